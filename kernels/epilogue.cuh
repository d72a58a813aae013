// What gemm.cu and gemv.cu do to a finished accumulator, and where they round: as the reference implementation, which
// rounds the result of every operator to bf16.
#pragma once

#include "kernel.cuh"

enum Epilogue {
  kPlain,     // bf16(acc)
  kBias,      // bf16(acc + bias): the bias is added before the product is rounded
  kResidual,  // bf16(bf16(acc) + residual)
  kSilu,      // bf16(bf16(silu(bf16(gate))) * bf16(up))
  kLogits,    // acc, fp32
};

DEVICE float silu_times(float gate, float up) {
  gate = round_bf16(gate);
  const float silu = gate * reciprocal_approx(1.f + exp2_approx(-1.4426950408889634f * gate));
  return round_bf16(silu) * round_bf16(up);
}
