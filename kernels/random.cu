// random_normal: a buffer of random bf16, for dummy weights and benches. Element i is the sum of the four bytes of word i of a
// Philox stream, centred and scaled: nearly normal (kurtosis 2.7, nothing beyond 3.5 deviations), and made of whole numbers and
// one product, so that every target makes the same bits.
//
// Grid: any number of blocks, which stride over vectors of 8; the last vector may be cut. It is bound by arithmetic, about
// 27 instructions an element, which is far faster than any file.
#include "philox.cuh"

constexpr float kSumDeviation = 147.80054f;  // of the sum of four uniform bytes: sqrt(4 (256^2 - 1) / 12)

DEVICE float centred_sum(uint32_t word) {
  return (float)((int)((word & 255) + (word >> 8 & 255) + (word >> 16 & 255) + (word >> 24)) - 510);
}

KERNEL(random_normal, RandomParams, RANDOM_THREADS) {
  pdl_launch_dependents();
  pdl_wait();
  const float scale = p.deviation * (1.f / kSumDeviation);
  const uint64_t vectors = (p.count + 7) / 8;
  for (uint64_t v = (uint64_t)block_x() * RANDOM_THREADS + thread_idx(); v < vectors;
       v += (uint64_t)grid_x() * RANDOM_THREADS) {
    float x[8];
    UNROLL for (int half = 0; half < 2; half++) {
      uint32_t c[4] = {(uint32_t)v, (uint32_t)(v >> 32), (uint32_t)half, 0};
      philox(c, p.seed_low, p.seed_high);
      UNROLL for (int i = 0; i < 4; i++) x[4 * half + i] = centred_sum(c[i]) * scale;
    }
    uint16_t* out = p.out + 8 * v;
    if (8 * v + 8 <= p.count) {
      store8(out, pack8(x));
    } else {
      UNROLL for (int i = 0; i < 7; i++) if (8 * v + i < p.count) out[i] = float_to_bf16(x[i]);
    }
  }
}
