// attn_decode: attention of one query token per row over its paged K and V.
//
// The work is rows x groups x pages, in this order. A group is the query heads of one KV head, or, to see what that is worth
// (ponder study ablation), one query head, which then reads K and V for itself. The grid's blocks share the work out evenly, each taking
// one contiguous span (each warp finds it in row_position, 32 rows at a time, so that a captured launch follows the growing
// sequences). A span falls into segments, each a run of pages of one (row, group) pair. A pair inside one block is written out directly;
// of a pair cut between blocks each writes a partial result, and the last one to finish merges them in order of the
// blocks, so the result does not depend on which one was last. With split_pages, pairs are cut at absolute positions
// instead, and the pieces are dealt out whole: then a row's result does not depend on what else is in the batch.
//
// Within a block, warp 4 streams tiles (64 tokens of K, then the same of V) through a ring by TMA. Warps 0 to 3 each
// own 16 tokens of every page: S = Q K^T and O += P V by mma.sync with the heads of the group as the 16 rows of A
// (16 at most), P never leaving registers; at a segment's end the four are merged in order. 64 KiB in flight per block
// is what HBM needs, and two blocks fit on a processor together, or one beside a block of the next product, which fills its
// ring of weights meanwhile.
//
// Before pdl_wait() the span is found and the ring filled with old pages: all that do not hold a row's newest token, which the
// launch before this one appends. That row_position, row_slot, block_table and those pages may be read then is due to that
// launch, gemv_norm_rope, gemv_rope or rope_append: it lets its dependents start only behind its own wait, so all launches before it have
// completed when this one starts. The SIMT machine knows this rule and checks it.
//
// Masking: only the page with the newest token has tokens behind the end. Their K may be anything; their V must be
// finite (P is 0 there): pools are zeroed at the start and only ever hold what was appended.
//
// fp8 pages (_fp8) are half as long a stream. e4m3 becomes f16, which holds it exactly, on the way from a tile to the fragments, one
// instruction for two elements; Q, which comes so, and P are f16, too, and the products accumulate in fp32 as ever. Bytes are moved
// as pairs, so a lane has four neighbouring columns where it has twice two of bf16: of K, that is another order of the columns of
// the sum, in which Q is read as well; of V, it is another order of the columns of O, which merge_warps() puts right. The scale of
// K is in p.scale, that of V in store_normalised().
//
// Prediction (not yet run on a GPU): 2.9 TB/s at long contexts; 4 to 5 us a call at batch 1 and a short one, the latencies of a
// page, of the merge of warps and of the merge of blocks.
//
// Grid: any number of blocks (one per processor is right); workspace grid_x * 2 partial results; shared memory
// ATTN_DECODE_SHARED_D64 / _D128, and _FP8 of these.
#include "attention.cuh"

constexpr int kComputeWarps = 4;
constexpr int kComputeThreads = kComputeWarps * kWarp;
constexpr int kSliceTokens = PAGE_TOKENS / kComputeWarps;
constexpr int kGroupRows = 16;  // rows of A
constexpr int kMergeBarrier = 1;
static_assert(ATTN_DECODE_THREADS == kComputeThreads + kWarp, "four compute warps and one that loads");

template <int kHeadDim, bool kFp8>
struct DecodeShared {
  static constexpr int kTileBytes = PAGE_TOKENS * kHeadDim * (kFp8 ? 1 : 2);
  static constexpr int kStages = 65536 / kTileBytes;
  static constexpr int kMergeColumns = kHeadDim + 8;  // 8 more: rows start in different banks

  uint8_t ring[kStages][kTileBytes];  // [panel][token][64] or, fp8, [token][head_dim], swizzled; K and V by turns
  float out[kComputeWarps][kGroupRows][kMergeColumns];
  float max[kComputeWarps][kGroupRows];
  float sum[kComputeWarps][kGroupRows];
  Barrier full[kStages], empty[kStages];
  uint32_t is_last;
};
static_assert(sizeof(DecodeShared<64, false>) == ATTN_DECODE_SHARED_D64, "");
static_assert(sizeof(DecodeShared<128, false>) == ATTN_DECODE_SHARED_D128, "");
static_assert(sizeof(DecodeShared<64, true>) == ATTN_DECODE_SHARED_D64_FP8, "");
static_assert(sizeof(DecodeShared<128, true>) == ATTN_DECODE_SHARED_D128_FP8, "");

template <int kHeadDim, bool kFp8>
using Ring = RingPosition<DecodeShared<kHeadDim, kFp8>::kStages>;

// ---- sharing out the work; a unit is one page (or split_pages) of one group of one row ----

DEVICE int pages_of(const AttnDecodeParams& p, int row) {
  const int position = row < p.rows ? p.row_position[row] : -1;
  return position < 0 ? 0 : position / PAGE_TOKENS + 1;
}

// With a sliding window, the page with the first token of it; those before are not read.
DEVICE int first_page_of(const AttnDecodeParams& p, int row) {
  return max_int(p.row_position[row] - p.window + 1, 0) / PAGE_TOKENS;
}

DEVICE int pages_per_unit(const AttnDecodeParams& p) { return max_int(p.split_pages, 1); }

// Of each group of a row.
DEVICE int units_of(const AttnDecodeParams& p, int row) {
  const int pages = pages_of(p, row);
  return pages == 0 ? 0 : ceil_div(pages - first_page_of(p, row), pages_per_unit(p));
}

// The units of this block, and how far it has come.
struct Span {
  int share;  // units per block
  int unit, end;
  int row, units;  // the row of `unit`, and its units for each group
  int row_start;   // its first unit
};

// By a whole warp.
DEVICE Span span_of_block(const AttnDecodeParams& p) {
  int units = 0;
  for (int row = lane_id(); row < p.rows; row += kWarp) units += units_of(p, row) * p.groups;
  UNROLL for (int m = kWarp / 2; m > 0; m /= 2) units += shfl_xor(units, m);
  Span s;
  s.share = ceil_div(units, grid_x());
  s.unit = min_int(block_x() * s.share, units);
  s.end = min_int(s.unit + s.share, units);
  s.row = 0, s.row_start = 0, s.units = 0;
  if (s.unit == s.end) return s;
  int before = 0;  // units of the rows below `first`
  for (int first = 0;; first += kWarp) {
    const int units_of_group = units_of(p, first + lane_id());
    int sum = units_of_group * p.groups;  // of the rows up to this lane's
    UNROLL for (int m = 1; m < kWarp; m *= 2) {
      const int below = shfl_up(sum, m);
      if (lane_id() >= m) sum += below;
    }
    const uint32_t reached = warp_ballot(before + sum > s.unit);
    if (reached) {
      const int lane = first_set(reached);
      s.row = first + lane;
      s.units = shfl(units_of_group, lane);
      s.row_start = before + shfl(sum, lane) - s.units * p.groups;
      return s;
    }
    before += shfl(sum, kWarp - 1);
  }
}

// Pages [first, last) of a pair: `count` units from `unit` on, of the pair's `units` from `pair_start` on.
struct Segment {
  int row, group, first, last;
  int unit, count, pair_start, units;
};

DEVICE bool next_segment(const AttnDecodeParams& p, Span& s, Segment& segment) {
  if (s.unit == s.end) return false;
  while (s.unit >= s.row_start + s.units * p.groups) {
    s.row_start += s.units * p.groups;
    s.units = units_of(p, ++s.row);
  }
  segment.row = s.row;
  segment.units = s.units;
  segment.group = (s.unit - s.row_start) / s.units;
  segment.pair_start = s.row_start + segment.group * s.units;
  segment.unit = s.unit;
  segment.count = p.split_pages ? 1 : min_int(segment.pair_start + s.units, s.end) - s.unit;
  segment.first = first_page_of(p, s.row) + (s.unit - segment.pair_start) * pages_per_unit(p);
  segment.last = min_int(segment.first + segment.count * pages_per_unit(p), pages_of(p, s.row));
  s.unit += segment.count;
  return true;
}

// ---- the loading warp ----

template <int kHeadDim, bool kFp8>
DEVICE void load_tile(DecodeShared<kHeadDim, kFp8>& shared, const Ring<kHeadDim, kFp8>& ring, const TensorMap* map,
                      int kv_head, int page) {
  constexpr int kTileBytes = DecodeShared<kHeadDim, kFp8>::kTileBytes;
  constexpr int kPanels = kFp8 ? 1 : kHeadDim / kPanelColumns;
  Barrier* full = &shared.full[ring.stage];
  mbarrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
  mbarrier_arrive_expect_tx(full, kTileBytes);
  UNROLL for (int panel = 0; panel < kPanels; panel++)
      tma_load(shared.ring[ring.stage] + panel * (kTileBytes / kPanels), map, full, kEvictFirst, panel * kPanelColumns,
               0, kv_head, page);
}

template <int kHeadDim, bool kFp8>
DEVICE void load_span(const AttnDecodeParams& p, DecodeShared<kHeadDim, kFp8>& shared, Span span) {
  Ring<kHeadDim, kFp8> ring;
  Segment segment;
  bool waited = false;
  while (next_segment(p, span, segment)) {
    const int* table = p.block_table + (size_t)p.row_slot[segment.row] * p.max_pages;
    const int newest = pages_of(p, segment.row) - 1, kv_head = segment.group / p.groups_per_kv_head;
    for (int i = segment.first; i < segment.last; i++) {
      const int page = table[i];
      if (i == newest && !waited) {
        pdl_wait();
        waited = true;
      }
      load_tile(shared, ring, &p.k_map, kv_head, page);
      advance(ring);
      load_tile(shared, ring, &p.v_map, kv_head, page);
      advance(ring);
    }
  }
}

// ---- the compute warps ----

// What a warp holds of a segment: rows lane / 4 and + 8 of the group, columns as out_column says.
template <int kHeadDim>
struct Attention {
  float out[kHeadDim / 8][4];
  float max[2];  // of the scores before scaling
  float sum[2];  // of this lane's columns only
};

// Column of the output that a lane has in out[j][e] and out[j][e + 2].
template <bool kFp8>
DEVICE int out_column(int j, int e) {
  return kFp8 ? j / 2 * 16 + lane_id() % 4 * 4 + 2 * e + j % 2 : 8 * j + lane_id() % 4 * 2 + e;
}

// Q of the pair as A fragments; rows behind the group are zero. In each 16 columns a lane has two and, 8 further on, two; or
// (fp8) four neighbours.
template <int kHeadDim, bool kFp8>
DEVICE void load_q(const AttnDecodeParams& p, const Segment& segment, int heads, uint32_t (&q)[kHeadDim / 16][4]) {
  const uint16_t* base =
      p.q + ((size_t)segment.row * p.q_heads + segment.group * heads) * kHeadDim + (kFp8 ? 4 : 2) * (lane_id() % 4);
  UNROLL for (int i = 0; i < 2; i++) {
    const int head = lane_id() / 4 + 8 * i;
    const uint32_t* row = (const uint32_t*)(base + head * kHeadDim);
    UNROLL for (int k = 0; k < kHeadDim / 16; k++) {
      q[k][i] = head < heads ? row[8 * k] : 0;
      q[k][i + 2] = head < heads ? row[8 * k + (kFp8 ? 1 : 4)] : 0;
    }
  }
}

// d += a b, where two lower bytes and two upper bytes of `b` are the halves of a B fragment, e4m3.
DEVICE void mma_e4m3(float (&d)[4], const uint32_t (&a)[4], uint32_t b) {
  mma_m16n8k16_f16(d, a, e4m3x2_to_f16x2((uint16_t)b), e4m3x2_to_f16x2((uint16_t)(b >> 16)));
}

// S = Q K^T for the warp's 16 tokens of a tile.
template <int kHeadDim, bool kFp8>
DEVICE void scores(const uint8_t* tile, const uint32_t (&q)[kHeadDim / 16][4], float (&s)[2][4]) {
  const int token = warp_id() * kSliceTokens + lane_id() / 16 * 8 + lane_id() % 8;
  UNROLL for (int j = 0; j < 2; j++) UNROLL for (int i = 0; i < 4; i++) s[j][i] = 0.f;
  if constexpr (kFp8) {
    UNROLL for (int k = 0; k < kHeadDim / 32; k++) {
      uint32_t b[4];
      ldmatrix_x4(b, tile + swizzled_fp8<kHeadDim>(token, 2 * k + lane_id() / 8 % 2));
      UNROLL for (int i = 0; i < 2; i++) {
        mma_e4m3(s[0], q[2 * k + i], b[i]);
        mma_e4m3(s[1], q[2 * k + i], b[2 + i]);
      }
    }
  } else {
    UNROLL for (int k = 0; k < kHeadDim / 16; k++) {
      uint32_t b[4];
      ldmatrix_x4(b, tile + swizzled(PAGE_TOKENS, token, 2 * k + lane_id() / 8 % 2));
      mma_m16n8k16(s[0], q[k], b[0], b[1]);
      mma_m16n8k16(s[1], q[k], b[2], b[3]);
    }
  }
}

// Online softmax: scores to probabilities relative to the new maximum, as the A fragment of P V; `a` is rescaled to it.
template <int kHeadDim, bool kFp8>
DEVICE void softmax(float (&s)[2][4], float scale_log2, Attention<kHeadDim>& a, uint32_t (&probabilities)[4]) {
  UNROLL for (int i = 0; i < 2; i++) {
    const float tile_max = fmaxf(fmaxf(s[0][2 * i], s[0][2 * i + 1]), fmaxf(s[1][2 * i], s[1][2 * i + 1]));
    const float max = fmaxf(a.max[i], quad_max(tile_max));
    const float rescale = exp2_approx((a.max[i] - max) * scale_log2);
    a.max[i] = max;
    a.sum[i] *= rescale;
    UNROLL for (int j = 0; j < kHeadDim / 8; j++) {
      a.out[j][2 * i] *= rescale;
      a.out[j][2 * i + 1] *= rescale;
    }
    UNROLL for (int j = 0; j < 2; j++) {
      const float low = exp2_approx((s[j][2 * i] - max) * scale_log2);
      const float high = exp2_approx((s[j][2 * i + 1] - max) * scale_log2);
      a.sum[i] += low + high;
      probabilities[2 * j + i] = pack_pair<kFp8>(low, high);
    }
  }
}

// O += P V for the warp's 16 tokens of a tile. A lane's register of e4m3 holds columns 2 g and 2 g + 1 of two tokens (g its
// number / 4): the even columns are one B fragment, the odd ones the next.
template <int kHeadDim, bool kFp8>
DEVICE void accumulate(const uint8_t* tile, const uint32_t (&probabilities)[4], Attention<kHeadDim>& a) {
  const int token = warp_id() * kSliceTokens + lane_id() / 8 % 2 * 8 + lane_id() % 8;
  if constexpr (kFp8) {
    UNROLL for (int j = 0; j < kHeadDim / 32; j++) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, tile + swizzled_fp8<kHeadDim>(token, 2 * j + lane_id() / 16));
      UNROLL for (int i = 0; i < 2; i++) {
        mma_e4m3(a.out[4 * j + 2 * i], probabilities, even_bytes(b[2 * i], b[2 * i + 1]));
        mma_e4m3(a.out[4 * j + 2 * i + 1], probabilities, odd_bytes(b[2 * i], b[2 * i + 1]));
      }
    }
  } else {
    UNROLL for (int j = 0; j < kHeadDim / 16; j++) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, tile + swizzled(PAGE_TOKENS, token, 2 * j + lane_id() / 16));
      mma_m16n8k16(a.out[2 * j], probabilities, b[0], b[1]);
      mma_m16n8k16(a.out[2 * j + 1], probabilities, b[2], b[3]);
    }
  }
}

DEVICE void release(Barrier* empty) {
  sync_warp();
  if (lane_id() == 0) mbarrier_arrive(empty);
}

template <int kHeadDim, bool kFp8>
DEVICE void attend(const AttnDecodeParams& p, DecodeShared<kHeadDim, kFp8>& shared, const Segment& segment, int heads,
                   Ring<kHeadDim, kFp8>& ring, Attention<kHeadDim>& a) {
  const float scale_log2 = p.scale * kLog2e;
  const int length = p.row_position[segment.row] + 1;
  uint32_t q[kHeadDim / 16][4];
  load_q<kHeadDim, kFp8>(p, segment, heads, q);
  UNROLL for (int i = 0; i < 2; i++) a.max[i] = kLowest, a.sum[i] = 0.f;
  UNROLL for (int j = 0; j < kHeadDim / 8; j++) UNROLL for (int i = 0; i < 4; i++) a.out[j][i] = 0.f;

  for (int page = segment.first; page < segment.last; page++) {
    // Tokens of the warp's slice, if not all of it; and those of them that lie before the window.
    const int valid = length - page * PAGE_TOKENS - warp_id() * kSliceTokens, hidden = valid - p.window;
    const bool live = valid > 0 && hidden < kSliceTokens;
    float s[2][4];
    uint32_t probabilities[4];

    mbarrier_wait(&shared.full[ring.stage], ring.parity);
    if (live) scores<kHeadDim, kFp8>(shared.ring[ring.stage], q, s);
    release(&shared.empty[ring.stage]);
    advance(ring);

    if (valid < kSliceTokens || hidden > 0) UNROLL for (int j = 0; j < 2; j++) UNROLL for (int i = 0; i < 4; i++) {
        const int token = 8 * j + 2 * (lane_id() % 4) + i % 2;
        if (token >= valid || token < hidden) s[j][i] = -INFINITY;
      }
    if (live) softmax<kHeadDim, kFp8>(s, scale_log2, a, probabilities);

    mbarrier_wait(&shared.full[ring.stage], ring.parity);
    if (live) accumulate<kHeadDim, kFp8>(shared.ring[ring.stage], probabilities, a);
    release(&shared.empty[ring.stage]);
    advance(ring);
  }
  UNROLL for (int i = 0; i < 2; i++) a.sum[i] = quad_sum(a.sum[i]);
}

// ---- merging; a thread's item is 8 columns of one row of the group ----

template <int kHeadDim>
DEVICE uint16_t* out_item(const AttnDecodeParams& p, const Segment& segment, int heads, int row, int column) {
  return p.out + ((size_t)segment.row * p.q_heads + segment.group * heads + row) * kHeadDim + column;
}

// A partial result: [group][head_dim + 2], output, maximum, sum.
template <int kHeadDim>
DEVICE float* partial_row(const AttnDecodeParams& p, int heads, int index, int row) {
  return p.partial + ((size_t)index * heads + row) * (kHeadDim + 2);
}

DEVICE void store_normalised(uint16_t* out, float (&x)[8], float sum, float v_scale) {
  const float inverse = v_scale / sum;
  UNROLL for (int i = 0; i < 8; i++) x[i] *= inverse;
  store8(out, pack8(x));
}

// Merges the warps, in order, into the output or (`partial` >= 0) into a partial result.
template <int kHeadDim, bool kFp8>
DEVICE void merge_warps(const AttnDecodeParams& p, DecodeShared<kHeadDim, kFp8>& shared, const Segment& segment,
                        int heads, const Attention<kHeadDim>& a, int partial) {
  const float scale_log2 = p.scale * kLog2e;
  UNROLL for (int i = 0; i < 2; i++) {
    const int row = lane_id() / 4 + 8 * i;
    if (row >= heads) continue;
    UNROLL for (int j = 0; j < kHeadDim / 8; j++) UNROLL for (int e = 0; e < 2; e++)
        shared.out[warp_id()][row][out_column<kFp8>(j, e)] = a.out[j][2 * i + e];
    if (lane_id() % 4 == 0) {
      shared.max[warp_id()][row] = a.max[i];
      shared.sum[warp_id()][row] = a.sum[i];
    }
  }
  named_barrier_sync(kMergeBarrier, kComputeThreads);

  for (int item = thread_idx(); item < heads * kHeadDim / 8; item += kComputeThreads) {
    const int row = item / (kHeadDim / 8), column = item % (kHeadDim / 8) * 8;
    float max = kLowest, sum = 0.f, out[8] = {};
    for (int w = 0; w < kComputeWarps; w++) max = fmaxf(max, shared.max[w][row]);
    for (int w = 0; w < kComputeWarps; w++) {
      const float weight = exp2_approx((shared.max[w][row] - max) * scale_log2);
      sum += weight * shared.sum[w][row];
      UNROLL for (int i = 0; i < 8; i++) out[i] += weight * shared.out[w][row][column + i];
    }
    if (partial < 0) {
      store_normalised(out_item<kHeadDim>(p, segment, heads, row, column), out, sum, p.v_scale);
    } else {
      float* to = partial_row<kHeadDim>(p, heads, partial, row);
      UNROLL for (int i = 0; i < 8; i++) to[column + i] = out[i];
      if (column == 0) to[kHeadDim] = max, to[kHeadDim + 1] = sum;
    }
  }
}

// The parts of a cut pair are those of neighbouring blocks, or its units: numbers in order.
struct Parts {
  int first, last;
};

DEVICE Parts parts_of(const AttnDecodeParams& p, const Segment& segment, int share) {
  const int last = segment.pair_start + segment.units - 1;
  return p.split_pages ? Parts{segment.pair_start, last} : Parts{segment.pair_start / share, last / share};
}

// Where a part has its partial result. A block has slot 0 for the pair that it finishes, 1 for the one it begins.
DEVICE int partial_index(const AttnDecodeParams& p, const Segment& segment, int part, int share) {
  return p.split_pages ? part : 2 * part + (segment.pair_start >= part * share ? 1 : 0);
}

template <int kHeadDim>
DEVICE void merge_parts(const AttnDecodeParams& p, const Segment& segment, int heads, int share, const Parts& parts) {
  const float scale_log2 = p.scale * kLog2e;
  for (int item = thread_idx(); item < heads * kHeadDim / 8; item += kComputeThreads) {
    const int row = item / (kHeadDim / 8), column = item % (kHeadDim / 8) * 8;
    float max = kLowest, sum = 0.f, out[8] = {};
    for (int part = parts.first; part <= parts.last; part++)
      max = fmaxf(max, partial_row<kHeadDim>(p, heads, partial_index(p, segment, part, share), row)[kHeadDim]);
    for (int part = parts.first; part <= parts.last; part++) {
      const float* from = partial_row<kHeadDim>(p, heads, partial_index(p, segment, part, share), row);
      const float weight = exp2_approx((from[kHeadDim] - max) * scale_log2);
      sum += weight * from[kHeadDim + 1];
      UNROLL for (int i = 0; i < 8; i++) out[i] += weight * from[column + i];
    }
    store_normalised(out_item<kHeadDim>(p, segment, heads, row, column), out, sum, p.v_scale);
  }
}

template <int kHeadDim, bool kFp8>
DEVICE void compute_span(const AttnDecodeParams& p, DecodeShared<kHeadDim, kFp8>& shared, Span span) {
  const int heads = p.q_heads / p.groups;
  Ring<kHeadDim, kFp8> ring;
  Segment segment;
  while (next_segment(p, span, segment)) {
    Attention<kHeadDim> a;
    attend(p, shared, segment, heads, ring, a);
    const bool cut = segment.count < segment.units;
    const int part = p.split_pages ? segment.unit : block_x();
    merge_warps(p, shared, segment, heads, a, cut ? partial_index(p, segment, part, span.share) : -1);
    if (cut) {
      const Parts parts = parts_of(p, segment, span.share);
      const uint32_t others = parts.last - parts.first;
      fence_device();
      named_barrier_sync(kMergeBarrier, kComputeThreads);
      if (thread_idx() == 0)
        shared.is_last = atomic_ticket(&p.ticket[segment.row * p.groups + segment.group], others) == others;
      named_barrier_sync(kMergeBarrier, kComputeThreads);
      if (shared.is_last) {
        fence_device();
        merge_parts<kHeadDim>(p, segment, heads, span.share, parts);
      }
    }
    named_barrier_sync(kMergeBarrier, kComputeThreads);  // the merge memory is free again
  }
}

template <int kHeadDim>
DEVICE void zero_padding(const AttnDecodeParams& p) {
  for (int row = block_x(); row < p.rows; row += grid_x()) {
    if (p.row_position[row] >= 0) continue;
    const Bf16x8 zeros = {};
    for (int i = thread_idx(); i < p.q_heads * kHeadDim / 8; i += kComputeThreads)
      store8(p.out + (size_t)row * p.q_heads * kHeadDim + 8 * i, zeros);
  }
}

template <int kHeadDim, bool kFp8>
DEVICE void attn_decode(const AttnDecodeParams& p) {
  using Shared = DecodeShared<kHeadDim, kFp8>;
  Shared& shared = *(Shared*)shared_memory();
  pdl_launch_dependents();
  if (thread_idx() == kComputeThreads) {
    prefetch_tensor_map(&p.k_map);
    prefetch_tensor_map(&p.v_map);
  }
  const Span span = span_of_block(p);
  if (thread_idx() == 0) {
    for (int i = 0; i < Shared::kStages; i++) {
      mbarrier_init(&shared.full[i], 1);
      mbarrier_init(&shared.empty[i], kComputeWarps);
    }
    mbarrier_init_fence();
  }
  sync_threads();

  if (warp_id() == kComputeWarps) {
    if (elect_one()) load_span(p, shared, span);
    return;
  }
  pdl_wait();
  if (thread_idx() == kComputeThreads - 1) prefetch_share(p.prefetch, block_x(), grid_x());
  zero_padding<kHeadDim>(p);
  compute_span(p, shared, span);
}

KERNEL(attn_decode_d64, AttnDecodeParams, ATTN_DECODE_THREADS) { attn_decode<64, false>(p); }
KERNEL(attn_decode_d128, AttnDecodeParams, ATTN_DECODE_THREADS) { attn_decode<128, false>(p); }
KERNEL(attn_decode_d64_fp8, AttnDecodeParams, ATTN_DECODE_THREADS) { attn_decode<64, true>(p); }
KERNEL(attn_decode_d128_fp8, AttnDecodeParams, ATTN_DECODE_THREADS) { attn_decode<128, true>(p); }
