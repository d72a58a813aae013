// Where q, k and v of a token go, and how they are rotated: what rope_append and the decode product of q, k and v share.
//
// In the product's columns the two halves of each head of q and k are interleaved by blocks of 8 (the weights are loaded
// so): columns 16 j .. 16 j + 7 of a head are its elements 8 j .. 8 j + 7, and the next 8 those half a head further on,
// their partners in the rotation (half-rotate, arXiv 2104.09864). Heads of v are as they are.
#pragma once

#include "kernel.cuh"

// A head of a token on its way out: `out` [head_dim], null where there is nothing to be written.
struct RopeTarget {
  uint8_t* out;    // bf16; with fp8 pages f16 (q) or e4m3 (k and v)
  float quantise;  // 0: bf16; else what k and v are multiplied with
  int position;    // -1: padding, whose q is zeros
  bool rotates;    // q and k of a real token
  bool is_q, is_v;
};

// `head`: q heads first, then k, then v.
DEVICE RopeTarget rope_target(const Rope& p, int row, int head) {
  const int position = p.row_position[row];
  if (head < p.q_heads) {
    uint16_t* q = p.q + ((int64_t)row * p.q_heads + head) * p.head_dim;
    return {(uint8_t*)q, p.k_quantise, position, position >= 0, true, false};
  }
  if (position < 0) return {nullptr, 0.f, position, false, false, false};
  const bool is_v = head >= p.q_heads + p.kv_heads;
  const int page = p.block_table[(int64_t)p.row_slot[row] * p.max_pages + position / PAGE_TOKENS];
  const int kv_head = head - p.q_heads - (is_v ? p.kv_heads : 0);
  const int64_t offset = (((int64_t)page * p.kv_heads + kv_head) * PAGE_TOKENS + position % PAGE_TOKENS) * p.head_dim;
  const float quantise = is_v ? p.v_quantise : p.k_quantise;
  return {(is_v ? p.v_pages : p.k_pages) + (quantise ? offset : 2 * offset), quantise, position, !is_v, false, is_v};
}

// Rounded once, to what the target is made of.
DEVICE void store_element(const RopeTarget& to, int i, float x) {
  uint16_t* out = (uint16_t*)to.out;
  if (!to.quantise)
    out[i] = float_to_bf16(x);
  else if (to.is_q)
    out[i] = (uint16_t)pack_f16x2(x, 0.f);
  else
    to.out[i] = (uint8_t)pack_e4m3x2(x * to.quantise, 0.f);
}

DEVICE void store_eight(const RopeTarget& to, int i, const float (&x)[8]) {
  uint16_t* out = (uint16_t*)to.out;
  if (!to.quantise) {
    store8(out + i, pack8(x));
  } else if (to.is_q) {
    uint32_t v[4];
    UNROLL for (int j = 0; j < 4; j++) v[j] = pack_f16x2(x[2 * j], x[2 * j + 1]);
    store_16(out + i, v);
  } else {
    uint32_t v[2];
    UNROLL for (int j = 0; j < 2; j++) {
      const float* four = x + 4 * j;
      v[j] = pack_e4m3x2(four[0] * to.quantise, four[1] * to.quantise) |
             (uint32_t)pack_e4m3x2(four[2] * to.quantise, four[3] * to.quantise) << 16;
    }
    store_8(to.out + i, v);
  }
}

// The elements of a head in columns `column` and `column` + 8, where column % 16 < 8.
struct RopePair {
  int low, high;
};

DEVICE RopePair rope_pair(const RopeTarget& to, int head_dim, int column) {
  if (to.is_v) return {column, column + 8};
  const int low = column / 16 * 8 + column % 16;
  return {low, low + head_dim / 2};
}

// cos and sin for element `low`, and for those after it: [2] each.
DEVICE const float* rope_angles(const Rope& p, const RopeTarget& to, int low) {
  return p.cos_sin + ((int64_t)to.position * (p.head_dim / 2) + low) * 2;
}

DEVICE void rotate_pair(const float* angles, float& low, float& high) {
  const float c = angles[0], s = angles[1], x = low;
  low = x * c - high * s;
  high = high * c + x * s;
}
