// Every PTX instruction that Ponder uses, one function each, with its section of the PTX manual (ISA 9.0). The only file
// with asm. For the C++ compiler the same functions are defined in simt/sm90.h, on the hostile SIMT machine.
//
// Conventions: shared memory is passed as ordinary pointers; a barrier is a uint64_t in shared memory; byte counts are
// bytes; `rank` is a block's rank in its cluster. Functions named *_sync or taking part in a collective need all 32 lanes.
#pragma once

#include <stdint.h>

#include "params.h"

typedef uint64_t Barrier;

// The swizzle field of a wgmma descriptor, bits 62-63 (PTX 9.7.15.5.1.2), and of a tensor map.
enum Swizzle { kSwizzleNone = 0, kSwizzle128 = 1, kSwizzle64 = 2, kSwizzle32 = 3 };

// L2 eviction policies as createpolicy encodes them (PTX 9.7.9.19): weights and KV are read once, activations often.
constexpr uint64_t kEvictNormal = 0;
constexpr uint64_t kEvictFirst = 0x12F0000000000000ull;
constexpr uint64_t kEvictLast = 0x14F0000000000000ull;

constexpr uint32_t kFullMask = 0xffffffffu;

#ifndef __CUDACC__
#include "simt/sm90.h"
#else
#include <initializer_list>

// ---- where am I ----

DEVICE int thread_idx() { return threadIdx.x; }
DEVICE int block_threads() { return blockDim.x; }
DEVICE int block_x() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }
DEVICE int block_z() { return blockIdx.z; }
DEVICE int grid_x() { return gridDim.x; }
DEVICE int grid_y() { return gridDim.y; }
DEVICE int grid_z() { return gridDim.z; }

// Start of the block's dynamic shared memory, 1024-byte aligned.
DEVICE uint8_t* shared_memory() {
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  return dynamic_shared;
}

// Generic to shared::cta address (PTX 9.7.9.21 cvta).
DEVICE uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// ---- arithmetic ----

DEVICE float bits_to_float(uint32_t x) { return __uint_as_float(x); }
DEVICE uint32_t float_to_bits(float x) { return __float_as_uint(x); }
// ex2.approx.ftz (PTX 9.7.3.21): 2^x, relative error 2^-22.
DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// lg2.approx.ftz (PTX 9.7.3.20).
DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// rsqrt.approx.ftz (PTX 9.7.3.17).
DEVICE float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// rcp.approx.ftz (PTX 9.7.3.14).
DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// cvt.rn.bf16x2 (PTX 9.7.9.22): two floats to two bf16, `low` in the lower half; nearest, ties to even.
DEVICE uint32_t pack_bf16x2(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
DEVICE uint16_t float_to_bf16(float x) {
  uint16_t y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
// mul.rn.bf16x2 (PTX 9.7.4.3): two products, each rounded once.
DEVICE uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
// cvt.rn.f16x2 (PTX 9.7.9.22): the same to f16.
DEVICE uint32_t pack_f16x2(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
// cvt.rn.satfinite.e4m3x2 (PTX 9.7.9.22): two floats to two e4m3, `low` in the lower byte; nearest, ties to even; what lies
// beyond 448 becomes 448.
DEVICE uint16_t pack_e4m3x2(float low, float high) {
  uint16_t y;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(y) : "f"(high), "f"(low));
  return y;
}
// cvt.rn.f16x2.e4m3x2 (PTX 9.7.9.22): exact.
DEVICE uint32_t e4m3x2_to_f16x2(uint16_t pair) {
  uint32_t y;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(y) : "h"(pair));
  return y;
}
// prmt (PTX 9.7.9.7): bytes 0 and 2, or 1 and 3, of `low`, then of `high`.
DEVICE uint32_t even_bytes(uint32_t low, uint32_t high) { return __byte_perm(low, high, 0x6420); }
DEVICE uint32_t odd_bytes(uint32_t low, uint32_t high) { return __byte_perm(low, high, 0x7531); }

// ---- memory ----

// 16-byte and 8-byte accesses (PTX 9.7.9.8 ld, 9.7.9.11 st); `p` aligned to as much, global or shared.
DEVICE void load_16(const void* p, uint32_t (&v)[4]) {
  const uint4 x = *(const uint4*)p;
  v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
}
DEVICE void store_16(void* p, const uint32_t (&v)[4]) { *(uint4*)p = make_uint4(v[0], v[1], v[2], v[3]); }
DEVICE void load_8(const void* p, uint32_t (&v)[2]) {
  const uint2 x = *(const uint2*)p;
  v[0] = x.x, v[1] = x.y;
}
DEVICE void store_8(void* p, const uint32_t (&v)[2]) { *(uint2*)p = make_uint2(v[0], v[1]); }
// ld.global.nc.L1::no_allocate (PTX 9.7.9.9): only for what no kernel ever writes (weights).
DEVICE void load_16_streaming(const void* p, uint32_t (&v)[4]) {
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "l"(p));
}
// fence (PTX 9.7.13.4) at device and at system scope.
DEVICE void fence_device() { __threadfence(); }
DEVICE void fence_system() { __threadfence_system(); }
// ld.acquire / st.release / red (PTX 9.7.9.8, 9.7.9.11), device scope unless named system.
DEVICE uint32_t load_acquire(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
DEVICE void store_release(uint32_t* p, uint32_t v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
DEVICE uint32_t load_acquire_system(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
DEVICE void store_release_system(uint32_t* p, uint32_t v) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
// atom.inc.acq_rel.gpu (PTX 9.7.13.5): returns the old value; wraps to 0 after `last`, so a ticket counter resets itself.
// The acquire and release order everything that the taker's *thread* did or will do; fence_device() and a block barrier
// carry that to the other threads of its block.
DEVICE uint32_t atomic_ticket(uint32_t* counter, uint32_t last) {
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(last) : "memory");
  return old;
}
// atomicInc (PTX 9.7.13.5), relaxed: the old value; wraps as atomic_ticket does, but orders nothing.
DEVICE uint32_t atomic_increment(uint32_t* counter, uint32_t last) { return atomicInc(counter, last); }
// atom.add relaxed (PTX 9.7.13.5), global or shared; integers only, because float sums would depend on the order.
DEVICE uint32_t atomic_add(uint32_t* p, uint32_t v) { return atomicAdd(p, v); }
DEVICE uint64_t atomic_add(uint64_t* p, uint64_t v) { return atomicAdd((unsigned long long*)p, (unsigned long long)v); }
DEVICE uint32_t atomic_max(uint32_t* p, uint32_t v) { return atomicMax(p, v); }
DEVICE uint32_t atomic_min(uint32_t* p, uint32_t v) { return atomicMin(p, v); }

// ---- warps ----

// shfl.sync (PTX 9.7.9.6), over all 32 lanes.
DEVICE float shfl_xor(float x, int mask) { return __shfl_xor_sync(kFullMask, x, mask); }
DEVICE int shfl_xor(int x, int mask) { return __shfl_xor_sync(kFullMask, x, mask); }
DEVICE uint32_t shfl_xor(uint32_t x, int mask) { return __shfl_xor_sync(kFullMask, x, mask); }
DEVICE uint64_t shfl_xor(uint64_t x, int mask) { return __shfl_xor_sync(kFullMask, (unsigned long long)x, mask); }
DEVICE float shfl(float x, int lane) { return __shfl_sync(kFullMask, x, lane); }
DEVICE int shfl(int x, int lane) { return __shfl_sync(kFullMask, x, lane); }
DEVICE uint32_t shfl(uint32_t x, int lane) { return __shfl_sync(kFullMask, x, lane); }
DEVICE uint64_t shfl(uint64_t x, int lane) { return __shfl_sync(kFullMask, (unsigned long long)x, lane); }
DEVICE float shfl_up(float x, int delta) { return __shfl_up_sync(kFullMask, x, delta); }
DEVICE int shfl_up(int x, int delta) { return __shfl_up_sync(kFullMask, x, delta); }
DEVICE uint32_t shfl_up(uint32_t x, int delta) { return __shfl_up_sync(kFullMask, x, delta); }
DEVICE uint64_t shfl_up(uint64_t x, int delta) { return __shfl_up_sync(kFullMask, (unsigned long long)x, delta); }
// vote.sync (PTX 9.7.13.9).
DEVICE uint32_t warp_ballot(bool x) { return __ballot_sync(kFullMask, x); }
DEVICE bool warp_any(bool x) { return __any_sync(kFullMask, x); }
DEVICE bool warp_all(bool x) { return __all_sync(kFullMask, x); }
DEVICE int popcount(uint32_t x) { return __popc(x); }
DEVICE int first_set(uint32_t x) { return __ffs(x) - 1; }  // -1 for none
DEVICE int leading_zeros(uint32_t x) { return __clz(x); }  // 32 for none
// bar.warp.sync (PTX 9.7.13.2).
DEVICE void sync_warp() { __syncwarp(); }
// elect.sync (PTX 9.7.13.15): true in exactly one lane of a converged warp.
DEVICE bool elect_one() {
  uint32_t yes;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(yes));
  return yes != 0;
}

// ---- blocks and clusters ----

// bar.sync 0 (PTX 9.7.13.1).
DEVICE void sync_threads() { __syncthreads(); }
// barrier.cta with an id from 1 to 15 and a number of threads (multiple of 32); never id 0 once roles diverge.
DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// %cluster_ctarank, %cluster_nctarank (PTX 10.14, 10.15).
DEVICE uint32_t cluster_rank() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
DEVICE uint32_t cluster_size() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
  return r;
}
// barrier.cluster (PTX 9.7.13.3), release / acquire.
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
// mapa (PTX 9.7.9.24): the address of the same shared variable in the block `rank` of this cluster, to read or write.
template <typename T>
DEVICE T* cluster_map(T* p, uint32_t rank) {
  uint64_t q;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(q) : "l"(p), "r"(rank));
  return (T*)q;
}

// setmaxnreg (PTX 9.7.20.5), by all warps of a warpgroup; N a multiple of 8 from 24 to 256.
template <int N>
DEVICE void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
DEVICE void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// griddepcontrol (PTX 9.7.13.14): wait until the grids this one depends on have completed and their writes are visible;
// let dependents start early. Both are no-ops in a launch without the PDL attribute.
DEVICE void pdl_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void pdl_launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Whether the body of a conditional graph node runs again (CUDA programming guide, conditional graph nodes). Not PTX but a call
// that the driver resolves when it loads the cubin, as it does vprintf's; so for a kernel of its own: beside wgmma, a call
// serialises everything.
DEVICE void graph_set_condition(uint64_t condition, bool again) { cudaGraphSetConditional(condition, again); }

// ---- mbarrier (PTX 9.7.13.16) ----

DEVICE void mbarrier_init(Barrier* b, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count) : "memory");
}
// Makes initialised barriers visible to the async proxy and to the cluster; a block or cluster barrier must follow.
DEVICE void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void mbarrier_arrive(Barrier* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
// Arrives and adds `bytes` to the phase's pending transaction count.
DEVICE void mbarrier_arrive_expect_tx(Barrier* b, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
}
DEVICE void mbarrier_expect_tx(Barrier* b, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
}
// Arrives at the same barrier of the block `rank` of this cluster.
DEVICE void mbarrier_arrive_cluster(Barrier* b, uint32_t rank) {
  asm volatile(
      "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote]; }" ::"r"(shared_address(b)),
      "r"(rank)
      : "memory");
}
// The same, ordering nothing but this thread's completed asynchronous reads (wgmma after its wait): without the fence at
// cluster scope, which costs a trip to L2.
DEVICE void mbarrier_release_cluster(Barrier* b, uint32_t rank) {
  asm volatile(
      "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(shared_address(b)),
      "r"(rank)
      : "memory");
}
DEVICE bool mbarrier_try_wait(Barrier* b, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(shared_address(b)), "r"(parity)
      : "memory");
  return done != 0;
}
// Waits until the phase with this parity has completed (a fresh barrier is in phase 0; parity 1 falls through).
DEVICE void mbarrier_wait(Barrier* b, uint32_t parity) {
  while (!mbarrier_try_wait(b, parity)) {
  }
}
// The same, acquiring what the other blocks of the cluster released.
DEVICE void mbarrier_wait_cluster(Barrier* b, uint32_t parity) {
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(shared_address(b)), "r"(parity)
        : "memory");
}

// fence.proxy.async (PTX 9.7.13.4): ordinary shared-memory writes before it are visible to TMA and wgmma after it.
DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- asynchronous copies ----

// cp.async, 16 bytes (PTX 9.7.9.25.3.1); bytes from `valid` (0 to 16) on are zero-filled.
DEVICE void cp_async_16(void* dst, const void* src, int valid = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(dst)), "l"(src), "r"(valid)
               : "memory");
}
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
// cp.async.mbarrier.arrive.noinc (PTX 9.7.13.16.15): the barrier gets this thread's arrival when its copies have landed.
DEVICE void cp_async_arrive(Barrier* b) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(b)) : "memory");
}

// cp.async.bulk (PTX 9.7.9.25.4.1): contiguous bytes, multiple of 16, both sides 16-byte aligned.
DEVICE void bulk_load(void* dst, const void* src, uint32_t bytes, Barrier* b, uint64_t policy = kEvictNormal) {
  if (policy == kEvictNormal)
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(dst)),
                 "l"(src), "r"(bytes), "r"(shared_address(b))
                 : "memory");
  else
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(shared_address(dst)),
        "l"(src), "r"(bytes), "r"(shared_address(b)), "l"(policy)
        : "memory");
}
DEVICE void bulk_store(void* dst, const void* src, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(shared_address(src)),
               "r"(bytes)
               : "memory");
}
// cp.async.bulk.prefetch.L2 (PTX 9.7.9.25.4.3).
DEVICE void bulk_prefetch(const void* src, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(src), "r"(bytes) : "memory");
}
// Groups of this thread's bulk and tensor stores (PTX 9.7.9.25.4.4 and .5). bulk_wait: complete; bulk_wait_read: their
// shared source may be written again.
DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int N>
DEVICE void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}
template <int N>
DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// cp.async.bulk.tensor (PTX 9.7.9.25.5.2 load, .3 store, .4 prefetch): one box of a tensor map; coordinates innermost
// first; out of bounds reads zeros and stores nothing. `dst` is 128-byte aligned (1024 for swizzle 128).
DEVICE void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

DEVICE void tma_load(void* dst, const TensorMap* map, Barrier* b, uint64_t policy, int c0) {
  asm volatile(
      "cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3}], "
      "[%2], %4;" ::"r"(shared_address(dst)),
      "l"(map), "r"(shared_address(b)), "r"(c0), "l"(policy == kEvictNormal ? 0x1000000000000000ull : policy)
      : "memory");
}

DEVICE void tma_load(void* dst, const TensorMap* map, Barrier* b, uint64_t policy, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4}], "
      "[%2], %5;" ::"r"(shared_address(dst)),
      "l"(map), "r"(shared_address(b)), "r"(c0), "r"(c1), "l"(policy == kEvictNormal ? 0x1000000000000000ull : policy)
      : "memory");
}

DEVICE void tma_load(void* dst, const TensorMap* map, Barrier* b, uint64_t policy, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5}], "
      "[%2], %6;" ::"r"(shared_address(dst)),
      "l"(map), "r"(shared_address(b)), "r"(c0), "r"(c1), "r"(c2),
      "l"(policy == kEvictNormal ? 0x1000000000000000ull : policy)
      : "memory");
}

DEVICE void tma_load(void* dst, const TensorMap* map, Barrier* b, uint64_t policy, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], "
      "[%2], %7;" ::"r"(shared_address(dst)),
      "l"(map), "r"(shared_address(b)), "r"(c0), "r"(c1), "r"(c2), "r"(c3),
      "l"(policy == kEvictNormal ? 0x1000000000000000ull : policy)
      : "memory");
}

// The box lands at the same offset in every block whose bit is set in `blocks`, and completes the barrier at the same offset.
DEVICE void tma_load_multicast(void* dst, const TensorMap* map, Barrier* b, uint16_t blocks, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, "
      "%4}], [%2], %5;" ::"r"(shared_address(dst)),
      "l"(map), "r"(shared_address(b)), "r"(c0), "r"(c1), "h"(blocks)
      : "memory");
}

DEVICE void tma_store(const TensorMap* map, const void* src, int c0) {
  asm volatile("cp.async.bulk.tensor.1d.global.shared::cta.bulk_group [%0, {%2}], [%1];" ::"l"(map),
               "r"(shared_address(src)), "r"(c0)
               : "memory");
}

DEVICE void tma_store(const TensorMap* map, const void* src, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(shared_address(src)), "r"(c0), "r"(c1)
               : "memory");
}

DEVICE void tma_store(const TensorMap* map, const void* src, int c0, int c1, int c2) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
               "r"(shared_address(src)), "r"(c0), "r"(c1), "r"(c2)
               : "memory");
}

DEVICE void tma_store(const TensorMap* map, const void* src, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(shared_address(src)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}

// ---- matrix fragments ----

// ldmatrix / stmatrix (PTX 9.7.14.5.15, .16): four 8x8 matrices of 16-bit values; lane l passes the address of row l%8 of
// matrix l/8. Lane l holds, of matrix i, elements (row l/4, columns 2(l%4), +1) in r[i]; _trans: of its transpose.
DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE void stmatrix_x4(void* row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
DEVICE void stmatrix_x4_trans(void* row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// mma.sync m16n8k16 bf16 (PTX 9.7.14.5.8): d += a b. With g = lane/4, c = lane%4: a = {(g, 2c..), (g+8, 2c..), (g, 2c+8..),
// (g+8, 2c+8..)}, b = {(k 2c.., n g), (k 2c+8.., n g)}, d = {(g, 2c), (g, 2c+1), (g+8, 2c), (g+8, 2c+1)}.
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The same of f16.
DEVICE void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- wgmma (PTX 9.7.15): by the 128 threads of a warpgroup, asynchronous ----

// Without it ptxas moves arithmetic that touches no memory below a following wgmma_wait, where it overlaps nothing. `x` is
// never negative, so nothing arrives at `b`; ptxas cannot know that, and computes x before it goes on.
DEVICE void compute_before_wait(float x, Barrier* b) {
  asm volatile("{ .reg .pred p; setp.lt.f32 p, %0, 0f00000000; @p mbarrier.arrive.shared::cta.b64 _, [%1]; }" ::"f"(x),
               "r"(shared_address(b))
               : "memory");
}

// Matrix descriptor (PTX 9.7.15.5.1.2). `tile` in shared memory; offsets in bytes. K-major with swizzle 128: leading offset
// unused (16), stride 1024 between groups of 8 rows; the next 16 values of k: descriptor + (32 >> 4). MN-major with swizzle
// 128: stride 1024 between groups of 8 k, leading offset between 64-wide panels; the next 16 values of k: + (2048 >> 4).
DEVICE uint64_t wgmma_descriptor(const void* tile, uint32_t leading, uint32_t stride, Swizzle swizzle) {
  return (uint64_t)((shared_address(tile) & 0x3ffff) >> 4) | (uint64_t)(leading >> 4) << 16 |
         (uint64_t)(stride >> 4) << 32 | (uint64_t)swizzle << 62;
}
// Orders ordinary register accesses before the following wgmma; once before the first and after touching accumulators or
// A registers.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// d (64 x N floats over the warpgroup) = a b + (accumulate ? d : 0), k = 16, bf16. Warp w holds rows 16w..; in lane l register
// 4j+i is row 16w + l/4 + 8(i/2), column 8j + 2(l%4) + i%2. SS: a from shared memory; RS: a from registers (fragments as in
// mma_m16n8k16). kMajorMN = 1: that operand is stored MN-major (transposed).
template <int N, int kMajorMNofA = 0, int kMajorMNofB = 0>
DEVICE void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate);
template <int N, int kMajorMNofB = 0>
DEVICE void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate);
// The same of f16.
template <int N>
DEVICE void wgmma_ss_f16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate);
template <int N, int kMajorMNofB = 0>
DEVICE void wgmma_rs_f16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate);
// The same of e4m3, k = 32, which take the place of 16 of bf16. The sums keep 14 bits: add them up elsewhere after a few.
template <int N>
DEVICE void wgmma_ss_e4m3(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate);

// Operand lists: WGMMA_R<n> names the first n registers, WGMMA_D<n>(d) binds them.
#define WGMMA_R4 "%0, %1, %2, %3"
#define WGMMA_D4(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define WGMMA_R8 WGMMA_R4 ", %4, %5, %6, %7"
#define WGMMA_D8(d) WGMMA_D4(d), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define WGMMA_R12 WGMMA_R8 ", %8, %9, %10, %11"
#define WGMMA_D12(d) WGMMA_D8(d), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define WGMMA_R16 WGMMA_R12 ", %12, %13, %14, %15"
#define WGMMA_D16(d) WGMMA_D12(d), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define WGMMA_R32 WGMMA_R16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_D32(d)                                                                                          \
  WGMMA_D16(d), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]),    \
      "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), \
      "+f"(d[31])
#define WGMMA_R48 WGMMA_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_D48(d)                                                                                          \
  WGMMA_D32(d), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]),    \
      "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), \
      "+f"(d[47])
#define WGMMA_R64 WGMMA_R48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_D64(d)                                                                                          \
  WGMMA_D48(d), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]),    \
      "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), \
      "+f"(d[63])
#define WGMMA_R80 WGMMA_R64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define WGMMA_D80(d)                                                                                          \
  WGMMA_D64(d), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]),    \
      "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), \
      "+f"(d[79])
#define WGMMA_R96 WGMMA_R80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_D96(d)                                                                                          \
  WGMMA_D80(d), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]),    \
      "+f"(d[87]), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), \
      "+f"(d[95])
#define WGMMA_R128                                                                                       \
  WGMMA_R96                                                                                              \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, " \
  "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_D128(d)                                                                                                 \
  WGMMA_D96(d), "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]),         \
      "+f"(d[103]), "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), \
      "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), \
      "+f"(d[119]), "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), \
      "+f"(d[127])

// SS and RS of one N and type; R = N/2 registers, and the numbers of the operands behind them.
#define WGMMA(N, TYPE, R, o0, o1, o2, o3, o4, o5, o6)                                                           \
  template <int kMajorMNofA, int kMajorMNofB>                                                                   \
  DEVICE void wgmma_ss_##N##_##TYPE(float(&d)[R], uint64_t a, uint64_t b, bool accumulate) {                    \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #o2                                                         \
                 ", 0;\n"                                                                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #TYPE "." #TYPE " {" WGMMA_R##R              \
                 "}, %" #o0 ", %" #o1 ", p, 1, 1, %" #o3 ", %" #o4 "; }"                                        \
                 : WGMMA_D##R(d)                                                                                \
                 : "l"(a), "l"(b), "r"((int)accumulate), "n"(kMajorMNofA), "n"(kMajorMNofB));                   \
  }                                                                                                             \
  template <int kMajorMNofB>                                                                                    \
  DEVICE void wgmma_rs_##N##_##TYPE(float(&d)[R], const uint32_t(&a)[4], uint64_t b, bool accumulate) {         \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #o5                                                         \
                 ", 0;\n"                                                                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #TYPE "." #TYPE " {" WGMMA_R##R              \
                 "}, {%" #o0 ", %" #o1 ", %" #o2 ", %" #o3 "}, %" #o4 ", p, 1, 1, %" #o6 "; }"                  \
                 : WGMMA_D##R(d)                                                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate), "n"(kMajorMNofB)); \
  }

// SS of e4m3, which has no transposed operands.
#define WGMMA_E4M3(N, R, o0, o1, o2)                                                                          \
  DEVICE void wgmma_ss_##N##_e4m3(float(&d)[R], uint64_t a, uint64_t b, bool accumulate) {                    \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #o2                                                       \
                 ", 0;\n"                                                                                     \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" WGMMA_R##R "}, %" #o0 ", %" #o1 \
                                                                                         ", p, 1, 1; }"       \
                 : WGMMA_D##R(d)                                                                              \
                 : "l"(a), "l"(b), "r"((int)accumulate));                                                     \
  }

WGMMA(8, bf16, 4, 4, 5, 6, 7, 8, 9, 10)
WGMMA(16, bf16, 8, 8, 9, 10, 11, 12, 13, 14)
WGMMA(24, bf16, 12, 12, 13, 14, 15, 16, 17, 18)
WGMMA(32, bf16, 16, 16, 17, 18, 19, 20, 21, 22)
WGMMA(64, bf16, 32, 32, 33, 34, 35, 36, 37, 38)
WGMMA(96, bf16, 48, 48, 49, 50, 51, 52, 53, 54)
WGMMA(128, bf16, 64, 64, 65, 66, 67, 68, 69, 70)
WGMMA(160, bf16, 80, 80, 81, 82, 83, 84, 85, 86)
WGMMA(192, bf16, 96, 96, 97, 98, 99, 100, 101, 102)
WGMMA(256, bf16, 128, 128, 129, 130, 131, 132, 133, 134)
WGMMA(64, f16, 32, 32, 33, 34, 35, 36, 37, 38)
WGMMA(128, f16, 64, 64, 65, 66, 67, 68, 69, 70)
WGMMA_E4M3(8, 4, 4, 5, 6)
WGMMA_E4M3(16, 8, 8, 9, 10)
WGMMA_E4M3(32, 16, 16, 17, 18)
WGMMA_E4M3(64, 32, 32, 33, 34)
WGMMA_E4M3(96, 48, 48, 49, 50)
WGMMA_E4M3(128, 64, 64, 65, 66)
WGMMA_E4M3(192, 96, 96, 97, 98)

// A product of another width would compile, to nothing.
constexpr bool one_of(int n, std::initializer_list<int> widths) {
  for (int width : widths)
    if (width == n) return true;
  return false;
}

template <int N, int kMajorMNofA, int kMajorMNofB>
DEVICE void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(one_of(N, {8, 16, 24, 32, 64, 96, 128, 160, 192, 256}), "no instruction of this width");
  if constexpr (N == 8) wgmma_ss_8_bf16<kMajorMNofA, kMajorMNofB>(d, a, b, accumulate);
  if constexpr (N == 16) wgmma_ss_16_bf16<kMajorMNofA, kMajorMNofB>(d, a, b, accumulate);
  if constexpr (N == 24) wgmma_ss_24_bf16<kMajorMNofA, kMajorMNofB>(d, a, b, accumulate);
  if constexpr (N == 32) wgmma_ss_32_bf16<kMajorMNofA, kMajorMNofB>(d, a, b, accumulate);
  if constexpr (N == 64) wgmma_ss_64_bf16<kMajorMNofA, kMajorMNofB>(d, a, b, accumulate);
  if constexpr (N == 96) wgmma_ss_96_bf16<kMajorMNofA, kMajorMNofB>(d, a, b, accumulate);
  if constexpr (N == 128) wgmma_ss_128_bf16<kMajorMNofA, kMajorMNofB>(d, a, b, accumulate);
  if constexpr (N == 160) wgmma_ss_160_bf16<kMajorMNofA, kMajorMNofB>(d, a, b, accumulate);
  if constexpr (N == 192) wgmma_ss_192_bf16<kMajorMNofA, kMajorMNofB>(d, a, b, accumulate);
  if constexpr (N == 256) wgmma_ss_256_bf16<kMajorMNofA, kMajorMNofB>(d, a, b, accumulate);
}
template <int N, int kMajorMNofB>
DEVICE void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(one_of(N, {8, 16, 24, 32, 64, 96, 128, 160, 192, 256}), "no instruction of this width");
  if constexpr (N == 8) wgmma_rs_8_bf16<kMajorMNofB>(d, a, b, accumulate);
  if constexpr (N == 16) wgmma_rs_16_bf16<kMajorMNofB>(d, a, b, accumulate);
  if constexpr (N == 24) wgmma_rs_24_bf16<kMajorMNofB>(d, a, b, accumulate);
  if constexpr (N == 32) wgmma_rs_32_bf16<kMajorMNofB>(d, a, b, accumulate);
  if constexpr (N == 64) wgmma_rs_64_bf16<kMajorMNofB>(d, a, b, accumulate);
  if constexpr (N == 96) wgmma_rs_96_bf16<kMajorMNofB>(d, a, b, accumulate);
  if constexpr (N == 128) wgmma_rs_128_bf16<kMajorMNofB>(d, a, b, accumulate);
  if constexpr (N == 160) wgmma_rs_160_bf16<kMajorMNofB>(d, a, b, accumulate);
  if constexpr (N == 192) wgmma_rs_192_bf16<kMajorMNofB>(d, a, b, accumulate);
  if constexpr (N == 256) wgmma_rs_256_bf16<kMajorMNofB>(d, a, b, accumulate);
}
template <int N>
DEVICE void wgmma_ss_f16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(one_of(N, {128}), "no instruction of this width");
  if constexpr (N == 128) wgmma_ss_128_f16<0, 0>(d, a, b, accumulate);
}
template <int N, int kMajorMNofB>
DEVICE void wgmma_rs_f16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(one_of(N, {64, 128}), "no instruction of this width");
  if constexpr (N == 64) wgmma_rs_64_f16<kMajorMNofB>(d, a, b, accumulate);
  if constexpr (N == 128) wgmma_rs_128_f16<kMajorMNofB>(d, a, b, accumulate);
}
template <int N>
DEVICE void wgmma_ss_e4m3(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(one_of(N, {8, 16, 32, 64, 96, 128, 192}), "no instruction of this width");
  if constexpr (N == 8) wgmma_ss_8_e4m3(d, a, b, accumulate);
  if constexpr (N == 16) wgmma_ss_16_e4m3(d, a, b, accumulate);
  if constexpr (N == 32) wgmma_ss_32_e4m3(d, a, b, accumulate);
  if constexpr (N == 64) wgmma_ss_64_e4m3(d, a, b, accumulate);
  if constexpr (N == 96) wgmma_ss_96_e4m3(d, a, b, accumulate);
  if constexpr (N == 128) wgmma_ss_128_e4m3(d, a, b, accumulate);
  if constexpr (N == 192) wgmma_ss_192_e4m3(d, a, b, accumulate);
}
#endif  // __CUDACC__
