// gemm_*: c [rows][n] = a [rows][k] w [n][k]^T, bf16 with fp32 accumulation and a fused epilogue. The product of prefill.
//
// Grid: as many blocks as there are tiles, at most one per SM; each block walks over tiles of 128 rows x 128 or 256
// columns. Tiles are numbered so that blocks that run together form a near-square of the result and share a and w in L2.
// Block: one producer thread keeps a ring of stages (64 k of a and w) full by TMA, across tiles; two consumer warpgroups
// own 64 rows of the tile each and run wgmma on one stage while the next is being issued. The result goes through swizzled
// shared memory, 64 columns at a time in two turns, to an asynchronous TMA store that overlaps the next tile.
//
// Why it is fast: loads never wait for arithmetic, wgmma m64n256k16 reads each byte of shared memory once for 128 clocks of
// tensor work, and registers move from the producer (which needs none) to the accumulators.
// Tails: TMA fills rows and columns beyond the ends with zeros and does not store them.
#include "epilogue.cuh"

namespace {

constexpr int kTileM = 128;
constexpr int kTileK = 64;
constexpr int kPanel = 64;       // columns of c that are stored at a time: 128 bytes, one swizzle atom
constexpr int kGroupM = 16;      // tiles along m that share a strip of w
constexpr int kWarpgroup = 128;  // threads
constexpr int kConsumerWarps = 8;
constexpr int kPanelBytes = 64 * kPanel * 2;
constexpr int kBytesA = kTileM * kTileK * 2;

template <int kTileN>
struct GemmShape {
  static constexpr int kStages = kTileN == 256 ? 4 : 6;
  static constexpr int kStageBytes = kBytesA + kTileN * kTileK * 2;
  static constexpr int kPanels = kStages * kStageBytes;        // offset: [2 warpgroups][2 turns] panels of c
  static constexpr int kBarriers = kPanels + 4 * kPanelBytes;  // offset: full, then empty, [kStages] each
  static constexpr int kShared = kBarriers + 2 * kStages * (int)sizeof(Barrier);
};
static_assert(GemmShape<128>::kShared == GEMM_SHARED_N128 && GemmShape<256>::kShared == GEMM_SHARED_N256);

struct Tile {
  int m, n;  // in tiles
};

// Column by column through groups of kGroupM tiles along m.
DEVICE Tile tile_at(int index, int tiles_m, int tiles_n) {
  const int group = index / (kGroupM * tiles_n);
  const int height = min_int(kGroupM, tiles_m - group * kGroupM);
  const int inside = index - group * kGroupM * tiles_n;
  return {group * kGroupM + inside % height, inside / height};
}

template <int kTileN>
DEVICE void produce(const GemmParams& p, uint8_t* shared, Barrier* full, Barrier* empty, int tiles_m, int tiles_n) {
  using Shape = GemmShape<kTileN>;
  int i = 0;  // stages so far
  for (int index = block_x(); index < tiles_m * tiles_n; index += grid_x()) {
    const Tile tile = tile_at(index, tiles_m, tiles_n);
    for (int k = 0; k < p.k; k += kTileK, i++) {
      const int stage = i % Shape::kStages;
      mbarrier_wait(&empty[stage], (i / Shape::kStages & 1) ^ 1);
      mbarrier_arrive_expect_tx(&full[stage], Shape::kStageBytes);
      uint8_t* a = shared + stage * Shape::kStageBytes;
      tma_load(a, &p.a_map, &full[stage], kEvictNormal, k, tile.m * kTileM);
      tma_load(a + kBytesA, &p.w_map, &full[stage], kEvictNormal, k, tile.n * kTileN);
    }
  }
}

// Issues the product of one stage: 64 rows of a times kTileN rows of w, over 64 k.
template <int kTileN>
DEVICE void multiply_stage(float (&acc)[kTileN / 2], const uint8_t* stage, int warpgroup, bool accumulate) {
  const uint64_t a = wgmma_descriptor(stage + warpgroup * 64 * kTileK * 2, 16, 1024, kSwizzle128);
  const uint64_t w = wgmma_descriptor(stage + kBytesA, 16, 1024, kSwizzle128);
  wgmma_fence();
  UNROLL for (int k = 0; k < kTileK / 16; k++) wgmma_ss<kTileN>(acc, a + 2 * k, w + 2 * k, accumulate || k > 0);
  wgmma_commit();
}

// Columns column..column+7 of a row pair as the accumulator's owner holds them: v = {(row, c), (row, c + 1), (row + 8, c),
// (row + 8, c + 1)} with c = column + 2 (lane % 4), packed for stmatrix.
template <Epilogue kEpilogue>
DEVICE void finish(const GemmParams& p, const float* v, int row, int column, uint32_t& low, uint32_t& high) {
  float x[4] = {v[0], v[1], v[2], v[3]};
  if (kEpilogue == kBias) {
    const uint32_t bias = *(const uint32_t*)(p.bias + column);
    UNROLL for (int i = 0; i < 4; i++) x[i] += i % 2 ? bf16_high(bias) : bf16_low(bias);
  }
  if (kEpilogue == kResidual) {
    UNROLL for (int i = 0; i < 2; i++) {
      if (row + 8 * i >= p.rows) continue;
      const uint32_t residual = *(const uint32_t*)(p.residual + (int64_t)(row + 8 * i) * p.n + column);
      x[2 * i] = round_bf16(x[2 * i]) + bf16_low(residual);
      x[2 * i + 1] = round_bf16(x[2 * i + 1]) + bf16_high(residual);
    }
  }
  low = pack_bf16x2(x[0], x[1]);
  high = pack_bf16x2(x[2], x[3]);
}

DEVICE void finish_silu(const float* gate, const float* up, uint32_t& low, uint32_t& high) {
  low = pack_bf16x2(silu_times(gate[0], up[0]), silu_times(gate[1], up[1]));
  high = pack_bf16x2(silu_times(gate[2], up[2]), silu_times(gate[3], up[3]));
}

template <int kTileN, Epilogue kEpilogue>
DEVICE void consume(const GemmParams& p, uint8_t* shared, Barrier* full, Barrier* empty, int tiles_m, int tiles_n) {
  using Shape = GemmShape<kTileN>;
  constexpr int kWidth = kEpilogue == kSilu ? kTileN / 2 : kTileN;  // columns of c in a tile
  const int warpgroup = warp_id() / 4 - 1, warp = warp_id() % 4, lane = lane_id();
  const bool storer = thread_idx() % kWarpgroup == 0;
  const int width = kEpilogue == kSilu ? p.n / 2 : p.n;
  uint8_t* panels = shared + Shape::kPanels + warpgroup * 2 * kPanelBytes;
  int i = 0;       // stages so far
  int stores = 0;  // panels so far
  for (int index = block_x(); index < tiles_m * tiles_n; index += grid_x()) {
    const Tile tile = tile_at(index, tiles_m, tiles_n);
    float acc[kTileN / 2];
    for (int k = 0; k < p.k; k += kTileK, i++) {
      const int stage = i % Shape::kStages;
      mbarrier_wait(&full[stage], i / Shape::kStages & 1);
      multiply_stage<kTileN>(acc, shared + stage * Shape::kStageBytes, warpgroup, k > 0);
      wgmma_wait<1>();
      if (k > 0 && lane == 0) mbarrier_arrive(&empty[(i - 1) % Shape::kStages]);
    }
    wgmma_wait<0>();
    if (lane == 0) mbarrier_arrive(&empty[(i - 1) % Shape::kStages]);

    const int row = tile.m * kTileM + warpgroup * 64;
    // stmatrix: this lane gives the address of row lane % 16 of 8 columns, the left or the right 8 of 16.
    const int matrix_row = warp * 16 + lane % 16;
    UNROLL for (int panel = 0; panel < kWidth / kPanel; panel++) {
      const int column = tile.n * kWidth + panel * kPanel;
      if (column >= width) continue;
      uint8_t* out = panels + (stores++ & 1) * kPanelBytes;
      if (storer) bulk_wait_read<1>();
      named_barrier_sync(1 + warpgroup, kWarpgroup);
      UNROLL for (int pair = 0; pair < kPanel / 16; pair++) {
        uint32_t r[4];
        UNROLL for (int side = 0; side < 2; side++) {
          const int j = (panel * kPanel + pair * 16 + side * 8) / 8;  // of the tile's 8-column groups of c
          if (kEpilogue == kSilu) {
            finish_silu(&acc[8 * j], &acc[8 * j + 4], r[2 * side], r[2 * side + 1]);
          } else {
            finish<kEpilogue>(p, &acc[4 * j], row + warp * 16 + lane / 4, tile.n * kTileN + 8 * j + 2 * (lane % 4),
                              r[2 * side], r[2 * side + 1]);
          }
        }
        const int chunk = 2 * pair + lane / 16;
        stmatrix_x4(out + matrix_row * 128 + (chunk ^ matrix_row % 8) * 16, r);
      }
      fence_proxy_async();
      named_barrier_sync(1 + warpgroup, kWarpgroup);
      if (storer) {
        tma_store(&p.c_map, out, column, row);
        bulk_commit();
      }
    }
  }
  if (storer) bulk_wait<0>();
}

template <int kTileN, Epilogue kEpilogue>
DEVICE void gemm(const GemmParams& p) {
  using Shape = GemmShape<kTileN>;
  pdl_launch_dependents();
  uint8_t* shared = shared_memory();
  Barrier* full = (Barrier*)(shared + Shape::kBarriers);
  Barrier* empty = full + Shape::kStages;
  if (thread_idx() == 0) {
    prefetch_tensor_map(&p.a_map);
    prefetch_tensor_map(&p.w_map);
    prefetch_tensor_map(&p.c_map);
    for (int s = 0; s < Shape::kStages; s++) {
      mbarrier_init(&full[s], 1);
      mbarrier_init(&empty[s], kConsumerWarps);
    }
    mbarrier_init_fence();
  }
  sync_threads();
  pdl_wait();

  const int tiles_m = ceil_div(p.rows, kTileM), tiles_n = ceil_div(p.n, kTileN);
  if (warp_id() < 4) {
    registers_decrease<40>();
    if (thread_idx() == 0) produce<kTileN>(p, shared, full, empty, tiles_m, tiles_n);
  } else {
    registers_increase<232>();
    consume<kTileN, kEpilogue>(p, shared, full, empty, tiles_m, tiles_n);
  }
}

}  // namespace

KERNEL(gemm_n128, GemmParams, GEMM_THREADS) { gemm<128, kPlain>(p); }
KERNEL(gemm_bias_n128, GemmParams, GEMM_THREADS) { gemm<128, kBias>(p); }
KERNEL(gemm_residual_n128, GemmParams, GEMM_THREADS) { gemm<128, kResidual>(p); }
KERNEL(gemm_silu_n128, GemmParams, GEMM_THREADS) { gemm<128, kSilu>(p); }
KERNEL(gemm_n256, GemmParams, GEMM_THREADS) { gemm<256, kPlain>(p); }
KERNEL(gemm_bias_n256, GemmParams, GEMM_THREADS) { gemm<256, kBias>(p); }
KERNEL(gemm_residual_n256, GemmParams, GEMM_THREADS) { gemm<256, kResidual>(p); }
KERNEL(gemm_silu_n256, GemmParams, GEMM_THREADS) { gemm<256, kSilu>(p); }
