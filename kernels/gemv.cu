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
#include "epilogue.cuh"
#include "rope.cuh"

namespace {

constexpr int kTileRows = 64;  // rows of w
constexpr int kStepK = 128;    // two boxes of 64 k
constexpr int kBoxK = 64;
constexpr int kConsumers = 128;  // threads
constexpr int kConsumerWarps = kConsumers / kWarp;
constexpr int kConsumerBarrier = 1;
constexpr int kBytesW = kTileRows * kStepK * 2;
constexpr int kBytesNorm = kStepK * 2;

template <int kTokens>
struct GemvShape {
  static constexpr int kBytesX = kTokens * kStepK * 2;
  static constexpr int kStageBytes = kBytesW + kBytesX;
  static constexpr int kStages = kTokens <= 16 ? 5 : kTokens == 32 ? 4 : 3;
  static constexpr int kNorm = kStages * kStageBytes;          // offset: norm weights, [kStages][kStepK]
  static constexpr int kScale = kNorm + kStages * kBytesNorm;  // offset: 1 / root mean square, [kTokens] floats
  static constexpr int kSquares = kScale + kTokens * 4;        // offset: sums of squares, [warp][kTokens] floats
  static constexpr int kBarriers = kSquares + kConsumerWarps * kTokens * 4;  // offset: full, then empty, [kStages] each
  static constexpr int kTicket = kBarriers + 2 * kStages * (int)sizeof(Barrier);  // offset: the ticket drawn, 16 bytes
  static constexpr int kShared = kTicket + 16;
};
static_assert(GemvShape<8>::kShared == GEMV_SHARED_M8 && GemvShape<16>::kShared == GEMV_SHARED_M16 &&
              GemvShape<32>::kShared == GEMV_SHARED_M32 && GemvShape<64>::kShared == GEMV_SHARED_M64);

// Which steps belong to which block.
struct Deal {
  uint32_t tiles, per_tile;  // steps of a tile
};

DEVICE Deal deal(const GemvParams& p) { return {(uint32_t)ceil_div(p.n, kTileRows), (uint32_t)ceil_div(p.k, kStepK)}; }
// First step of a block; of the block behind the last one: the number of steps. Needs steps * grid_x < 2^32.
DEVICE uint32_t first_step(const Deal& d, uint32_t block) { return block * (d.tiles * d.per_tile) / grid_x(); }
DEVICE uint32_t block_of(const Deal& d, uint32_t step) { return ((step + 1) * grid_x() - 1) / (d.tiles * d.per_tile); }

// ---- the loading thread ----

template <int kTokens, bool kNorm>
DEVICE void load_weights(const GemvParams& p, uint8_t* shared, int stage, Barrier* full, uint32_t tile, uint32_t step) {
  using Shape = GemvShape<kTokens>;
  uint8_t* to = shared + stage * Shape::kStageBytes;
  const int norm_bytes = kNorm ? min_int(kStepK, p.k - step * kStepK) * 2 : 0;
  mbarrier_arrive_expect_tx(full, Shape::kStageBytes + norm_bytes);
  UNROLL for (int box = 0; box < 2; box++)
      tma_load(to + box * (kBytesW / 2), &p.w_map, full, kEvictFirst, step * kStepK + box * kBoxK, tile * kTileRows);
  if (kNorm) bulk_load(shared + Shape::kNorm + stage * kBytesNorm, p.norm + step * kStepK, norm_bytes, full);
}

template <int kTokens>
DEVICE void load_x(const GemvParams& p, uint8_t* shared, int stage, Barrier* full, uint32_t step) {
  using Shape = GemvShape<kTokens>;
  uint8_t* to = shared + stage * Shape::kStageBytes + kBytesW;
  UNROLL for (int box = 0; box < 2; box++)
      tma_load(to + box * (Shape::kBytesX / 2), &p.x_map, full, kEvictLast, step * kStepK + box * kBoxK, 0);
}

template <int kTokens, bool kNorm>
DEVICE void produce(const GemvParams& p, uint8_t* shared, Barrier* full, Barrier* empty) {
  constexpr int kStages = GemvShape<kTokens>::kStages;
  const Deal d = deal(p);
  const uint32_t begin = first_step(d, block_x()), count = first_step(d, block_x() + 1) - begin;
  const uint32_t filled = min_int(count, kStages);
  for (uint32_t i = 0; i < filled; i++)
    load_weights<kTokens, kNorm>(p, shared, i, &full[i], (begin + i) / d.per_tile, (begin + i) % d.per_tile);
  pdl_wait();
  for (uint32_t i = 0; i < filled; i++) load_x<kTokens>(p, shared, i, &full[i], (begin + i) % d.per_tile);
  for (uint32_t i = filled; i < count; i++) {
    const uint32_t stage = i % kStages;
    mbarrier_wait(&empty[stage], (i / kStages & 1) ^ 1);
    load_weights<kTokens, kNorm>(p, shared, stage, &full[stage], (begin + i) / d.per_tile, (begin + i) % d.per_tile);
    load_x<kTokens>(p, shared, stage, &full[stage], (begin + i) % d.per_tile);
  }
}

// ---- the norm ----

// scale[token] = 1 / sqrt(mean of squares + eps) of a row of x; 0 for padding rows.
template <int kTokens>
DEVICE void row_scales(const GemvParams& p, float* scale) {
  const int parts = p.k / kTileRows;
  UNROLL for (int i = 0; i < kTokens / kConsumerWarps; i++) {
    const int token = i * kConsumerWarps + warp_id();
    float sum = 0.f;
    if (token < p.rows)
      for (int part = lane_id(); part < parts; part += kWarp) sum += p.squares[token * parts + part];
    sum = warp_sum(sum);
    if (lane_id() == 0) scale[token] = token < p.rows ? rsqrt_approx(sum / p.k + p.eps) : 0.f;
  }
  named_barrier_sync(kConsumerBarrier, kConsumers);
}

// Normalises a step of x in place: 16 vectors of 8 for each token, so that a thread always has the same 8 of the weights.
template <int kTokens>
DEVICE void normalise(const GemvParams& p, uint8_t* x, const uint16_t* norm, const float* scale, uint32_t step) {
  constexpr int kVectors = kStepK / 8;
  const int vector = thread_idx() % kVectors;
  if ((int)(step * kStepK) + vector * 8 < p.k) {
    float weight[8];
    unpack8(load8(norm + vector * 8), weight);
    UNROLL for (int i = 0; i < kTokens / (kConsumers / kVectors); i++) {
      const int token = i * (kConsumers / kVectors) + thread_idx() / kVectors;
      uint16_t* at = (uint16_t*)(x + vector / 8 * (GemvShape<kTokens>::kBytesX / 2) + token * (kBoxK * 2) +
                                 (vector % 8 ^ token % 8) * 16);
      float v[8];
      unpack8(load8(at), v);
      UNROLL for (int j = 0; j < 8; j++) v[j] = round_bf16(v[j] * scale[token]) * weight[j];
      store8(at, pack8(v));
    }
  }
  fence_proxy_async();
  named_barrier_sync(kConsumerBarrier, kConsumers);
}

// ---- the sums ----

// Where a block keeps its part of a cut tile: of the tile that began before the block's share, or of the one that begins
// inside of it. The parts are laid out as the accumulators are: [kTokens / 2][kConsumers].
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
  UNROLL for (int i = 0; i < kTokens / 2; i++) mine[i * kConsumers] = acc[i];
  fence_device();
  named_barrier_sync(kConsumerBarrier, kConsumers);
  if (thread_idx() == 0) *ticket = atomic_ticket(&p.ticket[tile], last - first);
  named_barrier_sync(kConsumerBarrier, kConsumers);
  if (*ticket != last - first) return false;
  fence_device();
  UNROLL for (int i = 0; i < kTokens / 2; i++) acc[i] = 0.f;
  for (uint32_t block = first; block <= last; block++) {
    const float* theirs = part<kTokens>(p, d, block, tile);
    UNROLL for (int i = 0; i < kTokens / 2; i++) acc[i] += theirs[i * kConsumers];
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
  named_barrier_sync(kConsumerBarrier, kConsumers);
  const int token = thread_idx();
  if (token < kTokens && token < p.rows) {
    float sum = 0.f;
    UNROLL for (int w = 0; w < kConsumerWarps; w++) sum += scratch[w * kTokens + token];
    p.squares_out[token * (p.n / kTileRows) + tile] = sum;
  }
  named_barrier_sync(kConsumerBarrier, kConsumers);
}

template <int kTokens, Epilogue kEpilogue>
DEVICE void store(const GemvParams& p, int tile, float* scratch, const float (&acc)[kTokens / 2]) {
  const int column = tile * kTileRows + warp_id() * 16 + lane_id() / 4;
  float squares[kTokens / 4];
  UNROLL for (int i = 0; i < kTokens / 4; i++) {
    squares[i] = 0.f;
    const int token = i / 2 * 8 + lane_id() % 4 * 2 + i % 2;
    if (token >= p.rows) continue;
    const float x[2] = {acc[i / 2 * 4 + i % 2], acc[i / 2 * 4 + i % 2 + 2]};
    if (kEpilogue == kPlain) store_pair(p, p.c + token * p.n, column, x);
    if (kEpilogue == kRope) store_rotated(p, token, column, x);
    if (kEpilogue == kResidual) squares[i] = add_pair(p, p.c + token * p.n, column, x);
    if (kEpilogue == kSilu && column < p.n)
      p.c[token * (p.n / 2) + tile * (kTileRows / 2) + warp_id() * 8 + lane_id() / 4] =
          float_to_bf16(silu_times(x[0], x[1]));
    if (kEpilogue == kLogits && column < p.n) {
      p.logits[(int64_t)token * p.n + column] = x[0];
      p.logits[(int64_t)token * p.n + column + 8] = x[1];
    }
  }
  if (kEpilogue == kResidual) store_squares<kTokens>(p, tile, scratch, squares);
}

template <int kTokens, bool kNorm, Epilogue kEpilogue>
DEVICE void consume(const GemvParams& p, uint8_t* shared, Barrier* full, Barrier* empty) {
  using Shape = GemvShape<kTokens>;
  uint32_t* ticket = (uint32_t*)(shared + Shape::kTicket);
  float* scale = (float*)(shared + Shape::kScale);
  float* scratch = (float*)(shared + Shape::kSquares);
  const Deal d = deal(p);
  const uint32_t begin = first_step(d, block_x()), end = first_step(d, block_x() + 1);
  pdl_wait();
  // Not before the wait: attn_decode, which may come next, reads ahead what earlier launches have written.
  pdl_launch_dependents();
  if (kNorm) row_scales<kTokens>(p, scale);
  uint32_t step = begin;
  while (step < end) {
    const uint32_t tile = step / d.per_tile, from = step;
    const uint32_t to = min_int(end, (tile + 1) * d.per_tile);
    float acc[kTokens / 2];
    for (; step < to; step++) {
      const uint32_t i = step - begin, stage = i % Shape::kStages;
      mbarrier_wait(&full[stage], i / Shape::kStages & 1);
      uint8_t* w = shared + stage * Shape::kStageBytes;
      uint8_t* x = w + kBytesW;
      if (kNorm)
        normalise<kTokens>(p, x, (const uint16_t*)(shared + Shape::kNorm + stage * kBytesNorm), scale,
                           step - tile * d.per_tile);
      wgmma_fence();
      UNROLL for (int box = 0; box < 2; box++) {
        const uint64_t a = wgmma_descriptor(w + box * (kBytesW / 2), 16, 1024, kSwizzle128);
        const uint64_t b = wgmma_descriptor(x + box * (Shape::kBytesX / 2), 16, 1024, kSwizzle128);
        UNROLL for (int k = 0; k < kBoxK / 16; k++)
            wgmma_ss<kTokens>(acc, a + 2 * k, b + 2 * k, step > from || box > 0 || k > 0);
      }
      wgmma_commit();
      wgmma_wait<0>();
      if (lane_id() == 0) mbarrier_arrive(&empty[stage]);
    }
    if (to - from == d.per_tile || merge<kTokens>(p, d, tile, ticket, acc))
      store<kTokens, kEpilogue>(p, tile, scratch, acc);
  }
}

template <int kTokens, bool kNorm, Epilogue kEpilogue>
DEVICE void gemv(const GemvParams& p) {
  using Shape = GemvShape<kTokens>;
  uint8_t* shared = shared_memory();
  Barrier* full = (Barrier*)(shared + Shape::kBarriers);
  Barrier* empty = full + Shape::kStages;
  if (thread_idx() == kConsumers) {
    prefetch_tensor_map(&p.w_map);
    prefetch_tensor_map(&p.x_map);
    for (int s = 0; s < Shape::kStages; s++) {
      mbarrier_init(&full[s], 1);
      mbarrier_init(&empty[s], kConsumerWarps);
    }
    mbarrier_init_fence();
  }
  sync_threads();
  if (thread_idx() < kConsumers) {
    consume<kTokens, kNorm, kEpilogue>(p, shared, full, empty);
  } else if (thread_idx() == kConsumers) {
    produce<kTokens, kNorm>(p, shared, full, empty);
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
