// Steering: techniques that act on the draws within thinking, beside budget forcing (budget.cuh), each off unless its bit is set.
//
//  avoid       NoWait (arXiv 2506.08343): tokens of a list may not be drawn.
//  switch      TIP (arXiv 2501.18585): tokens that begin another thought lose switch_penalty for the first switch_window tokens of
//              a thought, which begins with the thinking and with each of those tokens.
//  end bias    (arXiv 2505.07961) the end of thinking gets more likely, by a constant and with each thinking token.
//  brake       ThinkBrake (arXiv 2510.00546): after the end of a sentence the thinking stops where the most likely token is ahead of
//              the end by brake_margin at most, in natural log-probabilities.
//  confidence  The thinking stops where the most likely token has had a probability of `confidence` or more in streak_needed draws
//              in a row, this one included, and stop_after tokens are thought.
//  loop        The thinking stops where its last tokens are something of up to LOOP_PERIODS tokens loop_repeats times in a row, and
//              LOOP_TOKENS tokens or more in all.
//
// A stop takes the place of a draw, as if the model had drawn EOS: budget_after() ignores it where it would ignore an end of the
// model's own, and closes the thinking where not. What is injected is not steered, but seen: an injected switch token begins a
// thought. Nothing stops in the draw after an ignored end. Log-probabilities are those that decided: after bias and masks.
#pragma once

#include "budget.cuh"

DEVICE bool steers(const Budget& b, const BudgetStep& step, uint32_t techniques) {
  return step.forced < 0 && b.phase == PHASE_THINKING && (b.steering.techniques & techniques);
}

// Whether a technique may end the thinking in this draw, at its first attempt.
DEVICE bool steering_may_stop(const Budget& b, const BudgetStep& step, uint32_t techniques) {
  return !step.mask_end && steers(b, step, techniques);
}

// The token by which the end would go on from what the text already holds of it.
DEVICE int steering_end_token(const Budget& b, const int32_t* pool) { return pool[b.end.offset + b.end_match]; }

DEVICE float steering_end_bias(const Budget& b) {
  return b.steering.end_bias + b.steering.end_bias_ramp * (float)b.count;
}

// `probability`: of the most likely token; `margin`: from its log-probability to that of the end token.
DEVICE bool steering_stops(Budget& b, float probability, float margin) {
  Steering& s = b.steering;
  bool stops = (s.techniques & STEER_LOOP) && s.looping;
  if (s.techniques & STEER_BRAKE) stops |= s.at_sentence_end && margin <= s.brake_margin;
  if (s.techniques & STEER_CONFIDENCE) {
    s.streak = probability >= s.confidence ? s.streak + 1 : 0;
    stops |= s.streak >= s.streak_needed && b.count >= s.stop_after;
  }
  if (stops) s.streak = s.looping = 0;
  return stops;
}

// After budget_after(): whether it was the stop that has ended the thinking.
DEVICE void steering_stopped(Budget& b) {
  if (b.phase == PHASE_INJECTING && b.inject_kind == INJECT_CLOSE) b.steering.stopped = 1;
}

// After budget_emit(), with its flags.
DEVICE uint32_t steering_emit(Budget& b, uint32_t flags, uint8_t traits, bool is_switch) {
  Steering& s = b.steering;
  const bool thinks = flags & TOKEN_REASONING;
  s.at_sentence_end = thinks && (traits & TRAIT_SENTENCE);
  if (thinks) s.since_switch = is_switch ? 0 : s.since_switch + 1;
  return s.stopped ? TOKEN_STOPPED : 0;
}
