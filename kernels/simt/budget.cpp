// The state machine of budget.cuh without a sampler around it: what it decides does not depend on a GPU's threads, so the test
// that holds it against a model calls it directly, millions of times.
#include "budget.cuh"

extern "C" {

void simt_budget_before(Budget* b, const int32_t* pool, int32_t step[3]) {
  const BudgetStep s = budget_before(*b, pool);
  step[0] = s.forced;
  step[1] = s.mask_end;
  step[2] = s.mask_eos;
}

int32_t simt_budget_after(Budget* b, const int32_t* pool, int32_t token, int32_t is_eos) {
  return budget_after(*b, pool, token, is_eos != 0);
}

uint32_t simt_budget_emit(Budget* b, const int32_t* pool, int32_t token, uint8_t traits) {
  return budget_emit(*b, pool, token, traits);
}

int32_t simt_budget_completing(const Budget* b, const int32_t* pool) { return budget_completing(*b, pool); }
}
