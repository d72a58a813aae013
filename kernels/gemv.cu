// gemv_*: c [rows][n] = f(x) [rows][k] w [n][k]^T for 1 to 64 rows, bf16 with fp32 accumulation. The product of decode: its
// time is the time to read w, once.
//
// What goes before and after it in a layer is fused: x may be RMS-normalised on its way in (norm: the sums of squares come
// from whoever wrote x, the arithmetic is rms_norm's), and the result may be biased, rotated and appended to the KV cache
// (rope), multiplied as silu(gate) * up (silu), or added to the residual stream, with the sums of squares for the
// next norm (residual).
//
// The operands are swapped: 64 rows of w are the 64 rows of wgmma, the rows of x, padded with zeros by TMA to 8, 16, 32 or
// 64, its columns. So the padding costs nothing, and the tensor cores keep up with memory at any batch.
// Grid: at most one block per SM. The work is (tiles of 64 weight rows) x (steps of 128 k), numbered tile after tile and
// dealt evenly, so that every SM streams the same number of bytes whatever n and k are. A block's share begins and ends
// anywhere; a tile that is cut has its parts summed, in the order of k, by whichever block finishes last.
// Block: one thread keeps a ring of steps in flight by TMA (16 KB of weights each, 48 to 80 KB: more than hides the latency
// of HBM) and fills it *before* waiting for the previous kernel, which has yet to write x; one warpgroup multiplies.
//
// gemv_fp8_*: w in e4m3 with scales (fp8.cuh). A step is as many bytes and 256 k. For up to 32 rows x stays bf16 wherever it comes
// from and becomes e4m3 here: a warp takes a token at a time, 8 k a lane, straight from L2 into registers while the step before is
// multiplied, normalises, finds the largest of each SCALE_GROUP and leaves the tile in shared memory, one of two by turns. That
// each block does this anew costs nothing while it is shorter than the 650 ns in which a step's weights come. For 64 rows it would
// be twice as long: there x comes in e4m3, by TMA, and a launch before has made it so (norm.cu, quantise.cu).
// The sums of each SCALE_GROUP, which the tensor cores keep to 14 bits, are scaled and added up in fp32 (as in gemm.cu).
#include "epilogue.cuh"
#include "fp8.cuh"
#include "rope.cuh"

namespace {

constexpr int kTileRows = 64;    // rows of w
constexpr int kStepBytes = 256;  // of a row of w in a step: two boxes
constexpr int kBoxBytes = kStepBytes / 2;
constexpr int kBoxK = 64;  // elements of 16 bits in a box, which is how maps count
constexpr int kWarpgroup = 128;
constexpr int kWarpgroupWarps = kWarpgroup / kWarp;
constexpr int kBytesW = kTileRows * kStepBytes;

constexpr int kConsumerBarrier = 1;  // of those that multiply

template <int kTokens, bool kFp8>
struct GemvShape {
  static constexpr int kStepK = kFp8 ? kStepBytes : kStepBytes / 2;
  static constexpr bool kConverts = kFp8 && kTokens <= 32;                        // x to e4m3
  static constexpr int kBytesX = kConverts ? 0 : kTokens * kStepBytes;            // in a stage
  static constexpr int kBytesNorm = kFp8 ? 0 : kStepK * 2;                        // in a stage
  static constexpr int kBytesBlocks = kFp8 ? 2 * kTileRows / SCALE_ROWS * 4 : 0;  // in a stage: w's scales [box][8]
  static constexpr int kBytesTile = kConverts ? kTokens * kStepBytes : 0;         // x in e4m3: [box][kTokens], swizzled
  static constexpr int kStageBytes = kBytesW + kBytesX;
  static constexpr int kStages = kConverts || kTokens <= 16 ? 5 : kTokens == 32 ? 4 : 3;
  static constexpr int kBytesTokenScales = kFp8 ? 2 * kTokens * 4 : 0;  // x's scales of a step: [box][kTokens]
  // Offsets.
  static constexpr int kTiles = kStages * kStageBytes;                   // [2], tiles of x
  static constexpr int kNorm = kTiles + 2 * kBytesTile;                  // norm weights, [kStages][kStepK]
  static constexpr int kBlocks = kNorm + kStages * kBytesNorm;           // [kStages]
  static constexpr int kTokenScales = kBlocks + kStages * kBytesBlocks;  // of the two tiles, or of the stages
  static constexpr int kScale =
      kTokenScales + (kConverts ? 2 : kStages) * kBytesTokenScales;           // 1 / RMS, [kTokens] floats
  static constexpr int kSquares = kScale + kTokens * 4;                       // sums of squares, [warp][kTokens] floats
  static constexpr int kBarriers = kSquares + kWarpgroupWarps * kTokens * 4;  // full, then empty, [kStages] each
  static constexpr int kTicket = kBarriers + 2 * kStages * (int)sizeof(Barrier);  // the ticket drawn, 16 bytes
  static constexpr int kShared = kTicket + 16;
};
static_assert(GemvShape<8, false>::kShared == GEMV_SHARED_M8 && GemvShape<16, false>::kShared == GEMV_SHARED_M16 &&
              GemvShape<32, false>::kShared == GEMV_SHARED_M32 && GemvShape<64, false>::kShared == GEMV_SHARED_M64);
static_assert(GemvShape<8, true>::kShared == GEMV_FP8_SHARED_M8 &&
              GemvShape<16, true>::kShared == GEMV_FP8_SHARED_M16 &&
              GemvShape<32, true>::kShared == GEMV_FP8_SHARED_M32 &&
              GemvShape<64, true>::kShared == GEMV_FP8_SHARED_M64);

DEVICE void sync_consumers() { named_barrier_sync(kConsumerBarrier, kWarpgroup); }

// Which steps belong to which block.
struct Deal {
  uint32_t tiles, per_tile;  // steps of a tile
};

template <bool kFp8>
DEVICE Deal deal(const GemvParams& p) {
  return {(uint32_t)ceil_div(p.n, kTileRows), (uint32_t)ceil_div(p.k, GemvShape<8, kFp8>::kStepK)};
}
// First step of a block; of the block behind the last one: the number of steps. Needs steps * grid_x < 2^32.
DEVICE uint32_t first_step(const Deal& d, uint32_t block) { return block * (d.tiles * d.per_tile) / grid_x(); }
DEVICE uint32_t block_of(const Deal& d, uint32_t step) { return ((step + 1) * grid_x() - 1) / (d.tiles * d.per_tile); }

// ---- the loading thread ----

// The boxes of a step that begin within k: so many have scales.
DEVICE int boxes_within(const GemvParams& p, uint32_t step) {
  return min_int(2, ceil_div(p.k, SCALE_GROUP) - (int)step * 2);
}

template <int kTokens, bool kNorm, bool kFp8>
DEVICE void load_weights(const GemvParams& p, uint8_t* shared, int stage, Barrier* full, uint32_t tile, uint32_t step) {
  using Shape = GemvShape<kTokens, kFp8>;
  constexpr int kBlockBytes = kTileRows / SCALE_ROWS * 4;
  uint8_t* to = shared + stage * Shape::kStageBytes;
  const bool norm = kNorm && !kFp8;
  const int norm_bytes = norm ? min_int(Shape::kStepK, p.k - step * Shape::kStepK) * 2 : 0;
  const int boxes = kFp8 && p.scales.blocks ? boxes_within(p, step) : 0;
  const int x_scales = kFp8 && !Shape::kConverts ? boxes_within(p, step) * kTokens * 4 : 0;
  mbarrier_arrive_expect_tx(full, Shape::kStageBytes + norm_bytes + boxes * kBlockBytes + x_scales);
  UNROLL for (int box = 0; box < 2; box++)
      tma_load(to + box * (kBytesW / 2), &p.w_map, full, kEvictFirst, (step * 2 + box) * kBoxK, tile * kTileRows);
  if (norm)
    bulk_load(shared + Shape::kNorm + stage * Shape::kBytesNorm, p.norm + step * Shape::kStepK, norm_bytes, full);
  for (int box = 0; box < boxes; box++) {
    const int64_t first = (int64_t)(step * 2 + box) * (p.n / SCALE_ROWS) + tile * (kTileRows / SCALE_ROWS);
    bulk_load(shared + Shape::kBlocks + stage * Shape::kBytesBlocks + box * kBlockBytes, p.scales.blocks + first,
              kBlockBytes, full);
  }
}

template <int kTokens, bool kFp8>
DEVICE void load_x(const GemvParams& p, uint8_t* shared, int stage, Barrier* full, uint32_t step) {
  using Shape = GemvShape<kTokens, kFp8>;
  if (Shape::kConverts) return;  // by those who do it
  uint8_t* to = shared + stage * Shape::kStageBytes + kBytesW;
  UNROLL for (int box = 0; box < 2; box++)
      tma_load(to + box * (Shape::kBytesX / 2), &p.x_map, full, kEvictLast, (step * 2 + box) * kBoxK, 0);
  const int boxes = kFp8 ? boxes_within(p, step) : 0;
  for (int box = 0; box < boxes; box++)
    bulk_load(shared + Shape::kTokenScales + stage * Shape::kBytesTokenScales + box * (kTokens * 4),
              p.x_scales + (int64_t)(step * 2 + box) * p.x_scales_stride, kTokens * 4, full);
}

template <int kTokens, bool kNorm, bool kFp8>
DEVICE void produce(const GemvParams& p, uint8_t* shared, Barrier* full, Barrier* empty) {
  constexpr int kStages = GemvShape<kTokens, kFp8>::kStages;
  const Deal d = deal<kFp8>(p);
  const uint32_t begin = first_step(d, block_x()), count = first_step(d, block_x() + 1) - begin;
  const uint32_t filled = min_int(count, kStages);
  for (uint32_t i = 0; i < filled; i++)
    load_weights<kTokens, kNorm, kFp8>(p, shared, i, &full[i], (begin + i) / d.per_tile, (begin + i) % d.per_tile);
  pdl_wait();
  for (uint32_t i = 0; i < filled; i++) load_x<kTokens, kFp8>(p, shared, i, &full[i], (begin + i) % d.per_tile);
  for (uint32_t i = filled; i < count; i++) {
    const uint32_t stage = i % kStages;
    mbarrier_wait(&empty[stage], (i / kStages & 1) ^ 1);
    load_weights<kTokens, kNorm, kFp8>(p, shared, stage, &full[stage], (begin + i) / d.per_tile,
                                       (begin + i) % d.per_tile);
    load_x<kTokens, kFp8>(p, shared, stage, &full[stage], (begin + i) % d.per_tile);
  }
}

// The i-th token of this warp.
DEVICE int token_of(int i) { return i * kWarpgroupWarps + warp_id(); }

// ---- the norm ----

// scale[token] = 1 / sqrt(mean of squares + eps) of a row of x; 0 for padding rows.
template <int kTokens>
DEVICE void row_scales(const GemvParams& p, float* scale) {
  const int parts = p.k / kTileRows;
  UNROLL for (int i = 0; i < kTokens / kWarpgroupWarps; i++) {
    const int token = token_of(i);
    float sum = 0.f;
    if (token < p.rows)
      for (int part = lane_id(); part < parts; part += kWarp) sum += p.squares[token * parts + part];
    sum = warp_sum(sum);
    if (lane_id() == 0) scale[token] = token < p.rows ? rsqrt_approx(sum / p.k + p.eps) : 0.f;
  }
  sync_consumers();
}

// Normalises a step of x in place: 16 vectors of 8 for each token, so that a thread always has the same 8 of the weights.
template <int kTokens>
DEVICE void normalise(const GemvParams& p, uint8_t* x, const uint16_t* norm, const float* scale, uint32_t step) {
  using Shape = GemvShape<kTokens, false>;
  constexpr int kVectors = Shape::kStepK / 8;
  const int vector = thread_idx() % kVectors;
  if ((int)(step * Shape::kStepK) + vector * 8 < p.k) {
    float weight[8];
    unpack8(load8(norm + vector * 8), weight);
    UNROLL for (int i = 0; i < kTokens / (kWarpgroup / kVectors); i++) {
      const int token = i * (kWarpgroup / kVectors) + thread_idx() / kVectors;
      uint16_t* at =
          (uint16_t*)(x + vector / 8 * (Shape::kBytesX / 2) + token * kBoxBytes + (vector % 8 ^ token % 8) * 16);
      float v[8];
      unpack8(load8(at), v);
      UNROLL for (int j = 0; j < 8; j++) v[j] = round_bf16(v[j] * scale[token]) * weight[j];
      store8(at, pack8(v));
    }
  }
  fence_proxy_async();
  sync_consumers();
}

// ---- fp8: x on its way ----

// What a lane has of a step: 8 neighbours in k of each token of its warp, and of the norm weights.
template <int kTokens>
struct Neighbours {
  static constexpr int kCount = kTokens / kWarpgroupWarps;
  Bf16x8 x[kCount];
  Bf16x8 norm;
};

template <int kTokens, bool kNorm>
DEVICE void read_x(const GemvParams& p, uint32_t step, Neighbours<kTokens>& n) {
  const int k = step * kStepBytes + lane_id() * 8;
  UNROLL for (int i = 0; i < Neighbours<kTokens>::kCount; i++) {
    n.x[i] = Bf16x8{};
    if (k < p.k && token_of(i) < p.rows) n.x[i] = load8(p.x + (int64_t)token_of(i) * p.k + k);
  }
  if (kNorm && k < p.k) n.norm = load8(p.norm + k);
}

// Normalises and quantises it: to `tile` as wgmma wants it, and the scales [box][kTokens].
template <int kTokens, bool kNorm>
DEVICE void quantise(const GemvParams& p, const Neighbours<kTokens>& n, const float* scale, uint32_t step,
                     uint8_t* tile, float* token_scales) {
  using Shape = GemvShape<kTokens, true>;
  const int box = lane_id() / kGroupLanes, inside = lane_id() % kGroupLanes;
  const bool within = (int)step * kStepBytes + lane_id() * 8 < p.k;
  UNROLL for (int i = 0; i < Neighbours<kTokens>::kCount; i++) {
    const int token = token_of(i);
    Bf16x8 x = n.x[i];
    float v[8];
    unpack8(x, v);
    if (kNorm && within) {
      UNROLL for (int j = 0; j < 4; j++) {
        const uint32_t scaled = pack_bf16x2(v[2 * j] * scale[token], v[2 * j + 1] * scale[token]);
        x.pair[j] = multiply_bf16x2(scaled, n.norm.pair[j]);
      }
      unpack8(x, v);
    }
    const float most = group_max(largest(v));
    uint8_t* at =
        tile + box * (Shape::kBytesTile / 2) + token * kBoxBytes + ((inside / 2 ^ token % 8) * 16) + inside % 2 * 8;
    store_e4m3(at, v, quantise_factor(most));
    if (inside == 0) token_scales[box * kTokens + token] = scale_of(most);
  }
  fence_proxy_async();
  sync_consumers();
}

// ---- the sums ----

// Where a block keeps its part of a cut tile: of the tile that began before the block's share, or of the one that begins
// inside of it. The parts are laid out as the accumulators are: [kTokens / 2][kWarpgroup].
template <int kTokens>
DEVICE float* part(const GemvParams& p, const Deal& d, uint32_t block, uint32_t tile) {
  const uint32_t slot = 2 * block + (tile * d.per_tile >= first_step(d, block));
  return p.partial + (int64_t)slot * (kTokens * kTileRows) + thread_idx();
}

// Publishes this block's part of a cut tile. The last of the tile's blocks to come here gets true, and the whole sum.
template <int kTokens>
DEVICE bool merge(const GemvParams& p, const Deal& d, uint32_t tile, uint32_t* ticket, float (&acc)[kTokens / 2]) {
  const uint32_t first = block_of(d, tile * d.per_tile), last = block_of(d, (tile + 1) * d.per_tile - 1);
  float* mine = part<kTokens>(p, d, block_x(), tile);
  UNROLL for (int i = 0; i < kTokens / 2; i++) mine[i * kWarpgroup] = acc[i];
  fence_device();
  sync_consumers();
  if (thread_idx() == 0) *ticket = atomic_ticket(&p.ticket[tile], last - first);
  sync_consumers();
  if (*ticket != last - first) return false;
  fence_device();
  UNROLL for (int i = 0; i < kTokens / 2; i++) acc[i] = 0.f;
  for (uint32_t block = first; block <= last; block++) {
    const float* theirs = part<kTokens>(p, d, block, tile);
    UNROLL for (int i = 0; i < kTokens / 2; i++) acc[i] += theirs[i * kWarpgroup];
  }
  return true;
}

// ---- the result ----

DEVICE float bias(const GemvParams& p, int column) { return p.bias ? bf16_to_float(p.bias[column]) : 0.f; }

// A thread has the sums of rows `column` and `column` + 8 of w, which lie in one block of 16.
DEVICE void store_pair(const GemvParams& p, uint16_t* c, int column, const float (&x)[2]) {
  if (column >= p.n) return;
  UNROLL for (int half = 0; half < 2; half++) c[column + 8 * half] =
      float_to_bf16(x[half] + bias(p, column + 8 * half));
}

DEVICE void store_rotated(const GemvParams& p, int token, int column, const float (&x)[2]) {
  if (column >= p.n) return;
  float v[2];
  UNROLL for (int half = 0; half < 2; half++) v[half] = round_bf16(x[half] + bias(p, column + 8 * half));
  const RopeTarget to = rope_target(p.rope, token, column / p.rope.head_dim);
  if (!to.out) return;
  const RopePair at = rope_pair(to, p.rope.head_dim, column % p.rope.head_dim);
  if (to.rotates) rotate_pair(rope_angles(p.rope, to, at.low), v[0], v[1]);
  if (to.position < 0) v[0] = v[1] = 0.f;
  store_element(to, at.low, v[0]);
  store_element(to, at.high, v[1]);
}

// Adds a pair to the residual stream; the sum of the new values' squares.
DEVICE float add_pair(const GemvParams& p, uint16_t* c, int column, const float (&x)[2]) {
  if (column >= p.n) return 0.f;
  float squares = 0.f;
  UNROLL for (int half = 0; half < 2; half++) {
    uint16_t* at = c + column + 8 * half;
    const float sum = round_bf16(round_bf16(x[half] + bias(p, column + 8 * half)) + bf16_to_float(*at));
    *at = float_to_bf16(sum);
    squares += sum * sum;
  }
  return squares;
}

// The sums of squares of this tile's 64 columns, from those of each thread's columns: over the lanes that share a token, then
// over the warps in order.
template <int kTokens>
DEVICE void store_squares(const GemvParams& p, int tile, float* scratch, const float (&squares)[kTokens / 4]) {
  UNROLL for (int i = 0; i < kTokens / 4; i++) {
    float x = squares[i];
    UNROLL for (int m = 4; m < kWarp; m *= 2) x += shfl_xor(x, m);
    if (lane_id() < 4) scratch[warp_id() * kTokens + i / 2 * 8 + lane_id() * 2 + i % 2] = x;
  }
  sync_consumers();
  const int token = thread_idx();
  if (token < kTokens && token < p.rows) {
    float sum = 0.f;
    UNROLL for (int w = 0; w < kWarpgroupWarps; w++) sum += scratch[w * kTokens + token];
    p.squares_out[token * (p.n / kTileRows) + tile] = sum;
  }
  sync_consumers();
}

template <int kTokens, Epilogue kEpilogue, bool kFp8>
DEVICE void store(const GemvParams& p, int tile, float* scratch, const float (&acc)[kTokens / 2]) {
  const int warp = warp_id();
  const int column = tile * kTileRows + warp * 16 + lane_id() / 4;
  float scale[2] = {1.f, 1.f};
  if (kFp8 && p.scales.rows && column < p.n) {
    UNROLL for (int half = 0; half < 2; half++) scale[half] = p.scales.rows[column + 8 * half];
  }
  float squares[kTokens / 4];
  UNROLL for (int i = 0; i < kTokens / 4; i++) {
    squares[i] = 0.f;
    const int token = i / 2 * 8 + lane_id() % 4 * 2 + i % 2;
    if (token >= p.rows) continue;
    float x[2] = {acc[i / 2 * 4 + i % 2], acc[i / 2 * 4 + i % 2 + 2]};
    if (kFp8) x[0] *= scale[0], x[1] *= scale[1];
    if (kEpilogue == kPlain) store_pair(p, p.c + token * p.n, column, x);
    if (kEpilogue == kRope) store_rotated(p, token, column, x);
    if (kEpilogue == kResidual) squares[i] = add_pair(p, p.c + token * p.n, column, x);
    if (kEpilogue == kSilu && column < p.n)
      p.c[token * (p.n / 2) + tile * (kTileRows / 2) + warp * 8 + lane_id() / 4] =
          float_to_bf16(silu_times(x[0], x[1]));
    if (kEpilogue == kLogits && column < p.n) {
      p.logits[(int64_t)token * p.n + column] = x[0];
      p.logits[(int64_t)token * p.n + column + 8] = x[1];
    }
  }
  if (kEpilogue == kResidual) store_squares<kTokens>(p, tile, scratch, squares);
}

// One step: 64 rows of w times kTokens rows of x.
template <int kTokens>
DEVICE void multiply(float (&acc)[kTokens / 2], const uint8_t* w, const uint8_t* x, bool accumulate) {
  wgmma_fence();
  UNROLL for (int box = 0; box < 2; box++) {
    const uint64_t a = wgmma_descriptor(w + box * (kBytesW / 2), 16, 1024, kSwizzle128);
    const uint64_t b = wgmma_descriptor(x + box * (kTokens * kBoxBytes), 16, 1024, kSwizzle128);
    UNROLL for (int k = 0; k < kBoxBytes / 32; k++)
        wgmma_ss<kTokens>(acc, a + 2 * k, b + 2 * k, accumulate || box > 0 || k > 0);
  }
  wgmma_commit();
}

// The same in e4m3, each box by itself.
template <int kTokens>
DEVICE void multiply_e4m3(float (&sums)[2][kTokens / 2], const uint8_t* w, const uint8_t* x) {
  wgmma_fence();
  UNROLL for (int box = 0; box < 2; box++) {
    const uint64_t a = wgmma_descriptor(w + box * (kBytesW / 2), 16, 1024, kSwizzle128);
    const uint64_t b = wgmma_descriptor(x + box * (kTokens * kBoxBytes), 16, 1024, kSwizzle128);
    UNROLL for (int k = 0; k < kBoxBytes / 32; k++) wgmma_ss_e4m3<kTokens>(sums[box], a + 2 * k, b + 2 * k, k > 0);
  }
  wgmma_commit();
}

// Adds a step's sums, scaled. `of_w`: [box][8], or null; `of_x`: [box][kTokens].
template <int kTokens>
DEVICE void add_scaled(float (&acc)[kTokens / 2], const float (&sums)[2][kTokens / 2], const float* of_w, int boxes,
                       const float* of_x) {
  UNROLL for (int box = 0; box < 2; box++) {
    if (box >= boxes) continue;
    float w[2] = {1.f, 1.f};
    if (of_w) {
      UNROLL for (int half = 0; half < 2; half++) w[half] = of_w[box * (kTileRows / SCALE_ROWS) + warp_id() * 2 + half];
    }
    UNROLL for (int i = 0; i < kTokens / 4; i++) {
      const float x = of_x[box * kTokens + i / 2 * 8 + lane_id() % 4 * 2 + i % 2];
      UNROLL for (int half = 0; half < 2; half++) {
        const int at = i / 2 * 4 + i % 2 + 2 * half;
        acc[at] += sums[box][at] * (x * w[half]);
      }
    }
  }
}

// One step in bf16, the `in_tile`-th of its tile: adds to acc, or sets it if it is the block's `first` of that tile.
template <int kTokens, bool kNorm>
DEVICE void multiply_step(const GemvParams& p, uint8_t* shared, int stage, uint32_t in_tile, const float* scale,
                          bool first, float (&acc)[kTokens / 2]) {
  using Shape = GemvShape<kTokens, false>;
  uint8_t* w = shared + stage * Shape::kStageBytes;
  uint8_t* x = w + kBytesW;
  if (kNorm)
    normalise<kTokens>(p, x, (const uint16_t*)(shared + Shape::kNorm + stage * Shape::kBytesNorm), scale, in_tile);
  multiply<kTokens>(acc, w, x, !first);
  wgmma_wait<0>();
}

// One step in fp8: adds to acc. `x` in e4m3, and its scales.
template <int kTokens>
DEVICE void multiply_step_fp8(const GemvParams& p, uint8_t* shared, int stage, uint32_t in_tile, const uint8_t* x,
                              const float* of_x, float (&acc)[kTokens / 2]) {
  using Shape = GemvShape<kTokens, true>;
  float sums[2][kTokens / 2];
  multiply_e4m3<kTokens>(sums, shared + stage * Shape::kStageBytes, x);
  wgmma_wait<0>();
  const float* of_w = (const float*)(shared + Shape::kBlocks + stage * Shape::kBytesBlocks);
  add_scaled<kTokens>(acc, sums, p.scales.blocks ? of_w : nullptr, boxes_within(p, in_tile), of_x);
  sync_warp();  // others read scales, too
}

template <int kTokens, bool kNorm, Epilogue kEpilogue, bool kFp8>
DEVICE void consume(const GemvParams& p, uint8_t* shared, Barrier* full, Barrier* empty) {
  using Shape = GemvShape<kTokens, kFp8>;
  static_assert(!kNorm || !kFp8 || Shape::kConverts);
  uint32_t* ticket = (uint32_t*)(shared + Shape::kTicket);
  float* scale = (float*)(shared + Shape::kScale);
  float* scratch = (float*)(shared + Shape::kSquares);
  const Deal d = deal<kFp8>(p);
  const uint32_t begin = first_step(d, block_x()), end = first_step(d, block_x() + 1);
  pdl_wait();
  // Not before the wait: attn_decode, which may come next, reads ahead what earlier launches have written.
  pdl_launch_dependents();
  Neighbours<kTokens> neighbours;
  if constexpr (Shape::kConverts) read_x<kTokens, kNorm>(p, begin % d.per_tile, neighbours);
  if (kNorm) row_scales<kTokens>(p, scale);
  uint32_t step = begin;
  while (step < end) {
    const uint32_t tile = step / d.per_tile, from = step;
    const uint32_t to = min_int(end, (tile + 1) * d.per_tile);
    float acc[kTokens / 2];
    if constexpr (kFp8) {
      UNROLL for (int i = 0; i < kTokens / 2; i++) acc[i] = 0.f;
    }
    for (; step < to; step++) {
      const uint32_t i = step - begin, stage = i % Shape::kStages, in_tile = step - tile * d.per_tile;
      if constexpr (kFp8) {
        // What was multiplied two steps ago may be written over: all have met since, in the quantise() of the last step.
        uint8_t* x = shared + (Shape::kConverts ? Shape::kTiles + i % 2 * Shape::kBytesTile
                                                : stage * Shape::kStageBytes + kBytesW);
        const uint32_t scales = Shape::kConverts ? i % 2 : stage;
        float* of_x = (float*)(shared + Shape::kTokenScales + scales * Shape::kBytesTokenScales);
        if constexpr (Shape::kConverts) {
          quantise<kTokens, kNorm>(p, neighbours, scale, in_tile, x, of_x);
          if (step + 1 < end) read_x<kTokens, kNorm>(p, (step + 1) % d.per_tile, neighbours);
        }
        mbarrier_wait(&full[stage], i / Shape::kStages & 1);
        multiply_step_fp8<kTokens>(p, shared, stage, in_tile, x, of_x, acc);
      } else {
        mbarrier_wait(&full[stage], i / Shape::kStages & 1);
        multiply_step<kTokens, kNorm>(p, shared, stage, in_tile, scale, step == from, acc);
      }
      if (lane_id() == 0) mbarrier_arrive(&empty[stage]);
    }
    if (to - from == d.per_tile || merge<kTokens>(p, d, tile, ticket, acc))
      store<kTokens, kEpilogue, kFp8>(p, tile, scratch, acc);
  }
}

template <int kTokens, bool kNorm, Epilogue kEpilogue, bool kFp8 = false>
DEVICE void gemv(const GemvParams& p) {
  using Shape = GemvShape<kTokens, kFp8>;
  uint8_t* shared = shared_memory();
  Barrier* full = (Barrier*)(shared + Shape::kBarriers);
  Barrier* empty = full + Shape::kStages;
  if (thread_idx() == kWarpgroup) {
    prefetch_tensor_map(&p.w_map);
    if (!Shape::kConverts) prefetch_tensor_map(&p.x_map);
    for (int s = 0; s < Shape::kStages; s++) {
      mbarrier_init(&full[s], 1);
      mbarrier_init(&empty[s], kWarpgroupWarps);
    }
    mbarrier_init_fence();
  }
  sync_threads();
  if (thread_idx() < kWarpgroup) {
    consume<kTokens, kNorm, kEpilogue, kFp8>(p, shared, full, empty);
  } else if (thread_idx() == kWarpgroup) {
    produce<kTokens, kNorm, kFp8>(p, shared, full, empty);
  }
}

}  // namespace

KERNEL(gemv_norm_m8, GemvParams, GEMV_THREADS) { gemv<8, true, kPlain>(p); }
KERNEL(gemv_norm_m16, GemvParams, GEMV_THREADS) { gemv<16, true, kPlain>(p); }
KERNEL(gemv_norm_m32, GemvParams, GEMV_THREADS) { gemv<32, true, kPlain>(p); }
KERNEL(gemv_norm_m64, GemvParams, GEMV_THREADS) { gemv<64, true, kPlain>(p); }
KERNEL(gemv_norm_rope_m8, GemvParams, GEMV_THREADS) { gemv<8, true, kRope>(p); }
KERNEL(gemv_norm_rope_m16, GemvParams, GEMV_THREADS) { gemv<16, true, kRope>(p); }
KERNEL(gemv_norm_rope_m32, GemvParams, GEMV_THREADS) { gemv<32, true, kRope>(p); }
KERNEL(gemv_norm_rope_m64, GemvParams, GEMV_THREADS) { gemv<64, true, kRope>(p); }
KERNEL(gemv_norm_silu_m8, GemvParams, GEMV_THREADS) { gemv<8, true, kSilu>(p); }
KERNEL(gemv_norm_silu_m16, GemvParams, GEMV_THREADS) { gemv<16, true, kSilu>(p); }
KERNEL(gemv_norm_silu_m32, GemvParams, GEMV_THREADS) { gemv<32, true, kSilu>(p); }
KERNEL(gemv_norm_silu_m64, GemvParams, GEMV_THREADS) { gemv<64, true, kSilu>(p); }
KERNEL(gemv_residual_m8, GemvParams, GEMV_THREADS) { gemv<8, false, kResidual>(p); }
KERNEL(gemv_residual_m16, GemvParams, GEMV_THREADS) { gemv<16, false, kResidual>(p); }
KERNEL(gemv_residual_m32, GemvParams, GEMV_THREADS) { gemv<32, false, kResidual>(p); }
KERNEL(gemv_residual_m64, GemvParams, GEMV_THREADS) { gemv<64, false, kResidual>(p); }
KERNEL(gemv_logits_m8, GemvParams, GEMV_THREADS) { gemv<8, false, kLogits>(p); }
KERNEL(gemv_logits_m16, GemvParams, GEMV_THREADS) { gemv<16, false, kLogits>(p); }
KERNEL(gemv_logits_m32, GemvParams, GEMV_THREADS) { gemv<32, false, kLogits>(p); }
KERNEL(gemv_logits_m64, GemvParams, GEMV_THREADS) { gemv<64, false, kLogits>(p); }
KERNEL(gemv_fp8_norm_m8, GemvParams, GEMV_THREADS) { gemv<8, true, kPlain, true>(p); }
KERNEL(gemv_fp8_norm_m16, GemvParams, GEMV_THREADS) { gemv<16, true, kPlain, true>(p); }
KERNEL(gemv_fp8_norm_m32, GemvParams, GEMV_THREADS) { gemv<32, true, kPlain, true>(p); }
KERNEL(gemv_fp8_m64, GemvParams, GEMV_THREADS) { gemv<64, false, kPlain, true>(p); }
KERNEL(gemv_fp8_norm_rope_m8, GemvParams, GEMV_THREADS) { gemv<8, true, kRope, true>(p); }
KERNEL(gemv_fp8_norm_rope_m16, GemvParams, GEMV_THREADS) { gemv<16, true, kRope, true>(p); }
KERNEL(gemv_fp8_norm_rope_m32, GemvParams, GEMV_THREADS) { gemv<32, true, kRope, true>(p); }
KERNEL(gemv_fp8_rope_m64, GemvParams, GEMV_THREADS) { gemv<64, false, kRope, true>(p); }
KERNEL(gemv_fp8_norm_silu_m8, GemvParams, GEMV_THREADS) { gemv<8, true, kSilu, true>(p); }
KERNEL(gemv_fp8_norm_silu_m16, GemvParams, GEMV_THREADS) { gemv<16, true, kSilu, true>(p); }
KERNEL(gemv_fp8_norm_silu_m32, GemvParams, GEMV_THREADS) { gemv<32, true, kSilu, true>(p); }
KERNEL(gemv_fp8_silu_m64, GemvParams, GEMV_THREADS) { gemv<64, false, kSilu, true>(p); }
KERNEL(gemv_fp8_residual_m8, GemvParams, GEMV_THREADS) { gemv<8, false, kResidual, true>(p); }
KERNEL(gemv_fp8_residual_m16, GemvParams, GEMV_THREADS) { gemv<16, false, kResidual, true>(p); }
KERNEL(gemv_fp8_residual_m32, GemvParams, GEMV_THREADS) { gemv<32, false, kResidual, true>(p); }
KERNEL(gemv_fp8_residual_m64, GemvParams, GEMV_THREADS) { gemv<64, false, kResidual, true>(p); }
// Without what is fused: for ponder study ablation.
KERNEL(gemv_m8, GemvParams, GEMV_THREADS) { gemv<8, false, kPlain>(p); }
KERNEL(gemv_m16, GemvParams, GEMV_THREADS) { gemv<16, false, kPlain>(p); }
KERNEL(gemv_m32, GemvParams, GEMV_THREADS) { gemv<32, false, kPlain>(p); }
KERNEL(gemv_m64, GemvParams, GEMV_THREADS) { gemv<64, false, kPlain>(p); }
KERNEL(gemv_rope_m8, GemvParams, GEMV_THREADS) { gemv<8, false, kRope>(p); }
KERNEL(gemv_rope_m16, GemvParams, GEMV_THREADS) { gemv<16, false, kRope>(p); }
KERNEL(gemv_rope_m32, GemvParams, GEMV_THREADS) { gemv<32, false, kRope>(p); }
KERNEL(gemv_rope_m64, GemvParams, GEMV_THREADS) { gemv<64, false, kRope>(p); }
KERNEL(gemv_silu_m8, GemvParams, GEMV_THREADS) { gemv<8, false, kSilu>(p); }
KERNEL(gemv_silu_m16, GemvParams, GEMV_THREADS) { gemv<16, false, kSilu>(p); }
KERNEL(gemv_silu_m32, GemvParams, GEMV_THREADS) { gemv<32, false, kSilu>(p); }
KERNEL(gemv_silu_m64, GemvParams, GEMV_THREADS) { gemv<64, false, kSilu>(p); }
KERNEL(gemv_norm_logits_m8, GemvParams, GEMV_THREADS) { gemv<8, true, kLogits>(p); }
KERNEL(gemv_norm_logits_m16, GemvParams, GEMV_THREADS) { gemv<16, true, kLogits>(p); }
KERNEL(gemv_norm_logits_m32, GemvParams, GEMV_THREADS) { gemv<32, true, kLogits>(p); }
KERNEL(gemv_norm_logits_m64, GemvParams, GEMV_THREADS) { gemv<64, true, kLogits>(p); }
