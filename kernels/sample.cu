// sample: one step's last kernel. From a row of logits to its slot's next token, with budget forcing (budget.cuh), and to the
// ring that the host reads.
//
// Grid: rows x one cluster of 1 to 8 blocks along x; block `rank` of a row's cluster holds logits [rank * slice, + slice) in
// shared memory, so the logits are read once. Reductions go warp, block, cluster (over distributed shared memory).
// Shared memory: SAMPLE_SHARED_BASE + 4 bytes for each logit of a slice.
//
// Order (as vLLM's): bias, masks (padded rows, allowed tokens, what may not be drawn now), penalties; here log-probabilities are
// reported; then temperature, min-p, top-k, top-p; then the draw. The draw is Gumbel-max with Philox noise that depends on
// (seed, position, token id) alone, so a token does not depend on how the row is cut, nor on its neighbours in the batch.
// Thresholds of top-k and top-p are found without a sort: a radix descent over the bits of each candidate's distance to the
// maximum, with integer counts and fixed-point masses, which add up to the same bits in any order; ties go to the lowest id.
// What a request does not use is skipped. Forced tokens take part in everything but the draw.
#include "budget.cuh"
#include "philox.cuh"

constexpr int kWarps = SAMPLE_THREADS / kWarp;
constexpr int kDigits = 256;

struct SampleShared {
  // By turns, so that one reduction may begin while slower threads still read the one before.
  float warp_value[2][kWarps];
  int warp_id[2][kWarps];
  float block_value[2];
  int block_id[2];
  uint32_t count[kDigits];
  uint64_t mass[kDigits];
  uint32_t cluster_count[kDigits];
  uint64_t cluster_mass[kDigits];
  uint32_t digit;
  uint32_t below_count;
  uint64_t below_mass;
  // Of rank 0, for all:
  BudgetStep step;
  int token, redraw;
  Budget budget;
};

static_assert(sizeof(SampleShared) == SAMPLE_SHARED_BASE, "");

struct Candidate {
  float value;
  int id;
};

DEVICE bool better(const Candidate& a, const Candidate& b) {
  return a.value > b.value || (a.value == b.value && a.id < b.id);
}

// A row's part in this block.
struct Row {
  const SampleParams* p;
  SampleShared* shared;
  float* logits;  // [size] in shared memory
  int first, size, slice;
  int turn;
};

DEVICE Row row_of_block(const SampleParams& p, SampleShared& shared) {
  Row row;
  row.p = &p;
  row.shared = &shared;
  row.logits = (float*)(shared_memory() + sizeof(SampleShared));
  row.slice = ceil_div(p.vocab, (int)cluster_size());
  row.first = (int)cluster_rank() * row.slice;
  row.size = max_int(0, min_int(row.slice, p.vocab - row.first));
  row.turn = 0;
  return row;
}

DEVICE void sync_cluster() {
  if (cluster_size() == 1)
    sync_threads();
  else
    cluster_sync();
}

// ---- reductions over the row; every thread gets the result ----

DEVICE Candidate row_best(Row& row, Candidate c) {
  SampleShared& s = *row.shared;
  const int turn = row.turn;
  row.turn ^= 1;
  UNROLL for (int m = kWarp / 2; m > 0; m /= 2) {
    const Candidate other = {shfl_xor(c.value, m), shfl_xor(c.id, m)};
    if (better(other, c)) c = other;
  }
  if (lane_id() == 0) s.warp_value[turn][warp_id()] = c.value, s.warp_id[turn][warp_id()] = c.id;
  sync_threads();
  for (int w = 0; w < kWarps; w++) {
    const Candidate other = {s.warp_value[turn][w], s.warp_id[turn][w]};
    if (better(other, c)) c = other;
  }
  if (cluster_size() == 1) return c;
  if (thread_idx() == 0) s.block_value[turn] = c.value, s.block_id[turn] = c.id;
  cluster_sync();
  for (uint32_t r = 0; r < cluster_size(); r++) {
    const SampleShared* peer = cluster_map(&s, r);
    const Candidate other = {peer->block_value[turn], peer->block_id[turn]};
    if (better(other, c)) c = other;
  }
  return c;
}

DEVICE float row_sum(Row& row, float x) {
  SampleShared& s = *row.shared;
  const int turn = row.turn;
  row.turn ^= 1;
  x = warp_sum(x);
  if (lane_id() == 0) s.warp_value[turn][warp_id()] = x;
  sync_threads();
  float sum = 0.f;
  for (int w = 0; w < kWarps; w++) sum += s.warp_value[turn][w];
  if (cluster_size() == 1) return sum;
  if (thread_idx() == 0) s.block_value[turn] = sum;
  cluster_sync();
  sum = 0.f;
  for (uint32_t r = 0; r < cluster_size(); r++) sum += cluster_map(&s, r)->block_value[turn];
  return sum;
}

// ---- logits: bias, masks, penalties ----

DEVICE bool bit(const uint32_t* bits, int i) { return bits[i / 32] >> (i % 32) & 1; }

DEVICE void load_logits(Row& row, const SlotState& slot, int slot_id) {
  const SampleParams& p = *row.p;
  const float* from = p.logits + (size_t)block_y() * p.vocab + row.first;
  const int words = ceil_div(p.vocab, 32);
  const uint32_t* allowed = p.allowed + (size_t)slot_id * words;
  const uint32_t* prompt_seen = p.prompt_seen + (size_t)slot_id * words;
  const uint16_t* counts = p.output_counts + (size_t)slot_id * p.vocab;
  const bool biased = slot.bias_count > 0;
  if (biased) {
    for (int i = thread_idx(); i < row.size; i += SAMPLE_THREADS) row.logits[i] = from[i];
    sync_threads();
    for (uint32_t i = thread_idx(); i < slot.bias_count; i += SAMPLE_THREADS) {
      const int at = p.bias_ids[(size_t)slot_id * MAX_LOGIT_BIAS + i] - row.first;
      if (at >= 0 && at < row.size) row.logits[at] += p.bias_values[(size_t)slot_id * MAX_LOGIT_BIAS + i];
    }
    sync_threads();
  }
  for (int i = thread_idx(); i < row.size; i += SAMPLE_THREADS) {
    const int id = row.first + i;
    float x = biased ? row.logits[i] : from[i];
    if (slot.flags & SLOT_PENALTIES) {
      const int count = counts[id];
      if (count > 0 || bit(prompt_seen, id)) x = x > 0.f ? x / slot.repetition_penalty : x * slot.repetition_penalty;
      if (count > 0) x -= slot.frequency_penalty * count + slot.presence_penalty;
    }
    const bool real = p.token_traits[id] & TRAIT_REAL;
    if (!real || ((slot.flags & SLOT_ALLOWED_MASK) && !bit(allowed, id))) x = x == x ? -INFINITY : x;
    row.logits[i] = x;
  }
  sync_threads();
}

DEVICE void mask(Row& row, int id) {
  const int at = id - row.first;
  if (at >= 0 && at < row.size) row.logits[at] = -INFINITY;
}

// Tokens that this draw must not give. By one thread, because they need not be different; a barrier follows.
DEVICE void mask_for_draw(Row& row, const SlotState& slot, const Budget& b, bool mask_end, bool mask_eos) {
  if (thread_idx() == 0) {
    if (mask_end) mask(row, budget_completing(b, row.p->pool));
    const uint32_t masked = slot.generated < slot.min_generated ? slot.stop_count : mask_eos ? slot.eos_count : 0;
    for (uint32_t i = 0; i < masked; i++) mask(row, slot.stop_ids[i]);
  }
  sync_threads();
}

// ---- candidates: min-p, top-k, top-p ----

// Those at (distance, id) up to this pair, in this order, may be drawn. A distance is (maximum - logit) / temperature as the
// bits of a float >= 0, which compare as the float does.
struct Threshold {
  uint32_t distance, id;
};

struct Scale {
  float max, inverse_temperature;
};

DEVICE uint32_t distance_of(const Scale& scale, float logit) {
  return float_to_bits((scale.max - logit) * scale.inverse_temperature);
}

DEVICE bool passes(const Threshold& t, uint32_t distance, uint32_t id) {
  return distance < t.distance || (distance == t.distance && id <= t.id);
}

constexpr float kLog2e = 1.4426950408889634f;

// Probability relative to the maximum, 32 bits of fraction.
DEVICE uint64_t mass_of(uint32_t distance) {
  return (uint64_t)(exp2_approx(-kLog2e * bits_to_float(distance)) * 4294967296.f);
}

// What of the row lies before a digit: how many candidates, and their mass.
struct Before {
  uint32_t count;
  uint64_t mass;
};

// One digit of a descent: histogram of the digit at `shift` over candidates that pass `t` and whose higher bits equal those of
// `prefix`, over distances or, among those of one distance, over ids. Then the first digit by which `target` is reached, in counts or
// in mass; `before` grows by what lies below it.
DEVICE uint32_t descend(Row& row, const Scale& scale, const Threshold& t, bool over_ids, uint32_t distance,
                        uint32_t prefix, int shift, bool by_mass, uint64_t target, Before& before) {
  SampleShared& s = *row.shared;
  for (int i = thread_idx(); i < kDigits; i += SAMPLE_THREADS) s.count[i] = 0, s.mass[i] = 0;
  sync_threads();
  for (int i = thread_idx(); i < row.size; i += SAMPLE_THREADS) {
    if (row.logits[i] == -INFINITY) continue;
    const uint32_t d = distance_of(scale, row.logits[i]), id = row.first + i;
    if (!passes(t, d, id) || (over_ids && d != distance)) continue;
    const uint32_t key = over_ids ? id : d;
    if (shift < 24 && key >> (shift + 8) != prefix >> (shift + 8)) continue;
    atomic_add(&s.count[key >> shift & 255], 1u);
    if (by_mass) atomic_add(&s.mass[key >> shift & 255], mass_of(d));
  }
  sync_cluster();
  for (int i = thread_idx(); i < kDigits; i += SAMPLE_THREADS) {
    uint32_t count = 0;
    uint64_t mass = 0;
    for (uint32_t r = 0; r < cluster_size(); r++) {
      const SampleShared* peer = cluster_map(&s, r);
      count += peer->count[i];
      if (by_mass) mass += peer->mass[i];
    }
    s.cluster_count[i] = count;
    s.cluster_mass[i] = mass;
  }
  sync_threads();
  if (thread_idx() == 0) {
    Before sum = before;
    int digit = 0, last = 0;
    for (; digit < kDigits; digit++) {
      const uint32_t count = s.cluster_count[digit];
      const uint64_t mass = s.cluster_mass[digit];
      if (count > 0) {
        last = digit;
        if (by_mass ? sum.mass + mass >= target : sum.count + count >= target) break;
      }
      sum.count += count;
      sum.mass += mass;
    }
    // Less in all than the target: everything, up to the last candidate.
    if (digit == kDigits) {
      digit = last;
      sum.count -= s.cluster_count[last];
      sum.mass -= s.cluster_mass[last];
    }
    s.digit = digit;
    s.below_count = sum.count;
    s.below_mass = sum.mass;
  }
  // Peers read this block's histograms before it clears them for the next digit.
  sync_cluster();
  before.count = s.below_count;
  before.mass = s.below_mass;
  return prefix | s.digit << shift;
}

// The smallest set of the best candidates within `t` with `target` in counts or mass.
DEVICE Threshold tighten(Row& row, const Scale& scale, const Threshold& t, bool by_mass, uint64_t target) {
  Before before = {0, 0};
  uint32_t distance = 0;
  for (int shift = 24; shift >= 0; shift -= 8)
    distance = descend(row, scale, t, false, 0, distance, shift, by_mass, target, before);
  // Of those at this very distance as many as are still due, lowest ids first.
  uint32_t id = 0;
  for (int shift = 24; shift >= 0; shift -= 8)
    id = descend(row, scale, t, true, distance, id, shift, by_mass, target, before);
  return {distance, id};
}

DEVICE uint64_t total_mass(Row& row, const Scale& scale, const Threshold& t) {
  SampleShared& s = *row.shared;
  if (thread_idx() == 0) s.mass[0] = 0;
  sync_threads();
  uint64_t mass = 0;
  for (int i = thread_idx(); i < row.size; i += SAMPLE_THREADS) {
    if (row.logits[i] == -INFINITY) continue;
    const uint32_t d = distance_of(scale, row.logits[i]);
    if (passes(t, d, row.first + i)) mass += mass_of(d);
  }
  UNROLL for (int m = kWarp / 2; m > 0; m /= 2) mass += shfl_xor(mass, m);
  if (lane_id() == 0) atomic_add(&s.mass[0], mass);
  sync_cluster();
  mass = 0;
  for (uint32_t r = 0; r < cluster_size(); r++) mass += cluster_map(&s, r)->mass[0];
  sync_cluster();
  return mass;
}

// ---- the draw ----

// Gumbel noise of a token at a position. Exponential variates from log1p keep their precision where the noise is large.
DEVICE float gumbel(uint32_t seed_low, uint32_t seed_high, int position, uint32_t id) {
  uint32_t c[4] = {id / 4, (uint32_t)position, 0, 0};
  philox(c, seed_low, seed_high);
  const uint32_t bits = id & 2 ? (id & 1 ? c[3] : c[2]) : (id & 1 ? c[1] : c[0]);
  const float u = ((float)bits + 0.5f) * 2.3283064365386963e-10f;
  return -logf(-log1pf(-u));
}

DEVICE int draw(Row& row, const SlotState& slot, const Candidate& best) {
  if (slot.temperature == 0.f) return best.id;
  const Scale scale = {best.value, 1.f / slot.temperature};
  Threshold t = {0x7f7fffffu, 0xffffffffu};
  // Not -logf(): of 1 that would be -0, whose bits are the largest of all.
  if (slot.min_p > 0.f) t.distance = float_to_bits(0.f - logf(slot.min_p));
  if (slot.top_k > 0 && slot.top_k < row.p->vocab) t = tighten(row, scale, t, false, slot.top_k);
  if (slot.top_p < 1.f) {
    const uint64_t target = (uint64_t)((double)total_mass(row, scale, t) * (double)slot.top_p);
    t = tighten(row, scale, t, true, target > 0 ? target : 1);
  }
  Candidate c = {-INFINITY, 0x7fffffff};
  for (int i = thread_idx(); i < row.size; i += SAMPLE_THREADS) {
    if (row.logits[i] == -INFINITY) continue;
    const uint32_t d = distance_of(scale, row.logits[i]), id = row.first + i;
    if (!passes(t, d, id)) continue;
    const float noise = gumbel(slot.seed_low, slot.seed_high, slot.length, id);
    const Candidate other = {noise - bits_to_float(d), (int)id};
    if (better(other, c)) c = other;
  }
  return row_best(row, c).id;
}

// ---- log-probabilities ----

DEVICE float logit_of(Row& row, int id) {
  const int rank = id / row.slice;
  return cluster_map(row.logits, rank)[id - rank * row.slice];
}

// The next best after `last`, in order of logit, then id.
DEVICE Candidate next_best(Row& row, const Candidate& last) {
  Candidate c = {-INFINITY, 0x7fffffff};
  for (int i = thread_idx(); i < row.size; i += SAMPLE_THREADS) {
    const Candidate other = {row.logits[i], row.first + i};
    if (better(last, other) && better(other, c)) c = other;
  }
  return row_best(row, c);
}

// ---- the step ----

DEVICE bool is_among(const int32_t* ids, uint32_t count, int token) {
  for (uint32_t i = 0; i < count; i++)
    if (ids[i] == token) return true;
  return false;
}

// By one thread: the token's effects on its slot, and its record.
DEVICE void advance_slot(const SampleParams& p, SlotState& slot, int slot_id, const Budget& budget, int token,
                         uint32_t flags, float logprob, TokenRecord& record) {
  slot.budget = budget;
  slot.last_token = token;
  slot.length++;
  slot.generated++;
  if (slot.flags & SLOT_PENALTIES) {
    uint16_t& count = p.output_counts[(size_t)slot_id * p.vocab + token];
    if (count < 0xffff) count++;
  }
  uint32_t finish = FINISH_NONE;
  const uint32_t ignored = slot.flags & SLOT_IGNORE_EOS ? slot.eos_count : 0;
  if (!(flags & TOKEN_INJECTED) && slot.generated >= slot.min_generated &&
      is_among(slot.stop_ids + ignored, slot.stop_count - ignored, token))
    finish = FINISH_STOP;
  else if (slot.generated >= slot.max_generated || slot.length >= slot.max_length)
    finish = FINISH_LENGTH;
  slot.finish = finish;
  if (finish) slot.flags &= ~SLOT_ACTIVE;
  record.token = token;
  record.flags = flags | TOKEN_VALID;
  record.finish = finish;
  record.generated = slot.generated;
  record.ignores_used = budget.ignores_used;
  record.reasoning_tokens = budget.reasoning_tokens;
  record.logprob = logprob;
}

// By one thread of each row: the last of them publishes the step.
DEVICE void publish(const SampleParams& p) {
  fence_system();
  if (atomic_ticket(p.ticket, p.rows - 1) == (uint32_t)p.rows - 1) {
    const uint32_t step = *p.step;
    p.ring->rows[step % RING_STEPS] = p.rows;
    *p.step = step + 1;
    fence_system();
    store_release_system(&p.ring->head, step + 1);
  }
}

KERNEL(sample, SampleParams, SAMPLE_THREADS) {
  pdl_launch_dependents();
  pdl_wait();
  SampleShared& shared = *(SampleShared*)shared_memory();
  const int slot_id = p.row_slot[block_y()];
  SlotState& slot = p.slots[slot_id];
  const bool leader = cluster_rank() == 0 && thread_idx() == 0;
  // The leader alone: once its record is out, the last row's leader may count the step.
  TokenRecord& record = p.ring->records[leader ? *p.step % RING_STEPS : 0][block_y()];

  if (!(slot.flags & SLOT_ACTIVE)) {
    if (leader) {
      record.serial = slot.serial;
      record.slot = slot_id;
      record.flags = 0;
      record.top_count = 0;
      publish(p);
    }
    return;
  }

  Row row = row_of_block(p, shared);
  const SampleShared* root = cluster_map(&shared, 0);
  if (leader) {
    shared.budget = slot.budget;
    shared.step = budget_before(shared.budget, p.pool);
    shared.token = shared.step.forced;
    shared.redraw = 0;
  }
  load_logits(row, slot, slot_id);
  sync_cluster();
  const BudgetStep step = root->step;

  Candidate best = {0.f, 0};
  float log_sum = 0.f;
  bool finite = true;
  for (int attempt = 0; attempt < 2; attempt++) {
    if (step.forced < 0)
      mask_for_draw(row, slot, root->budget, step.mask_end || attempt > 0, step.mask_eos || attempt > 0);
    // A NaN or +infinity is the best of all, so that it is noticed.
    Candidate c = {-INFINITY, 0x7fffffff};
    for (int i = thread_idx(); i < row.size; i += SAMPLE_THREADS) {
      const float x = row.logits[i];
      const Candidate other = {x == x ? x : INFINITY, row.first + i};
      if (better(other, c)) c = other;
    }
    best = row_best(row, c);
    finite = best.value > -INFINITY && best.value < INFINITY;
    if (!finite) break;
    float sum = 0.f;
    for (int i = thread_idx(); i < row.size; i += SAMPLE_THREADS)
      sum += exp2_approx((row.logits[i] - best.value) * kLog2e);
    log_sum = best.value + logf(row_sum(row, sum));
    if (step.forced >= 0) break;

    const int drawn = draw(row, slot, best);
    if (leader) {
      const bool is_eos = is_among(slot.stop_ids, slot.eos_count, drawn);
      const int token = budget_after(shared.budget, p.pool, drawn, is_eos);
      shared.redraw = token == BUDGET_REDRAW && attempt == 0;
      shared.token = token == BUDGET_REDRAW ? drawn : token;
    }
    sync_cluster();
    if (!root->redraw) break;
    sync_cluster();
  }

  if (!finite) {
    if (leader) {
      slot.flags &= ~SLOT_ACTIVE;
      slot.finish = FINISH_ERROR;
      record.serial = slot.serial;
      record.slot = slot_id;
      record.flags = TOKEN_VALID;
      record.finish = FINISH_ERROR;
      record.token = slot.last_token;
      record.generated = slot.generated;
      record.ignores_used = slot.budget.ignores_used;
      record.reasoning_tokens = slot.budget.reasoning_tokens;
      record.logprob = 0.f;
      record.top_count = 0;
      publish(p);
    }
    if (cluster_size() > 1) cluster_sync();
    return;
  }

  const int wanted = slot.logprobs < 0 ? 0 : slot.logprobs;
  Candidate top = best;
  int found = 0;
  while (found < wanted && top.value > -INFINITY) {
    if (leader) {
      record.top_ids[found] = top.id;
      record.top_logprobs[found] = top.value - log_sum;
    }
    found++;
    if (found < wanted) top = next_best(row, top);
  }
  if (leader) {
    const int token = shared.token;
    const uint32_t flags = budget_emit(shared.budget, p.pool, token, p.token_traits[token]);
    record.serial = slot.serial;
    record.slot = slot_id;
    record.top_count = found;
    advance_slot(p, slot, slot_id, shared.budget, token, flags, logit_of(row, token) - log_sum, record);
    publish(p);
  }
  // The leader reads other blocks' logits.
  if (cluster_size() > 1) cluster_sync();
}
