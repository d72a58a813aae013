// What gemm.cu and gemv.cu do to a finished accumulator, and where they round: the residual stream as the reference
// implementation, which rounds the result of every operator to bf16; silu times up only once, which is nearer to fp32.
#pragma once

#include "kernel.cuh"

enum Epilogue {
  kPlain,     // bf16(acc)
  kBias,      // bf16(acc + bias): the bias is added before the product is rounded
  kResidual,  // bf16(bf16(acc + bias, if there is one) + residual)
  kSilu,      // bf16(silu(gate) * up)
  kRope,      // bf16(rotated bf16(acc + bias)), to q and to the KV pages
  kLogits,    // acc, fp32
};

DEVICE float silu_times(float gate, float up) {
  const float silu = gate * reciprocal_approx(1.f + exp2_approx(-1.4426950408889634f * gate));
  return silu * up;
}
