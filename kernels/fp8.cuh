// Numbers in e4m3 that share a scale: x -> e4m3(x * (448 / most)), and back times most / 448, `most` being their largest magnitude.
// Activations share one by SCALE_GROUP neighbours in k of a token: each of 16 lanes has 8 of them.
#pragma once

#include "kernel.cuh"

constexpr float kMostE4m3 = 448.f;
constexpr int kGroupLanes = SCALE_GROUP / 8;

// 448 / most as division rounds it, without the call that division would be: beside wgmma one serialises everything. 0 for a
// group of nothing but zeros, or nearly.
DEVICE float quantise_factor(float most) {
  if (most < 1e-30f) return 0.f;
  const float reciprocal = reciprocal_approx(most), q = kMostE4m3 * reciprocal;
  return fmaf(fmaf(-q, most, kMostE4m3), reciprocal, q);
}

// What the e4m3 are to be multiplied with.
DEVICE float scale_of(float most) { return most < 1e-30f ? 0.f : most * (1.f / kMostE4m3); }

DEVICE float largest(const float (&v)[8]) {
  float most = 0.f;
  UNROLL for (int i = 0; i < 8; i++) most = fmaxf(most, fabsf(v[i]));
  return most;
}

// Over the 16 lanes of a group.
DEVICE float group_max(float x) {
  UNROLL for (int m = kGroupLanes / 2; m > 0; m /= 2) x = fmaxf(x, shfl_xor(x, m));
  return x;
}

// Eight in e4m3; `to` aligned to as many bytes. A NaN stays one.
DEVICE void store_e4m3(uint8_t* to, const float (&v)[8], float factor) {
  uint32_t words[2];
  UNROLL for (int i = 0; i < 2; i++) {
    words[i] = pack_e4m3x2(v[4 * i] * factor, v[4 * i + 1] * factor) |
               (uint32_t)pack_e4m3x2(v[4 * i + 2] * factor, v[4 * i + 3] * factor) << 16;
  }
  store_8(to, words);
}
