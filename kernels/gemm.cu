// gemm_*: c [rows][n] = a [rows][k] w [n][k]^T, bf16 with fp32 accumulation and a fused epilogue. The product of prefill.
//
// Tiles of 128 rows x kTileN columns, kTileN from 96 to 256: the host picks the one whose waves fit the chip best
// (engine/tiling.rs). Grid: at most one block per SM; each walks over tiles, numbered so that blocks that run together form
// a near-square of the result and share a and w in L2. Launched in clusters of two, the pair takes two tiles above each other:
// each block loads one half of their strip of w and multicasts it to both, which saves a third of the traffic from L2 (a
// tile of 128 x 256 alone wants 48 bytes a clock of it per SM, and there are 38).
// Block: one producer thread keeps a ring of stages (64 k of a and w) full by TMA, across tiles; two consumer warpgroups
// own 64 rows of the tile each and run wgmma on one stage while the next is being issued. The result goes through swizzled
// shared memory to TMA stores that overlap the next tile; the residual comes there by TMA while the tile is multiplied.
//
// Why it is fast: loads never wait for arithmetic, wgmma m64n256k16 reads each byte of shared memory once for 128 clocks of
// tensor work, and registers move from the producer (which needs none) to the accumulators.
// Tails: TMA fills rows and columns beyond the ends with zeros and does not store them.
//
// gemm_fp8_*: a and w in e4m3 with scales. A stage is as many bytes and twice as much k, multiplied twice as fast; its sums,
// which the tensor cores keep to 14 bits, are scaled and added up in fp32 registers (as in DeepSeek-V3, arXiv 2412.19437, 3.3.2): of a's
// SCALE_GROUP k and, where w's scales are of blocks, of w's. Scales of w's rows are multiplied in at the end. A stage's sums beside
// those of the tile take registers for tiles of up to 192 columns; while one warpgroup adds, the other multiplies.
#include "epilogue.cuh"
#include "fp8.cuh"

namespace {

constexpr int kTileM = 128;
constexpr int kTileBytesK = 128;  // of a row in a stage: 64 k of bf16, 128 of e4m3
constexpr int kBoxes = 64;        // elements of 16 bits in them, which is how maps count
constexpr int kGroupM = 16;       // tiles along m that share a strip of w
constexpr int kWarpgroup = 128;   // threads
constexpr int kConsumers = 2;     // warpgroups
constexpr int kConsumerWarps = kConsumers * kWarpgroup / kWarp;
constexpr int kConsumerRows = kTileM / kConsumers;
constexpr int kBytesA = kTileM * kTileBytesK;
constexpr int kMostStages = 8;

template <bool kFp8>
constexpr int kTileK = kFp8 ? 128 : 64;
static_assert(kTileK<true> == SCALE_GROUP);

template <int kTileN, Epilogue kEpilogue, bool kFp8>
struct Shape {
  static constexpr int kWidth = kEpilogue == kSilu ? kTileN / 2 : kTileN;  // columns of c in a tile
  static constexpr int kPanel = kWidth % 64 == 0 ? 64 : 32;                // columns of a TMA store: one swizzle atom
  static constexpr int kPanels = kWidth / kPanel;
  static constexpr int kPanelBytes = kConsumerRows * kPanel * 2;
  static constexpr int kHalfW = kTileN / 2 * kTileBytesK;  // what one TMA load brings of w
  static constexpr int kStageBytes = kBytesA + 2 * kHalfW;
  static constexpr int kBarrierBytes = (2 * kMostStages + kConsumers) * (int)sizeof(Barrier);
  static constexpr int kResultBytes = kConsumers * kPanels * kPanelBytes;  // [consumer][panel][64 rows][kPanel]
  static constexpr int kScaleBytes = kFp8 ? (kTileM + kTileN / SCALE_ROWS) * 4 : 0;  // in a stage: of a's rows, of w's
  static constexpr int kFit = (GEMM_SHARED - kBarrierBytes - kResultBytes) / (kStageBytes + kScaleBytes);
  static constexpr int kStages = kFit < kMostStages ? kFit : kMostStages;
  static constexpr int kResult = kStages * kStageBytes;              // offset
  static constexpr int kScales = kResult + kResultBytes;             // offset: [kStages]
  static constexpr int kBarriers = kScales + kStages * kScaleBytes;  // offset: full, empty, residual
  static_assert(kWidth % kPanel == 0 && kStages >= 3 && kStageBytes % 1024 == 0 && kPanelBytes % 1024 == 0);
};

struct Barriers {
  Barrier* full;      // [kStages] a and w have landed
  Barrier* empty;     // [kStages] the consumers of all blocks that get this stage's w have read it
  Barrier* residual;  // [kConsumers]
};

struct Tile {
  int m, n;  // in tiles
};

// The tiles of this block: `index` counts the cluster's, each as many tiles above each other as the cluster has blocks.
struct Walk {
  int index, step, count;
  int height, width;  // of the result, in the cluster's tiles
  int blocks, rank;   // of the cluster
};

template <int kTileN>
DEVICE Walk walk(const GemmParams& p) {
  const int blocks = cluster_size();
  const int height = ceil_div(p.rows, kTileM * blocks), width = ceil_div(p.n, kTileN);
  return {block_x() / blocks, grid_x() / blocks, height * width, height, width, blocks, (int)cluster_rank()};
}

// Column by column through groups of kGroupM tiles along m.
DEVICE Tile tile_at(const Walk& w, int index) {
  const int tall = kGroupM / w.blocks;
  const int group = index / (tall * w.width);
  const int height = min_int(tall, w.height - group * tall);
  const int inside = index - group * tall * w.width;
  return {(group * tall + inside % height) * w.blocks + w.rank, inside / height};
}

// (fp8) Of w's scales for a stage.
template <int kTileN>
DEVICE int bytes_of_blocks(const GemmParams& p, Tile tile) {
  const int first = tile.n * kTileN / SCALE_ROWS;
  return p.w_scales.blocks ? min_int(kTileN / SCALE_ROWS, p.n / SCALE_ROWS - first) * 4 : 0;
}

// (fp8) The scales of stage `step` of k.
template <int kTileN>
DEVICE void load_scales(const GemmParams& p, float* to, Barrier* full, int step, Tile tile) {
  bulk_load(to, p.a_scales + (int64_t)step * p.a_scales_stride + tile.m * kTileM, kTileM * 4, full);
  const int bytes = bytes_of_blocks<kTileN>(p, tile);
  const int64_t first = (int64_t)step * (p.n / SCALE_ROWS) + tile.n * kTileN / SCALE_ROWS;
  if (bytes > 0) bulk_load(to + kTileM, p.w_scales.blocks + first, bytes, full);
}

template <int kTileN, Epilogue kEpilogue, bool kFp8>
DEVICE void produce(const GemmParams& p, uint8_t* shared, const Barriers& barriers) {
  using S = Shape<kTileN, kEpilogue, kFp8>;
  const Walk w = walk<kTileN>(p);
  int i = 0;  // stages so far
  for (int index = w.index; index < w.count; index += w.step) {
    const Tile tile = tile_at(w, index);
    for (int step = 0; step * kTileK<kFp8> < p.k; step++, i++) {
      const int stage = i % S::kStages, box = step * kBoxes;
      Barrier* full = &barriers.full[stage];
      mbarrier_wait_cluster(&barriers.empty[stage], (i / S::kStages & 1) ^ 1);
      if constexpr (kFp8) {
        mbarrier_arrive_expect_tx(full, S::kStageBytes + kTileM * 4 + bytes_of_blocks<kTileN>(p, tile));
        load_scales<kTileN>(p, (float*)(shared + S::kScales + stage * S::kScaleBytes), full, step, tile);
      } else {
        mbarrier_arrive_expect_tx(full, S::kStageBytes);
      }
      uint8_t* to = shared + stage * S::kStageBytes;
      tma_load(to, &p.a_map, full, kEvictNormal, box, tile.m * kTileM);
      to += kBytesA;
      if (w.blocks == 1) {
        tma_load(to, &p.w_map, full, kEvictNormal, box, tile.n * kTileN);
        tma_load(to + S::kHalfW, &p.w_map, full, kEvictNormal, box, tile.n * kTileN + kTileN / 2);
      } else {
        tma_load_multicast(to + w.rank * S::kHalfW, &p.w_map, full, 3, box, tile.n * kTileN + w.rank * (kTileN / 2));
      }
    }
  }
}

// Issues the product of one stage: 64 rows of a times kTileN rows of w, over its k, 32 bytes at a time.
template <int kTileN, bool kFp8>
DEVICE void multiply_stage(float (&acc)[kTileN / 2], const uint8_t* stage, int consumer, bool accumulate) {
  const uint64_t a = wgmma_descriptor(stage + consumer * kConsumerRows * kTileBytesK, 16, 1024, kSwizzle128);
  const uint64_t w = wgmma_descriptor(stage + kBytesA, 16, 1024, kSwizzle128);
  wgmma_fence();
  UNROLL for (int k = 0; k < kTileBytesK / 32; k++) {
    if constexpr (kFp8)
      wgmma_ss_e4m3<kTileN>(acc, a + 2 * k, w + 2 * k, accumulate || k > 0);
    else
      wgmma_ss<kTileN>(acc, a + 2 * k, w + 2 * k, accumulate || k > 0);
  }
  wgmma_commit();
}

// (fp8) Adds a stage's sums, scaled, to those of the tile. `of_w`: the first `blocks` have come.
template <int kTileN>
DEVICE void add_scaled(float (&acc)[kTileN / 2], const float (&sums)[kTileN / 2], const float (&of_a)[2],
                       const float* of_w, int blocks) {
  UNROLL for (int j = 0; j < kTileN / SCALE_ROWS; j++) {
    const float w = j < blocks ? of_w[j] : 1.f;
    UNROLL for (int i = 0; i < 4; i++) acc[4 * j + i] += sums[4 * j + i] * (of_a[i / 2] * w);
  }
}

// (fp8) Scales of w's rows, which are c's columns.
template <int kTileN>
DEVICE void scale_columns(const GemmParams& p, float (&acc)[kTileN / 2], int first_column) {
  if (!p.w_scales.rows) return;
  UNROLL for (int j = 0; j < kTileN / 8; j++) {
    const int column = first_column + 8 * j + 2 * (lane_id() % 4);
    if (column >= p.n) break;
    UNROLL for (int i = 0; i < 4; i++) acc[4 * j + i] *= p.w_scales.rows[column + i % 2];
  }
}

// One arrival per warp, at every block of the cluster.
DEVICE void release(Barrier* empty, int blocks) {
  if (lane_id() < blocks) mbarrier_release_cluster(empty, lane_id());
}

// Byte of the 16-byte chunk `chunk` (8 columns) of a row, in a panel as TMA swizzles it.
template <int kPanel>
DEVICE int in_panel(int row, int chunk) {
  const int at = row * kPanel * 2 + chunk * 16;
  return at ^ (at >> 7 & (kPanel / 8 - 1)) << 4;
}

// Eight columns of c as the accumulator's owner holds them, packed for stmatrix: v = {(row, c), (row, c + 1), (row + 8, c),
// (row + 8, c + 1)} with c = 8 j + 2 (lane % 4). `column`: of c; `residual`: (row, c) and (row + 8, c), pairs of bf16.
template <Epilogue kEpilogue>
DEVICE void finish(const GemmParams& p, const float* v, int column, const uint32_t (&residual)[2], uint32_t* packed) {
  float x[4] = {v[0], v[1], v[2], v[3]};
  if (kEpilogue == kBias || (kEpilogue == kResidual && p.bias)) {
    const uint32_t bias = *(const uint32_t*)(p.bias + column);
    UNROLL for (int i = 0; i < 4; i++) x[i] += i % 2 ? bf16_high(bias) : bf16_low(bias);
  }
  if (kEpilogue == kResidual) {
    UNROLL for (int i = 0; i < 4; i++) x[i] =
        round_bf16(x[i]) + (i % 2 ? bf16_high(residual[i / 2]) : bf16_low(residual[i / 2]));
  }
  packed[0] = pack_bf16x2(x[0], x[1]);
  packed[1] = pack_bf16x2(x[2], x[3]);
}

DEVICE void finish_silu(const float* gate, const float* up, uint32_t* packed) {
  packed[0] = pack_bf16x2(silu_times(gate[0], up[0]), silu_times(gate[1], up[1]));
  packed[1] = pack_bf16x2(silu_times(gate[2], up[2]), silu_times(gate[3], up[3]));
}

// The warpgroup's 64 rows of the tile, from its accumulators to the first `panels` of `result`, where the residual may be.
template <int kTileN, Epilogue kEpilogue, bool kFp8>
DEVICE void write_result(const GemmParams& p, uint8_t* result, int panels, const float (&acc)[kTileN / 2],
                         int first_column) {
  using S = Shape<kTileN, kEpilogue, kFp8>;
  const int lane = lane_id(), first_row = warp_id() % 4 * 16;
  UNROLL for (int panel = 0; panel < S::kPanels; panel++, result += S::kPanelBytes) {
    if (panel >= panels) continue;
    UNROLL for (int chunk = 0; chunk < S::kPanel / 8; chunk += 2) {
      uint32_t r[4];
      UNROLL for (int side = 0; side < 2; side++) {
        const int j = panel * (S::kPanel / 8) + chunk + side;  // of the tile's groups of 8 columns of c
        uint32_t residual[2] = {0, 0};
        if (kEpilogue == kResidual) {
          UNROLL for (int i = 0; i < 2; i++) residual[i] = *(
              const uint32_t*)(result + in_panel<S::kPanel>(first_row + lane / 4 + 8 * i, chunk + side) + lane % 4 * 4);
        }
        if (kEpilogue == kSilu) {
          finish_silu(&acc[8 * j], &acc[8 * j + 4], &r[2 * side]);
        } else {
          finish<kEpilogue>(p, &acc[4 * j], first_column + 8 * j + 2 * (lane % 4), residual, &r[2 * side]);
        }
      }
      if (kEpilogue == kResidual) sync_warp();  // others read what this lane's row is written over
      // stmatrix: this lane gives the address of row lane % 16 of 8 columns, the left or the right 8 of 16.
      stmatrix_x4(result + in_panel<S::kPanel>(first_row + lane % 16, chunk + lane / 16), r);
    }
  }
}

template <int kTileN, Epilogue kEpilogue, bool kFp8>
DEVICE void consume(const GemmParams& p, uint8_t* shared, const Barriers& barriers) {
  using S = Shape<kTileN, kEpilogue, kFp8>;
  const int consumer = warp_id() / 4 - 1;
  const bool storer = thread_idx() % kWarpgroup == 0;
  const int width = kEpilogue == kSilu ? p.n / 2 : p.n;
  uint8_t* result = shared + S::kResult + consumer * S::kPanels * S::kPanelBytes;
  Barrier* residual = &barriers.residual[consumer];
  const Walk w = walk<kTileN>(p);
  // The residual is asked for a little after the tile's beginning, when the stores of the last tile have left its place.
  const int steps = ceil_div(p.k, kTileK<kFp8>), ask = min_int(2, steps - 1);
  uint32_t residual_parity = 0;
  int i = 0;  // stages so far
  for (int index = w.index; index < w.count; index += w.step) {
    const Tile tile = tile_at(w, index);
    const int row = tile.m * kTileM + consumer * kConsumerRows, column = tile.n * S::kWidth;
    const int panels = min_int(S::kPanels, ceil_div(width - column, S::kPanel));
    float acc[kTileN / 2];
    if constexpr (kFp8) {
      UNROLL for (int j = 0; j < kTileN / 2; j++) acc[j] = 0.f;
    }
    for (int step = 0; step < steps; step++, i++) {
      const int stage = i % S::kStages;
      mbarrier_wait(&barriers.full[stage], i / S::kStages & 1);
      float sums[kFp8 ? kTileN / 2 : 1];
      if constexpr (kFp8)
        multiply_stage<kTileN, true>(sums, shared + stage * S::kStageBytes, consumer, false);
      else
        multiply_stage<kTileN, false>(acc, shared + stage * S::kStageBytes, consumer, step > 0);
      if (kEpilogue == kResidual && step == ask && storer) {
        bulk_wait_read<0>();
        mbarrier_arrive_expect_tx(residual, panels * S::kPanelBytes);
        UNROLL for (int panel = 0; panel < S::kPanels; panel++) {
          if (panel < panels)
            tma_load(result + panel * S::kPanelBytes, &p.residual_map, residual, kEvictNormal,
                     column + panel * S::kPanel, row);
        }
      }
      if constexpr (kFp8) {
        const float* scales = (const float*)(shared + S::kScales + stage * S::kScaleBytes);
        const int row_in_tile = consumer * kConsumerRows + warp_id() % 4 * 16 + lane_id() / 4;
        const float of_a[2] = {scales[row_in_tile], scales[row_in_tile + 8]};
        wgmma_wait<0>();
        add_scaled<kTileN>(acc, sums, of_a, scales + kTileM, bytes_of_blocks<kTileN>(p, tile) / 4);
        sync_warp();  // others read scales, too
        release(&barriers.empty[stage], w.blocks);
      } else {
        wgmma_wait<1>();
        if (step > 0) release(&barriers.empty[(i - 1) % S::kStages], w.blocks);
      }
    }
    if constexpr (kFp8) {
      scale_columns<kTileN>(p, acc, tile.n * kTileN);
    } else {
      wgmma_wait<0>();
      release(&barriers.empty[(i - 1) % S::kStages], w.blocks);
    }

    if (kEpilogue == kResidual) {
      mbarrier_wait(residual, residual_parity);
      residual_parity ^= 1;
    } else {
      if (storer) bulk_wait_read<0>();
      named_barrier_sync(1 + consumer, kWarpgroup);
    }
    write_result<kTileN, kEpilogue, kFp8>(p, result, panels, acc, tile.n * kTileN);
    fence_proxy_async();
    named_barrier_sync(1 + consumer, kWarpgroup);
    if (storer) {
      UNROLL for (int panel = 0; panel < S::kPanels; panel++) {
        if (panel < panels) tma_store(&p.c_map, result + panel * S::kPanelBytes, column + panel * S::kPanel, row);
      }
      bulk_commit();
    }
  }
  if (storer) bulk_wait<0>();
}

template <int kTileN, Epilogue kEpilogue, bool kFp8 = false>
DEVICE void gemm(const GemmParams& p) {
  using S = Shape<kTileN, kEpilogue, kFp8>;
  pdl_launch_dependents();
  uint8_t* shared = shared_memory();
  Barrier* first = (Barrier*)(shared + S::kBarriers);
  const Barriers barriers = {first, first + S::kStages, first + 2 * S::kStages};
  const int blocks = cluster_size();
  if (thread_idx() == 0) {
    prefetch_tensor_map(&p.a_map);
    prefetch_tensor_map(&p.w_map);
    prefetch_tensor_map(&p.c_map);
    for (int s = 0; s < S::kStages; s++) {
      mbarrier_init(&barriers.full[s], 1);
      mbarrier_init(&barriers.empty[s], kConsumerWarps * blocks);
    }
    for (int c = 0; c < kConsumers; c++) mbarrier_init(&barriers.residual[c], 1);
    mbarrier_init_fence();
  }
  if (blocks == 1)
    sync_threads();
  else
    cluster_sync();
  pdl_wait();

  if (warp_id() < 4) {
    registers_decrease<40>();
    if (thread_idx() == 0) produce<kTileN, kEpilogue, kFp8>(p, shared, barriers);
    sync_warp();
  } else {
    registers_increase<232>();
    consume<kTileN, kEpilogue, kFp8>(p, shared, barriers);
    sync_warp();
  }
  // The other block may still arrive at the barriers of this one.
  if (blocks > 1) cluster_sync();
}

}  // namespace

KERNEL(gemm_n96, GemmParams, GEMM_THREADS) { gemm<96, kPlain>(p); }
KERNEL(gemm_n128, GemmParams, GEMM_THREADS) { gemm<128, kPlain>(p); }
KERNEL(gemm_n160, GemmParams, GEMM_THREADS) { gemm<160, kPlain>(p); }
KERNEL(gemm_n192, GemmParams, GEMM_THREADS) { gemm<192, kPlain>(p); }
KERNEL(gemm_n256, GemmParams, GEMM_THREADS) { gemm<256, kPlain>(p); }
KERNEL(gemm_bias_n96, GemmParams, GEMM_THREADS) { gemm<96, kBias>(p); }
KERNEL(gemm_bias_n128, GemmParams, GEMM_THREADS) { gemm<128, kBias>(p); }
KERNEL(gemm_bias_n160, GemmParams, GEMM_THREADS) { gemm<160, kBias>(p); }
KERNEL(gemm_bias_n192, GemmParams, GEMM_THREADS) { gemm<192, kBias>(p); }
KERNEL(gemm_bias_n256, GemmParams, GEMM_THREADS) { gemm<256, kBias>(p); }
KERNEL(gemm_residual_n96, GemmParams, GEMM_THREADS) { gemm<96, kResidual>(p); }
KERNEL(gemm_residual_n128, GemmParams, GEMM_THREADS) { gemm<128, kResidual>(p); }
KERNEL(gemm_residual_n160, GemmParams, GEMM_THREADS) { gemm<160, kResidual>(p); }
KERNEL(gemm_residual_n192, GemmParams, GEMM_THREADS) { gemm<192, kResidual>(p); }
KERNEL(gemm_residual_n256, GemmParams, GEMM_THREADS) { gemm<256, kResidual>(p); }
KERNEL(gemm_silu_n128, GemmParams, GEMM_THREADS) { gemm<128, kSilu>(p); }
KERNEL(gemm_silu_n192, GemmParams, GEMM_THREADS) { gemm<192, kSilu>(p); }
KERNEL(gemm_silu_n256, GemmParams, GEMM_THREADS) { gemm<256, kSilu>(p); }
KERNEL(gemm_fp8_n96, GemmParams, GEMM_THREADS) { gemm<96, kPlain, true>(p); }
KERNEL(gemm_fp8_n128, GemmParams, GEMM_THREADS) { gemm<128, kPlain, true>(p); }
KERNEL(gemm_fp8_n192, GemmParams, GEMM_THREADS) { gemm<192, kPlain, true>(p); }
KERNEL(gemm_fp8_bias_n96, GemmParams, GEMM_THREADS) { gemm<96, kBias, true>(p); }
KERNEL(gemm_fp8_bias_n128, GemmParams, GEMM_THREADS) { gemm<128, kBias, true>(p); }
KERNEL(gemm_fp8_bias_n192, GemmParams, GEMM_THREADS) { gemm<192, kBias, true>(p); }
KERNEL(gemm_fp8_residual_n96, GemmParams, GEMM_THREADS) { gemm<96, kResidual, true>(p); }
KERNEL(gemm_fp8_residual_n128, GemmParams, GEMM_THREADS) { gemm<128, kResidual, true>(p); }
KERNEL(gemm_fp8_residual_n192, GemmParams, GEMM_THREADS) { gemm<192, kResidual, true>(p); }
KERNEL(gemm_fp8_silu_n128, GemmParams, GEMM_THREADS) { gemm<128, kSilu, true>(p); }
KERNEL(gemm_fp8_silu_n192, GemmParams, GEMM_THREADS) { gemm<192, kSilu, true>(p); }
