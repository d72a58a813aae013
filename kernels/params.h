// THE kernel ABI: one struct per kernel, passed by value, plus the device-resident state they share. Pure C, <stdint.h> only.
// bindgen makes the Rust side of it, so nothing here is written twice. Every pointer carries its shape; bf16 is uint16_t.
//
// Words: a *row* is one token of the batch; a *slot* is a running sequence's seat on the device; a *page* holds kPageTokens
// tokens of one layer's K or V, in bf16 or, each divided by the scale of its layer's K or V, in e4m3 (fp8). Nothing in a params struct changes from one decode step to the next: what changes is in
// device memory, so that a captured step can be replayed.
#ifndef PONDER_PARAMS_H
#define PONDER_PARAMS_H

#include <stdint.h>

enum {
  PAGE_TOKENS = 64,
  MAX_SLOTS = 1024,      // slot 0 is reserved: padding rows point at it, and it owns page 0
  MAX_DECODE_ROWS = 64,  // largest decode bucket
  MAX_STOP_IDS = 16,
  MAX_LOGIT_BIAS = 512,
  MAX_TOP_LOGPROBS = 20,
  MAX_IGNORE_STRINGS = 8,
  MAX_END_TOKENS = 8,    // longest start or end delimiter
  POOL_PER_SLOT = 1024,  // ids of a slot's strings in the pool
  RING_STEPS = 64,       // sampler results that may wait for the host
  LOOP_PERIODS = 256,    // longest repetition that loop breaking finds, in tokens
  LOOP_TOKENS = 32,      // and the least that a loop must cover

  EMBED_THREADS = 128,
  NORM_THREADS = 128,
  ROPE_THREADS = 128,
  UNFUSED_THREADS = 128,
  GEMM_THREADS = 384,  // one producer and two consumer warpgroups
  GEMV_THREADS = 160,  // one consumer warpgroup and one warp that loads
  QUANTISE_THREADS = 128,
  ATTN_PREFILL_THREADS_D64 = 512,   // one producer and three consumer warpgroups
  ATTN_PREFILL_THREADS_D128 = 384,  // and two
  ATTN_DECODE_THREADS = 160,        // four compute warps and one that loads
  SAMPLE_THREADS = 512,
  DECODE_LOOP_THREADS = 32,
  RANDOM_THREADS = 256,

  // Dynamic shared memory, bytes.
  NORM_SHARED = 128,
  QUANTISE_SHARED = 128,
  GEMM_SHARED = 232448,  // all there is: as many stages as fit
  GEMV_SHARED_M8 = 93696,
  GEMV_SHARED_M16 = 104096,
  GEMV_SHARED_M32 = 100048,
  GEMV_SHARED_M64 = 100416,
  GEMV_FP8_SHARED_M8 = 86720,
  GEMV_FP8_SHARED_M16 = 91104,
  GEMV_FP8_SHARED_M32 = 99872,
  GEMV_FP8_SHARED_M64 = 101376,
  ATTN_PREFILL_SHARED_D64 = 180424,
  ATTN_PREFILL_SHARED_D128 = 229528,
  ATTN_DECODE_SHARED_D64 = 84616,
  ATTN_DECODE_SHARED_D128 = 100936,
  ATTN_PREFILL_SHARED_D64_FP8 = 215040,
  ATTN_PREFILL_SHARED_D128_FP8 = 231424,
  ATTN_DECODE_SHARED_D64_FP8 = 84744,
  ATTN_DECODE_SHARED_D128_FP8 = 101000,
  SAMPLE_SHARED_BASE = 9904,  // and 4 for each logit of a block's slice, a multiple of 4 of them

  // (query token, head of the group) pairs in a tile of attn_prefill.
  ATTN_PREFILL_ROWS_D64 = 192,
  ATTN_PREFILL_ROWS_D128 = 128,

  NO_WINDOW = 1 << 30,  // more than any context

  SCALE_GROUP = 128,  // neighbours in k that share a scale: of an activation, and of a block of weights
  SCALE_ROWS = 8,     // rows of a packed matrix that share the scales of their blocks
};

// A tensor map for TMA: on CUDA what cuTensorMapEncodeTiled fills, on the host target the fields of SimtTensorMap.
typedef struct __attribute__((aligned(64))) TensorMap {
  uint64_t opaque[16];
} TensorMap;

// ---------------------------------------------------------------------------------------------------------------------
// Slots: what the sampler knows about a running sequence. The host writes a slot on admission; only `sample` advances it.
// ---------------------------------------------------------------------------------------------------------------------

enum SlotFlag {
  SLOT_ACTIVE = 1,  // decoding; otherwise, and while it pauses, every kernel treats its rows as padding
  SLOT_IGNORE_EOS = 2,
  SLOT_ALLOWED_MASK = 4,  // the allowed-token bitmask of this slot applies
  SLOT_PENALTIES = 8,     // token counts are kept and penalties apply
  SLOT_GUIDED = 16,       // no draw outside of thinking without a mask from the host: see mask_for
};

enum FinishReason {
  FINISH_NONE = 0,
  FINISH_STOP = 1,    // EOS or a stop id
  FINISH_LENGTH = 2,  // max_generated or max_length
  FINISH_ERROR = 3,   // logits that are not finite, or no token left to draw
};

// A string of token ids in the device pool, in the region of POOL_PER_SLOT ids that belongs to its slot.
typedef struct PoolString {
  uint32_t offset;  // in ids
  uint32_t length;  // in ids
} PoolString;

enum ThinkPhase {
  PHASE_OFF = 0,  // no thinking seen yet (or no delimiters): the start matcher runs
  PHASE_THINKING = 1,
  PHASE_INJECTING = 2,  // ids of `inject` are due, `inject_kind` says why
  PHASE_ANSWERING = 3,  // thinking is over for this turn
};

enum InjectKind { INJECT_NONE = 0, INJECT_IGNORE = 1, INJECT_CLOSE = 2, INJECT_END = 3 };
enum BudgetAccounting { ACCOUNT_STRICT = 0, ACCOUNT_S1_HARNESS = 1, ACCOUNT_S1_README = 2 };
enum BudgetOnEnd { ON_END_REPLACE = 0, ON_END_MASK = 1 };

#define BUDGET_NO_MAX 0x7fffffff

enum SteeringTechnique {
  STEER_AVOID = 1,
  STEER_SWITCH = 2,
  STEER_BRAKE = 4,
  STEER_END_BIAS = 8,
  STEER_CONFIDENCE = 16,
  STEER_LOOP = 32,
};

// Techniques that act on the draws within thinking, per slot: first what the request asked for, then the state of steering.cuh.
typedef struct Steering {
  uint32_t techniques;    // bits of SteeringTechnique
  float switch_penalty;   // (switch) taken from the logits of switch tokens
  int32_t switch_window;  // in this many thinking tokens after one, or after the beginning
  float brake_margin;     // (brake) natural log
  float end_bias;         // (end bias) added to the logit of the end's next token
  float end_bias_ramp;    // and as much for each thinking token
  float confidence;       // (confidence) probability of the most likely token
  int32_t streak_needed;  // so many draws in a row
  int32_t stop_after;     // not before so many thinking tokens
  int32_t loop_repeats;   // (loop) how often something stands in a row

  int32_t since_switch;      // thinking tokens
  int32_t streak;            // confident draws in a row
  uint32_t at_sentence_end;  // the last token is a thinking token that ends a sentence
  uint32_t looping;          // a loop is complete
  int32_t history_length;    // thinking tokens that loop_history has seen
  uint32_t stopped;          // a technique has ended the thinking
} Steering;

// Budget forcing, per slot: first what the request asked for, then the state of the machine in budget.cuh.
typedef struct Budget {
  PoolString start;       // completes -> THINKING; length 0: none
  PoolString end;         // ends thinking (at most MAX_END_TOKENS ids); length 0: budget forcing off
  PoolString close;       // what stands in the output after a natural end; begins with `end`, the rest is injected
  PoolString end_string;  // forced at the maximum; outside the budget
  PoolString ignore_strings[MAX_IGNORE_STRINGS];  // round-robin
  uint32_t ignore_count;                          // how many of them; 0: an ignored end is masked for one step instead
  int32_t newline;       // id forced before end_string when the last token does not end with a newline; -1: none
  int32_t max_thinking;  // BUDGET_NO_MAX: none
  int32_t min_thinking;
  int32_t n_ignore;
  uint32_t accounting;  // BudgetAccounting
  uint32_t on_end;      // BudgetOnEnd

  uint32_t phase;            // ThinkPhase
  int32_t count;             // thinking tokens as `accounting` counts them
  int32_t reasoning_tokens;  // tokens between the delimiters, injected ones included: what is reported
  int32_t ignores_used;
  uint32_t next_ignore;
  uint32_t start_match;    // ids of `start` matched so far
  uint32_t end_match;      // ids of `end` matched so far
  int32_t inject_first;    // an id to inject before `inject`; -1: none
  PoolString inject;       // what is left to inject
  uint32_t inject_kind;    // InjectKind
  uint32_t mask_end_once;  // the end set is masked for the next draw
  uint32_t mask_eos_once;  // EOS is masked for the next draw (directly after a forced end)
  uint32_t utf8_missing;   // bytes that the text so far still lacks to end on a whole character
  uint32_t ends_with_newline;
  uint32_t max_hit;

  Steering steering;
} Budget;

typedef struct SlotState {
  uint32_t serial;  // which request sits here; echoed in the ring
  uint32_t flags;   // SlotFlag
  int32_t last_token;
  int32_t length;  // tokens of the sequence, prompt and generated; KV is due at position length - 1 in a decode step
  int32_t generated;
  int32_t max_generated;
  int32_t min_generated;  // EOS and stop ids are masked before that
  int32_t max_length;     // the context
  int32_t mask_for;       // (guided) `allowed` holds the mask for the draw after so many generated tokens; -1: none yet
  uint32_t finish;        // FinishReason

  float temperature;         // 0: greedy
  float top_p;               // 1: off
  float min_p;               // 0: off
  int32_t top_k;             // 0: off
  float repetition_penalty;  // 1: off
  float presence_penalty;
  float frequency_penalty;
  uint32_t seed_low, seed_high;
  int32_t logprobs;     // -1: none; otherwise how many of the most likely tokens to report
  uint32_t bias_count;  // entries in this slot's logit bias list
  uint32_t stop_count;
  int32_t stop_ids[MAX_STOP_IDS];  // end the answer (EOS of the model unless SLOT_IGNORE_EOS, and the request's own)
  uint32_t eos_count;              // the first eos_count of stop_ids are the model's EOS: an end of thinking, too

  Budget budget;
} SlotState;

// Bits of token_traits.
enum TokenTrait {
  TRAIT_MISSING_MASK = 3,    // UTF-8 bytes still missing after the token's last character
  TRAIT_CONTINUE_SHIFT = 2,  // bits 2-4: its bytes, if all are continuation bytes; else 0
  TRAIT_CONTINUE_MASK = 7,
  TRAIT_NEWLINE = 32,    // its bytes end with a newline
  TRAIT_REAL = 64,       // not a padded row of the vocabulary
  TRAIT_SENTENCE = 128,  // its bytes end a sentence or a line
};

enum TokenFlag {
  TOKEN_VALID = 1,         // the slot was active: there is a token
  TOKEN_INJECTED = 2,      // forced, not drawn
  TOKEN_REASONING = 4,     // stands between the delimiters
  TOKEN_DELIMITER = 8,     // part of a start, end, close or end string
  TOKEN_MAX_HIT = 16,      // the maximum has been hit by now
  TOKEN_AWAITS_MASK = 32,  // the slot pauses until the mask for its next draw is there
  TOKEN_STOPPED = 64,      // a technique of steering has ended the thinking by now
};

// What the sampler tells the host about one row of one step.
typedef struct TokenRecord {
  uint32_t serial;
  uint32_t slot;
  int32_t token;
  uint32_t flags;     // TokenFlag
  uint32_t finish;    // FinishReason
  int32_t generated;  // tokens generated including this one
  int32_t ignores_used;
  int32_t reasoning_tokens;
  float
      logprob;  // of `token`, natural log, from the logits after bias, masks and penalties, before temperature; 0 if not asked for
  int32_t top_count;
  int32_t top_ids[MAX_TOP_LOGPROBS];
  float top_logprobs[MAX_TOP_LOGPROBS];
} TokenRecord;

// The ring in mapped pinned host memory. The device writes records[head % RING_STEPS][0..rows), fences, and releases head. The
// host writes `until` alone, before it launches a loop, and again to break in.
typedef struct TokenRing {
  uint32_t head;  // steps completed since start-up (wraps)
  uint32_t head_padding[31];
  uint32_t until;  // a loop on the device ends once head is there or past it (wraps)
  uint32_t until_padding[31];
  uint32_t rows[RING_STEPS];  // rows of each step
  TokenRecord records[RING_STEPS][MAX_DECODE_ROWS];
} TokenRing;

// ---------------------------------------------------------------------------------------------------------------------
// Kernels
// ---------------------------------------------------------------------------------------------------------------------

// embed: resolves each row's token and position, and gathers its embedding.
typedef struct EmbedParams {
  const uint16_t* table;           // [vocab][hidden]
  const SlotState* slots;          // [MAX_SLOTS]
  const int32_t* row_slot;         // [rows]
  const int32_t* prompt_token;     // [rows] for prefill; null in decode, where the slot's last token is taken
  const int32_t* prompt_position;  // [rows] for prefill; null in decode, where it is the slot's length - 1
  int32_t* row_position;           // [rows] out; -1 for padding rows and slots that are not active
  uint16_t* out;                   // [rows][hidden]
  float* squares;                  // [rows][hidden / 64] out, sums of squares for the first norm; or null
  int32_t rows, hidden, vocab;
} EmbedParams;

// What numbers in e4m3 are to be multiplied with. Activations: each SCALE_GROUP neighbours of a row share one.
// Weights have one for each row, or for SCALE_GROUP k of SCALE_ROWS rows; the other is null.
typedef struct WeightScales {
  const float* rows;    // [n]
  const float* blocks;  // [k / SCALE_GROUP, rounded up][n / SCALE_ROWS]
} WeightScales;

// rms_norm: out[i] = norm(x[row_index[i]]); rms_norm_summed knows the sums of squares already;
// rms_norm_fp8 and rms_norm_summed_fp8 make e4m3 with scales.
// The norm is as the reference implementation rounds it: bf16(bf16(x * rsqrt(mean x^2 + eps)) * weight).
typedef struct NormParams {
  const uint16_t* x;         // [any][hidden]
  const uint16_t* weight;    // [hidden]
  const int32_t* row_index;  // [rows] or null for the identity
  const float* squares;      // [rows][hidden / 64] (summed): sums of squares of 64 neighbours in x, from who wrote it
  uint16_t* out;             // [rows][hidden]
  uint8_t* out_fp8;          // [rows][hidden] (fp8)
  float* scales;             // [hidden / SCALE_GROUP, rounded up][scales_stride] out (fp8)
  int32_t rows, hidden;
  int32_t scales_stride;  // at least rows
  float eps;
} NormParams;

// quantise: out, scales = x in e4m3, by groups of a row.
typedef struct QuantiseParams {
  const uint16_t* x;  // [rows][k]
  uint8_t* out;       // [rows][k]
  float* scales;      // [k / SCALE_GROUP, rounded up][scales_stride]
  int32_t rows, k;    // k a multiple of 8
  int32_t scales_stride;
} QuantiseParams;

// quantise_weight: out, scales = w in e4m3, a scale for each row.
typedef struct QuantiseWeightParams {
  const uint16_t* w;  // [n][k]
  uint8_t* out;       // [n][k]
  float* scales;      // [n]
  int32_t n, k;       // k a multiple of 8
} QuantiseWeightParams;

// Where q, k and v of a step's rows go. Heads of q and k have their halves interleaved by blocks of 8 columns in the product
// (rope.cuh), and only there.
typedef struct Rope {
  const float* cos_sin;          // [max_position][head_dim / 2][2]
  const int32_t* row_position;   // [rows], -1: padding, nothing is appended
  const int32_t* row_slot;       // [rows]
  const int32_t* block_table;    // [MAX_SLOTS][max_pages] page ids
  uint16_t* q;                   // [rows][q_heads][head_dim] out; bf16, or f16 where pages are e4m3
  uint8_t* k_pages;              // [pages][kv_heads][PAGE_TOKENS][head_dim], bf16 or e4m3
  uint8_t* v_pages;              // the same
  float k_quantise, v_quantise;  // what K and V are multiplied with for pages of e4m3, 1 / scale; 0: pages of bf16
  int32_t q_heads, kv_heads, head_dim, max_pages;
} Rope;

// rope_append: q and k normalised per head (optional) and rotated, k and v appended to their page.
typedef struct RopeParams {
  const uint16_t* qkv;     // [rows][(q_heads + 2 kv_heads) * head_dim], q heads first, then k, then v; interleaved
  const uint16_t* q_norm;  // [head_dim] or null
  const uint16_t* k_norm;  // [head_dim] or null
  Rope rope;
  int32_t rows;
  float norm_eps;
} RopeParams;

// gemm_*_n<tile_n>: c = a w^T with an epilogue, for prefill (many rows). bf16 in, fp32 accumulation; k a multiple of 64, n
// of 64. fp8: a and w in e4m3; their maps have pairs of them, half as many as k. In clusters of 1 or 2 blocks. panel: 64 columns of c, or 32 where a tile's columns of c are no multiple of 64.
// Gate and up projections are interleaved in w by blocks of 8 rows: 8 of gate, then 8 of up.
typedef struct __attribute__((aligned(64))) GemmParams {
  TensorMap a_map;         // a [rows][k], box 64 (k) x 128 rows, swizzle 128
  TensorMap w_map;         // w [n][k], box 64 (k) x tile_n / 2 rows, swizzle 128
  TensorMap c_map;         // c [rows][n] (n / 2 for silu), box panel x 64 rows, swizzled
  TensorMap residual_map;  // the same of the residual [rows][n] (residual), which may be c itself
  const uint16_t* bias;    // [n] (bias), or null (residual)
  const float* a_scales;   // [k / SCALE_GROUP, rounded up][a_scales_stride] (fp8)
  WeightScales w_scales;   // (fp8)
  int32_t rows, n, k;
  int32_t a_scales_stride;  // at least the rows of all tiles: a multiple of 256
} GemmParams;

// gemv_*_m<tokens>: c = x w^T for decode (1 to 64 rows): streams w once. The same w as the prefill product's; k a multiple of
// 64, n of 16, or of 64 for rope, residual and fp8. norm: x is RMS-normalised on its way, as rms_norm does it. fp8: w in e4m3, and
// x becomes it on its way, behind the norm; for 64 tokens it comes in e4m3.
// Results: none (c, with bias), rope (q and the KV pages, with bias), silu (interleaved as above), residual (added to c), logits
// (fp32, of gate and up as well where silu is apart). The steps of 128 k (fp8: 256) of all tiles of 64 weight rows are dealt
// evenly to the blocks; where a tile is cut, its parts are summed in order by the last block that finishes one. The grid has at
// most as many blocks as there are such steps.
typedef struct __attribute__((aligned(64))) GemvParams {
  TensorMap w_map;        // w [n][k], box 64 (k) x 64 rows, swizzle 128; fp8: pairs [n][k / 2]
  TensorMap x_map;        // x [rows][k], box 64 (k) x tokens rows, swizzle 128; in e4m3: pairs [rows][k / 2]
  const uint16_t* x;      // [rows][k] (fp8, up to 32 tokens, which do not use the map)
  const float* x_scales;  // [k / SCALE_GROUP, rounded up][x_scales_stride] (fp8, 64 tokens)
  WeightScales scales;    // (fp8)
  const uint16_t* norm;   // [k] (norm)
  const float* squares;   // [rows][k / 64] (norm): sums of squares of 64 neighbours in x
  const uint16_t* bias;   // [n] or null (none, rope, residual)
  uint16_t* c;            // [rows][n], or [rows][n / 2] for silu
  float* squares_out;     // [rows][n / 64] (residual): the same of the new c
  float* logits;          // [rows][n] (logits)
  float* partial;         // [grid_x * 2][tokens][64] workspace: the parts of cut tiles
  uint32_t* ticket;       // [ceil(n / 64)] zero between launches
  Rope rope;              // (rope)
  int32_t rows, n, k;
  int32_t x_scales_stride;  // at least 64, a multiple of 4
  float eps;                // (norm)
} GemvParams;

// add_residual: residual += x, rounded as gemv_residual rounds it.
typedef struct AddResidualParams {
  const uint16_t* x;   // [rows][hidden]
  uint16_t* residual;  // [rows][hidden]
  float* squares;      // [rows][hidden / 64] out: sums of squares of 64 neighbours in the new residual
  int32_t rows, hidden;
} AddResidualParams;

// silu_mul: out = silu(gate) * up, from sums that have not been rounded, as in gemv_silu.
typedef struct SiluMulParams {
  const float* gate_up;  // [rows][2 inner], interleaved as above
  uint16_t* out;         // [rows][inner]
  int32_t rows, inner;
} SiluMulParams;

// attn_prefill: causal attention of ragged chunks over paged KV (the chunk's own K and V are already in their pages).
typedef struct PrefillTile {
  int32_t first_row;  // row of the batch where the tile's first query token lies
  int32_t tokens;     // query tokens in this tile
  int32_t position;   // position of the first of them in its sequence
  int32_t slot;
} PrefillTile;

typedef struct __attribute__((aligned(64))) AttnPrefillParams {
  TensorMap
      k_map;  // k_pages as 4-D (head_dim, PAGE_TOKENS, kv_heads, pages), box 64 x 64 x 1 x 1, swizzle 128; fp8: pairs
              // (head_dim / 2, ..), box head_dim / 2 x 64 x 1 x 1, swizzled by its width
  TensorMap v_map;  // the same for v_pages
  TensorMap
      q_map;  // q (f16 for fp8) as 4-D (head_dim, group, kv_heads, rows), box 64 x group x 1 x (ROWS / group), swizzle 128
  const PrefillTile* tiles;    // [tile_count], longest first; at most ATTN_PREFILL_ROWS_* / group tokens each
  const int32_t* tile_count;   // [1]
  const int32_t* block_table;  // [MAX_SLOTS][max_pages]
  uint32_t* ticket;            // [1] zero between launches
  uint16_t* out;               // [rows][q_heads][head_dim]
  int32_t q_heads, kv_heads, max_pages;
  int32_t window;  // how many tokens a token attends to, itself included, or NO_WINDOW
  float scale;     // scale of K / sqrt(head_dim)
  float v_scale;   // 1 for pages of bf16
} AttnPrefillParams;

// The weights of a product that comes later, for a kernel that leaves the memory idle to read into L2: each of its blocks
// reads `share` bytes from the beginning of its part of the matrix, as its part of the product will.
typedef struct Prefetch {
  const uint8_t* weights;  // [bytes] or null
  uint64_t bytes;
  uint64_t share;  // a multiple of 16, below 2^32
} Prefetch;

// attn_decode: one query token per row over its paged KV; the pages of all rows are dealt evenly to the blocks, or in pieces of
// split_pages; partial results are merged in order by the last block of a row. A group of query heads reads K and V once.
typedef struct __attribute__((aligned(64))) AttnDecodeParams {
  TensorMap k_map;  // as above
  TensorMap v_map;
  const uint16_t* q;            // [rows][q_heads][head_dim], bf16; f16 for fp8
  const int32_t* row_position;  // [rows], -1: padding, output zero
  const int32_t* row_slot;      // [rows]
  const int32_t* block_table;   // [MAX_SLOTS][max_pages]
  float* partial;    // [grid_x * 2, or pieces of all rows and groups][q_heads / groups][head_dim + 2]: output, max, sum
  uint32_t* ticket;  // [rows * groups] zero between launches
  uint16_t* out;     // [rows][q_heads][head_dim]
  Prefetch prefetch;
  int32_t rows, q_heads, max_pages;
  int32_t groups;              // as many as KV heads; or as query heads, if none is to share what it reads
  int32_t groups_per_kv_head;  // 1; or query heads per KV head
  int32_t split_pages;         // 0: pairs are cut where the blocks' shares end; else after so many pages, always
  int32_t window;              // as above
  float scale;
  float v_scale;
} AttnDecodeParams;

// sample: one block cluster per row: logits to the next token, budget forcing, the slot's next state, the ring.
typedef struct SampleParams {
  const float* logits;          // [rows][vocab]
  SlotState* slots;             // [MAX_SLOTS]
  const int32_t* row_slot;      // [rows]
  const uint8_t* token_traits;  // [vocab]
  const int32_t* pool;          // token ids of all strings
  const uint32_t* allowed;      // [MAX_SLOTS][vocab / 32 rounded up]
  const int32_t* bias_ids;      // [MAX_SLOTS][MAX_LOGIT_BIAS]
  const float* bias_values;     // [MAX_SLOTS][MAX_LOGIT_BIAS]
  uint16_t* output_counts;      // [MAX_SLOTS][vocab] how often a token was generated
  const uint32_t* prompt_seen;  // [MAX_SLOTS][vocab / 32 rounded up] tokens of the prompt, for the repetition penalty
  const uint32_t* avoided;      // [MAX_SLOTS][vocab / 32 rounded up] (steering: avoid)
  const uint32_t* switches;     // the same (steering: switch)
  // (steering: loop) [MAX_SLOTS][2][LOOP_PERIODS]: a ring of the last thinking tokens; and for each period how many of them in
  // a row equal the one a period before.
  int32_t* loop_history;
  TokenRing* ring;   // mapped host memory
  uint32_t* step;    // [1] steps so far (the ring's head, on the device)
  uint32_t* ticket;  // [1] rows finished in this step
  Prefetch prefetch;
  int32_t rows, vocab;
} SampleParams;

// decode_loop: the last kernel of a decode step that is repeated on the device. Decides whether there is a next one.
typedef struct DecodeLoopParams {
  const SlotState* slots;   // [MAX_SLOTS]
  const int32_t* row_slot;  // [rows]
  const TokenRing* ring;    // mapped host memory
  const uint32_t* step;     // [1] steps so far
  uint64_t condition;       // of the loop: see graph_set_condition
  int32_t rows;
} DecodeLoopParams;

// random_normal: bf16 from a normal-like distribution, mean 0, for dummy weights and benches.
typedef struct RandomParams {
  uint16_t* out;  // [count]
  uint64_t count;
  uint32_t seed_low, seed_high;
  float deviation;
} RandomParams;

#ifndef __CUDACC__
// The kernels as the host target compiles them: as they are, and with every memory access checked.
#define KERNEL_PROTOTYPE(name, Params) \
  void host_##name(const Params*);     \
  void checked_##name(const Params*);
#ifdef __cplusplus
extern "C" {
#endif
KERNEL_PROTOTYPE(embed, EmbedParams)
KERNEL_PROTOTYPE(rms_norm, NormParams)
KERNEL_PROTOTYPE(rms_norm_fp8, NormParams)
KERNEL_PROTOTYPE(rms_norm_summed_fp8, NormParams)
KERNEL_PROTOTYPE(quantise, QuantiseParams)
KERNEL_PROTOTYPE(quantise_weight, QuantiseWeightParams)
KERNEL_PROTOTYPE(rms_norm_summed, NormParams)
KERNEL_PROTOTYPE(rope_append_d64, RopeParams)
KERNEL_PROTOTYPE(rope_append_d128, RopeParams)
KERNEL_PROTOTYPE(gemm_n96, GemmParams)
KERNEL_PROTOTYPE(gemm_n128, GemmParams)
KERNEL_PROTOTYPE(gemm_n160, GemmParams)
KERNEL_PROTOTYPE(gemm_n192, GemmParams)
KERNEL_PROTOTYPE(gemm_n256, GemmParams)
KERNEL_PROTOTYPE(gemm_bias_n96, GemmParams)
KERNEL_PROTOTYPE(gemm_bias_n128, GemmParams)
KERNEL_PROTOTYPE(gemm_bias_n160, GemmParams)
KERNEL_PROTOTYPE(gemm_bias_n192, GemmParams)
KERNEL_PROTOTYPE(gemm_bias_n256, GemmParams)
KERNEL_PROTOTYPE(gemm_residual_n96, GemmParams)
KERNEL_PROTOTYPE(gemm_residual_n128, GemmParams)
KERNEL_PROTOTYPE(gemm_residual_n160, GemmParams)
KERNEL_PROTOTYPE(gemm_residual_n192, GemmParams)
KERNEL_PROTOTYPE(gemm_residual_n256, GemmParams)
KERNEL_PROTOTYPE(gemm_silu_n128, GemmParams)
KERNEL_PROTOTYPE(gemm_silu_n192, GemmParams)
KERNEL_PROTOTYPE(gemm_silu_n256, GemmParams)
KERNEL_PROTOTYPE(gemm_fp8_n96, GemmParams)
KERNEL_PROTOTYPE(gemm_fp8_n128, GemmParams)
KERNEL_PROTOTYPE(gemm_fp8_n192, GemmParams)
KERNEL_PROTOTYPE(gemm_fp8_bias_n96, GemmParams)
KERNEL_PROTOTYPE(gemm_fp8_bias_n128, GemmParams)
KERNEL_PROTOTYPE(gemm_fp8_bias_n192, GemmParams)
KERNEL_PROTOTYPE(gemm_fp8_residual_n96, GemmParams)
KERNEL_PROTOTYPE(gemm_fp8_residual_n128, GemmParams)
KERNEL_PROTOTYPE(gemm_fp8_residual_n192, GemmParams)
KERNEL_PROTOTYPE(gemm_fp8_silu_n128, GemmParams)
KERNEL_PROTOTYPE(gemm_fp8_silu_n192, GemmParams)
KERNEL_PROTOTYPE(gemv_norm_m8, GemvParams)
KERNEL_PROTOTYPE(gemv_norm_m16, GemvParams)
KERNEL_PROTOTYPE(gemv_norm_m32, GemvParams)
KERNEL_PROTOTYPE(gemv_norm_m64, GemvParams)
KERNEL_PROTOTYPE(gemv_norm_rope_m8, GemvParams)
KERNEL_PROTOTYPE(gemv_norm_rope_m16, GemvParams)
KERNEL_PROTOTYPE(gemv_norm_rope_m32, GemvParams)
KERNEL_PROTOTYPE(gemv_norm_rope_m64, GemvParams)
KERNEL_PROTOTYPE(gemv_norm_silu_m8, GemvParams)
KERNEL_PROTOTYPE(gemv_norm_silu_m16, GemvParams)
KERNEL_PROTOTYPE(gemv_norm_silu_m32, GemvParams)
KERNEL_PROTOTYPE(gemv_norm_silu_m64, GemvParams)
KERNEL_PROTOTYPE(gemv_m8, GemvParams)
KERNEL_PROTOTYPE(gemv_m16, GemvParams)
KERNEL_PROTOTYPE(gemv_m32, GemvParams)
KERNEL_PROTOTYPE(gemv_m64, GemvParams)
KERNEL_PROTOTYPE(gemv_rope_m8, GemvParams)
KERNEL_PROTOTYPE(gemv_rope_m16, GemvParams)
KERNEL_PROTOTYPE(gemv_rope_m32, GemvParams)
KERNEL_PROTOTYPE(gemv_rope_m64, GemvParams)
KERNEL_PROTOTYPE(gemv_silu_m8, GemvParams)
KERNEL_PROTOTYPE(gemv_silu_m16, GemvParams)
KERNEL_PROTOTYPE(gemv_silu_m32, GemvParams)
KERNEL_PROTOTYPE(gemv_silu_m64, GemvParams)
KERNEL_PROTOTYPE(gemv_norm_logits_m8, GemvParams)
KERNEL_PROTOTYPE(gemv_norm_logits_m16, GemvParams)
KERNEL_PROTOTYPE(gemv_norm_logits_m32, GemvParams)
KERNEL_PROTOTYPE(gemv_norm_logits_m64, GemvParams)
KERNEL_PROTOTYPE(gemv_residual_m8, GemvParams)
KERNEL_PROTOTYPE(gemv_residual_m16, GemvParams)
KERNEL_PROTOTYPE(gemv_residual_m32, GemvParams)
KERNEL_PROTOTYPE(gemv_residual_m64, GemvParams)
KERNEL_PROTOTYPE(gemv_logits_m8, GemvParams)
KERNEL_PROTOTYPE(gemv_logits_m16, GemvParams)
KERNEL_PROTOTYPE(gemv_logits_m32, GemvParams)
KERNEL_PROTOTYPE(gemv_logits_m64, GemvParams)
KERNEL_PROTOTYPE(gemv_fp8_norm_m8, GemvParams)
KERNEL_PROTOTYPE(gemv_fp8_norm_m16, GemvParams)
KERNEL_PROTOTYPE(gemv_fp8_norm_m32, GemvParams)
KERNEL_PROTOTYPE(gemv_fp8_m64, GemvParams)
KERNEL_PROTOTYPE(gemv_fp8_norm_rope_m8, GemvParams)
KERNEL_PROTOTYPE(gemv_fp8_norm_rope_m16, GemvParams)
KERNEL_PROTOTYPE(gemv_fp8_norm_rope_m32, GemvParams)
KERNEL_PROTOTYPE(gemv_fp8_rope_m64, GemvParams)
KERNEL_PROTOTYPE(gemv_fp8_norm_silu_m8, GemvParams)
KERNEL_PROTOTYPE(gemv_fp8_norm_silu_m16, GemvParams)
KERNEL_PROTOTYPE(gemv_fp8_norm_silu_m32, GemvParams)
KERNEL_PROTOTYPE(gemv_fp8_silu_m64, GemvParams)
KERNEL_PROTOTYPE(gemv_fp8_residual_m8, GemvParams)
KERNEL_PROTOTYPE(gemv_fp8_residual_m16, GemvParams)
KERNEL_PROTOTYPE(gemv_fp8_residual_m32, GemvParams)
KERNEL_PROTOTYPE(gemv_fp8_residual_m64, GemvParams)
KERNEL_PROTOTYPE(add_residual, AddResidualParams)
KERNEL_PROTOTYPE(silu_mul, SiluMulParams)
KERNEL_PROTOTYPE(attn_prefill_d64, AttnPrefillParams)
KERNEL_PROTOTYPE(attn_prefill_d128, AttnPrefillParams)
KERNEL_PROTOTYPE(attn_prefill_d64_fp8, AttnPrefillParams)
KERNEL_PROTOTYPE(attn_prefill_d128_fp8, AttnPrefillParams)
KERNEL_PROTOTYPE(attn_decode_d64, AttnDecodeParams)
KERNEL_PROTOTYPE(attn_decode_d128, AttnDecodeParams)
KERNEL_PROTOTYPE(attn_decode_d64_fp8, AttnDecodeParams)
KERNEL_PROTOTYPE(attn_decode_d128_fp8, AttnDecodeParams)
KERNEL_PROTOTYPE(sample, SampleParams)
KERNEL_PROTOTYPE(decode_loop, DecodeLoopParams)
KERNEL_PROTOTYPE(random_normal, RandomParams)
// The functions of budget.cuh (kernels/simt/budget.cpp), for the test that holds them against a model.
void simt_budget_before(Budget* b, const int32_t* pool, int32_t step[3]);  // forced, mask_end, mask_eos
int32_t simt_budget_after(Budget* b, const int32_t* pool, int32_t token, int32_t is_eos);
uint32_t simt_budget_emit(Budget* b, const int32_t* pool, int32_t token, uint8_t traits);
int32_t simt_budget_completing(const Budget* b, const int32_t* pool);
#ifdef __cplusplus
}
#endif
#endif  // __CUDACC__

#endif  // PONDER_PARAMS_H
