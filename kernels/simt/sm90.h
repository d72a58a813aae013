// The host meaning of sm90.cuh: the same functions, on the SIMT machine. What is more than arithmetic is a call into the
// machine (machine.cpp, async.cpp, tensor.cpp), with the source line where lanes must agree on it.
#pragma once

#include <math.h>
#include <string.h>

namespace simt {

// What a thread knows about itself.
struct Lane {
  int thread, threads;
  int block[3], grid[3];
  uint32_t rank, cluster;
  uint8_t* shared;
};
extern __thread Lane* lane;

uint64_t shuffle(uint64_t value, int source, int line);
uint32_t vote(bool value, int line);
void warp_sync(int line);
bool elect(int line);
void block_barrier(int id, int threads, bool wait);
void cluster_arrive();
void cluster_wait();
void* cluster_map(void* p, uint32_t rank);
void set_registers(int count, bool increase);
void pdl_wait();
void pdl_launch_dependents();
void graph_set_condition(uint64_t condition, bool again);
void bulk_prefetch(const void* src, uint32_t bytes);

uint32_t atomic_inc_wrap(uint32_t* p, uint32_t last, bool relaxed = false);
uint32_t atomic_add(uint32_t* p, uint32_t v);
uint64_t atomic_add(uint64_t* p, uint64_t v);
uint32_t atomic_max(uint32_t* p, uint32_t v);
uint32_t atomic_min(uint32_t* p, uint32_t v);
void fence();
uint32_t load_acquire(const uint32_t* p);
uint32_t load_acquire_system(const uint32_t* p);
void store_release(uint32_t* p, uint32_t v);

void barrier_init(Barrier* b, uint32_t count);
void barrier_init_fence();
void barrier_arrive(Barrier* b, uint32_t expect_bytes, bool arrive);
void barrier_arrive_remote(Barrier* b, uint32_t rank);
bool barrier_test(Barrier* b, uint32_t parity);
void barrier_wait(Barrier* b, uint32_t parity);
void proxy_fence();

void cp_async(void* dst, const void* src, int valid);
void cp_async_commit();
void cp_async_wait(int pending);
void cp_async_arrive(Barrier* b);
void bulk_load(void* dst, const void* src, uint32_t bytes, Barrier* b);
void bulk_store(void* dst, const void* src, uint32_t bytes);
void bulk_commit();
void bulk_wait(int pending, bool read_only);
void tensor_load(void* dst, const TensorMap* map, Barrier* b, uint32_t blocks, int rank, const int* coordinates);
void tensor_store(const TensorMap* map, const void* src, int rank, const int* coordinates);

void load_matrix(uint32_t* r, const void* row, bool transpose, int line);
void store_matrix(void* row, const uint32_t* r, bool transpose, int line);
void mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool f16, int line);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);
enum class WgmmaType { kBf16, kF16, kE4m3 };
// a_registers: null for A from shared memory.
void wgmma(float* d, int n, uint64_t a, const uint32_t* a_registers, uint64_t b, bool a_mn, bool b_mn, bool accumulate,
           WgmmaType type);

}  // namespace simt

#define SIMT_LINE int line = __builtin_LINE()

DEVICE int thread_idx() { return simt::lane->thread; }
DEVICE int block_threads() { return simt::lane->threads; }
DEVICE int block_x() { return simt::lane->block[0]; }
DEVICE int block_y() { return simt::lane->block[1]; }
DEVICE int block_z() { return simt::lane->block[2]; }
DEVICE int grid_x() { return simt::lane->grid[0]; }
DEVICE int grid_y() { return simt::lane->grid[1]; }
DEVICE int grid_z() { return simt::lane->grid[2]; }
DEVICE uint8_t* shared_memory() { return simt::lane->shared; }

// ---- arithmetic ----

DEVICE float bits_to_float(uint32_t x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
DEVICE uint32_t float_to_bits(float x) {
  uint32_t y;
  memcpy(&y, &x, 4);
  return y;
}
DEVICE float exp2_approx(float x) { return exp2f(x); }
DEVICE float log2_approx(float x) { return log2f(x); }
DEVICE float rsqrt_approx(float x) { return 1.f / sqrtf(x); }
DEVICE float reciprocal_approx(float x) { return 1.f / x; }
DEVICE uint16_t float_to_bf16(float x) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // the canonical NaN
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
DEVICE uint32_t pack_bf16x2(float low, float high) { return float_to_bf16(low) | (uint32_t)float_to_bf16(high) << 16; }
// A product of two bf16 is exact in fp32.
DEVICE uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
  return pack_bf16x2(bits_to_float(a << 16) * bits_to_float(b << 16),
                     bits_to_float(a & 0xffff0000u) * bits_to_float(b & 0xffff0000u));
}

namespace simt {
static inline uint16_t float_to_f16(float x) {
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;          // the canonical NaN
  if (magnitude >= 0x477ff000u) return sign | 0x7c00;  // 65520 and more
  if (magnitude < 0x38800000u) return sign | (uint16_t)rintf(fabsf(x) * 0x1p24f);
  return sign | (((magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13) - (112 << 10));
}
static inline float f16_to_float(uint16_t x) {
  const uint32_t exponent = x >> 10 & 31, fraction = x & 0x3ff;
  const float magnitude = exponent == 0    ? fraction * 0x1p-24f
                          : exponent == 31 ? bits_to_float(0x7f800000u | fraction << 13)
                                           : bits_to_float((exponent + 112) << 23 | fraction << 13);
  return x & 0x8000 ? -magnitude : magnitude;
}
static inline uint8_t float_to_e4m3(float x) {
  const uint32_t bits = float_to_bits(x), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7f;                                     // the canonical NaN
  if (magnitude < 0x3c800000u) return sign | (uint8_t)rintf(fabsf(x) * 512.f);  // below 2^-6: eighths of that
  const uint32_t rounded = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
  return sign | (rounded < 0x7e ? rounded : 0x7e);
}
static inline float e4m3_to_float(uint8_t x) {
  const int exponent = x >> 3 & 15, fraction = x & 7;
  if ((x & 0x7f) == 0x7f) return NAN;
  const float magnitude = exponent == 0 ? fraction / 512.f : bits_to_float((exponent + 120) << 23 | fraction << 20);
  return x & 0x80 ? -magnitude : magnitude;
}
}  // namespace simt

DEVICE uint32_t pack_f16x2(float low, float high) {
  return simt::float_to_f16(low) | (uint32_t)simt::float_to_f16(high) << 16;
}
DEVICE uint16_t pack_e4m3x2(float low, float high) { return simt::float_to_e4m3(low) | simt::float_to_e4m3(high) << 8; }
DEVICE uint32_t e4m3x2_to_f16x2(uint16_t pair) {
  return pack_f16x2(simt::e4m3_to_float(pair), simt::e4m3_to_float(pair >> 8));
}
DEVICE uint32_t even_bytes(uint32_t low, uint32_t high) {
  return (low & 0xff) | (low >> 8 & 0xff00) | (high & 0xff) << 16 | (high << 8 & 0xff000000u);
}
DEVICE uint32_t odd_bytes(uint32_t low, uint32_t high) { return even_bytes(low >> 8, high >> 8); }

// ---- memory ----

DEVICE void load_16(const void* p, uint32_t (&v)[4]) {
  const uint32_t* from = (const uint32_t*)p;
  for (int i = 0; i < 4; i++) v[i] = from[i];
}
DEVICE void store_16(void* p, const uint32_t (&v)[4]) {
  uint32_t* to = (uint32_t*)p;
  for (int i = 0; i < 4; i++) to[i] = v[i];
}
DEVICE void load_8(const void* p, uint32_t (&v)[2]) {
  const uint32_t* from = (const uint32_t*)p;
  for (int i = 0; i < 2; i++) v[i] = from[i];
}
DEVICE void store_8(void* p, const uint32_t (&v)[2]) {
  uint32_t* to = (uint32_t*)p;
  for (int i = 0; i < 2; i++) to[i] = v[i];
}
DEVICE void load_16_streaming(const void* p, uint32_t (&v)[4]) { load_16(p, v); }
DEVICE void fence_device() { simt::fence(); }
DEVICE void fence_system() { simt::fence(); }
DEVICE uint32_t load_acquire(const uint32_t* p) { return simt::load_acquire(p); }
DEVICE void store_release(uint32_t* p, uint32_t v) { simt::store_release(p, v); }
DEVICE uint32_t load_acquire_system(const uint32_t* p) { return simt::load_acquire_system(p); }
DEVICE void store_release_system(uint32_t* p, uint32_t v) { simt::store_release(p, v); }
DEVICE uint32_t atomic_ticket(uint32_t* counter, uint32_t last) { return simt::atomic_inc_wrap(counter, last); }
DEVICE uint32_t atomic_increment(uint32_t* counter, uint32_t last) {
  return simt::atomic_inc_wrap(counter, last, true);
}
DEVICE uint32_t atomic_add(uint32_t* p, uint32_t v) { return simt::atomic_add(p, v); }
DEVICE uint64_t atomic_add(uint64_t* p, uint64_t v) { return simt::atomic_add(p, v); }
DEVICE uint32_t atomic_max(uint32_t* p, uint32_t v) { return simt::atomic_max(p, v); }
DEVICE uint32_t atomic_min(uint32_t* p, uint32_t v) { return simt::atomic_min(p, v); }

// ---- warps ----

namespace simt {
template <typename T>
static inline T shuffle_value(T x, int source, int line) {
  uint64_t bits = 0;
  memcpy(&bits, &x, sizeof(T));
  bits = shuffle(bits, source, line);
  memcpy(&x, &bits, sizeof(T));
  return x;
}
static inline int own_lane() { return lane->thread % 32; }
}  // namespace simt

#define SIMT_SHUFFLES(T)                                                                                        \
  DEVICE T shfl_xor(T x, int mask, SIMT_LINE) { return simt::shuffle_value(x, simt::own_lane() ^ mask, line); } \
  DEVICE T shfl(T x, int from, SIMT_LINE) { return simt::shuffle_value(x, from & 31, line); }                   \
  DEVICE T shfl_up(T x, int delta, SIMT_LINE) {                                                                 \
    const int self = simt::own_lane();                                                                          \
    return simt::shuffle_value(x, self < delta ? self : self - delta, line);                                    \
  }
SIMT_SHUFFLES(float)
SIMT_SHUFFLES(int)
SIMT_SHUFFLES(uint32_t)
SIMT_SHUFFLES(uint64_t)
#undef SIMT_SHUFFLES

DEVICE uint32_t warp_ballot(bool x, SIMT_LINE) { return simt::vote(x, line); }
DEVICE bool warp_any(bool x, SIMT_LINE) { return simt::vote(x, line) != 0; }
DEVICE bool warp_all(bool x, SIMT_LINE) { return simt::vote(x, line) == kFullMask; }
DEVICE int popcount(uint32_t x) { return __builtin_popcount(x); }
DEVICE int first_set(uint32_t x) { return __builtin_ffs((int)x) - 1; }
DEVICE int leading_zeros(uint32_t x) { return x ? __builtin_clz(x) : 32; }
DEVICE void sync_warp(SIMT_LINE) { simt::warp_sync(line); }
DEVICE bool elect_one(SIMT_LINE) { return simt::elect(line); }

// ---- blocks and clusters ----

DEVICE void sync_threads() { simt::block_barrier(0, simt::lane->threads, true); }
DEVICE void named_barrier_sync(int id, int threads) { simt::block_barrier(id, threads, true); }
DEVICE void named_barrier_arrive(int id, int threads) { simt::block_barrier(id, threads, false); }
DEVICE uint32_t cluster_rank() { return simt::lane->rank; }
DEVICE uint32_t cluster_size() { return simt::lane->cluster; }
DEVICE void cluster_arrive() { simt::cluster_arrive(); }
DEVICE void cluster_wait() { simt::cluster_wait(); }
DEVICE void cluster_sync() {
  simt::cluster_arrive();
  simt::cluster_wait();
}
template <typename T>
DEVICE T* cluster_map(T* p, uint32_t rank) {
  return (T*)simt::cluster_map((void*)p, rank);
}
template <int N>
DEVICE void registers_increase() {
  simt::set_registers(N, true);
}
template <int N>
DEVICE void registers_decrease() {
  simt::set_registers(N, false);
}
DEVICE void pdl_wait() { simt::pdl_wait(); }
DEVICE void pdl_launch_dependents() { simt::pdl_launch_dependents(); }
DEVICE void graph_set_condition(uint64_t condition, bool again) { simt::graph_set_condition(condition, again); }

// ---- mbarrier ----

DEVICE void mbarrier_init(Barrier* b, uint32_t count) { simt::barrier_init(b, count); }
DEVICE void mbarrier_init_fence() { simt::barrier_init_fence(); }
DEVICE void mbarrier_arrive(Barrier* b) { simt::barrier_arrive(b, 0, true); }
DEVICE void mbarrier_arrive_expect_tx(Barrier* b, uint32_t bytes) { simt::barrier_arrive(b, bytes, true); }
DEVICE void mbarrier_expect_tx(Barrier* b, uint32_t bytes) { simt::barrier_arrive(b, bytes, false); }
DEVICE void mbarrier_arrive_cluster(Barrier* b, uint32_t rank) { simt::barrier_arrive_remote(b, rank); }
DEVICE void mbarrier_release_cluster(Barrier* b, uint32_t rank) { simt::barrier_arrive_remote(b, rank); }
DEVICE bool mbarrier_try_wait(Barrier* b, uint32_t parity) { return simt::barrier_test(b, parity); }
DEVICE void mbarrier_wait(Barrier* b, uint32_t parity) { simt::barrier_wait(b, parity); }
DEVICE void mbarrier_wait_cluster(Barrier* b, uint32_t parity) { simt::barrier_wait(b, parity); }
DEVICE void fence_proxy_async() { simt::proxy_fence(); }

// ---- asynchronous copies ----

DEVICE void cp_async_16(void* dst, const void* src, int valid = 16) { simt::cp_async(dst, src, valid); }
DEVICE void cp_async_commit() { simt::cp_async_commit(); }
template <int N>
DEVICE void cp_async_wait() {
  simt::cp_async_wait(N);
}
DEVICE void cp_async_arrive(Barrier* b) { simt::cp_async_arrive(b); }
DEVICE void bulk_load(void* dst, const void* src, uint32_t bytes, Barrier* b, uint64_t = kEvictNormal) {
  simt::bulk_load(dst, src, bytes, b);
}
DEVICE void bulk_store(void* dst, const void* src, uint32_t bytes) { simt::bulk_store(dst, src, bytes); }
DEVICE void bulk_prefetch(const void* src, uint32_t bytes) { simt::bulk_prefetch(src, bytes); }
DEVICE void bulk_commit() { simt::bulk_commit(); }
template <int N>
DEVICE void bulk_wait() {
  simt::bulk_wait(N, false);
}
template <int N>
DEVICE void bulk_wait_read() {
  simt::bulk_wait(N, true);
}
DEVICE void prefetch_tensor_map(const TensorMap*) {}

template <typename... C>
DEVICE void tma_load(void* dst, const TensorMap* map, Barrier* b, uint64_t, C... c) {
  const int coordinates[] = {(int)c...};
  simt::tensor_load(dst, map, b, 0, sizeof...(c), coordinates);
}
DEVICE void tma_load_multicast(void* dst, const TensorMap* map, Barrier* b, uint16_t blocks, int c0, int c1) {
  const int coordinates[] = {c0, c1};
  simt::tensor_load(dst, map, b, blocks, 2, coordinates);
}
template <typename... C>
DEVICE void tma_store(const TensorMap* map, const void* src, C... c) {
  const int coordinates[] = {(int)c...};
  simt::tensor_store(map, src, sizeof...(c), coordinates);
}

// ---- matrix fragments ----

DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row, SIMT_LINE) { simt::load_matrix(r, row, false, line); }
DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, SIMT_LINE) { simt::load_matrix(r, row, true, line); }
DEVICE void stmatrix_x4(void* row, const uint32_t (&r)[4], SIMT_LINE) { simt::store_matrix(row, r, false, line); }
DEVICE void stmatrix_x4_trans(void* row, const uint32_t (&r)[4], SIMT_LINE) { simt::store_matrix(row, r, true, line); }
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_LINE) {
  simt::mma(d, a, b0, b1, false, line);
}
DEVICE void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_LINE) {
  simt::mma(d, a, b0, b1, true, line);
}

// ---- wgmma ----

// A matter of ptxas alone.
DEVICE void compute_before_wait(float, Barrier*) {}

// Shared addresses are offsets within the block's 256 KiB window, as on the device.
DEVICE uint64_t wgmma_descriptor(const void* tile, uint32_t leading, uint32_t stride, Swizzle swizzle) {
  return (uint64_t)(((uint64_t)tile & 0x3ffff) >> 4) | (uint64_t)(leading >> 4) << 16 | (uint64_t)(stride >> 4) << 32 |
         (uint64_t)swizzle << 62;
}
DEVICE void wgmma_fence() { simt::wgmma_fence(); }
DEVICE void wgmma_commit() { simt::wgmma_commit(); }
template <int N>
DEVICE void wgmma_wait() {
  simt::wgmma_wait(N);
}
template <int N, int kMajorMNofA = 0, int kMajorMNofB = 0>
DEVICE void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  simt::wgmma(d, N, a, nullptr, b, kMajorMNofA, kMajorMNofB, accumulate, simt::WgmmaType::kBf16);
}
template <int N, int kMajorMNofB = 0>
DEVICE void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  simt::wgmma(d, N, 0, a, b, false, kMajorMNofB, accumulate, simt::WgmmaType::kBf16);
}
template <int N>
DEVICE void wgmma_ss_f16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  simt::wgmma(d, N, a, nullptr, b, false, false, accumulate, simt::WgmmaType::kF16);
}
template <int N, int kMajorMNofB = 0>
DEVICE void wgmma_rs_f16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  simt::wgmma(d, N, 0, a, b, false, kMajorMNofB, accumulate, simt::WgmmaType::kF16);
}
template <int N>
DEVICE void wgmma_ss_e4m3(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  simt::wgmma(d, N, a, nullptr, b, false, false, accumulate, simt::WgmmaType::kE4m3);
}

#undef SIMT_LINE
