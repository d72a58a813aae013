// Where q, k and v of a token go, and how they are rotated: what rope_append and the decode product of q, k and v share.
//
// In the product's columns the two halves of each head of q and k are interleaved by blocks of 8 (the weights are loaded
// so): columns 16 j .. 16 j + 7 of a head are its elements 8 j .. 8 j + 7, and the next 8 those half a head further on,
// their partners in the rotation (half-rotate, arXiv 2104.09864). Heads of v are as they are.
#pragma once

#include "kernel.cuh"

// A head of a token on its way out: `out` [head_dim], null where there is nothing to be written.
struct RopeTarget {
  uint16_t* out;
  int position;  // -1: padding, whose q is zeros
  bool rotates;  // q and k of a real token
  bool is_v;
};

// `head`: q heads first, then k, then v.
DEVICE RopeTarget rope_target(const Rope& p, int row, int head) {
  const int position = p.row_position[row];
  if (head < p.q_heads) return {p.q + ((int64_t)row * p.q_heads + head) * p.head_dim, position, position >= 0, false};
  if (position < 0) return {nullptr, position, false, false};
  const bool is_v = head >= p.q_heads + p.kv_heads;
  const int page = p.block_table[(int64_t)p.row_slot[row] * p.max_pages + position / PAGE_TOKENS];
  const int kv_head = head - p.q_heads - (is_v ? p.kv_heads : 0);
  const int64_t offset = (((int64_t)page * p.kv_heads + kv_head) * PAGE_TOKENS + position % PAGE_TOKENS) * p.head_dim;
  return {(is_v ? p.v_pages : p.k_pages) + offset, position, !is_v, is_v};
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
