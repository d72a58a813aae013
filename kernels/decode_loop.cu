// decode_loop: ends each pass of the loop on the device that repeats a decode step. Another pass follows while one of its
// sequences runs and the host has not asked for an end: it names the step to stop at before the launch, and an earlier
// one to break in. Reads one word of host memory, once a step.
//
// Grid: one block of one warp. In a file of its own because of graph_set_condition.
#include "kernel.cuh"

KERNEL(decode_loop, DecodeLoopParams, DECODE_LOOP_THREADS) {
  // Before the wait: a host that breaks in a moment later waits for one step more.
  const uint32_t until = load_acquire_system(&p.ring->until);
  pdl_wait();
  bool active = false;
  for (int row = thread_idx(); row < p.rows; row += DECODE_LOOP_THREADS) active |= slot_runs(p.slots[p.row_slot[row]]);
  active = warp_any(active);
  if (thread_idx() == 0) graph_set_condition(p.condition, active && (int32_t)(*p.step - until) < 0);
}
