// quantise: rows of bf16 to e4m3 with a scale for each SCALE_GROUP of k (fp8.cuh): what a product of prefill reads where its weights
// are fp8 and its input comes from attention or the MLP. After a norm rms_norm_fp8 does it, in decode the product itself.
// quantise_weight: a matrix of bf16 to e4m3 with a scale for each row, once, when weights are loaded.
//
// Grid of quantise: (k / 1024 rounded up, rows): a block has 1024 neighbours of a row, 8 for each thread, read and written once.
// Grid of quantise_weight: one block per row, which is read twice, the second time from L2: loading waits for the disk anyway.
#include "fp8.cuh"

namespace {

constexpr int kBlockK = 8 * QUANTISE_THREADS;

}  // namespace

KERNEL(quantise, QuantiseParams, QUANTISE_THREADS) {
  pdl_launch_dependents();
  pdl_wait();
  const int row = block_y(), k = block_x() * kBlockK + thread_idx() * 8;
  float v[8] = {};
  if (k < p.k) unpack8(load8(p.x + (int64_t)row * p.k + k), v);
  const float most = group_max(largest(v));
  if (k >= p.k) return;
  store_e4m3(p.out + (int64_t)row * p.k + k, v, quantise_factor(most));
  if (lane_id() % kGroupLanes == 0) p.scales[(int64_t)(k / SCALE_GROUP) * p.scales_stride + row] = scale_of(most);
}

KERNEL(quantise_weight, QuantiseWeightParams, QUANTISE_THREADS) {
  pdl_launch_dependents();
  pdl_wait();
  float* maxima = (float*)shared_memory();
  const int64_t row = (int64_t)block_x() * p.k;
  float most = 0.f;
  for (int k = thread_idx() * 8; k < p.k; k += kBlockK) {
    float v[8];
    unpack8(load8(p.w + row + k), v);
    most = fmaxf(most, largest(v));
  }
  most = warp_max(most);
  if (lane_id() == 0) maxima[warp_id()] = most;
  sync_threads();
  for (int w = 0; w < QUANTISE_THREADS / kWarp; w++) most = fmaxf(most, maxima[w]);
  for (int k = thread_idx() * 8; k < p.k; k += kBlockK) {
    float v[8];
    unpack8(load8(p.w + row + k), v);
    store_e4m3(p.out + row + k, v, quantise_factor(most));
  }
  if (thread_idx() == 0) p.scales[block_x()] = scale_of(most);
}
