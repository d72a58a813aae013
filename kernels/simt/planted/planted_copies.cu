// Planted bugs of mbarriers and asynchronous copies. With p.planted the bug, without it the corrected twin. Shared memory:
// 512 bytes of data, then mbarriers.
#include "../../kernel.cuh"
#include "planted.h"

DEVICE uint32_t* data() { return (uint32_t*)shared_memory(); }
DEVICE Barrier* barriers() { return (Barrier*)(shared_memory() + PLANTED_SHARED); }
DEVICE int neighbour() { return (thread_idx() + 1) % PLANTED_THREADS; }

// By all threads: barriers()[0] for one arrival, barriers()[1] for one of every thread.
DEVICE void init_barriers() {
  if (thread_idx() == 0) {
    mbarrier_init(&barriers()[0], 1);
    mbarrier_init(&barriers()[1], PLANTED_THREADS);
    mbarrier_init_fence();
  }
  sync_threads();
}

// By thread 0: in[PLANTED_THREADS] to data(), of which the barrier is told to expect so many bytes.
DEVICE void load(const uint32_t* in, int expected) {
  mbarrier_arrive_expect_tx(&barriers()[0], expected);
  bulk_load(data(), in, PLANTED_SHARED, &barriers()[0]);
}

// out[t] = in[t + 1], ordered by an mbarrier at which one thread never arrives.
KERNEL(lost_arrive, PlantedParams, PLANTED_THREADS) {
  init_barriers();
  data()[thread_idx()] = p.input[thread_idx()];
  if (!p.planted || thread_idx() != 77) mbarrier_arrive(&barriers()[1]);
  mbarrier_wait(&barriers()[1], 0);
  p.out[thread_idx()] = data()[neighbour()];
}

// out[t] = in[t + 1] through a bulk load, for which nobody waits.
KERNEL(missing_mbarrier_wait, PlantedParams, PLANTED_THREADS) {
  init_barriers();
  if (thread_idx() == 0) load(p.input, PLANTED_SHARED);
  if (!p.planted) mbarrier_wait(&barriers()[0], 0);
  p.out[thread_idx()] = data()[neighbour()];
}

// Four tiles through a ring of one stage: out[i][t] = in[i][t]. The stage is released before it is read.
KERNEL(early_release, PlantedParams, PLANTED_THREADS) {
  init_barriers();
  for (int i = 0; i < 4; i++) {
    if (thread_idx() == 0) {
      if (i > 0) mbarrier_wait(&barriers()[1], (i - 1) & 1);
      load(p.input + i * PLANTED_THREADS, PLANTED_SHARED);
    }
    mbarrier_wait(&barriers()[0], i & 1);
    if (p.planted) mbarrier_arrive(&barriers()[1]);
    p.out[i * PLANTED_THREADS + thread_idx()] = data()[thread_idx()];
    if (!p.planted) mbarrier_arrive(&barriers()[1]);
  }
}

// The load brings 16 bytes more than the barrier was told.
KERNEL(transaction_underflow, PlantedParams, PLANTED_THREADS) {
  init_barriers();
  if (thread_idx() == 0) load(p.input, PLANTED_SHARED - 16 * p.planted);
  mbarrier_wait(&barriers()[0], 0);
  p.out[thread_idx()] = data()[neighbour()];
}

// The load brings 16 bytes less than the barrier was told.
KERNEL(transaction_overflow, PlantedParams, PLANTED_THREADS) {
  init_barriers();
  if (thread_idx() == 0) load(p.input, PLANTED_SHARED + 16 * p.planted);
  mbarrier_wait(&barriers()[0], 0);
  p.out[thread_idx()] = data()[neighbour()];
}

// out[t] = in[t] by a bulk store of words that ordinary stores wrote.
KERNEL(missing_proxy_fence, PlantedParams, PLANTED_THREADS) {
  data()[thread_idx()] = p.input[thread_idx()];
  if (!p.planted) fence_proxy_async();
  sync_threads();
  if (thread_idx() == 0) {
    bulk_store(p.out, data(), PLANTED_SHARED);
    bulk_commit();
    bulk_wait<0>();
  }
}

// The same, but the first word changes while the store may still read it.
KERNEL(overwritten_store_source, PlantedParams, PLANTED_THREADS) {
  data()[thread_idx()] = p.input[thread_idx()];
  fence_proxy_async();
  sync_threads();
  if (thread_idx() == 0) {
    bulk_store(p.out, data(), PLANTED_SHARED);
    bulk_commit();
    if (!p.planted) bulk_wait_read<0>();
    data()[0] = p.input[0] + 1;
    bulk_wait<0>();
  }
}

// out[t] = in[t + 1] through cp.async, for which nobody waits.
KERNEL(missing_cp_async_wait, PlantedParams, PLANTED_THREADS) {
  if (thread_idx() < PLANTED_THREADS / 4) cp_async_16(data() + 4 * thread_idx(), p.input + 4 * thread_idx());
  cp_async_commit();
  if (!p.planted) cp_async_wait<0>();
  sync_threads();
  p.out[thread_idx()] = data()[neighbour()];
}

// out[t] = in[t], beside a cp.async that nobody waits for, nor reads.
KERNEL(cp_async_at_exit, PlantedParams, PLANTED_THREADS) {
  if (thread_idx() < PLANTED_THREADS / 4) cp_async_16(data() + 4 * thread_idx(), p.input);
  cp_async_commit();
  p.out[thread_idx()] = p.input[thread_idx()];
  if (!p.planted) cp_async_wait<0>();
}

// Every warp waits for something else that never comes. Without the bug nobody waits: out[t] = in[t].
KERNEL(everybody_waits, PlantedParams, PLANTED_THREADS) {
  init_barriers();
  if (p.planted) {
    if (warp_id() == 0) mbarrier_wait(&barriers()[1], 0);
    if (warp_id() == 1) named_barrier_sync(3, 64);
    if (warp_id() == 2 && lane_id() < 20) sync_warp();
    if (warp_id() >= 2) cluster_sync();
  }
  p.out[thread_idx()] = p.input[thread_idx()];
}
