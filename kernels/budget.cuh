// Budget forcing (s1, arXiv 2501.19393) as a pure function over a slot's Budget: which token is forced, what may not be drawn,
// and what becomes of what was drawn. `sample` calls it twice a step, around the draw; so does the test that holds it against
// an independent model.
//
// Words. The *end* is the token sequence by which the model ends its thinking; the *end set* of a step is the token that would
// complete it there, and EOS. Thinking runs from the completed start (or the end of the prompt) to the completed end.
//
// The contract, in the order in which a step decides:
//  1. The matchers of start and end have seen every token emitted so far, drawn or injected: they live here, on the device.
//  2. Injecting: the next token of the string is emitted, nothing is drawn.
//  3. Thinking, or injecting an ignore string, with count >= max: the end string is injected. It waits while the text ends inside
//     a UTF-8 character (at most UTF8_PATIENCE tokens). It continues an end that the model has begun: what the text already
//     holds of it is not repeated. Before it comes `newline`, if there is one and the text does not end with one.
//  4. The draw. The end set is masked for the one draw after an ignored end; EOS is masked for the one draw after a forced end
//     (not in the s1 accountings, where the loops they reproduce do not).
//  5. A drawn token of the end set, while ignores remain or count < min, is dropped and one ignore is used up. With
//     on_end = replace and an ignore string (round-robin) that is not empty the string is injected, its first token in this
//     very step; else the draw is repeated with the end set masked, at the same position. Of an end of several tokens the
//     dropped one is the last: the text keeps the others, because they may have been the beginning of something else.
//  6. Otherwise it ends the thinking. After a completed end the rest of `close` is injected; EOS is dropped, as s1's harness drops
//     it, and `close` is injected in its place. Then the answer begins, for good: a later start does not re-arm.
// Only a drawn token completes an end: one that an ignore string completes is thinking like the rest of it.
//
// Counting. The beginning of an end counts as thinking until the end is completed or forced: then it belongs to the end, and the
// minimum is met without it. strict: every token between the delimiters, injected ones included; the end string is outside. s1-harness: the
// same number, since the harness cuts to the maximum at the end whatever its rounds came to; and the first draw of a request
// with ignores masks the end set, as its rounds do (min_tokens = 1). s1-readme: drawn tokens including dropped ends, ignore
// strings not; an end that spends the last token is not ignored.
#pragma once

#include "kernel.cuh"

constexpr int UTF8_PATIENCE = 4;
constexpr int BUDGET_REDRAW = -1;

// What `sample` must know before the draw.
struct BudgetStep {
  int forced;     // the token, or -1: draw
  bool mask_end;  // the end set may not be drawn
  bool mask_eos;  // EOS may not be drawn
};

DEVICE bool budget_is_thinking(const Budget& b) {
  return b.phase == PHASE_THINKING || (b.phase == PHASE_INJECTING && b.inject_kind == INJECT_IGNORE);
}

// The token that would complete the end now, or -1.
DEVICE int budget_completing(const Budget& b, const int32_t* pool) {
  if (b.end.length == 0 || b.end_match + 1 != b.end.length) return -1;
  return pool[b.end.offset + b.end.length - 1];
}

// The longest beginning of s that ends with `token`, given that `matched` ids were matched before.
DEVICE uint32_t budget_advance(const int32_t* pool, PoolString s, uint32_t matched, int token) {
  const int32_t* ids = pool + s.offset;
  while (s.length > 0) {
    if (matched < s.length && ids[matched] == token) return matched + 1;
    if (matched == 0) return 0;
    uint32_t shorter = matched - 1;
    for (; shorter > 0; shorter--) {
      bool same = true;
      for (uint32_t i = 0; i < shorter; i++) same = same && ids[i] == ids[matched - shorter + i];
      if (same) break;
    }
    matched = shorter;
  }
  return 0;
}

DEVICE void budget_inject(Budget& b, PoolString s, uint32_t skip, uint32_t kind) {
  b.inject.offset = s.offset + skip;
  b.inject.length = s.length - skip;
  b.inject_kind = kind;
  b.inject_first = -1;
  b.phase = PHASE_INJECTING;
}

// How much of the end string the text already holds, because the model has begun the end.
DEVICE uint32_t budget_already_said(const Budget& b, const int32_t* pool) {
  if (b.end_match == 0) return 0;
  const int32_t* end = pool + b.end.offset;
  const int32_t* forced = pool + b.end_string.offset;
  // Where the end stands in the end string, what comes before it is skipped as well.
  for (uint32_t at = 0; at + b.end.length <= b.end_string.length; at++) {
    bool same = true;
    for (uint32_t i = 0; i < b.end.length; i++) same = same && forced[at + i] == end[i];
    if (same) return at + b.end_match;
  }
  uint32_t said = min_int(b.end_match, b.end_string.length);
  for (; said > 0; said--) {
    bool same = true;
    for (uint32_t i = 0; i < said; i++) same = same && forced[i] == end[b.end_match - said + i];
    if (same) break;
  }
  return said;
}

DEVICE void budget_force_end(Budget& b, const int32_t* pool) {
  const uint32_t said = budget_already_said(b, pool);
  b.reasoning_tokens -= min_int(said, b.end_match);
  budget_inject(b, b.end_string, said, INJECT_END);
  if (said == 0 && b.newline >= 0 && !b.ends_with_newline) b.inject_first = b.newline;
  b.max_hit = 1;
  if (b.inject.length == 0 && b.inject_first < 0) b.phase = PHASE_ANSWERING;
}

DEVICE void budget_begin_thinking(Budget& b) {
  b.phase = PHASE_THINKING;
  b.mask_end_once = b.accounting == ACCOUNT_S1_HARNESS && b.n_ignore > 0;
}

// Steps 2 to 4: before the draw.
DEVICE BudgetStep budget_before(Budget& b, const int32_t* pool) {
  BudgetStep step = {-1, false, false};
  if (budget_is_thinking(b) && b.count >= b.max_thinking &&
      (b.utf8_missing == 0 || b.count - b.max_thinking >= UTF8_PATIENCE))
    budget_force_end(b, pool);
  if (b.phase == PHASE_INJECTING) {
    step.forced = b.inject_first >= 0 ? b.inject_first : pool[b.inject.offset];
    return step;
  }
  step.mask_end = b.phase == PHASE_THINKING && b.mask_end_once;
  step.mask_eos = step.mask_end || b.mask_eos_once;
  return step;
}

// Emits `token`: everything that follows from its standing in the text. Returns its TokenFlags.
DEVICE uint32_t budget_emit(Budget& b, const int32_t* pool, int token, uint8_t traits) {
  const uint32_t continuation = traits >> TRAIT_CONTINUE_SHIFT & TRAIT_CONTINUE_MASK;
  if (continuation == 0)
    b.utf8_missing = traits & TRAIT_MISSING_MASK;
  else
    b.utf8_missing = b.utf8_missing > continuation ? b.utf8_missing - continuation : 0;
  b.ends_with_newline = (traits & TRAIT_NEWLINE) != 0;

  uint32_t flags = 0;
  if (b.phase == PHASE_INJECTING) {
    flags = TOKEN_INJECTED;
    if (b.inject_first >= 0) {
      b.inject_first = -1;
    } else {
      b.inject.offset++;
      b.inject.length--;
    }
    const bool done = b.inject.length == 0;
    if (b.inject_kind == INJECT_IGNORE) {
      flags |= TOKEN_REASONING;
      b.reasoning_tokens++;
      if (b.accounting != ACCOUNT_S1_README) b.count++;
      b.end_match = budget_advance(pool, b.end, b.end_match, token);
      if (b.end_match == b.end.length) b.end_match = 0;
      if (done) b.phase = PHASE_THINKING;
    } else {
      flags |= TOKEN_DELIMITER;
      if (done) {
        b.phase = PHASE_ANSWERING;
        b.mask_eos_once = b.inject_kind == INJECT_END && b.accounting == ACCOUNT_STRICT;
      }
    }
  } else if (b.phase == PHASE_THINKING) {
    b.mask_end_once = 0;
    b.count++;
    b.end_match = budget_advance(pool, b.end, b.end_match, token);
    if (b.end_match == b.end.length && b.end.length > 0) {
      flags = TOKEN_DELIMITER;
      b.reasoning_tokens -= b.end.length - 1;
      budget_inject(b, b.close, b.end.length, INJECT_CLOSE);
      if (b.inject.length == 0) b.phase = PHASE_ANSWERING;
    } else {
      flags = TOKEN_REASONING;
      b.reasoning_tokens++;
    }
  } else {
    b.mask_eos_once = 0;
    if (b.phase == PHASE_OFF && b.start.length > 0) {
      b.start_match = budget_advance(pool, b.start, b.start_match, token);
      if (b.start_match == b.start.length) {
        flags = TOKEN_DELIMITER;
        budget_begin_thinking(b);
      }
    }
  }
  return flags | (b.max_hit ? TOKEN_MAX_HIT : 0);
}

// Steps 5 and 6: what becomes of a drawn token. Returns the token to emit (by budget_emit), or BUDGET_REDRAW: draw again with
// the end set masked.
DEVICE int budget_after(Budget& b, const int32_t* pool, int token, bool is_eos) {
  if (b.phase != PHASE_THINKING) return token;
  const bool completes = token == budget_completing(b, pool);
  if (!completes && !is_eos) return token;

  if (b.count >= b.max_thinking) {
    budget_force_end(b, pool);
    return b.inject_first >= 0 ? b.inject_first : b.inject.length > 0 ? pool[b.inject.offset] : token;
  }
  const bool readme = b.accounting == ACCOUNT_S1_README;
  const int between = readme ? b.count : b.count - (int)b.end_match;
  bool ignore = b.ignores_used < b.n_ignore || between < b.min_thinking;
  if (readme) ignore = ignore && b.count + 1 < b.max_thinking;
  if (ignore) {
    b.ignores_used++;
    if (readme) b.count++;
    b.mask_end_once = 1;
    if (b.on_end == ON_END_MASK || b.ignore_count == 0) return BUDGET_REDRAW;
    const PoolString s = b.ignore_strings[b.next_ignore];
    b.next_ignore = (b.next_ignore + 1) % b.ignore_count;
    if (s.length == 0) return BUDGET_REDRAW;
    budget_inject(b, s, 0, INJECT_IGNORE);
    return pool[b.inject.offset];
  }
  if (completes) return token;
  b.reasoning_tokens -= b.end_match;
  budget_inject(b, b.close, b.end_match, INJECT_CLOSE);
  return pool[b.inject.offset];
}
