// gemv_*: c [rows][n] = x [rows][k] w [n][k]^T for 1 to 16 rows, bf16 with fp32 accumulation and a fused epilogue. The
// product of decode: its time is the time to read w, once.
//
// The operands are swapped: 64 rows of w are the 64 rows of wgmma, the rows of x, padded with zeros by TMA to 8 or 16, its
// columns. So the padding costs nothing, and the tensor cores keep up with memory at any batch.
// Grid: at most one block per SM. The work is (tiles of 64 weight rows) x (steps of 128 k), numbered tile after tile and
// dealt evenly, so that every SM streams the same number of bytes whatever n and k are. A block's share begins and ends
// anywhere; a tile that is cut has its parts summed, in the order of k, by whichever block finishes last.
// Block: one thread keeps a ring of five steps in flight by TMA (80 KB of weights, four times what hides the latency of
// HBM) and fills it *before* waiting for the previous kernel, which has yet to write x; one warpgroup multiplies.
#include "epilogue.cuh"

namespace {

constexpr int kTileRows = 64;  // rows of w
constexpr int kStepK = 128;    // two boxes of 64 k
constexpr int kBoxK = 64;
constexpr int kStages = 5;
constexpr int kConsumers = 128;  // threads
constexpr int kBytesW = kTileRows * kStepK * 2;

template <int kTokens>
struct GemvShape {
  static constexpr int kBytesX = kTokens * kStepK * 2;
  static constexpr int kStageBytes = kBytesW + kBytesX;
  static constexpr int kBarriers = kStages * kStageBytes;  // offset: full, then empty, [kStages] each
  static constexpr int kTicket = kBarriers + 2 * kStages * (int)sizeof(Barrier);  // offset: the ticket drawn, 16 bytes
  static constexpr int kShared = kTicket + 16;
};
static_assert(GemvShape<8>::kShared == GEMV_SHARED_M8 && GemvShape<16>::kShared == GEMV_SHARED_M16);

// Which steps belong to which block.
struct Deal {
  uint32_t tiles, per_tile;  // steps of a tile
};

DEVICE Deal deal(const GemvParams& p) { return {(uint32_t)ceil_div(p.n, kTileRows), (uint32_t)ceil_div(p.k, kStepK)}; }
// First step of a block; of the block behind the last one: the number of steps. Needs steps * grid_x < 2^32.
DEVICE uint32_t first_step(const Deal& d, uint32_t block) { return block * (d.tiles * d.per_tile) / grid_x(); }
DEVICE uint32_t block_of(const Deal& d, uint32_t step) { return ((step + 1) * grid_x() - 1) / (d.tiles * d.per_tile); }

template <int kTokens>
DEVICE void load_weights(const GemvParams& p, uint8_t* stage, Barrier* full, uint32_t tile, uint32_t step) {
  mbarrier_arrive_expect_tx(full, GemvShape<kTokens>::kStageBytes);
  UNROLL for (int box = 0; box < 2; box++)
      tma_load(stage + box * (kBytesW / 2), &p.w_map, full, kEvictFirst, step * kStepK + box * kBoxK, tile * kTileRows);
}

template <int kTokens>
DEVICE void load_x(const GemvParams& p, uint8_t* stage, Barrier* full, uint32_t step) {
  constexpr int kBytesX = GemvShape<kTokens>::kBytesX;
  UNROLL for (int box = 0; box < 2; box++)
      tma_load(stage + kBytesW + box * (kBytesX / 2), &p.x_map, full, kEvictLast, step * kStepK + box * kBoxK, 0);
}

template <int kTokens>
DEVICE void produce(const GemvParams& p, uint8_t* shared, Barrier* full, Barrier* empty) {
  constexpr int kStageBytes = GemvShape<kTokens>::kStageBytes;
  const Deal d = deal(p);
  const uint32_t begin = first_step(d, block_x()), count = first_step(d, block_x() + 1) - begin;
  const uint32_t filled = min_int(count, kStages);
  for (uint32_t i = 0; i < filled; i++)
    load_weights<kTokens>(p, shared + i * kStageBytes, &full[i], (begin + i) / d.per_tile, (begin + i) % d.per_tile);
  pdl_wait();
  for (uint32_t i = 0; i < filled; i++)
    load_x<kTokens>(p, shared + i * kStageBytes, &full[i], (begin + i) % d.per_tile);
  for (uint32_t i = filled; i < count; i++) {
    const uint32_t stage = i % kStages;
    mbarrier_wait(&empty[stage], (i / kStages & 1) ^ 1);
    uint8_t* to = shared + stage * kStageBytes;
    load_weights<kTokens>(p, to, &full[stage], (begin + i) / d.per_tile, (begin + i) % d.per_tile);
    load_x<kTokens>(p, to, &full[stage], (begin + i) % d.per_tile);
  }
}

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
  named_barrier_sync(1, kConsumers);
  if (thread_idx() == 0) *ticket = atomic_ticket(&p.ticket[tile], last - first);
  named_barrier_sync(1, kConsumers);
  if (*ticket != last - first) return false;
  fence_device();
  UNROLL for (int i = 0; i < kTokens / 2; i++) acc[i] = 0.f;
  for (uint32_t block = first; block <= last; block++) {
    const float* theirs = part<kTokens>(p, d, block, tile);
    UNROLL for (int i = 0; i < kTokens / 2; i++) acc[i] += theirs[i * kConsumers];
  }
  return true;
}

template <int kTokens, Epilogue kEpilogue>
DEVICE void store(const GemvParams& p, int tile, const float (&acc)[kTokens / 2]) {
  const int warp = warp_id(), lane = lane_id();
  const int n = tile * kTileRows + warp * 16 + lane / 4;  // this thread has rows n and n + 8 of w
  UNROLL for (int i = 0; i < kTokens / 4; i++) {
    const int token = i / 2 * 8 + lane % 4 * 2 + i % 2;
    if (token >= p.rows) continue;
    const float x[2] = {acc[i / 2 * 4 + i % 2], acc[i / 2 * 4 + i % 2 + 2]};
    UNROLL for (int half = 0; half < 2; half++) {
      const int column = n + 8 * half;
      if (column >= p.n) continue;
      if (kEpilogue == kPlain) p.c[token * p.n + column] = float_to_bf16(x[half]);
      if (kEpilogue == kBias) p.c[token * p.n + column] = float_to_bf16(x[half] + bf16_to_float(p.bias[column]));
      if (kEpilogue == kLogits) p.logits[token * p.n + column] = x[half];
    }
    if (kEpilogue == kSilu && n < p.n) {
      const int column = tile * (kTileRows / 2) + warp * 8 + lane / 4;
      p.c[token * (p.n / 2) + column] = float_to_bf16(silu_times(x[0], x[1]));
    }
  }
}

template <int kTokens, Epilogue kEpilogue>
DEVICE void consume(const GemvParams& p, uint8_t* shared, Barrier* full, Barrier* empty, uint32_t* ticket) {
  using Shape = GemvShape<kTokens>;
  const Deal d = deal(p);
  const uint32_t begin = first_step(d, block_x()), end = first_step(d, block_x() + 1);
  pdl_wait();
  uint32_t step = begin;
  while (step < end) {
    const uint32_t tile = step / d.per_tile, from = step;
    const uint32_t to = min_int(end, (tile + 1) * d.per_tile);
    float acc[kTokens / 2];
    for (; step < to; step++) {
      const uint32_t i = step - begin, stage = i % kStages;
      mbarrier_wait(&full[stage], i / kStages & 1);
      const uint8_t* w = shared + stage * Shape::kStageBytes;
      wgmma_fence();
      UNROLL for (int box = 0; box < 2; box++) {
        const uint64_t a = wgmma_descriptor(w + box * (kBytesW / 2), 16, 1024, kSwizzle128);
        const uint64_t b = wgmma_descriptor(w + kBytesW + box * (Shape::kBytesX / 2), 16, 1024, kSwizzle128);
        UNROLL for (int k = 0; k < kBoxK / 16; k++)
            wgmma_ss<kTokens>(acc, a + 2 * k, b + 2 * k, step > from || box > 0 || k > 0);
      }
      wgmma_commit();
      wgmma_wait<0>();
      if (lane_id() == 0) mbarrier_arrive(&empty[stage]);
    }
    if (to - from == d.per_tile || merge<kTokens>(p, d, tile, ticket, acc)) store<kTokens, kEpilogue>(p, tile, acc);
  }
}

template <int kTokens, Epilogue kEpilogue>
DEVICE void gemv(const GemvParams& p) {
  using Shape = GemvShape<kTokens>;
  pdl_launch_dependents();
  uint8_t* shared = shared_memory();
  Barrier* full = (Barrier*)(shared + Shape::kBarriers);
  Barrier* empty = full + kStages;
  if (thread_idx() == kConsumers) {
    prefetch_tensor_map(&p.w_map);
    prefetch_tensor_map(&p.x_map);
    for (int s = 0; s < kStages; s++) {
      mbarrier_init(&full[s], 1);
      mbarrier_init(&empty[s], kConsumers / kWarp);
    }
    mbarrier_init_fence();
  }
  sync_threads();
  if (thread_idx() < kConsumers) {
    consume<kTokens, kEpilogue>(p, shared, full, empty, (uint32_t*)(shared + Shape::kTicket));
  } else if (thread_idx() == kConsumers) {
    produce<kTokens>(p, shared, full, empty);
  }
}

}  // namespace

KERNEL(gemv_m8, GemvParams, GEMV_THREADS) { gemv<8, kPlain>(p); }
KERNEL(gemv_bias_m8, GemvParams, GEMV_THREADS) { gemv<8, kBias>(p); }
KERNEL(gemv_silu_m8, GemvParams, GEMV_THREADS) { gemv<8, kSilu>(p); }
KERNEL(gemv_logits_m8, GemvParams, GEMV_THREADS) { gemv<8, kLogits>(p); }
KERNEL(gemv_m16, GemvParams, GEMV_THREADS) { gemv<16, kPlain>(p); }
KERNEL(gemv_bias_m16, GemvParams, GEMV_THREADS) { gemv<16, kBias>(p); }
KERNEL(gemv_silu_m16, GemvParams, GEMV_THREADS) { gemv<16, kSilu>(p); }
KERNEL(gemv_logits_m16, GemvParams, GEMV_THREADS) { gemv<16, kLogits>(p); }
