// The kernels that prove the SIMT machine: planted bugs, each with its corrected twin, and kernels that only show what an
// instruction means. Host target only; tests/simt.rs runs them.
#ifndef PONDER_PLANTED_H
#define PONDER_PLANTED_H

#include "../../params.h"

enum {
  PLANTED_THREADS = 128,
  PLANTED_SHARED = 512,  // a word per thread, where a kernel says nothing else
  PLANTED_COPY_SHARED = 1024,
  PLANTED_WGMMA_SHARED = 16384 + 64,
  MEANING_BARRIER = 40960,  // where the mbarrier is, behind what a kernel moves
  MEANING_SHARED = MEANING_BARRIER + 64,
};

typedef struct PlantedParams {
  TensorMap map, other_map;
  const uint32_t* input;   // [blocks][PLANTED_THREADS], where a kernel says nothing else
  uint32_t* out;           // the same
  uint32_t* counter;       // [1], 0 before the launch
  int32_t planted;         // 1: with the bug, 0: its corrected twin
  int32_t mode;            // which of a kernel's variants
  int32_t bytes;           // of a copy
  int32_t coordinates[4];  // of a tensor copy, innermost first
} PlantedParams;

#ifndef __CUDACC__
#ifdef __cplusplus
extern "C" {
#endif
KERNEL_PROTOTYPE(missing_sync_threads, PlantedParams)
KERNEL_PROTOTYPE(shared_race, PlantedParams)
KERNEL_PROTOTYPE(global_race, PlantedParams)
KERNEL_PROTOTYPE(flag_without_fence, PlantedParams)
KERNEL_PROTOTYPE(shared_out_of_bounds, PlantedParams)
KERNEL_PROTOTYPE(global_out_of_bounds, PlantedParams)
KERNEL_PROTOTYPE(uninitialised_shared, PlantedParams)
KERNEL_PROTOTYPE(divergent_shuffle, PlantedParams)
KERNEL_PROTOTYPE(divergent_sync_threads, PlantedParams)
KERNEL_PROTOTYPE(partial_setmaxnreg, PlantedParams)
KERNEL_PROTOTYPE(launch_dependents_before_pdl_wait, PlantedParams)
KERNEL_PROTOTYPE(read_before_pdl_wait, PlantedParams)
KERNEL_PROTOTYPE(early_exit, PlantedParams)
KERNEL_PROTOTYPE(lost_arrive, PlantedParams)
KERNEL_PROTOTYPE(missing_mbarrier_wait, PlantedParams)
KERNEL_PROTOTYPE(early_release, PlantedParams)
KERNEL_PROTOTYPE(transaction_underflow, PlantedParams)
KERNEL_PROTOTYPE(transaction_overflow, PlantedParams)
KERNEL_PROTOTYPE(missing_proxy_fence, PlantedParams)
KERNEL_PROTOTYPE(overwritten_store_source, PlantedParams)
KERNEL_PROTOTYPE(missing_cp_async_wait, PlantedParams)
KERNEL_PROTOTYPE(cp_async_at_exit, PlantedParams)
KERNEL_PROTOTYPE(missing_wgmma_wait, PlantedParams)
KERNEL_PROTOTYPE(overwritten_a_registers, PlantedParams)
KERNEL_PROTOTYPE(wrong_swizzle, PlantedParams)
KERNEL_PROTOTYPE(wrong_stride, PlantedParams)
KERNEL_PROTOTYPE(unfenced_operand, PlantedParams)
KERNEL_PROTOTYPE(release_before_wgmma_wait, PlantedParams)
KERNEL_PROTOTYPE(everybody_waits, PlantedParams)
KERNEL_PROTOTYPE(load_box, PlantedParams)
KERNEL_PROTOTYPE(store_box, PlantedParams)
KERNEL_PROTOTYPE(matrix_fragments, PlantedParams)
KERNEL_PROTOTYPE(mma_fragments, PlantedParams)
KERNEL_PROTOTYPE(wgmma_n8, PlantedParams)
KERNEL_PROTOTYPE(wgmma_n64, PlantedParams)
KERNEL_PROTOTYPE(wgmma_n96, PlantedParams)
KERNEL_PROTOTYPE(wgmma_n256, PlantedParams)
KERNEL_PROTOTYPE(wgmma_e4m3, PlantedParams)
KERNEL_PROTOTYPE(cluster_exchange, PlantedParams)
KERNEL_PROTOTYPE(cluster_arrivals, PlantedParams)
KERNEL_PROTOTYPE(cp_async_copy, PlantedParams)
KERNEL_PROTOTYPE(bulk_copy, PlantedParams)
KERNEL_PROTOTYPE(named_barriers, PlantedParams)
KERNEL_PROTOTYPE(collectives, PlantedParams)
KERNEL_PROTOTYPE(grid_barrier, PlantedParams)
KERNEL_PROTOTYPE(barriers_alone, PlantedParams)
#ifdef __cplusplus
}
#endif
#endif  // __CUDACC__

#endif  // PONDER_PLANTED_H
