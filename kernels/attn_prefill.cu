// attn_prefill: causal attention of ragged chunks of query tokens over their sequences' paged K and V.
//
// A tile is up to 64 rows of Q per consumer warpgroup that share one kv head: (query token, head of the group), head
// fastest, so rows / group tokens (a group that does not divide the rows leaves some idle; group <= 16). The host lists
// the tiles, longest first; work item i is (tile i / kv_heads, kv head i % kv_heads), so that blocks that run together
// share K and V in L2. A block starts with the item of its number and draws further ones from a ticket counter.
// Keys and values go by tiles of 128 tokens (two pages) at absolute positions, newest first, so that where a prompt is
// cut into chunks does not change the order of any sum.
//
// Warpgroup 0 loads: one thread, TMA, rings of tiles for K and for V. It also draws the items, ahead of their time, and
// hands each to the consumers with its Q, of which there are two, so that the next one is there when an item ends.
// The other warpgroups own 64 rows each: S = Q K^T with both operands in shared memory, online softmax in registers,
// O += P V with P from registers and V transposed by wgmma. Inside a warpgroup the softmax of one tile overlaps the P V
// of the tile before; between them, named barriers hand the tensor cores round so that one computes while the others
// exponentiate. Heads of 128 have two consumers, whose registers O fills. Heads of 64 have half the products for each
// exponential and room for three consumers, which together keep both the tensor cores and the special function units
// busy.
//
// What one tile of keys costs a consumer, counted in the machine code, in clocks of a quarter of an SM (one warp):
//
//                         d64    d128
//   tensor cores          512    1024   2 * 64 * 128 * head_dim multiply-adds at 2048 a clock and SM
//   exponentials          528     528   66 a lane at 16 a clock and SM
//   instructions          422     465   one a clock; a masked tile 148 more
//   consumers               3       2   a round takes the longest sum: 1584 (exponentials) and 2048 (tensor cores)
//
// So heads of 128 should keep the tensor cores busy but for the ends of items, about 1500 clocks each; heads of 64 are
// bound by exponentials and products at once, and any wait shows.
//
// Why a counter deals the items: of the ideal time for one prompt of 2k, 4k and 8k tokens (32 over 8 heads of 128, 132
// blocks, simulated) the longest-first list takes 1.19, 1.12 and 1.06 when dealt out in turn, 1.03, 1.00 and 1.00 there
// and back again (snake order), and 1.03, 1.01 and 1.00 when drawn. A ragged batch of five (40 over 8 heads) takes 1.60,
// 1.45 and 1.15.
//
// fp8 pages (_fp8): wgmma transposes no e4m3, and multiplies it with nothing but fp8. So a third ring, whose tiles are as they lie in
// the pages, K and V by turns, stands before the two others: three warps of the loading warpgroup, idle otherwise, convert each of
// its tiles to f16, which holds e4m3 exactly; Q comes in f16, and P is made so. The scale of K is in p.scale, that of V in
// store_output(). Eight numbers cost a lane 11 instructions, so a round of heads of 128 (two tiles) has 470 more for each of
// the three, and shared memory moves 1.3 times the bytes (not yet run on a GPU).
//
// Masking: only tiles that reach beyond the warpgroup's first query are masked, and with a sliding window those that
// begin before its last query's; tiles before every query's window are not read. The keys behind a sequence's end are
// masked by causality; the values there must be finite (P is 0): pools are zeroed at the start and only ever hold what
// rope_append wrote. Rows of Q behind the tile's tokens compute something that nobody stores.
//
// Grid: min(tiles * kv_heads, processors) blocks; shared memory ATTN_PREFILL_SHARED_D64 / _D128, and _FP8 of these.
#include "attention.cuh"

constexpr int kTileTokens = 2 * PAGE_TOKENS;
constexpr int kWarpgroup = 128;
constexpr int kWarpgroupWarps = kWarpgroup / kWarp;
constexpr int kConsumerRows = 64;
constexpr int kTurnBarrier = 1;                       // + consumer: its turn at the tensor cores
constexpr int kStoreBarrier = 4;                      // + consumer: its rows of Q have been read
constexpr int kPageBytes = PAGE_TOKENS * kRowBytes;   // a page's share of a panel
constexpr int kPanelBytes = kTileTokens * kRowBytes;  // of K and V

// A tile of queries and one kv head. No tokens: there is no more work.
struct WorkItem {
  PrefillTile tile;
  int kv_head;
};

// Tiles of fp8 pages.
enum RawTile { kNoMoreTiles, kKeys, kValues };
constexpr int kConvertWarps = kWarpgroupWarps - 1;

template <int kHeadDim, bool kFp8>
struct RawTiles {};
template <int kHeadDim>
struct alignas(1024) RawTiles<kHeadDim, true> {
  static constexpr int kRawBytes = kTileTokens * kHeadDim;
  static constexpr int kRawStages = 32768 / kRawBytes;

  uint8_t raw[kRawStages][kRawBytes];  // [token][head_dim], swizzled
  Barrier raw_full[kRawStages], raw_empty[kRawStages];
  RawTile raw_tile[kRawStages];
};

template <int kHeadDim, bool kFp8>
struct PrefillShared : RawTiles<kHeadDim, kFp8> {
  static constexpr int kConsumers = kHeadDim == 64 ? 3 : 2;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kRows = kConsumers * kConsumerRows;
  static constexpr int kPanels = kHeadDim / kPanelColumns;
  static constexpr int kTileBytes = kPanels * kPanelBytes;
  static constexpr int kQueryPanelBytes = kRows * kRowBytes;
  // A tile of V is freed later than one of K, because the softmax comes before the wait for P V.
  static constexpr int kKeyStages = kHeadDim == 64 ? 4 : 2;
  static constexpr int kValueStages = kHeadDim == 64 ? 4 : kFp8 ? 2 : 3;

  uint8_t q[2][kPanels * kQueryPanelBytes];  // [panel][row][64], swizzled; O on its way out
  uint8_t k[kKeyStages][kTileBytes];
  uint8_t v[kValueStages][kTileBytes];
  Barrier q_full[2], q_empty[2];
  Barrier k_full[kKeyStages], k_empty[kKeyStages];
  Barrier v_full[kValueStages], v_empty[kValueStages];
  WorkItem item[2];  // with q
};
static_assert(sizeof(PrefillShared<64, false>) == ATTN_PREFILL_SHARED_D64, "");
static_assert(sizeof(PrefillShared<128, false>) == ATTN_PREFILL_SHARED_D128, "");
static_assert(sizeof(PrefillShared<64, true>) == ATTN_PREFILL_SHARED_D64_FP8, "");
static_assert(sizeof(PrefillShared<128, true>) == ATTN_PREFILL_SHARED_D128_FP8, "");
static_assert(PrefillShared<64, false>::kThreads == ATTN_PREFILL_THREADS_D64, "");
static_assert(PrefillShared<128, false>::kThreads == ATTN_PREFILL_THREADS_D128, "");
static_assert(PrefillShared<64, false>::kRows == ATTN_PREFILL_ROWS_D64, "");
static_assert(PrefillShared<128, false>::kRows == ATTN_PREFILL_ROWS_D128, "");

DEVICE int newest_position(const PrefillTile& tile) { return tile.position + tile.tokens - 1; }

// Of the tiles of keys that any query of `tile` attends to.
DEVICE int oldest_tile(const AttnPrefillParams& p, const PrefillTile& tile) {
  return max_int(tile.position - p.window + 1, 0) / kTileTokens;
}

// ---- the producer ----

// Positions of the producer: of fp8 pages it fills the ring of raw tiles, which the converting warps empty into the others.
template <int kHeadDim, bool kFp8>
struct ProducerRings {
  RingPosition<PrefillShared<kHeadDim, kFp8>::kKeyStages> k;
  RingPosition<PrefillShared<kHeadDim, kFp8>::kValueStages> v;
};
template <int kHeadDim>
struct ProducerRings<kHeadDim, true> {
  RingPosition<RawTiles<kHeadDim, true>::kRawStages> raw;
};

template <int kHeadDim>
DEVICE void load_bf16(uint8_t* tile, const TensorMap* map, Barrier* full, int kv_head, int page0, int page1) {
  using Shared = PrefillShared<kHeadDim, false>;
  mbarrier_arrive_expect_tx(full, Shared::kTileBytes);
  UNROLL for (int panel = 0; panel < Shared::kPanels; panel++) {
    tma_load(tile + panel * kPanelBytes, map, full, kEvictLast, panel * kPanelColumns, 0, kv_head, page0);
    tma_load(tile + panel * kPanelBytes + kPageBytes, map, full, kEvictLast, panel * kPanelColumns, 0, kv_head, page1);
  }
}

// The next tile of K or of V: two pages.
template <int kHeadDim>
DEVICE void load_tile(const AttnPrefillParams& p, PrefillShared<kHeadDim, false>& shared,
                      ProducerRings<kHeadDim, false>& rings, RawTile kind, int kv_head, int page0, int page1) {
  if (kind == kKeys) {
    const int stage = rings.k.stage;
    mbarrier_wait(&shared.k_empty[stage], rings.k.parity ^ 1);
    load_bf16<kHeadDim>(shared.k[stage], &p.k_map, &shared.k_full[stage], kv_head, page0, page1);
    advance(rings.k);
  } else {
    const int stage = rings.v.stage;
    mbarrier_wait(&shared.v_empty[stage], rings.v.parity ^ 1);
    load_bf16<kHeadDim>(shared.v[stage], &p.v_map, &shared.v_full[stage], kv_head, page0, page1);
    advance(rings.v);
  }
}

template <int kHeadDim>
DEVICE void load_tile(const AttnPrefillParams& p, PrefillShared<kHeadDim, true>& shared,
                      ProducerRings<kHeadDim, true>& rings, RawTile kind, int kv_head, int page0, int page1) {
  constexpr int kRawBytes = RawTiles<kHeadDim, true>::kRawBytes;
  const int stage = rings.raw.stage;
  Barrier* full = &shared.raw_full[stage];
  const TensorMap* map = kind == kKeys ? &p.k_map : &p.v_map;
  mbarrier_wait(&shared.raw_empty[stage], rings.raw.parity ^ 1);
  shared.raw_tile[stage] = kind;
  mbarrier_arrive_expect_tx(full, kRawBytes);
  tma_load(shared.raw[stage], map, full, kEvictLast, 0, 0, kv_head, page0);
  tma_load(shared.raw[stage] + kRawBytes / 2, map, full, kEvictLast, 0, 0, kv_head, page1);
  advance(rings.raw);
}

template <int kHeadDim, bool kFp8>
DEVICE void produce(const AttnPrefillParams& p, PrefillShared<kHeadDim, kFp8>& shared) {
  using Shared = PrefillShared<kHeadDim, kFp8>;
  const int tile_tokens = Shared::kRows / (p.q_heads / p.kv_heads);
  const int query_bytes = tile_tokens * (p.q_heads / p.kv_heads) * kHeadDim * 2;
  const int items = *p.tile_count * p.kv_heads;
  RingPosition<2> q_ring;
  ProducerRings<kHeadDim, kFp8> rings;
  int next = block_x();
  while (next < items) {
    const WorkItem item = {p.tiles[next / p.kv_heads], next % p.kv_heads};
    const int* table = p.block_table + (size_t)item.tile.slot * p.max_pages;
    const int last_page = newest_position(item.tile) / PAGE_TOKENS;
    const int newest = newest_position(item.tile) / kTileTokens, oldest = oldest_tile(p, item.tile);

    // V lags one tile behind K. The second page of the newest tile may not exist: the first again, all of it masked.
    int v_page0 = 0, v_page1 = 0;
    for (int n = newest; n >= oldest - 1; n--) {
      const int page0 = n < oldest ? 0 : table[2 * n];
      const int page1 = n < oldest ? 0 : table[min_int(2 * n + 1, last_page)];
      if (n >= oldest) load_tile<kHeadDim>(p, shared, rings, kKeys, item.kv_head, page0, page1);
      if (n == newest) {
        mbarrier_wait(&shared.q_empty[q_ring.stage], q_ring.parity ^ 1);
        shared.item[q_ring.stage] = item;
        mbarrier_arrive_expect_tx(&shared.q_full[q_ring.stage], query_bytes);
        UNROLL for (int panel = 0; panel < Shared::kPanels; panel++)
            tma_load(shared.q[q_ring.stage] + panel * Shared::kQueryPanelBytes, &p.q_map, &shared.q_full[q_ring.stage],
                     kEvictFirst, panel * kPanelColumns, 0, item.kv_head, item.tile.first_row);
        advance(q_ring);
      } else {
        load_tile<kHeadDim>(p, shared, rings, kValues, item.kv_head, v_page0, v_page1);
      }
      v_page0 = page0, v_page1 = page1;
      // Late enough to go to a block that is nearly free, early enough to have come when this item's loads are issued.
      if (n == min_int(newest, oldest + 1)) next = grid_x() + (int)atomic_increment(p.ticket, items - 1);
    }
  }
  mbarrier_wait(&shared.q_empty[q_ring.stage], q_ring.parity ^ 1);
  shared.item[q_ring.stage] = {};
  mbarrier_arrive(&shared.q_full[q_ring.stage]);
  if constexpr (kFp8) {
    mbarrier_wait(&shared.raw_empty[rings.raw.stage], rings.raw.parity ^ 1);
    shared.raw_tile[rings.raw.stage] = kNoMoreTiles;
    mbarrier_arrive(&shared.raw_full[rings.raw.stage]);
  }
}

// ---- the converting warps, 1 to 3, of fp8 pages ----

// A tile of e4m3 to one of f16, 8 columns at a time; by 8 rows, in which a lane always has the same places.
template <int kHeadDim>
DEVICE void convert_tile(const uint8_t* raw, uint8_t* tile) {
  constexpr int kChunks = kHeadDim / 8;
  for (int rows = 8 * (warp_id() - 1); rows < kTileTokens; rows += 8 * kConvertWarps) {
    UNROLL for (int i = lane_id(); i < 8 * kChunks; i += kWarp) {
      const int row = i / kChunks, chunk = i % kChunks;
      uint32_t e4m3[2], f16[4];
      load_8(raw + rows * kHeadDim + swizzled_fp8<kHeadDim>(row, chunk / 2) + chunk % 2 * 8, e4m3);
      UNROLL for (int j = 0; j < 4; j++) f16[j] = e4m3x2_to_f16x2((uint16_t)(e4m3[j / 2] >> j % 2 * 16));
      store_16(tile + rows * kRowBytes + swizzled(kTileTokens, row, chunk), f16);
    }
  }
}

DEVICE void release(Barrier* empty) {
  if (lane_id() == 0) mbarrier_arrive(empty);
}

template <int kHeadDim>
DEVICE void convert(PrefillShared<kHeadDim, true>& shared) {
  using Shared = PrefillShared<kHeadDim, true>;
  RingPosition<Shared::kRawStages> raw;
  RingPosition<Shared::kKeyStages> k;
  RingPosition<Shared::kValueStages> v;
  for (;; advance(raw)) {
    mbarrier_wait(&shared.raw_full[raw.stage], raw.parity);
    const RawTile kind = shared.raw_tile[raw.stage];
    if (kind == kNoMoreTiles) return;
    const bool keys = kind == kKeys;
    mbarrier_wait(keys ? &shared.k_empty[k.stage] : &shared.v_empty[v.stage], (keys ? k.parity : v.parity) ^ 1);
    convert_tile<kHeadDim>(shared.raw[raw.stage], keys ? shared.k[k.stage] : shared.v[v.stage]);
    fence_proxy_async();  // wgmma reads it
    sync_warp();
    release(keys ? &shared.k_full[k.stage] : &shared.v_full[v.stage]);
    release(&shared.raw_empty[raw.stage]);
    if (keys)
      advance(k);
    else
      advance(v);
  }
}

// ---- the consumers ----

// S = Q K^T: 64 rows x 128 tokens. Descriptors of the consumer's first row and of the tile.
template <int kHeadDim, bool kFp8>
DEVICE void issue_scores(float (&s)[kTileTokens / 2], uint64_t q, uint64_t k) {
  UNROLL for (int i = 0; i < kHeadDim / 16; i++) {
    const int columns = i % 4 * 32;
    const uint64_t q_part = q + (i / 4 * PrefillShared<kHeadDim, kFp8>::kQueryPanelBytes + columns) / 16;
    const uint64_t k_part = k + (i / 4 * kPanelBytes + columns) / 16;
    if constexpr (kFp8)
      wgmma_ss_f16<kTileTokens>(s, q_part, k_part, i > 0);
    else
      wgmma_ss<kTileTokens>(s, q_part, k_part, i > 0);
  }
}

// O += P V: V is [token][column], the transpose of what K-major would be.
template <int kHeadDim, bool kFp8>
DEVICE void issue_output(float (&o)[kHeadDim / 2], const uint32_t (&probabilities)[kTileTokens / 16][4], uint64_t v) {
  UNROLL for (int i = 0; i < kTileTokens / 16; i++) {
    if constexpr (kFp8)
      wgmma_rs_f16<kHeadDim, 1>(o, probabilities[i], v + i * kRowBytes, true);
    else
      wgmma_rs<kHeadDim, 1>(o, probabilities[i], v + i * kRowBytes, true);
  }
}

// Of one lane: rows lane / 4 and + 8 of the warp's 16.
struct RowState {
  int position[2];
  float max[2];  // of the scores before scaling
  float sum[2];  // of this lane's columns only
};

// Scores to probabilities relative to the new maximum; `rescale` is what makes older results relative to it, too.
DEVICE void softmax(float (&s)[kTileTokens / 2], RowState& row, float scale_log2, float (&rescale)[2]) {
  UNROLL for (int i = 0; i < 2; i++) {
    float max = s[2 * i];
    UNROLL for (int j = 0; j < kTileTokens / 8; j++) max = fmaxf(max, fmaxf(s[4 * j + 2 * i], s[4 * j + 2 * i + 1]));
    max = fmaxf(row.max[i], quad_max(max));
    rescale[i] = exp2_approx((row.max[i] - max) * scale_log2);
    row.max[i] = max;
    const float offset = max * scale_log2;
    float sum = 0.f;
    UNROLL for (int j = 0; j < kTileTokens / 8; j++) {
      UNROLL for (int c = 0; c < 2; c++) {
        float& x = s[4 * j + 2 * i + c];
        x = exp2_approx(x * scale_log2 - offset);
        sum += x;
      }
    }
    row.sum[i] = row.sum[i] * rescale[i] + sum;
  }
}

DEVICE void mask(float (&s)[kTileTokens / 2], const RowState& row, int first_token) {
  const int first = first_token + 2 * (lane_id() % 4);
  UNROLL for (int i = 0; i < 4; i++) {
    const int visible = row.position[i / 2] - first - i % 2;
    UNROLL for (int j = 0; j < kTileTokens / 8; j++) if (8 * j > visible) s[4 * j + i] = -INFINITY;
  }
}

DEVICE void mask_before_window(float (&s)[kTileTokens / 2], const RowState& row, int first_token, int window) {
  const int first = first_token + 2 * (lane_id() % 4);
  UNROLL for (int i = 0; i < 4; i++) {
    const int hidden = row.position[i / 2] - window - first - i % 2;
    UNROLL for (int j = 0; j < kTileTokens / 8; j++) if (8 * j <= hidden) s[4 * j + i] = -INFINITY;
  }
}

// The accumulator of S, packed by pairs, is the A fragment of P V.
template <bool kFp8>
DEVICE void pack(const float (&s)[kTileTokens / 2], uint32_t (&probabilities)[kTileTokens / 16][4]) {
  UNROLL for (int k = 0; k < kTileTokens / 16; k++) UNROLL for (int i = 0; i < 4; i++) probabilities[k][i] =
      pack_pair<kFp8>(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
}

// Normalised O of the warp's 16 rows from `first_row` on: to the memory of its rows of Q, then 16 bytes at a time to `out`.
template <int kHeadDim>
DEVICE void store_output(const AttnPrefillParams& p, uint8_t* staging, const WorkItem& item, int first_row,
                         const float (&o)[kHeadDim / 2], const RowState& row) {
  constexpr int kRows = PrefillShared<kHeadDim, false>::kRows;
  const int group = p.q_heads / p.kv_heads;
  float inverse[2];
  UNROLL for (int i = 0; i < 2; i++) inverse[i] = reciprocal_approx(quad_sum(row.sum[i])) * p.v_scale;
  UNROLL for (int j = 0; j < kHeadDim / 16; j++) {
    uint32_t r[4];
    UNROLL for (int i = 0; i < 4; i++) r[i] =
        pack_bf16x2(o[8 * j + 2 * i] * inverse[i % 2], o[8 * j + 2 * i + 1] * inverse[i % 2]);
    stmatrix_x4(staging + swizzled(kRows, first_row + lane_id() % 16, 2 * j + lane_id() / 16), r);
  }
  sync_warp();
  constexpr int kChunks = kHeadDim / 8;
  const int group_inverse = ceil_div(1 << 16, group);  // of a row below 192 and a group of at most 16: exact
  UNROLL for (int i = lane_id(); i < 16 * kChunks; i += kWarp) {
    const int r = first_row + i / kChunks, chunk = i % kChunks;
    const int token = r * group_inverse >> 16;
    if (token >= item.tile.tokens) continue;
    const size_t head = (size_t)(item.tile.first_row + token) * p.q_heads + item.kv_head * group + r - token * group;
    uint32_t v[4];
    load_16(staging + swizzled(kRows, r, chunk), v);
    store_16(p.out + head * kHeadDim + 8 * chunk, v);
  }
}

template <int kHeadDim, bool kFp8>
DEVICE void consume(const AttnPrefillParams& p, PrefillShared<kHeadDim, kFp8>& shared) {
  using Shared = PrefillShared<kHeadDim, kFp8>;
  const int group = p.q_heads / p.kv_heads;
  const int consumer = shfl(warp_id() / kWarpgroupWarps - 1, 0);
  const int next_consumer = consumer + 1 == Shared::kConsumers ? 0 : consumer + 1;
  const int first_row = (warp_id() - kWarpgroupWarps) * 16;
  const int token[2] = {(first_row + lane_id() / 4) / group, (first_row + lane_id() / 4 + 8) / group};
  const int first_token = consumer * kConsumerRows / group;
  const int last_token = (consumer * kConsumerRows + kConsumerRows - 1) / group;
  const float scale_log2 = p.scale * kLog2e;
  const uint64_t q0 = wgmma_descriptor(shared.q[0] + consumer * kConsumerRows * kRowBytes, 16, 1024, kSwizzle128);
  const uint64_t k0 = wgmma_descriptor(shared.k[0], 16, 1024, kSwizzle128);
  const uint64_t v0 = wgmma_descriptor(shared.v[0], kPanelBytes, 1024, kSwizzle128);
  RingPosition<2> q_ring;
  RingPosition<Shared::kKeyStages> k_ring;
  RingPosition<Shared::kValueStages> v_ring;
  if (next_consumer == 0) named_barrier_arrive(kTurnBarrier, 2 * kWarpgroup);  // consumer 0 begins

  for (;; advance(q_ring)) {
    mbarrier_wait(&shared.q_full[q_ring.stage], q_ring.parity);
    const WorkItem item = shared.item[q_ring.stage];
    if (item.tile.tokens == 0) break;
    const int newest = newest_position(item.tile) / kTileTokens, oldest = oldest_tile(p, item.tile);
    const int first_query = item.tile.position + first_token;
    const int last_hidden = item.tile.position + last_token - p.window;
    const uint64_t q = q0 + q_ring.stage * (sizeof(shared.q[0]) / 16);
    RowState row;
    UNROLL for (int i = 0; i < 2; i++) {
      row.position[i] = item.tile.position + token[i];
      row.max[i] = kLowest;
      row.sum[i] = 0.f;
    }

    float s[kTileTokens / 2], o[kHeadDim / 2], rescale[2];
    uint32_t probabilities[kTileTokens / 16][4];
    UNROLL for (int i = 0; i < kHeadDim / 2; i++) o[i] = 0.f;

    mbarrier_wait(&shared.k_full[k_ring.stage], k_ring.parity);
    wgmma_fence();
    issue_scores<kHeadDim, kFp8>(s, q, k0 + k_ring.stage * (Shared::kTileBytes / 16));
    wgmma_commit();
    wgmma_wait<0>();
    release(&shared.k_empty[k_ring.stage]);
    advance(k_ring);
    mask(s, row, newest * kTileTokens);
    if (newest * kTileTokens <= last_hidden) mask_before_window(s, row, newest * kTileTokens, p.window);
    softmax(s, row, scale_log2, rescale);
    pack<kFp8>(s, probabilities);

    for (int n = newest - 1; n >= oldest; n--) {
      mbarrier_wait(&shared.k_full[k_ring.stage], k_ring.parity);
      named_barrier_sync(kTurnBarrier + consumer, 2 * kWarpgroup);
      wgmma_fence();
      issue_scores<kHeadDim, kFp8>(s, q, k0 + k_ring.stage * (Shared::kTileBytes / 16));
      wgmma_commit();
      mbarrier_wait(&shared.v_full[v_ring.stage], v_ring.parity);
      wgmma_fence();
      issue_output<kHeadDim, kFp8>(o, probabilities, v0 + v_ring.stage * (Shared::kTileBytes / 16));
      wgmma_commit();
      named_barrier_arrive(kTurnBarrier + next_consumer, 2 * kWarpgroup);
      wgmma_wait<1>();
      release(&shared.k_empty[k_ring.stage]);
      advance(k_ring);
      if ((n + 1) * kTileTokens - 1 > first_query) mask(s, row, n * kTileTokens);
      if (n * kTileTokens <= last_hidden) mask_before_window(s, row, n * kTileTokens, p.window);
      softmax(s, row, scale_log2, rescale);
      compute_before_wait(row.sum[0] + row.sum[1], &shared.q_empty[0]);
      wgmma_wait<0>();
      release(&shared.v_empty[v_ring.stage]);
      advance(v_ring);
      pack<kFp8>(s, probabilities);
      UNROLL for (int i = 0; i < kHeadDim / 2; i++) o[i] *= rescale[i / 2 % 2];
    }

    mbarrier_wait(&shared.v_full[v_ring.stage], v_ring.parity);
    wgmma_fence();
    issue_output<kHeadDim, kFp8>(o, probabilities, v0 + v_ring.stage * (Shared::kTileBytes / 16));
    wgmma_commit();
    wgmma_wait<0>();
    release(&shared.v_empty[v_ring.stage]);
    advance(v_ring);

    named_barrier_sync(kStoreBarrier + consumer, kWarpgroup);
    store_output<kHeadDim>(p, shared.q[q_ring.stage], item, first_row, o, row);
    fence_proxy_async();  // the next Q comes by TMA
    sync_warp();
    release(&shared.q_empty[q_ring.stage]);
  }
  if (consumer == 0) named_barrier_sync(kTurnBarrier, 2 * kWarpgroup);  // takes the turn that is left over
}

template <int kHeadDim, bool kFp8, int kProducerRegisters, int kConsumerRegisters>
DEVICE void attn_prefill(const AttnPrefillParams& p) {
  using Shared = PrefillShared<kHeadDim, kFp8>;
  Shared& shared = *(Shared*)shared_memory();
  pdl_launch_dependents();
  if (thread_idx() == 0) {
    prefetch_tensor_map(&p.q_map);
    prefetch_tensor_map(&p.k_map);
    prefetch_tensor_map(&p.v_map);
    const auto init = [](Barrier* full, Barrier* empty, int stages, int producers, int consumers) {
      for (int i = 0; i < stages; i++) {
        mbarrier_init(&full[i], producers);
        mbarrier_init(&empty[i], consumers);
      }
    };
    constexpr int kProducers = kFp8 ? kConvertWarps : 1, kConsumerWarps = Shared::kConsumers * kWarpgroupWarps;
    init(shared.q_full, shared.q_empty, 2, 1, kConsumerWarps);
    init(shared.k_full, shared.k_empty, Shared::kKeyStages, kProducers, kConsumerWarps);
    init(shared.v_full, shared.v_empty, Shared::kValueStages, kProducers, kConsumerWarps);
    if constexpr (kFp8) init(shared.raw_full, shared.raw_empty, Shared::kRawStages, 1, kConvertWarps);
    mbarrier_init_fence();
  }
  sync_threads();
  pdl_wait();

  if (warp_id() < kWarpgroupWarps) {
    registers_decrease<kProducerRegisters>();
    if (warp_id() == 0 && elect_one()) produce(p, shared);
    if constexpr (kFp8) {
      if (warp_id() > 0) convert(shared);
    }
  } else {
    registers_increase<kConsumerRegisters>();
    consume(p, shared);
  }
}

KERNEL(attn_prefill_d64, AttnPrefillParams, ATTN_PREFILL_THREADS_D64) { attn_prefill<64, false, 32, 160>(p); }
KERNEL(attn_prefill_d128, AttnPrefillParams, ATTN_PREFILL_THREADS_D128) { attn_prefill<128, false, 24, 240>(p); }
KERNEL(attn_prefill_d64_fp8, AttnPrefillParams, ATTN_PREFILL_THREADS_D64) { attn_prefill<64, true, 32, 160>(p); }
KERNEL(attn_prefill_d128_fp8, AttnPrefillParams, ATTN_PREFILL_THREADS_D128) { attn_prefill<128, true, 56, 224>(p); }
