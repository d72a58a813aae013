// add_residual, silu_mul: what the products of decode do to their sums before they write them (gemv.cu), as kernels of their own.
// No step needs them: `ponder study ablation` puts them in place of a fused epilogue, to see what it is worth.
//
// So that the answer stays the same, every bit is that of the fused epilogue: the same rounding, and sums of squares added in the
// order of the product's warps. That is why gate and up come here in fp32: the epilogue does not round them either.
//
// Mapping: 16 neighbouring columns to a thread, which are two vectors of 8. Grid: ceil(rows * columns / 16 / UNFUSED_THREADS)
// blocks; no shared memory.
#include "epilogue.cuh"

DEVICE int item_of_thread() { return block_x() * UNFUSED_THREADS + thread_idx(); }

KERNEL(add_residual, AddResidualParams, UNFUSED_THREADS) {
  pdl_launch_dependents();
  pdl_wait();
  const int item = item_of_thread(), items = p.rows * p.hidden / 16;
  // Of columns i and i + 8, as a thread of the product has them.
  float squares[8] = {};
  if (item < items) UNROLL for (int half = 0; half < 2; half++) {
      const int64_t at = (int64_t)item * 16 + 8 * half;
      float x[8], sum[8];
      unpack8(load8(p.x + at), x);
      unpack8(load8(p.residual + at), sum);
      UNROLL for (int i = 0; i < 8; i++) {
        sum[i] = round_bf16(x[i] + sum[i]);
        squares[i] += sum[i] * sum[i];
      }
      store8(p.residual + at, pack8(sum));
    }
  UNROLL for (int m = 1; m < 8; m *= 2) UNROLL for (int i = 0; i < 8; i += 2 * m) squares[i] += squares[i + m];
  float of_64 = 0.f;
  UNROLL for (int i = 0; i < 4; i++) of_64 += shfl(squares[0], lane_id() / 4 * 4 + i);
  if (item < items && item % 4 == 0) p.squares[item / 4] = of_64;
}

KERNEL(silu_mul, SiluMulParams, UNFUSED_THREADS) {
  pdl_launch_dependents();
  pdl_wait();
  const int item = item_of_thread();
  if (item >= p.rows * p.inner / 8) return;
  float out[8];
  UNROLL for (int i = 0; i < 8; i += 4) {
    uint32_t gate[4], up[4];
    load_16(p.gate_up + (int64_t)item * 16 + i, gate);
    load_16(p.gate_up + (int64_t)item * 16 + 8 + i, up);
    UNROLL for (int j = 0; j < 4; j++) out[i + j] = silu_times(bits_to_float(gate[j]), bits_to_float(up[j]));
  }
  store8(p.out + (int64_t)item * 8, pack8(out));
}
