// The host target's C interface: what engine/device/host.rs calls to run one launch on the SIMT machine.
#ifndef PONDER_SIMT_H
#define PONDER_SIMT_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// A tensor map as the host target reads it; lives in the 128 bytes of a TensorMap.
typedef struct SimtTensorMap {
  uint64_t base;        // address of element 0
  uint64_t strides[3];  // bytes, of dimensions 1 to 3
  uint32_t dims[4];     // elements, innermost first
  uint32_t box[4];
  uint32_t rank;  // 1 to 4
  uint32_t element_bytes;
  uint32_t swizzle;  // enum Swizzle of sm90.cuh
  uint32_t magic;    // SIMT_MAP_MAGIC: anything else is an error when used
} SimtTensorMap;
enum { SIMT_MAP_MAGIC = 0x50544d31 };

// Order in which runnable fibers are picked.
enum SimtOrder { SIMT_ASCENDING = 0, SIMT_DESCENDING = 1, SIMT_RANDOM = 2 };

typedef struct SimtLaunch {
  const char* name;                    // for reports
  uint64_t stream;                     // whose earlier launches it may overlap
  void (*kernel)(const void* params);  // run by every thread
  const void* params;                  // the params struct, aligned as it wants
  uint32_t params_bytes;
  uint32_t grid[3];
  uint32_t cluster;       // blocks per cluster along x, 1 for none
  uint32_t threads;       // per block
  uint32_t shared_bytes;  // dynamic shared memory
  uint32_t pdl;           // launched with programmatic dependence on what ran before
  uint32_t checked;       // `kernel` is the instrumented build: race, bounds, proxy and PDL checks are on
  uint32_t order;         // SimtOrder
  uint32_t seed;          // of the random order and of the delays of asynchronous work
  uint32_t workers;       // OS threads to spread blocks over
} SimtLaunch;

// Runs one launch to completion. Returns 0; or 1 with a report (kernel, block, thread, cause; at most `capacity` bytes,
// NUL-terminated) for the first error found.
int simt_run(const SimtLaunch* launch, char* report, uint64_t capacity);

// Device memory of the host target: the checked build knows these allocations and reports accesses outside of them.
// 1024-byte aligned, guarded, filled with a NaN pattern if `nan`; null when there is no memory. Launches of one stream write it.
void* simt_alloc(uint64_t bytes, uint64_t stream, uint32_t nan);
void simt_free(void* p);
// The host has waited for everything before in this stream: nothing is pending for the PDL check.
void simt_sync(uint64_t stream);

#ifdef __cplusplus
}
#endif
#endif
