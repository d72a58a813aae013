// attn_prefill: causal attention of ragged chunks of query tokens over their sequences' paged K and V.
//
// A tile is up to ATTN_PREFILL_ROWS = 128 rows of Q that share one kv head: (query token, head of the group), head
// fastest, so 128 / group tokens (a group that does not divide 128 leaves rows idle; group <= 16). The host lists the
// tiles, longest first; work item i is (tile i / kv_heads, kv head i % kv_heads), and the blocks take every grid_x-th.
// Keys and values go by tiles of 128 tokens (two pages) at absolute positions, newest first, so that where a prompt is
// cut into chunks does not change the order of any sum.
//
// Warpgroup 0 loads: one thread, TMA, rings of two tiles for K and for V. Warpgroups 1 and 2 own 64 rows each: S = Q
// K^T with both operands in shared memory, online softmax in registers, O += P V with P from registers and V transposed
// by wgmma. Inside a warpgroup the softmax of one tile overlaps the P V of the tile before; between the two, named
// barriers hand the tensor cores to and fro so that one computes while the other exponentiates.
//
// Masking: only tiles that reach beyond the warpgroup's first query are masked. The keys behind a sequence's end are
// masked by causality; the values there must be finite (P is 0): pools are zeroed at the start and only ever hold what
// rope_append wrote. Rows of Q behind the tile's tokens compute something that nobody stores.
//
// Grid: min(tiles * kv_heads, processors) blocks; shared memory ATTN_PREFILL_SHARED_D64 / _D128.
#include "attention.cuh"

constexpr int kTileRows = ATTN_PREFILL_ROWS;
constexpr int kTileTokens = 2 * PAGE_TOKENS;
constexpr int kStages = 2;
constexpr int kConsumers = 2;
constexpr int kWarpgroup = 128;
constexpr int kConsumerRows = kTileRows / kConsumers;
constexpr int kConsumerWarps = kConsumers * kWarpgroup / kWarp;
constexpr int kTurnBarrier = 1;                           // + consumer: its turn at the tensor cores
constexpr int kQueryBarrier = kTurnBarrier + kConsumers;  // + consumer: its rows of Q have been read
static_assert(ATTN_PREFILL_THREADS == (1 + kConsumers) * kWarpgroup, "one producer and two consumer warpgroups");
static_assert(kTileRows == 128 && kTileTokens == 128, "panels of Q, K and V have 128 rows");

constexpr int kPanelBytes = 128 * kRowBytes;
constexpr int kPageBytes = PAGE_TOKENS * kRowBytes;  // a page's share of a panel

template <int kHeadDim>
struct PrefillShared {
  static constexpr int kPanels = kHeadDim / kPanelColumns;
  static constexpr int kTileBytes = kPanels * kPanelBytes;

  uint8_t q[kTileBytes];  // [panel][row][64], swizzled; O on its way out
  uint8_t k[kStages][kTileBytes];
  uint8_t v[kStages][kTileBytes];
  Barrier q_full, q_empty;
  Barrier k_full[kStages], k_empty[kStages];
  Barrier v_full[kStages], v_empty[kStages];
};
static_assert(sizeof(PrefillShared<64>) == ATTN_PREFILL_SHARED_D64, "");
static_assert(sizeof(PrefillShared<128>) == ATTN_PREFILL_SHARED_D128, "");

DEVICE int newest_position(const PrefillTile& tile) { return tile.position + tile.tokens - 1; }

// ---- the producer ----

template <int kHeadDim>
DEVICE void load_kv(uint8_t* tile, const TensorMap* map, Barrier* full, int kv_head, int page0, int page1) {
  mbarrier_arrive_expect_tx(full, PrefillShared<kHeadDim>::kTileBytes);
  UNROLL for (int panel = 0; panel < PrefillShared<kHeadDim>::kPanels; panel++) {
    tma_load(tile + panel * kPanelBytes, map, full, kEvictLast, panel * kPanelColumns, 0, kv_head, page0);
    tma_load(tile + panel * kPanelBytes + kPageBytes, map, full, kEvictLast, panel * kPanelColumns, 0, kv_head, page1);
  }
}

template <int kHeadDim>
DEVICE void produce(const AttnPrefillParams& p, PrefillShared<kHeadDim>& shared) {
  const int group = p.q_heads / p.kv_heads;
  const int items = *p.tile_count * p.kv_heads;
  RingPosition<kStages> k_ring, v_ring;
  uint32_t q_parity = 0;
  for (int item = block_x(); item < items; item += grid_x(), q_parity ^= 1) {
    const PrefillTile tile = p.tiles[item / p.kv_heads];
    const int kv_head = item % p.kv_heads;
    const int* table = p.block_table + (size_t)tile.slot * p.max_pages;
    const int last_page = newest_position(tile) / PAGE_TOKENS;
    const int newest = newest_position(tile) / kTileTokens;

    // V lags one tile behind K. The second page of the newest tile may not exist: the first again, all of it masked.
    int v_page0 = 0, v_page1 = 0;
    for (int n = newest; n >= -1; n--) {
      const int page0 = n < 0 ? 0 : table[2 * n];
      const int page1 = n < 0 ? 0 : table[min_int(2 * n + 1, last_page)];
      if (n >= 0) {
        mbarrier_wait(&shared.k_empty[k_ring.stage], k_ring.parity ^ 1);
        load_kv<kHeadDim>(shared.k[k_ring.stage], &p.k_map, &shared.k_full[k_ring.stage], kv_head, page0, page1);
        advance(k_ring);
      }
      if (n == newest) {
        const int tokens = kTileRows / group;
        mbarrier_wait(&shared.q_empty, q_parity ^ 1);
        mbarrier_arrive_expect_tx(&shared.q_full, tokens * group * kHeadDim * 2);
        UNROLL for (int panel = 0; panel < PrefillShared<kHeadDim>::kPanels; panel++)
            tma_load(shared.q + panel * kPanelBytes, &p.q_map, &shared.q_full, kEvictFirst, panel * kPanelColumns, 0,
                     kv_head, tile.first_row);
      } else {
        mbarrier_wait(&shared.v_empty[v_ring.stage], v_ring.parity ^ 1);
        load_kv<kHeadDim>(shared.v[v_ring.stage], &p.v_map, &shared.v_full[v_ring.stage], kv_head, v_page0, v_page1);
        advance(v_ring);
      }
      v_page0 = page0, v_page1 = page1;
    }
  }
}

// ---- the consumers ----

// S = Q K^T: 64 rows x 128 tokens.
template <int kHeadDim>
DEVICE void issue_scores(float (&s)[kTileTokens / 2], const uint8_t* q, const uint8_t* k) {
  UNROLL for (int i = 0; i < kHeadDim / 16; i++) {
    const int offset = i / 4 * kPanelBytes + i % 4 * 32;
    wgmma_ss<kTileTokens>(s, wgmma_descriptor(q + offset, 16, 1024, kSwizzle128),
                          wgmma_descriptor(k + offset, 16, 1024, kSwizzle128), i > 0);
  }
}

// O += P V: V is [token][column], the transpose of what K-major would be.
template <int kHeadDim>
DEVICE void issue_output(float (&o)[kHeadDim / 2], const uint32_t (&probabilities)[kTileTokens / 16][4],
                         const uint8_t* v) {
  UNROLL for (int i = 0; i < kTileTokens / 16; i++) wgmma_rs<kHeadDim, 1>(
      o, probabilities[i], wgmma_descriptor(v + i * 16 * kRowBytes, kPanelBytes, 1024, kSwizzle128), true);
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
  UNROLL for (int j = 0; j < kTileTokens / 8; j++)
      UNROLL for (int i = 0; i < 4; i++) if (first + 8 * j + i % 2 > row.position[i / 2]) s[4 * j + i] = -INFINITY;
}

// The accumulator of S, packed by pairs, is the A fragment of P V.
DEVICE void pack(const float (&s)[kTileTokens / 2], uint32_t (&probabilities)[kTileTokens / 16][4]) {
  UNROLL for (int k = 0; k < kTileTokens / 16; k++) UNROLL for (int i = 0; i < 4; i++) probabilities[k][i] =
      pack_bf16x2(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
}

DEVICE void release(Barrier* empty) {
  if (lane_id() == 0) mbarrier_arrive(empty);
}

// Normalised O of the warp's 16 rows: to the memory of its rows of Q, then 16 bytes at a time to `out`.
template <int kHeadDim>
DEVICE void store_output(const AttnPrefillParams& p, uint8_t* staging, const PrefillTile& tile, int kv_head,
                         const float (&o)[kHeadDim / 2], const RowState& row) {
  const int group = p.q_heads / p.kv_heads;
  const int first_row = (warp_id() - kWarpgroup / kWarp) * 16;
  float inverse[2];
  UNROLL for (int i = 0; i < 2; i++) inverse[i] = 1.f / quad_sum(row.sum[i]);
  UNROLL for (int j = 0; j < kHeadDim / 16; j++) {
    uint32_t r[4];
    UNROLL for (int i = 0; i < 4; i++) r[i] =
        pack_bf16x2(o[8 * j + 2 * i] * inverse[i % 2], o[8 * j + 2 * i + 1] * inverse[i % 2]);
    stmatrix_x4(staging + swizzled(kTileRows, first_row + lane_id() % 16, 2 * j + lane_id() / 16), r);
  }
  sync_warp();
  constexpr int kChunks = kHeadDim / 8;
  UNROLL for (int i = lane_id(); i < 16 * kChunks; i += kWarp) {
    const int r = first_row + i / kChunks, chunk = i % kChunks;
    if (r >= tile.tokens * group) continue;
    uint32_t v[4];
    load_16(staging + swizzled(kTileRows, r, chunk), v);
    store_16(
        p.out + ((size_t)(tile.first_row + r / group) * p.q_heads + kv_head * group + r % group) * kHeadDim + 8 * chunk,
        v);
  }
}

template <int kHeadDim>
DEVICE void consume(const AttnPrefillParams& p, PrefillShared<kHeadDim>& shared) {
  const int group = p.q_heads / p.kv_heads;
  const int items = *p.tile_count * p.kv_heads;
  const int consumer = warp_id() / (kWarpgroup / kWarp) - 1;
  const int other = 1 - consumer;
  const uint8_t* q = shared.q + consumer * kConsumerRows * kRowBytes;
  const float scale_log2 = p.scale * kLog2e;
  RingPosition<kStages> k_ring, v_ring;
  uint32_t q_parity = 0;
  if (consumer == 1) named_barrier_arrive(kTurnBarrier + other, kConsumers * kWarpgroup);

  for (int item = block_x(); item < items; item += grid_x(), q_parity ^= 1) {
    const PrefillTile tile = p.tiles[item / p.kv_heads];
    const int newest = newest_position(tile) / kTileTokens;
    const int first_query = tile.position + consumer * kConsumerRows / group;
    RowState row;
    UNROLL for (int i = 0; i < 2; i++) {
      const int r = (warp_id() - kWarpgroup / kWarp) * 16 + lane_id() / 4 + 8 * i;
      row.position[i] = tile.position + r / group;
      row.max[i] = kLowest;
      row.sum[i] = 0.f;
    }

    float s[kTileTokens / 2], o[kHeadDim / 2], rescale[2];
    uint32_t probabilities[kTileTokens / 16][4];
    UNROLL for (int i = 0; i < kHeadDim / 2; i++) o[i] = 0.f;

    mbarrier_wait(&shared.q_full, q_parity);
    mbarrier_wait(&shared.k_full[k_ring.stage], k_ring.parity);
    wgmma_fence();
    issue_scores<kHeadDim>(s, q, shared.k[k_ring.stage]);
    wgmma_commit();
    wgmma_wait<0>();
    release(&shared.k_empty[k_ring.stage]);
    advance(k_ring);
    mask(s, row, newest * kTileTokens);
    softmax(s, row, scale_log2, rescale);
    pack(s, probabilities);

    for (int n = newest - 1; n >= 0; n--) {
      mbarrier_wait(&shared.k_full[k_ring.stage], k_ring.parity);
      named_barrier_sync(kTurnBarrier + consumer, kConsumers * kWarpgroup);
      wgmma_fence();
      issue_scores<kHeadDim>(s, q, shared.k[k_ring.stage]);
      wgmma_commit();
      mbarrier_wait(&shared.v_full[v_ring.stage], v_ring.parity);
      wgmma_fence();
      issue_output<kHeadDim>(o, probabilities, shared.v[v_ring.stage]);
      wgmma_commit();
      named_barrier_arrive(kTurnBarrier + other, kConsumers * kWarpgroup);
      wgmma_wait<1>();
      release(&shared.k_empty[k_ring.stage]);
      advance(k_ring);
      if ((n + 1) * kTileTokens - 1 > first_query) mask(s, row, n * kTileTokens);
      softmax(s, row, scale_log2, rescale);
      compute_before_wait(row.sum[0] + row.sum[1], &shared.q_empty);
      wgmma_wait<0>();
      release(&shared.v_empty[v_ring.stage]);
      advance(v_ring);
      pack(s, probabilities);
      UNROLL for (int i = 0; i < kHeadDim / 2; i++) o[i] *= rescale[i / 2 % 2];
    }

    mbarrier_wait(&shared.v_full[v_ring.stage], v_ring.parity);
    wgmma_fence();
    issue_output<kHeadDim>(o, probabilities, shared.v[v_ring.stage]);
    wgmma_commit();
    wgmma_wait<0>();
    release(&shared.v_empty[v_ring.stage]);
    advance(v_ring);

    named_barrier_sync(kQueryBarrier + consumer, kWarpgroup);
    store_output<kHeadDim>(p, shared.q, tile, item % p.kv_heads, o, row);
    fence_proxy_async();  // the next Q comes by TMA
    sync_warp();
    release(&shared.q_empty);
  }
  if (consumer == 0) named_barrier_sync(kTurnBarrier, kConsumers * kWarpgroup);  // takes the turn that is left over
}

template <int kHeadDim>
DEVICE void attn_prefill(const AttnPrefillParams& p) {
  PrefillShared<kHeadDim>& shared = *(PrefillShared<kHeadDim>*)shared_memory();
  pdl_launch_dependents();
  if (thread_idx() == 0) {
    prefetch_tensor_map(&p.q_map);
    prefetch_tensor_map(&p.k_map);
    prefetch_tensor_map(&p.v_map);
    mbarrier_init(&shared.q_full, 1);
    mbarrier_init(&shared.q_empty, kConsumerWarps);
    for (int i = 0; i < kStages; i++) {
      mbarrier_init(&shared.k_full[i], 1);
      mbarrier_init(&shared.k_empty[i], kConsumerWarps);
      mbarrier_init(&shared.v_full[i], 1);
      mbarrier_init(&shared.v_empty[i], kConsumerWarps);
    }
    mbarrier_init_fence();
  }
  sync_threads();
  pdl_wait();

  if (warp_id() < kWarpgroup / kWarp) {
    registers_decrease<24>();
    if (warp_id() == 0 && elect_one()) produce(p, shared);
  } else {
    registers_increase<240>();
    consume(p, shared);
  }
}

KERNEL(attn_prefill_d64, AttnPrefillParams, ATTN_PREFILL_THREADS) { attn_prefill<64>(p); }
KERNEL(attn_prefill_d128, AttnPrefillParams, ATTN_PREFILL_THREADS) { attn_prefill<128>(p); }
