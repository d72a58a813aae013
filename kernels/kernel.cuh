// The vocabulary of every kernel: how a kernel is declared, bf16 vectors, and reductions.
//
// A kernel is written once. `KERNEL(name, Params, THREADS) { ... p.x ... }` is, for nvcc, an extern "C" __global__ function
// taking its parameters by value; for the C++ compiler, a function that every SIMT thread of kernels/simt runs.
#pragma once

#include "params.h"

#ifdef __CUDACC__
#define DEVICE static __device__ __forceinline__
#define KERNEL(name, Params, THREADS) \
  extern "C" __global__ void __launch_bounds__(THREADS, 1) name(const __grid_constant__ Params p)
#define UNROLL _Pragma("unroll")
#else
#define DEVICE static inline
#ifdef SIMT_CHECKED
#define SIMT_SYMBOL(name) checked_##name
#else
#define SIMT_SYMBOL(name) host_##name
#endif
#define KERNEL(name, Params, THREADS)                                             \
  static void name##_body(const Params& p);                                       \
  extern "C" void SIMT_SYMBOL(name)(const Params* p) { name##_body(*p); }         \
  static_assert((THREADS) % 32 == 0 && (THREADS) <= 1024, "whole warps, please"); \
  static void name##_body(const Params& p)
#define UNROLL
#endif

#include "sm90.cuh"

constexpr int kWarp = 32;

DEVICE int lane_id() { return thread_idx() % kWarp; }
DEVICE int warp_id() { return thread_idx() / kWarp; }

DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }
DEVICE int min_int(int a, int b) { return a < b ? a : b; }
DEVICE int max_int(int a, int b) { return a > b ? a : b; }

// ---- slots ----

// Whether the slot's next draw needs a mask of its own: that of a guided answer, not that of thinking.
DEVICE bool slot_is_guided(const SlotState& slot) {
  const uint32_t phase = slot.budget.phase;
  return (slot.flags & SLOT_GUIDED) && phase != PHASE_THINKING && phase != PHASE_INJECTING;
}

// Whether its rows are more than padding: it is active and not paused.
DEVICE bool slot_runs(const SlotState& slot) {
  return (slot.flags & SLOT_ACTIVE) && (!slot_is_guided(slot) || slot.mask_for == slot.generated);
}

// ---- bf16 ----

// bf16 -> float is a shift: bf16 is the upper half of a float.
DEVICE float bf16_to_float(uint16_t x) { return bits_to_float((uint32_t)x << 16); }
DEVICE float bf16_low(uint32_t pair) { return bits_to_float(pair << 16); }
DEVICE float bf16_high(uint32_t pair) { return bits_to_float(pair & 0xffff0000u); }

// Eight bf16 in one 16-byte vector, the unit of every global access.
struct Bf16x8 {
  uint32_t pair[4];
};

DEVICE void unpack8(const Bf16x8& v, float (&out)[8]) {
  UNROLL for (int i = 0; i < 4; i++) {
    out[2 * i] = bf16_low(v.pair[i]);
    out[2 * i + 1] = bf16_high(v.pair[i]);
  }
}

DEVICE Bf16x8 pack8(const float (&in)[8]) {
  Bf16x8 v;
  UNROLL for (int i = 0; i < 4; i++) v.pair[i] = pack_bf16x2(in[2 * i], in[2 * i + 1]);
  return v;
}

DEVICE Bf16x8 load8(const uint16_t* p) {
  Bf16x8 v;
  load_16(p, v.pair);
  return v;
}

DEVICE void store8(uint16_t* p, const Bf16x8& v) { store_16(p, v.pair); }

// The nearest bf16, as a float: where the reference implementation rounds.
DEVICE float round_bf16(float x) { return bf16_to_float(float_to_bf16(x)); }

// ---- reductions: fixed trees, so the same inputs give the same bits ----

DEVICE float warp_sum(float x) {
  UNROLL for (int m = kWarp / 2; m > 0; m /= 2) x += shfl_xor(x, m);
  return x;
}

DEVICE float warp_max(float x) {
  UNROLL for (int m = kWarp / 2; m > 0; m /= 2) x = fmaxf(x, shfl_xor(x, m));
  return x;
}

// Sum over a block of `warps` warps; every thread gets it. `scratch`: shared memory, [32] floats, free again after the
// next sync_threads().
DEVICE float block_sum(float x, float* scratch, int warps) {
  x = warp_sum(x);
  if (lane_id() == 0) scratch[warp_id()] = x;
  sync_threads();
  float sum = 0.f;
  for (int w = 0; w < warps; w++) sum += scratch[w];
  return sum;
}

// By one thread of block `block` of `blocks`. The block's part begins on a line of L2.
DEVICE void prefetch_share(const Prefetch& prefetch, int block, int blocks) {
  if (!prefetch.weights) return;
  const uint64_t from = prefetch.bytes / blocks * block / 128 * 128, left = prefetch.bytes - from;
  bulk_prefetch(prefetch.weights + from, (uint32_t)(left < prefetch.share ? left / 16 * 16 : prefetch.share));
}
