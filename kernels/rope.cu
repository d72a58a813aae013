// rope_append: RMSNorm of each q and k head (optional), rotary position embedding, and the append of k and v to their
// pages.
//
// Which columns are a pair: rope.cuh. Arithmetic is fp32 and the result is rounded
// once; the norm before it is rounded as rms_norm rounds. A row whose position is -1 is padding: its q becomes zeros
// and nothing is appended.
//
// Mapping: head_dim / 16 neighbouring threads share a head, 8 pairs each, so every access is 16 bytes (8 of e4m3) and a warp covers
// 4 (d128) or 8 (d64) heads; they talk to each other only for the norm. Order of the threads: chunk of the head, head
// (q, k, v), row. Grid: ceil(rows * (q_heads + 2 kv_heads) * head_dim / 16 / ROPE_THREADS) blocks; no shared memory.
#include "rope.cuh"

DEVICE void normalise(float (&x)[8], float scale, const uint16_t* weight) {
  float w[8];
  unpack8(load8(weight), w);
  UNROLL for (int i = 0; i < 8; i++) x[i] = round_bf16(round_bf16(x[i] * scale) * w[i]);
}

template <int kHeadDim>
DEVICE void rope_append(const RopeParams& p) {
  constexpr int kHeadThreads = kHeadDim / 16;
  pdl_wait();
  pdl_launch_dependents();  // not before: attn_decode reads ahead what launches before this one have written

  const int heads = p.rope.q_heads + 2 * p.rope.kv_heads;
  const int items = p.rows * heads * kHeadThreads;
  const int index = block_x() * ROPE_THREADS + thread_idx();
  const int item = min_int(index, items - 1);  // the norm needs whole warps
  const int column = item % kHeadThreads * 16;
  const int head = item / kHeadThreads % heads;
  const int row = item / kHeadThreads / heads;
  const RopeTarget to = rope_target(p.rope, row, head);
  const RopePair at = rope_pair(to, kHeadDim, column);

  float low[8], high[8];
  const uint16_t* in = p.qkv + ((int64_t)row * heads + head) * kHeadDim + column;
  unpack8(load8(in), low);
  unpack8(load8(in + 8), high);

  if (p.q_norm != nullptr) {
    float square = 0.f;
    UNROLL for (int i = 0; i < 8; i++) square += low[i] * low[i] + high[i] * high[i];
    UNROLL for (int m = 1; m < kHeadThreads; m *= 2) square += shfl_xor(square, m);
    if (to.rotates) {
      const float scale = rsqrt_approx(square * (1.f / kHeadDim) + p.norm_eps);
      const uint16_t* weight = head < p.rope.q_heads ? p.q_norm : p.k_norm;
      normalise(low, scale, weight + at.low);
      normalise(high, scale, weight + at.high);
    }
  }
  if (index >= items || !to.out) return;

  if (to.rotates) {
    const float* angles = rope_angles(p.rope, to, at.low);
    UNROLL for (int i = 0; i < 8; i += 2) {
      uint32_t bits[4];
      load_16(angles + 2 * i, bits);
      UNROLL for (int j = 0; j < 2; j++) {
        const float pair[2] = {bits_to_float(bits[2 * j]), bits_to_float(bits[2 * j + 1])};
        rotate_pair(pair, low[i + j], high[i + j]);
      }
    }
  }
  if (to.position < 0) UNROLL for (int i = 0; i < 8; i++) low[i] = high[i] = 0.f;
  store_eight(to, at.low, low);
  store_eight(to, at.high, high);
}

KERNEL(rope_append_d64, RopeParams, ROPE_THREADS) { rope_append<64>(p); }
KERNEL(rope_append_d128, RopeParams, ROPE_THREADS) { rope_append<128>(p); }
