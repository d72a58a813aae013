// What both attention kernels share: softmax constants and the swizzled layout of K, V and Q tiles in shared memory.
#pragma once

#include "kernel.cuh"

constexpr float kLog2e = 1.4426950408889634f;

// Where a running maximum starts: finite, so that exp2(score - maximum) of a row with nothing to attend to is 0, not
// NaN.
constexpr float kLowest = -1e30f;

// TMA swizzles 64 columns of bf16 (128 bytes) at a time: a tile is head_dim / 64 panels of [rows][64].
constexpr int kPanelColumns = 64;
constexpr int kRowBytes = 2 * kPanelColumns;

// Byte of the 16-byte chunk `chunk` (8 columns) of row `row`, in a tile whose panels have `rows` rows.
DEVICE int swizzled(int rows, int row, int chunk) {
  return chunk / 8 * rows * kRowBytes + row * kRowBytes + (chunk % 8 ^ row % 8) * 16;
}

// The same in a tile of e4m3, whose rows are one panel of kHeadDim bytes, swizzled by their width; a chunk is 16 columns.
template <int kHeadDim>
DEVICE int swizzled_fp8(int row, int chunk) {
  return row * kHeadDim + (chunk ^ (kHeadDim == 128 ? row % 8 : row / 2 % 4)) * 16;
}

// What Q and the probabilities are beside fp8 pages: f16, which e4m3 becomes in one instruction for two numbers.
template <bool kFp8>
DEVICE uint32_t pack_pair(float low, float high) {
  return kFp8 ? pack_f16x2(low, high) : pack_bf16x2(low, high);
}

// Reductions over the four lanes that share a row of an accumulator.
DEVICE float quad_max(float x) {
  x = fmaxf(x, shfl_xor(x, 1));
  return fmaxf(x, shfl_xor(x, 2));
}
DEVICE float quad_sum(float x) {
  x += shfl_xor(x, 1);
  return x + shfl_xor(x, 2);
}

// A position in a ring of `kStages` tiles, and the parity of the barriers' phase there.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;
};
template <int kStages>
DEVICE void advance(RingPosition<kStages>& ring) {
  if (++ring.stage == kStages) {
    ring.stage = 0;
    ring.parity ^= 1;
  }
}
