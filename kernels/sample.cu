// sample: one step's last kernel. From a row of logits to its slot's next token, with budget forcing (budget.cuh), and to the
// ring that the host reads.
//
// Grid: rows x one cluster of 1 to 8 blocks along x; block `rank` of a row's cluster holds logits [rank * slice, + slice) in
// shared memory, so the logits are read once. A thread's logits are groups of four neighbours, the same ones in every pass.
// Reductions go warp, block, cluster (over distributed shared memory). Shared memory: SAMPLE_SHARED_BASE + 4 bytes for each
// logit of a slice, a multiple of 4 of them.
//
// Order (as vLLM's): bias, masks (padded rows, allowed tokens, what may not be drawn now), penalties; here log-probabilities are
// reported; then temperature, min-p, top-k, top-p; then the draw. The draw is Gumbel-max with Philox noise that depends on
// (seed, position, token id) alone, so a token does not depend on how the row is cut, nor on its neighbours in the batch.
//
// Thresholds of top-k and top-p are found without a sort, by a descent: candidates of an interval of distances to the maximum
// are counted in 256 parts of it, with integer counts and fixed-point masses, which add up to the same bits in any order; the
// part in which the target is reached is the next interval. The first parts are 1/8 wide, because there the logits spread; a
// part of one candidate, or one that is taken whole, ends the descent: after two or three steps where logits come from a
// model. Ties go to the lowest id, found by a descent over ids.
//
// What a request does not use is skipped. Forced tokens take part in everything but the draw. Each block runs the budget on a
// copy of its own, so that no block waits for another's; the leader's copy is the one that is kept. So it is with steering
// (steering.cuh), which adds a pass over the slice where tokens are avoided or penalised, a sum where confidence counts, and a
// barrier where the end's logit is looked at.
//
// Passes over the slice after the load: greedy 1 (the maximum); with log-probabilities 2, in one reduction; with a temperature
// one more, and one for each step of a descent. A reduction or a step's exchange is one barrier of the cluster, one of the
// block, and 8 reads of peers at once. What that should take: benches/predict.py (docs/predictions.md), not yet run on a GPU.
#include "philox.cuh"
#include "steering.cuh"

constexpr int kWarps = SAMPLE_THREADS / kWarp;
constexpr int kParts = 256;
constexpr int kBatch = 5;  // groups of four logits that a thread loads at once

struct alignas(16) SampleShared {  // the logits come behind it
  // By turns, so that one reduction may begin while slower threads still read the one before.
  float warp_value[2][kWarps];
  int warp_id[2][kWarps];
  float block_value[2];
  int block_id[2];
  float warp_total[2][kWarps];
  float block_total[2];
  // Of this block, by turns: candidates, and the low 16 bits of their masses and the others, each below 2^32 in all: one array,
  // because it is zeroed as one.
  uint32_t parts[2][3 * kParts];
  // Of the cluster.
  uint64_t weight[kParts];
  uint32_t count[kParts];
  BudgetStep step;
  int token, redraw;
  int thinks;      // the emitted token is a thinking token
  uint32_t loops;  // periods at which it completes a loop
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
  int groups;      // of four logits; behind the end they are -infinity
  int turn;        // of the reductions
  int parts_turn;  // of the descent
};

DEVICE Row row_of_block(const SampleParams& p, SampleShared& shared) {
  Row row;
  row.p = &p;
  row.shared = &shared;
  row.logits = (float*)(shared_memory() + sizeof(SampleShared));
  row.slice = ceil_div(p.vocab, 4 * (int)cluster_size()) * 4;
  row.first = (int)cluster_rank() * row.slice;
  row.size = max_int(0, min_int(row.slice, p.vocab - row.first));
  row.groups = ceil_div(row.size, 4);
  row.turn = row.parts_turn = 0;
  return row;
}

DEVICE void sync_cluster() {
  if (cluster_size() == 1)
    sync_threads();
  else
    cluster_sync();
}

// Four neighbouring logits of the slice.
struct Four {
  float x[4];
};

DEVICE Four four_of(const Row& row, int group) {
  uint32_t bits[4];
  load_16(row.logits + 4 * group, bits);
  return {{bits_to_float(bits[0]), bits_to_float(bits[1]), bits_to_float(bits[2]), bits_to_float(bits[3])}};
}

DEVICE void store_four(Row& row, int group, const Four& f) {
  const uint32_t bits[4] = {float_to_bits(f.x[0]), float_to_bits(f.x[1]), float_to_bits(f.x[2]), float_to_bits(f.x[3])};
  store_16(row.logits + 4 * group, bits);
}

// ---- reductions over the row; every thread gets the result ----

constexpr float kLog2e = 1.4426950408889634f;

// exp(from - to): what a sum relative to `from` is worth relative to `to`.
DEVICE float rescaling(float from, float to) { return from == -INFINITY ? 0.f : exp2_approx((from - to) * kLog2e); }

// The best candidate; and, with `total`, the sum of what each thread has in it relative to its own candidate's value, relative
// to the best one's.
DEVICE Candidate row_best(Row& row, Candidate c, float* total = nullptr) {
  SampleShared& s = *row.shared;
  const int turn = row.turn;
  row.turn ^= 1;
  const float own = c.value;
  UNROLL for (int m = kWarp / 2; m > 0; m /= 2) {
    const Candidate other = {shfl_xor(c.value, m), shfl_xor(c.id, m)};
    if (better(other, c)) c = other;
  }
  const float warp_total = total ? warp_sum(*total * rescaling(own, c.value)) : 0.f;
  if (lane_id() == 0) {
    s.warp_value[turn][warp_id()] = c.value, s.warp_id[turn][warp_id()] = c.id;
    if (total) s.warp_total[turn][warp_id()] = warp_total;
  }
  sync_threads();
  for (int w = 0; w < kWarps; w++) {
    const Candidate other = {s.warp_value[turn][w], s.warp_id[turn][w]};
    if (better(other, c)) c = other;
  }
  if (total) {
    *total = 0.f;
    for (int w = 0; w < kWarps; w++) *total += s.warp_total[turn][w] * rescaling(s.warp_value[turn][w], c.value);
  }
  if (cluster_size() == 1) return c;
  if (thread_idx() == 0) {
    s.block_value[turn] = c.value, s.block_id[turn] = c.id;
    if (total) s.block_total[turn] = *total;
  }
  cluster_sync();
  for (uint32_t r = 0; r < cluster_size(); r++) {
    const SampleShared* peer = cluster_map(&s, r);
    const Candidate other = {peer->block_value[turn], peer->block_id[turn]};
    if (better(other, c)) c = other;
  }
  if (total) {
    *total = 0.f;
    for (uint32_t r = 0; r < cluster_size(); r++) {
      const SampleShared* peer = cluster_map(&s, r);
      *total += peer->block_total[turn] * rescaling(peer->block_value[turn], c.value);
    }
  }
  return c;
}

// ---- logits: bias, masks, penalties ----

DEVICE bool bit(const uint32_t* bits, int i) { return bits[i / 32] >> (i % 32) & 1; }

struct Adjustment {
  const SlotState* slot;
  bool masked;                  // `allowed` applies
  const uint32_t* allowed;      // [vocab / 32 rounded up]
  const uint32_t* prompt_seen;  // the same
  const uint16_t* counts;       // [vocab]
};

DEVICE float adjusted(const Adjustment& a, int id, uint8_t traits, float x) {
  const SlotState& slot = *a.slot;
  if (slot.flags & SLOT_PENALTIES) {
    const int count = a.counts[id];
    if (count > 0 || bit(a.prompt_seen, id)) x = x > 0.f ? x / slot.repetition_penalty : x * slot.repetition_penalty;
    if (count > 0) x -= slot.frequency_penalty * count + slot.presence_penalty;
  }
  const bool real = traits & TRAIT_REAL;
  if (!real || (a.masked && !bit(a.allowed, id))) x = x == x ? -INFINITY : x;
  return x;
}

// Each thread's own logits; a barrier follows.
DEVICE void load_logits(Row& row, const SlotState& slot, int slot_id) {
  const SampleParams& p = *row.p;
  const float* from = p.logits + (size_t)block_y() * p.vocab + row.first;
  const uint8_t* traits = p.token_traits + row.first;
  const size_t words = ceil_div(p.vocab, 32);
  const bool masked = (slot.flags & SLOT_ALLOWED_MASK) || slot_is_guided(slot);
  const Adjustment a = {&slot, masked, p.allowed + slot_id * words, p.prompt_seen + slot_id * words,
                        p.output_counts + (size_t)slot_id * p.vocab};
  const bool biased = slot.bias_count > 0, aligned = p.vocab % 4 == 0;
  for (int first = thread_idx(); first < row.groups; first += kBatch * SAMPLE_THREADS) {
    uint32_t bits[kBatch][4], kinds[kBatch];  // all on their way before the first is used
    UNROLL for (int j = 0; j < kBatch; j++) {
      const int at = 4 * (first + j * SAMPLE_THREADS);
      if (at + 4 <= row.size && aligned) {
        load_16(from + at, bits[j]);
        kinds[j] = *(const uint32_t*)(traits + at);
      } else {
        kinds[j] = 0;
        UNROLL for (int i = 0; i < 4; i++) {
          bits[j][i] = at + i < row.size ? float_to_bits(from[at + i]) : 0xff800000u;  // -infinity
          if (at + i < row.size) kinds[j] |= (uint32_t)traits[at + i] << (8 * i);
        }
      }
    }
    UNROLL for (int j = 0; j < kBatch; j++) {
      const int group = first + j * SAMPLE_THREADS;
      if (group >= row.groups) break;
      Four f;
      UNROLL for (int i = 0; i < 4; i++) {
        f.x[i] = bits_to_float(bits[j][i]);
        if (!biased && 4 * group + i < row.size)
          f.x[i] = adjusted(a, row.first + 4 * group + i, (uint8_t)(kinds[j] >> (8 * i)), f.x[i]);
      }
      store_four(row, group, f);
    }
  }
  if (!biased) return;
  sync_threads();
  for (uint32_t i = thread_idx(); i < slot.bias_count; i += SAMPLE_THREADS) {
    const int at = p.bias_ids[(size_t)slot_id * MAX_LOGIT_BIAS + i] - row.first;
    if (at >= 0 && at < row.size) row.logits[at] += p.bias_values[(size_t)slot_id * MAX_LOGIT_BIAS + i];
  }
  sync_threads();
  for (int group = thread_idx(); group < row.groups; group += SAMPLE_THREADS)
    for (int i = 4 * group; i < min_int(4 * group + 4, row.size); i++)
      row.logits[i] = adjusted(a, row.first + i, traits[i], row.logits[i]);
}

DEVICE void mask(Row& row, int id) {
  const int at = id - row.first;
  if (at >= 0 && at < row.size) row.logits[at] = -INFINITY;
}

// Tokens that this draw must not give. By one thread, because they need not be different; a barrier follows.
DEVICE void mask_for_draw(Row& row, const SlotState& slot, const Budget& b, bool mask_end, bool mask_eos) {
  if (mask_end) mask(row, budget_completing(b, row.p->pool));
  const uint32_t masked = slot.generated < slot.min_generated ? slot.stop_count : mask_eos ? slot.eos_count : 0;
  for (uint32_t i = 0; i < masked; i++) mask(row, slot.stop_ids[i]);
}

// By one thread, before the masks of the draw; a barrier follows.
DEVICE void bias_end(Row& row, const Budget& b) {
  const int at = steering_end_token(b, row.p->pool) - row.first;
  if (at >= 0 && at < row.size) row.logits[at] += steering_end_bias(b);
}

// Avoided and penalised tokens: each thread's own logits.
DEVICE void steer_logits(Row& row, const Steering& s, int slot_id) {
  const size_t words = ceil_div(row.p->vocab, 32);
  const bool avoids = s.techniques & STEER_AVOID;
  const bool penalises = (s.techniques & STEER_SWITCH) && s.since_switch < s.switch_window;
  const uint32_t* avoided = row.p->avoided + slot_id * words;
  const uint32_t* switches = row.p->switches + slot_id * words;
  for (int group = thread_idx(); group < row.groups; group += SAMPLE_THREADS) {
    Four f = four_of(row, group);
    UNROLL for (int i = 0; i < 4; i++) {
      const int id = row.first + 4 * group + i;
      if (id >= row.first + row.size) break;
      if (penalises && bit(switches, id)) f.x[i] -= s.switch_penalty;
      if (avoids && bit(avoided, id)) f.x[i] = f.x[i] == f.x[i] ? -INFINITY : f.x[i];
    }
    store_four(row, group, f);
  }
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

DEVICE Threshold tighter(const Threshold& a, const Threshold& b) { return passes(a, b.distance, b.id) ? b : a; }

// Probability relative to the maximum, 32 bits of fraction.
DEVICE uint64_t mass_of(uint32_t distance) {
  return (uint64_t)(exp2_approx(-kLog2e * bits_to_float(distance)) * 4294967296.f);
}

// What a descent divides into kParts: distances, or the ids of one distance.
struct Interval {
  uint32_t low, high;  // both in it
  bool is_first;       // all distances, in parts of 1/8
  bool over_ids;
  uint32_t distance;  // of the ids
};

DEVICE int shift_of(const Interval& in) { return max_int(0, 24 - leading_zeros(in.high - in.low)); }

DEVICE int part_of(const Interval& in, int shift, uint32_t key) {
  return in.is_first ? (int)fminf(8.f * bits_to_float(key), kParts - 1) : (int)((key - in.low) >> shift);
}

DEVICE Interval part(const Interval& in, int shift, int i) {
  Interval p = in;
  p.is_first = false;
  p.low = in.is_first ? float_to_bits(0.125f * i) : in.low + ((uint32_t)i << shift);
  if (!in.is_first)
    p.high = p.low + ((1u << shift) - 1) < in.high ? p.low + ((1u << shift) - 1) : in.high;
  else if (i < kParts - 1)
    p.high = float_to_bits(0.125f * (i + 1)) - 1;
  return p;
}

// Candidates within `t` in each part of `in`, over the row: shared.count, and shared.weight: their number or mass.
DEVICE void weigh_parts(Row& row, const Scale& scale, const Threshold& t, const Interval& in, bool by_mass) {
  SampleShared& s = *row.shared;
  const int turn = row.parts_turn, shift = shift_of(in);
  row.parts_turn ^= 1;
  for (int group = thread_idx(); group < row.groups; group += SAMPLE_THREADS) {
    const Four f = four_of(row, group);
    UNROLL for (int i = 0; i < 4; i++) {
      if (f.x[i] == -INFINITY) continue;
      const uint32_t d = distance_of(scale, f.x[i]), id = row.first + 4 * group + i;
      if (!passes(t, d, id) || (in.over_ids && d != in.distance)) continue;
      const uint32_t key = in.over_ids ? id : d;
      if (key < in.low || key > in.high) continue;
      const int at = part_of(in, shift, key);
      atomic_add(&s.parts[turn][at], 1u);
      if (by_mass) {
        const uint64_t mass = mass_of(d);
        atomic_add(&s.parts[turn][kParts + at], (uint32_t)mass & 0xffff);
        atomic_add(&s.parts[turn][2 * kParts + at], (uint32_t)(mass >> 16));
      }
    }
  }
  sync_cluster();
  // Peers have read the others, of the step before, on their way to this barrier.
  for (int i = thread_idx(); i < 3 * kParts; i += SAMPLE_THREADS) s.parts[turn ^ 1][i] = 0;
  for (int i = thread_idx(); i < kParts; i += SAMPLE_THREADS) {
    uint32_t count = 0;
    uint64_t mass = 0;
    for (uint32_t r = 0; r < cluster_size(); r++) {
      const SampleShared* peer = cluster_map(&s, r);
      count += peer->parts[turn][i];
      if (by_mass) mass += peer->parts[turn][kParts + i] + ((uint64_t)peer->parts[turn][2 * kParts + i] << 16);
    }
    s.count[i] = count;
    s.weight[i] = by_mass ? mass : count;
  }
  sync_threads();
}

// The part by which a target is reached, and the weight before it.
struct Reached {
  int part;  // -1: not reached
  uint64_t before;
};

// By each warp for itself: kParts / 32 parts a lane.
DEVICE uint64_t weight_up_to(const SampleShared& s) {
  uint64_t sum = 0;
  UNROLL for (int i = 0; i < kParts / kWarp; i++) sum += s.weight[lane_id() * (kParts / kWarp) + i];
  UNROLL for (int m = 1; m < kWarp; m *= 2) {
    const uint64_t below = shfl_up(sum, m);
    if (lane_id() >= m) sum += below;
  }
  return sum;
}

DEVICE Reached reach(const SampleShared& s, uint64_t up_to, uint64_t before, uint64_t target) {
  const uint32_t reached = warp_ballot(before + up_to >= target);
  if (!reached) return {-1, 0};
  const int lane = first_set(reached);
  if (lane > 0) before += shfl(up_to, lane - 1);
  int i = lane * (kParts / kWarp);
  while (before + s.weight[i] < target) before += s.weight[i++];
  return {i, before};
}

// The smallest set of the best candidates within `t` that reaches `count` of them; or, where `share` is not 0, that share of
// their mass.
DEVICE Threshold tighten(Row& row, const Scale& scale, const Threshold& t, uint64_t count, float share) {
  const bool by_mass = share > 0.f;
  const SampleShared& s = *row.shared;
  Interval in = {0, 0x7f7fffffu, true, false, 0};
  uint64_t before = 0, target = count;
  for (;;) {
    weigh_parts(row, scale, t, in, by_mass);
    const uint64_t up_to = weight_up_to(s);
    if (in.is_first && by_mass) {
      target = (uint64_t)((double)shfl(up_to, kWarp - 1) * (double)share);
      if (target == 0) target = 1;
    }
    const Reached r = reach(s, up_to, before, target);
    if (r.part < 0) return t;  // all of them are less
    before = r.before;
    const int shift = shift_of(in);
    in = part(in, shift, r.part);
    // Behind a target of counts there may be no more; behind one of masses there may be candidates without mass.
    const bool is_whole = s.count[r.part] == 1 || (!by_mass && before + s.weight[r.part] == target);
    if (in.over_ids && (is_whole || in.low == in.high)) return tighter(t, {in.distance, in.high});
    if (is_whole) return tighter(t, {in.high, 0xffffffffu});
    if (in.low == in.high) in = {0, (uint32_t)row.p->vocab - 1, false, true, in.low};
  }
}

// ---- the draw ----

// Gumbel noise from 32 random bits. Exponential variates from log1p keep their precision where the noise is large.
DEVICE float gumbel(uint32_t bits) {
  const float u = ((float)bits + 0.5f) * 2.3283064365386963e-10f;
  return -logf(-log1pf(-u));
}

DEVICE int draw(Row& row, const SlotState& slot, const Candidate& best) {
  if (slot.temperature == 0.f) return best.id;
  const Scale scale = {best.value, 1.f / slot.temperature};
  Threshold t = {0x7f7fffffu, 0xffffffffu};
  // Not -logf(): of 1 that would be -0, whose bits are the largest of all.
  if (slot.min_p > 0.f) t.distance = float_to_bits(0.f - logf(slot.min_p));
  if (slot.top_k > 0 && slot.top_k < row.p->vocab) t = tighten(row, scale, t, slot.top_k, 0.f);
  if (slot.top_p < 1.f) t = tighten(row, scale, t, 0, fmaxf(slot.top_p, 1e-30f));
  Candidate c = {-INFINITY, 0x7fffffff};
  for (int group = thread_idx(); group < row.groups; group += SAMPLE_THREADS) {
    const Four f = four_of(row, group);
    const uint32_t first = row.first + 4 * group;
    bool kept[4];
    UNROLL for (int i = 0; i < 4; i++) kept[i] = f.x[i] > -INFINITY && passes(t, distance_of(scale, f.x[i]), first + i);
    if (!(kept[0] || kept[1] || kept[2] || kept[3])) continue;
    uint32_t bits[4] = {first / 4, (uint32_t)slot.length, 0, 0};  // four ids share a block of Philox
    philox(bits, slot.seed_low, slot.seed_high);
    UNROLL for (int i = 0; i < 4; i++) {
      const Candidate other = {gumbel(bits[i]) - bits_to_float(distance_of(scale, f.x[i])), (int)first + i};
      if (kept[i] && better(other, c)) c = other;
    }
  }
  return row_best(row, c).id;
}

// ---- log-probabilities ----

// The best of all; and with `wants_sum` log(sum of exp(logit)), otherwise 0. A NaN or +infinity is the best of all, so that it is
// noticed.
DEVICE Candidate summarise(Row& row, bool wants_sum, float& log_sum) {
  Candidate c = {-INFINITY, 0x7fffffff};
  for (int group = thread_idx(); group < row.groups; group += SAMPLE_THREADS) {
    const Four f = four_of(row, group);
    UNROLL for (int i = 0; i < 4; i++) {
      const Candidate other = {f.x[i] == f.x[i] ? f.x[i] : INFINITY, row.first + 4 * group + i};
      if (better(other, c)) c = other;
    }
  }
  log_sum = 0.f;
  if (!wants_sum) return row_best(row, c);
  float total = 0.f;
  for (int group = thread_idx(); group < row.groups && c.value > -INFINITY; group += SAMPLE_THREADS) {
    const Four f = four_of(row, group);
    UNROLL for (int i = 0; i < 4; i++) total += exp2_approx((f.x[i] - c.value) * kLog2e);
  }
  const Candidate best = row_best(row, c, &total);
  log_sum = best.value + logf(total);
  return best;
}

DEVICE float logit_of(Row& row, int id) {
  const int rank = id / row.slice;
  return cluster_map(row.logits, rank)[id - rank * row.slice];
}

// The next best after `last`, in order of logit, then id.
DEVICE Candidate next_best(Row& row, const Candidate& last) {
  Candidate c = {-INFINITY, 0x7fffffff};
  for (int group = thread_idx(); group < row.groups; group += SAMPLE_THREADS) {
    const Four f = four_of(row, group);
    UNROLL for (int i = 0; i < 4; i++) {
      const Candidate other = {f.x[i], row.first + 4 * group + i};
      if (better(last, other) && better(other, c)) c = other;
    }
  }
  return row_best(row, c);
}

// ---- the step ----

DEVICE bool is_among(const int32_t* ids, uint32_t count, int token) {
  for (uint32_t i = 0; i < count; i++)
    if (ids[i] == token) return true;
  return false;
}

// By the first block: the emitted token joins the thinking's history.
DEVICE void find_loop(const SampleParams& p, SampleShared& shared, int slot_id) {
  int32_t* history = p.loop_history + (size_t)slot_id * 2 * LOOP_PERIODS;
  int32_t* runs = history + LOOP_PERIODS;
  Steering& s = shared.budget.steering;
  const int n = s.history_length, period = thread_idx() + 1;
  const bool has_period = period <= LOOP_PERIODS;
  int run = 0;
  if (has_period && n >= period && history[(n - period) % LOOP_PERIODS] == shared.token) {
    run = runs[period - 1] + 1;
    if (run + period >= max_int(s.loop_repeats * period, LOOP_TOKENS)) atomic_add(&shared.loops, 1u);
  }
  sync_threads();
  if (has_period) runs[period - 1] = shared.loops ? 0 : run;
  if (thread_idx() == 0) {
    history[n % LOOP_PERIODS] = shared.token;
    s.history_length = n + 1;
    s.looping = shared.loops > 0;
  }
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
  record.flags = flags | TOKEN_VALID | (finish || slot_runs(slot) ? 0 : TOKEN_AWAITS_MASK);
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
  if (thread_idx() == kWarp) prefetch_share(p.prefetch, block_y() * grid_x() + block_x(), grid_x() * p.rows);
  const int slot_id = p.row_slot[block_y()];
  SlotState& slot = p.slots[slot_id];
  const bool leader = cluster_rank() == 0 && thread_idx() == 0;
  // The leader alone: once its record is out, the last row's leader may count the step.
  TokenRecord& record = p.ring->records[leader ? *p.step % RING_STEPS : 0][block_y()];

  if (!slot_runs(slot)) {
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
  const bool is_first = thread_idx() == 0;
  for (int i = thread_idx(); i < (int)(sizeof(Budget) / 4); i += SAMPLE_THREADS)
    ((uint32_t*)&shared.budget)[i] = ((const uint32_t*)&slot.budget)[i];
  for (int i = thread_idx(); i < 3 * kParts; i += SAMPLE_THREADS) shared.parts[0][i] = 0;
  load_logits(row, slot, slot_id);
  sync_threads();

  const bool wants_logprobs = slot.logprobs >= 0;
  Candidate best = {0.f, 0};
  float log_sum = 0.f;
  bool finite = true;
  for (int attempt = 0; attempt < 2; attempt++) {
    if (is_first) {
      if (attempt == 0) {
        shared.step = budget_before(shared.budget, p.pool);
        shared.token = shared.step.forced;
        if (steers(shared.budget, shared.step, STEER_END_BIAS)) bias_end(row, shared.budget);
      }
      shared.redraw = 0;
      if (shared.step.forced < 0)
        mask_for_draw(row, slot, shared.budget, shared.step.mask_end || attempt > 0,
                      shared.step.mask_eos || attempt > 0);
    }
    sync_threads();
    const bool may_stop = attempt == 0 && steering_may_stop(shared.budget, shared.step, ~0u);
    const bool needs_sum = may_stop && (shared.budget.steering.techniques & STEER_CONFIDENCE);
    if (attempt == 0 && steers(shared.budget, shared.step, STEER_AVOID | STEER_SWITCH))
      steer_logits(row, shared.budget.steering, slot_id);
    best = summarise(row, wants_logprobs || needs_sum, log_sum);
    finite = best.value > -INFINITY && best.value < INFINITY;
    if (!finite || shared.step.forced >= 0) break;

    bool stops = false;  // the first thread's is what counts
    if (may_stop) {
      float margin = INFINITY;
      if ((shared.budget.steering.techniques & STEER_BRAKE) && shared.budget.steering.at_sentence_end) {
        if (is_first) margin = best.value - logit_of(row, steering_end_token(shared.budget, p.pool));
        sync_cluster();  // before a block masks the end in its logits
      }
      if (is_first) stops = steering_stops(shared.budget, needs_sum ? expf(best.value - log_sum) : 0.f, margin);
    }
    const int drawn = draw(row, slot, best);
    if (is_first) {
      const bool is_end = stops || is_among(slot.stop_ids, slot.eos_count, drawn);
      const int token = budget_after(shared.budget, p.pool, drawn, is_end);
      if (stops) steering_stopped(shared.budget);
      shared.redraw = token == BUDGET_REDRAW && attempt == 0;
      shared.token = token == BUDGET_REDRAW ? drawn : token;
    }
    sync_threads();
    if (!shared.redraw) break;
    sync_threads();
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
  uint32_t flags = 0;
  if (leader) {
    const int token = shared.token;
    const Steering& s = shared.budget.steering;
    const bool is_switch =
        (s.techniques & STEER_SWITCH) && bit(p.switches + slot_id * (size_t)ceil_div(p.vocab, 32), token);
    flags = budget_emit(shared.budget, p.pool, token, p.token_traits[token]);
    shared.thinks = (flags & TOKEN_REASONING) != 0;
    shared.loops = 0;
    flags |= steering_emit(shared.budget, flags, p.token_traits[token], is_switch);
  }
  if (cluster_rank() == 0 && (shared.budget.steering.techniques & STEER_LOOP)) {
    sync_threads();
    if (shared.thinks) find_loop(p, shared, slot_id);
  }
  if (leader) {
    const int token = shared.token;
    record.serial = slot.serial;
    record.slot = slot_id;
    record.top_count = found;
    advance_slot(p, slot, slot_id, shared.budget, token, flags, wants_logprobs ? logit_of(row, token) - log_sum : 0.f,
                 record);
    publish(p);
  }
  // The leader reads other blocks' logits.
  if (cluster_size() > 1) cluster_sync();
}
