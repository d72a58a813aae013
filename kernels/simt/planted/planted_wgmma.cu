// Planted bugs of wgmma. With p.planted the bug, without it the corrected twin. All compute out [64][64] (floats) = a b^T
// with a [64][64] and b [64][64] bf16; p.map and p.other_map are a and b with boxes of 64 x 64 and 128-byte swizzle, p.input is
// a. Shared memory: a, b (8192 bytes each), then mbarriers.
#include "../../kernel.cuh"
#include "planted.h"

constexpr int kTile = 64;
constexpr int kTileBytes = kTile * kTile * 2;

DEVICE uint8_t* tile_a() { return shared_memory(); }
DEVICE uint8_t* tile_b() { return shared_memory() + kTileBytes; }
DEVICE Barrier* barriers() { return (Barrier*)(shared_memory() + 2 * kTileBytes); }

// barriers()[0]: a stage is full (one arrival); barriers()[1]: it is empty (one of every thread).
DEVICE void init_barriers() {
  if (thread_idx() == 0) {
    mbarrier_init(&barriers()[0], 1);
    mbarrier_init(&barriers()[1], PLANTED_THREADS);
    mbarrier_init_fence();
  }
  sync_threads();
}

DEVICE void load_tiles(const PlantedParams& p) {
  if (thread_idx() == 0) {
    mbarrier_arrive_expect_tx(&barriers()[0], 2 * kTileBytes);
    tma_load(tile_a(), &p.map, &barriers()[0], kEvictNormal, 0, 0);
    tma_load(tile_b(), &p.other_map, &barriers()[0], kEvictNormal, 0, 0);
  }
}

DEVICE uint64_t descriptor(const uint8_t* tile, int stride = 1024, Swizzle swizzle = kSwizzle128) {
  return wgmma_descriptor(tile, 16, stride, swizzle);
}

// Issues and commits d (+)= a b^T, 16 of k at a time.
DEVICE void multiply(float (&d)[kTile / 2], uint64_t a, uint64_t b, bool accumulate) {
  wgmma_fence();
  for (int k = 0; k < kTile / 16; k++) wgmma_ss<kTile>(d, a + k * (32 >> 4), b + k * (32 >> 4), accumulate || k > 0);
  wgmma_commit();
}

DEVICE void store(float* out, const float (&d)[kTile / 2]) {
  const int row = warp_id() * 16 + lane_id() / 4, column = 2 * (lane_id() % 4);
  UNROLL for (int i = 0; i < kTile / 2; i++) out[(row + 8 * (i / 2 % 2)) * kTile + 8 * (i / 4) + column + i % 2] = d[i];
}

// Accumulators are stored before they are there.
KERNEL(missing_wgmma_wait, PlantedParams, PLANTED_THREADS) {
  init_barriers();
  load_tiles(p);
  mbarrier_wait(&barriers()[0], 0);
  float d[kTile / 2];
  multiply(d, descriptor(tile_a()), descriptor(tile_b()), false);
  if (!p.planted) wgmma_wait<0>();
  store((float*)p.out, d);
  if (p.planted) wgmma_wait<0>();
}

// A from registers, where the next step's fragments replace those of a wgmma in flight.
KERNEL(overwritten_a_registers, PlantedParams, PLANTED_THREADS) {
  init_barriers();
  load_tiles(p);
  mbarrier_wait(&barriers()[0], 0);
  float d[kTile / 2];
  uint32_t a[4];
  const uint32_t* row = p.input + (warp_id() * 16 + lane_id() / 4) * (kTile / 2) + lane_id() % 4;
  for (int k = 0; k < kTile / 16; k++) {
    for (int i = 0; i < 4; i++) a[i] = row[8 * (i % 2) * (kTile / 2) + 8 * k + 4 * (i / 2)];
    wgmma_fence();
    wgmma_rs<kTile>(d, a, descriptor(tile_b()) + k * (32 >> 4), k > 0);
    wgmma_commit();
    if (!p.planted) wgmma_wait<0>();
  }
  wgmma_wait<0>();
  store((float*)p.out, d);
}

// The descriptor knows nothing of the tensor copy's swizzle.
KERNEL(wrong_swizzle, PlantedParams, PLANTED_THREADS) {
  init_barriers();
  load_tiles(p);
  mbarrier_wait(&barriers()[0], 0);
  float d[kTile / 2];
  multiply(d, descriptor(tile_a()), descriptor(tile_b(), 1024, p.planted ? kSwizzleNone : kSwizzle128), false);
  wgmma_wait<0>();
  store((float*)p.out, d);
}

// The descriptor takes groups of 8 rows to lie 512 bytes apart.
KERNEL(wrong_stride, PlantedParams, PLANTED_THREADS) {
  init_barriers();
  load_tiles(p);
  mbarrier_wait(&barriers()[0], 0);
  float d[kTile / 2];
  multiply(d, descriptor(tile_a(), p.planted ? 512 : 1024), descriptor(tile_b()), false);
  wgmma_wait<0>();
  store((float*)p.out, d);
}

// A is written by ordinary stores, which the async proxy sees only after a fence.
KERNEL(unfenced_operand, PlantedParams, PLANTED_THREADS) {
  init_barriers();
  load_tiles(p);
  mbarrier_wait(&barriers()[0], 0);
  for (int i = thread_idx(); i < kTile * kTile / 8; i += PLANTED_THREADS) {
    const int row = i / 8, chunk = i % 8 ^ row % 8;
    uint32_t v[4];
    load_16(p.input + i * 4, v);
    store_16(tile_a() + row * 128 + chunk * 16, v);
  }
  if (!p.planted) fence_proxy_async();
  sync_threads();
  float d[kTile / 2];
  multiply(d, descriptor(tile_a()), descriptor(tile_b()), false);
  wgmma_wait<0>();
  store((float*)p.out, d);
}

// Twice through a ring of one stage, so that out is 2 a b^T. The stage is released while wgmma may still read it.
KERNEL(release_before_wgmma_wait, PlantedParams, PLANTED_THREADS) {
  init_barriers();
  float d[kTile / 2];
  for (int i = 0; i < 2; i++) {
    if (i > 0 && thread_idx() == 0) mbarrier_wait(&barriers()[1], 0);
    load_tiles(p);
    mbarrier_wait(&barriers()[0], i);
    multiply(d, descriptor(tile_a()), descriptor(tile_b()), i > 0);
    if (p.planted) mbarrier_arrive(&barriers()[1]);
    wgmma_wait<0>();
    if (!p.planted) mbarrier_arrive(&barriers()[1]);
  }
  store((float*)p.out, d);
}
