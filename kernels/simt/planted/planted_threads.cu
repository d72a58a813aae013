// Planted bugs of threads, memory, and clusters. With p.planted the bug, without it the corrected twin; in, out: a word per
// thread.
#include "../../kernel.cuh"
#include "planted.h"

DEVICE uint32_t* words() { return (uint32_t*)shared_memory(); }
DEVICE int neighbour() { return (thread_idx() + 1) % PLANTED_THREADS; }

// out[t] = in[t + 1], through shared memory with no barrier between.
KERNEL(missing_sync_threads, PlantedParams, PLANTED_THREADS) {
  words()[thread_idx()] = 0;
  sync_threads();
  words()[thread_idx()] = p.input[thread_idx()];
  if (!p.planted) sync_threads();
  p.out[thread_idx()] = words()[neighbour()];
}

// out[t] = the sum of in[s] over s % 8 == t % 8, whose addition is not atomic.
KERNEL(shared_race, PlantedParams, PLANTED_THREADS) {
  if (thread_idx() < 8) words()[thread_idx()] = 0;
  sync_threads();
  uint32_t* sum = words() + thread_idx() % 8;
  if (p.planted)
    *sum += p.input[thread_idx()];
  else
    atomic_add(sum, p.input[thread_idx()]);
  sync_threads();
  p.out[thread_idx()] = *sum;
}

// out[0] counts the blocks, not atomically.
KERNEL(global_race, PlantedParams, PLANTED_THREADS) {
  if (thread_idx() != 0) return;
  if (p.planted)
    p.out[0] += 1;
  else
    atomic_add(p.out, 1);
}

// Block 0: out[t] = in[t]. Block 1 waits for a flag of block 0: out[T + t] = out[t] + 1. The flag is raised with no fence
// after the data.
KERNEL(flag_without_fence, PlantedParams, PLANTED_THREADS) {
  const int t = thread_idx();
  if (block_x() == 0) {
    p.out[t] = p.input[t];
    sync_threads();
    if (t == 0) {
      if (!p.planted) fence_device();
      atomic_add(p.counter, 1);
    }
    return;
  }
  if (t == 0)
    while (load_acquire(p.counter) == 0) {
    }
  sync_threads();
  p.out[PLANTED_THREADS + t] = p.out[t] + 1;
}

// The last thread writes one word past the end.
KERNEL(shared_out_of_bounds, PlantedParams, PLANTED_THREADS) {
  words()[thread_idx() + p.planted] = p.input[thread_idx()];
  p.out[thread_idx()] = words()[thread_idx() + p.planted];
}

KERNEL(global_out_of_bounds, PlantedParams, PLANTED_THREADS) {
  p.out[thread_idx() + p.planted] = p.input[thread_idx()];
}

// out[t] = in[t + 1], but half the words are never written.
KERNEL(uninitialised_shared, PlantedParams, PLANTED_THREADS) {
  if (!p.planted || thread_idx() < PLANTED_THREADS / 2) words()[thread_idx()] = p.input[thread_idx()];
  sync_threads();
  p.out[thread_idx()] = words()[neighbour()];
}

// out[t] = in[t ^ 1], where the halves of a warp shuffle in two different places.
KERNEL(divergent_shuffle, PlantedParams, PLANTED_THREADS) {
  const uint32_t x = p.input[thread_idx()];
  uint32_t y;
  if (p.planted && lane_id() < 16)
    y = shfl_xor(x, 1);
  else
    y = shfl_xor(x, 1);
  p.out[thread_idx()] = y;
}

// Half the threads leave without the barrier.
KERNEL(divergent_sync_threads, PlantedParams, PLANTED_THREADS) {
  words()[thread_idx()] = p.input[thread_idx()];
  p.out[thread_idx()] = words()[thread_idx()];
  if (!p.planted || thread_idx() < PLANTED_THREADS / 2) sync_threads();
}

// One warp of the warpgroup keeps its registers.
KERNEL(partial_setmaxnreg, PlantedParams, PLANTED_THREADS) {
  if (!p.planted || warp_id() != 2) registers_decrease<40>();
  p.out[thread_idx()] = p.input[thread_idx()];
}

// Copies what the launch before the one before has written, ahead of its wait: the launch between them must let this one start only
// when it is behind its own wait.
KERNEL(launch_dependents_before_pdl_wait, PlantedParams, PLANTED_THREADS) {
  const uint32_t word = p.input[thread_idx()];
  if (p.planted) pdl_launch_dependents();
  pdl_wait();
  pdl_launch_dependents();
  p.out[thread_idx()] = word;
}

// Copies what the launch before may still be writing.
KERNEL(read_before_pdl_wait, PlantedParams, PLANTED_THREADS) {
  if (!p.planted) pdl_wait();
  p.out[thread_idx()] = p.input[thread_idx()];
}

// out of a block: in of its peer in a cluster of 2, read from the peer's shared memory; the peer does not stay for it.
KERNEL(early_exit, PlantedParams, PLANTED_THREADS) {
  const int t = block_x() * PLANTED_THREADS + thread_idx();
  words()[thread_idx()] = p.input[t];
  cluster_sync();
  p.out[t] = cluster_map(words(), cluster_rank() ^ 1)[thread_idx()];
  if (!p.planted) cluster_sync();
}
