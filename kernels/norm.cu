// rms_norm: RMS normalisation of rows of up to 8192 (a multiple of 8). Decode normalises in its products (gemv.cu); where it is not
// to (ponder study ablation), rms_norm_summed takes the sums of squares that they would have taken, in their order: no bit differs.
// rms_norm_fp8: in e4m3 with scales (fp8.cuh), for a product of prefill whose weights are fp8; rms_norm_summed_fp8 for one of
// decode with more rows than it converts itself.
//
// Grid: one block per row. Each thread keeps its vectors of 8 in registers between the two passes, so that a row is read
// from memory once; the weight, which no kernel writes, is loaded before waiting for the previous kernel.
#include "fp8.cuh"

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

template <bool kSummed, bool kFp8>
DEVICE void norm(const NormParams& p) {
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
    // All lanes of a warp go on or none, because groups are.
    if (offset_of(i) - lane_id() * 8 >= p.hidden) break;
    const bool inside = offset_of(i) < p.hidden;
    const int64_t at = (int64_t)row * p.hidden + offset_of(i);
    float v[8] = {};
    if (inside) {
      float w[8];
      unpack8(h[i], v);
      unpack8(weight[i], w);
      UNROLL for (int j = 0; j < 8; j++) v[j] = round_bf16(v[j] * scale) * w[j];
    }
    if (kFp8) {
      UNROLL for (int j = 0; j < 8; j++) v[j] = round_bf16(v[j]);
      const float most = group_max(largest(v));
      if (!inside) continue;
      store_e4m3(p.out_fp8 + at, v, quantise_factor(most));
      if (lane_id() % kGroupLanes == 0)
        p.scales[(int64_t)(offset_of(i) / SCALE_GROUP) * p.scales_stride + row] = scale_of(most);
    } else if (inside) {
      store8(p.out + at, pack8(v));
    }
  }
}

}  // namespace

KERNEL(rms_norm, NormParams, NORM_THREADS) { norm<false, false>(p); }
KERNEL(rms_norm_summed, NormParams, NORM_THREADS) { norm<true, false>(p); }
KERNEL(rms_norm_fp8, NormParams, NORM_THREADS) { norm<false, true>(p); }
KERNEL(rms_norm_summed_fp8, NormParams, NORM_THREADS) { norm<true, true>(p); }
