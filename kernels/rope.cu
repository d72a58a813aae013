// rope_append: RMSNorm of each q and k head (optional), rotary position embedding, and the append of k and v to their
// pages.
//
// Pairing is half-rotate: element i turns with element i + head_dim / 2. Arithmetic is fp32 and the result is rounded
// once; the norm before it is rounded as rms_norm rounds. A row whose position is -1 is padding: its q becomes zeros
// and nothing is appended.
//
// Mapping: head_dim / 16 neighbouring threads share a head, 8 pairs each, so every access is 16 bytes and a warp covers
// 4 (d128) or 8 (d64) heads; they talk to each other only for the norm. Order of the threads: chunk of the head, head
// (q, k, v), row. Grid: ceil(rows * (q_heads + 2 kv_heads) * head_dim / 16 / ROPE_THREADS) blocks; no shared memory.
#include "kernel.cuh"

// Both halves' share of one thread: elements 8 chunk .. 8 chunk + 7 of the lower and of the upper half.
struct HalfPair {
  float low[8], high[8];
};

DEVICE void normalise(float (&x)[8], float scale, const uint16_t* weight) {
  float w[8];
  unpack8(load8(weight), w);
  UNROLL for (int i = 0; i < 8; i++) x[i] = round_bf16(round_bf16(x[i] * scale) * w[i]);
}

// `cos_sin`: [8][2].
DEVICE void rotate(HalfPair& x, const float* cos_sin) {
  UNROLL for (int i = 0; i < 8; i += 2) {
    uint32_t bits[4];
    load_16(cos_sin + 2 * i, bits);
    UNROLL for (int j = 0; j < 2; j++) {
      const float c = bits_to_float(bits[2 * j]), s = bits_to_float(bits[2 * j + 1]);
      const float low = x.low[i + j], high = x.high[i + j];
      x.low[i + j] = low * c - high * s;
      x.high[i + j] = high * c + low * s;
    }
  }
}

template <int kHeadDim>
DEVICE void rope_append(const RopeParams& p) {
  constexpr int kHalf = kHeadDim / 2;
  constexpr int kHeadThreads = kHalf / 8;
  pdl_launch_dependents();
  pdl_wait();

  const int heads = p.q_heads + 2 * p.kv_heads;
  const int items = p.rows * heads * kHeadThreads;
  const int index = block_x() * ROPE_THREADS + thread_idx();
  const int item = min_int(index, items - 1);  // the norm needs whole warps
  const int chunk = item % kHeadThreads;
  const int head = item / kHeadThreads % heads;
  const int row = item / kHeadThreads / heads;
  const bool is_q = head < p.q_heads;
  const bool is_v = head >= p.q_heads + p.kv_heads;
  const int position = p.row_position[row];

  HalfPair x;
  const uint16_t* in = p.qkv + ((size_t)row * heads + head) * kHeadDim + 8 * chunk;
  unpack8(load8(in), x.low);
  unpack8(load8(in + kHalf), x.high);

  if (p.q_norm != nullptr) {
    float square = 0.f;
    UNROLL for (int i = 0; i < 8; i++) square += x.low[i] * x.low[i] + x.high[i] * x.high[i];
    UNROLL for (int m = 1; m < kHeadThreads; m *= 2) square += shfl_xor(square, m);
    if (!is_v) {
      const float scale = rsqrt_approx(square * (1.f / kHeadDim) + p.norm_eps);
      const uint16_t* weight = (is_q ? p.q_norm : p.k_norm) + 8 * chunk;
      normalise(x.low, scale, weight);
      normalise(x.high, scale, weight + kHalf);
    }
  }
  if (index >= items) return;

  uint16_t* out;
  if (is_q) {
    out = p.q + ((size_t)row * p.q_heads + head) * kHeadDim;
    if (position < 0) UNROLL for (int i = 0; i < 8; i++) x.low[i] = x.high[i] = 0.f;
  } else {
    if (position < 0) return;
    const int page = p.block_table[(size_t)p.row_slot[row] * p.max_pages + position / PAGE_TOKENS];
    const int kv_head = head - p.q_heads - (is_v ? p.kv_heads : 0);
    out = (is_v ? p.v_pages : p.k_pages) +
          (((size_t)page * p.kv_heads + kv_head) * PAGE_TOKENS + position % PAGE_TOKENS) * kHeadDim;
  }
  if (!is_v && position >= 0) rotate(x, p.cos_sin + ((size_t)position * kHalf + 8 * chunk) * 2);
  store8(out + 8 * chunk, pack8(x.low));
  store8(out + kHalf + 8 * chunk, pack8(x.high));
}

KERNEL(rope_append_d64, RopeParams, ROPE_THREADS) { rope_append<64>(p); }
KERNEL(rope_append_d128, RopeParams, ROPE_THREADS) { rope_append<128>(p); }
