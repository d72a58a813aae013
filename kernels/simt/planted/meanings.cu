// What the instructions mean: each kernel moves data through one of them and nothing else, for tests/simt.rs to compare with
// plain Rust.
#include "../../kernel.cuh"
#include "planted.h"

DEVICE uint32_t* words() { return (uint32_t*)shared_memory(); }
DEVICE Barrier* barrier() { return (Barrier*)(shared_memory() + MEANING_BARRIER); }

DEVICE void init_barrier() {
  if (thread_idx() == 0) {
    mbarrier_init(barrier(), 1);
    mbarrier_init_fence();
  }
  sync_threads();
}

// The bytes of shared memory to out.
DEVICE void copy_out(const PlantedParams& p) {
  for (int i = thread_idx(); i < p.bytes / 4; i += PLANTED_THREADS) p.out[i] = words()[i];
}

// One box of p.map, of rank p.mode at p.coordinates, as it lies in shared memory: p.bytes.
KERNEL(load_box, PlantedParams, PLANTED_THREADS) {
  init_barrier();
  if (thread_idx() == 0) {
    const int* c = p.coordinates;
    mbarrier_arrive_expect_tx(barrier(), p.bytes);
    if (p.mode == 1) tma_load(words(), &p.map, barrier(), kEvictNormal, c[0]);
    if (p.mode == 2) tma_load(words(), &p.map, barrier(), kEvictNormal, c[0], c[1]);
    if (p.mode == 3) tma_load(words(), &p.map, barrier(), kEvictNormal, c[0], c[1], c[2]);
    if (p.mode == 4) tma_load(words(), &p.map, barrier(), kEvictNormal, c[0], c[1], c[2], c[3]);
  }
  mbarrier_wait(barrier(), 0);
  copy_out(p);
}

// The reverse: p.bytes of input as they are to lie in shared memory, stored as one box.
KERNEL(store_box, PlantedParams, PLANTED_THREADS) {
  for (int i = thread_idx(); i < p.bytes / 4; i += PLANTED_THREADS) words()[i] = p.input[i];
  fence_proxy_async();
  sync_threads();
  if (thread_idx() == 0) {
    const int* c = p.coordinates;
    if (p.mode == 1) tma_store(&p.map, words(), c[0]);
    if (p.mode == 2) tma_store(&p.map, words(), c[0], c[1]);
    if (p.mode == 3) tma_store(&p.map, words(), c[0], c[1], c[2]);
    if (p.mode == 4) tma_store(&p.map, words(), c[0], c[1], c[2], c[3]);
    bulk_commit();
    bulk_wait<0>();
  }
}

// By warp 0: four 8x8 matrices of 16-bit values. mode 0, 1: input [4][8][8] to out [32][4] registers by ldmatrix, plain and
// transposed; mode 2, 3: input [32][4] registers to out [4][8][8] by stmatrix.
KERNEL(matrix_fragments, PlantedParams, PLANTED_THREADS) {
  if (warp_id() != 0) return;
  const int lane = lane_id();
  uint32_t r[4];
  load_16(p.input + 4 * lane, r);
  uint32_t* row = words() + 4 * lane;
  if (p.mode < 2) {
    store_16(row, r);
    sync_warp();
    if (p.mode == 0)
      ldmatrix_x4(r, row);
    else
      ldmatrix_x4_trans(r, row);
  } else {
    if (p.mode == 2)
      stmatrix_x4(row, r);
    else
      stmatrix_x4_trans(row, r);
    sync_warp();
    load_16(row, r);
  }
  store_16(p.out + 4 * lane, r);
}

// By warp 0: registers as they are. input: [32] of a[4], b[2], d[4]; out: [32] of d[4].
KERNEL(mma_fragments, PlantedParams, PLANTED_THREADS) {
  if (warp_id() != 0) return;
  const uint32_t* in = p.input + 10 * lane_id();
  uint32_t a[4];
  float d[4];
  for (int i = 0; i < 4; i++) a[i] = in[i], d[i] = bits_to_float(in[6 + i]);
  mma_m16n8k16(d, a, in[4], in[5]);
  for (int i = 0; i < 4; i++) p.out[4 * lane_id() + i] = float_to_bits(d[i]);
}

// out [128][kN / 2]: the registers of d = 1 + a b, a 64 x 64, b 64 x kN, both brought by p.map and p.other_map with 128-byte
// swizzle. mode & 1: a from registers, input [128][4][4]. mode & 2: a is stored as [k][m]; mode & 4: b is stored as [k][n],
// in panels of 64 columns.
template <int kN, int kMajorMNofA, int kMajorMNofB>
DEVICE void wgmma_product(const PlantedParams& p) {
  uint8_t* a = shared_memory();
  uint8_t* b = a + 8192;
  init_barrier();
  if (thread_idx() == 0) {
    mbarrier_arrive_expect_tx(barrier(), 8192 + kN * 128);
    tma_load(a, &p.map, barrier(), kEvictNormal, 0, 0);
    if (kMajorMNofB)
      for (int panel = 0; panel < kN / 64; panel++)
        tma_load(b + panel * 8192, &p.other_map, barrier(), kEvictNormal, 64 * panel, 0);
    else
      tma_load(b, &p.other_map, barrier(), kEvictNormal, 0, 0);
  }
  mbarrier_wait(barrier(), 0);
  float d[kN / 2];
  for (int i = 0; i < kN / 2; i++) d[i] = 1.f;
  uint32_t registers[4][4];
  for (int k = 0; k < 4; k++)
    if (p.mode & 1) load_16(p.input + (thread_idx() * 4 + k) * 4, registers[k]);
  const uint64_t a_tile = wgmma_descriptor(a, kMajorMNofA ? 8192 : 16, 1024, kSwizzle128);
  const uint64_t b_tile = wgmma_descriptor(b, kMajorMNofB ? 8192 : 16, 1024, kSwizzle128);
  wgmma_fence();
  for (int k = 0; k < 4; k++) {
    const uint64_t b_part = b_tile + k * ((kMajorMNofB ? 2048 : 32) >> 4);
    if (p.mode & 1)
      wgmma_rs<kN, kMajorMNofB>(d, registers[k], b_part, true);
    else
      wgmma_ss<kN, kMajorMNofA, kMajorMNofB>(d, a_tile + k * ((kMajorMNofA ? 2048 : 32) >> 4), b_part, true);
  }
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < kN / 2; i++) p.out[thread_idx() * (kN / 2) + i] = float_to_bits(d[i]);
}

template <int kN>
DEVICE void wgmma_k_major(const PlantedParams& p) {
  if (p.mode & 2)
    wgmma_product<kN, 1, 0>(p);
  else
    wgmma_product<kN, 0, 0>(p);
}

template <int kN>
DEVICE void wgmma_any(const PlantedParams& p) {
  if (!(p.mode & 4))
    wgmma_k_major<kN>(p);
  else if (p.mode & 2)
    wgmma_product<kN, 1, 1>(p);
  else
    wgmma_product<kN, 0, 1>(p);
}

KERNEL(wgmma_n8, PlantedParams, PLANTED_THREADS) { wgmma_k_major<8>(p); }
KERNEL(wgmma_n64, PlantedParams, PLANTED_THREADS) { wgmma_any<64>(p); }
KERNEL(wgmma_n96, PlantedParams, PLANTED_THREADS) { wgmma_k_major<96>(p); }
KERNEL(wgmma_n256, PlantedParams, PLANTED_THREADS) { wgmma_any<256>(p); }

// out [128][8]: the registers of d = a b, a 64 x 128, b 128 x 16 in e4m3, both brought in pairs by p.map and p.other_map.
KERNEL(wgmma_e4m3, PlantedParams, PLANTED_THREADS) {
  uint8_t* a = shared_memory();
  uint8_t* b = a + 8192;
  init_barrier();
  if (thread_idx() == 0) {
    mbarrier_arrive_expect_tx(barrier(), 8192 + 2048);
    tma_load(a, &p.map, barrier(), kEvictNormal, 0, 0);
    tma_load(b, &p.other_map, barrier(), kEvictNormal, 0, 0);
  }
  mbarrier_wait(barrier(), 0);
  float d[8];
  const uint64_t a_tile = wgmma_descriptor(a, 16, 1024, kSwizzle128),
                 b_tile = wgmma_descriptor(b, 16, 1024, kSwizzle128);
  wgmma_fence();
  for (int k = 0; k < 4; k++) wgmma_ss_e4m3<16>(d, a_tile + 2 * k, b_tile + 2 * k, k > 0);
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < 8; i++) p.out[thread_idx() * 8 + i] = float_to_bits(d[i]);
}

// A cluster whose rank 0 multicasts 512 bytes of p.map to all; every block adds its rank and writes the words into the next
// block's shared memory, and stores what it got: out [rank][T].
KERNEL(cluster_exchange, PlantedParams, PLANTED_THREADS) {
  init_barrier();
  cluster_sync();
  const uint32_t rank = cluster_rank(), blocks = cluster_size();
  if (thread_idx() == 0) mbarrier_arrive_expect_tx(barrier(), PLANTED_SHARED);
  cluster_sync();
  if (rank == 0 && thread_idx() == 0) tma_load_multicast(words(), &p.map, barrier(), (1 << blocks) - 1, 0, 0);
  mbarrier_wait_cluster(barrier(), 0);
  const uint32_t x = words()[thread_idx()] + rank;
  cluster_sync();
  cluster_map(words(), (rank + 1) % blocks)[thread_idx()] = x;
  cluster_arrive();
  sync_threads();
  cluster_wait();
  p.out[rank * PLANTED_THREADS + thread_idx()] = words()[thread_idx()];
}

// Every block of a cluster arrives, from one thread, at the mbarrier of rank 0, which then stores the number of arrivals.
KERNEL(cluster_arrivals, PlantedParams, PLANTED_THREADS) {
  if (cluster_rank() == 0 && thread_idx() == 0) {
    mbarrier_init(barrier(), cluster_size());
    mbarrier_init_fence();
  }
  cluster_sync();
  if (thread_idx() == 0) {
    cluster_map(words(), 0)[cluster_rank()] = p.input[block_x()];
    mbarrier_arrive_cluster(barrier(), 0);
  }
  if (cluster_rank() != 0) return;
  mbarrier_wait_cluster(barrier(), 0);
  if (thread_idx() < (int)cluster_size()) p.out[thread_idx()] = words()[thread_idx()];
}

// 512 bytes through cp.async, of each 16 only the first p.bytes; mode 0: waited for as groups, the younger one later; mode 1: by
// an mbarrier.
KERNEL(cp_async_copy, PlantedParams, PLANTED_THREADS) {
  const int t = thread_idx();
  if (t == 0) {
    mbarrier_init(barrier(), PLANTED_THREADS);
    mbarrier_init_fence();
  }
  sync_threads();
  for (int half = 0; half < 2; half++) {
    if (t / 16 == half) cp_async_16(words() + 4 * t, p.input + 4 * t, p.bytes);
    cp_async_commit();
  }
  if (p.mode == 1) {
    cp_async_arrive(barrier());
    mbarrier_wait(barrier(), 0);
    p.out[t] = words()[t];
    return;
  }
  cp_async_wait<1>();
  sync_threads();
  if (t < 64) p.out[t] = words()[t];
  cp_async_wait<0>();
  sync_threads();
  if (t >= 64) p.out[t] = words()[t];
}

// 512 bytes by a bulk load and, from a second buffer, a bulk store of their complements; mode 1: the wait for the load spins
// on try_wait.
KERNEL(bulk_copy, PlantedParams, PLANTED_THREADS) {
  init_barrier();
  if (thread_idx() == 0) {
    mbarrier_expect_tx(barrier(), PLANTED_SHARED);
    bulk_load(words(), p.input, PLANTED_SHARED, barrier());
    mbarrier_arrive(barrier());
  }
  if (p.mode == 1)
    while (!mbarrier_try_wait(barrier(), 0)) {
    }
  else
    mbarrier_wait(barrier(), 0);
  words()[PLANTED_THREADS + thread_idx()] = ~words()[thread_idx()];
  fence_proxy_async();
  sync_threads();
  if (thread_idx() == 0) {
    bulk_store(p.out, words() + PLANTED_THREADS, PLANTED_SHARED);
    bulk_commit();
    bulk_wait<0>();
  }
}

// Four rounds of 64 words from the upper half of the block to the lower one, by named barriers 1 (full) and 2 (empty):
// out[round][64] = the round's words, neighbours exchanged.
KERNEL(named_barriers, PlantedParams, PLANTED_THREADS) {
  const int t = thread_idx() % 64;
  for (int round = 0; round < 4; round++) {
    if (thread_idx() >= 64) {
      if (round > 0) named_barrier_sync(2, PLANTED_THREADS);
      words()[t] = p.input[round * 64 + t];
      named_barrier_arrive(1, PLANTED_THREADS);
    } else {
      named_barrier_sync(1, PLANTED_THREADS);
      p.out[round * 64 + t] = words()[t ^ 1];
      if (round < 3) named_barrier_arrive(2, PLANTED_THREADS);
    }
  }
}

// What every thread gets of each exchange within its warp: out [T][8].
KERNEL(collectives, PlantedParams, PLANTED_THREADS) {
  const uint32_t x = p.input[thread_idx()];
  uint32_t* out = p.out + 8 * thread_idx();
  out[0] = shfl_xor(x, 5);
  out[1] = shfl(x, x % 32);
  out[2] = shfl_up(x, 3);
  out[3] = warp_ballot(x & 1);
  out[4] = warp_any(x % 64 == 0);
  out[5] = warp_all(x % 64 != 0);
  out[6] = float_to_bits(warp_sum((float)(x % 1024)));
  out[7] = popcount(warp_ballot(elect_one()));
}

// Every block adds to a counter and waits for all others, three times over; out [block] = the sum of input over the blocks.
KERNEL(grid_barrier, PlantedParams, PLANTED_THREADS) {
  if (thread_idx() != 0) return;
  for (int round = 1; round <= 3; round++) {
    atomic_ticket(p.counter, ~0u);
    while (load_acquire(p.counter) < (uint32_t)(round * grid_x())) {
    }
    if (round == 1) p.out[grid_x() + block_x()] = p.input[block_x()];
    if (round == 2) {
      uint32_t sum = 0;
      for (int i = 0; i < grid_x(); i++) sum += p.out[grid_x() + i];
      p.out[block_x()] = sum;
    }
  }
}

// p.mode times a barrier of the whole block, and nothing else: what the machine itself costs.
KERNEL(barriers_alone, PlantedParams, PLANTED_THREADS) {
  for (int i = 0; i < p.mode; i++) sync_threads();
}
