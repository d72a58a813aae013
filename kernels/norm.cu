// rms_norm: RMS normalisation of rows of up to 8192 (a multiple of 8). Decode normalises in its products (gemv.cu); where it is not
// to (ponder study ablation), rms_norm_summed takes the sums of squares that they would have taken, in their order: no bit differs.
//
// Grid: one block per row. Each thread keeps its vectors of 8 in registers between the two passes, so that a row is read
// from memory once; the weight, which no kernel writes, is loaded before waiting for the previous kernel.
#include "kernel.cuh"

namespace {

constexpr int kMaxHidden = 8192;
constexpr int kVectors = kMaxHidden / (8 * NORM_THREADS);  // per thread

// Offset in the row of a thread's vector i.
DEVICE int offset_of(int i) { return (i * NORM_THREADS + thread_idx()) * 8; }

// Of row `row`, from those of 64 neighbours; by each warp for itself.
DEVICE float sum_of_parts(const NormParams& p, int row) {
  const int parts = p.hidden / 64;
  float sum = 0.f;
  for (int part = lane_id(); part < parts; part += kWarp) sum += p.squares[row * parts + part];
  return warp_sum(sum);
}

template <bool kSummed>
DEVICE void rms_norm(const NormParams& p) {
  pdl_launch_dependents();
  const int row = block_x();
  Bf16x8 weight[kVectors];
  UNROLL for (int i = 0; i < kVectors; i++) if (offset_of(i) < p.hidden) weight[i] = load8(p.weight + offset_of(i));
  pdl_wait();

  const uint16_t* x = p.x + (int64_t)(p.row_index ? p.row_index[row] : row) * p.hidden;
  Bf16x8 h[kVectors];
  float squares = 0.f;
  UNROLL for (int i = 0; i < kVectors; i++) {
    if (offset_of(i) >= p.hidden) break;
    h[i] = load8(x + offset_of(i));
    float v[8];
    unpack8(h[i], v);
    UNROLL for (int j = 0; j < 8; j++) squares += v[j] * v[j];
  }

  const float sum = kSummed ? sum_of_parts(p, row) : block_sum(squares, (float*)shared_memory(), NORM_THREADS / kWarp);
  const float scale = rsqrt_approx(sum / p.hidden + p.eps);
  UNROLL for (int i = 0; i < kVectors; i++) {
    if (offset_of(i) >= p.hidden) break;
    float v[8], w[8];
    unpack8(h[i], v);
    unpack8(weight[i], w);
    UNROLL for (int j = 0; j < 8; j++) v[j] = round_bf16(v[j] * scale) * w[j];
    store8(p.out + (int64_t)row * p.hidden + offset_of(i), pack8(v));
  }
}

}  // namespace

KERNEL(rms_norm, NormParams, NORM_THREADS) { rms_norm<false>(p); }
KERNEL(rms_norm_summed, NormParams, NORM_THREADS) { rms_norm<true>(p); }
