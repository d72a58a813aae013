// The SIMT machine: every thread of a kernel is a fiber, a block lives on one OS thread, blocks spread over the cores.
//
// Files: machine.cpp (fibers, scheduling, barriers, warps, launches), async.cpp (mbarrier and copies), tensor.cpp (ldmatrix,
// mma, wgmma), check.cpp (memory: what may be touched, races, proxies; the callbacks of instrumented code).
//
// In a checked launch the machine is hostile: fibers run in a seeded order; asynchronous work is delivered late; accumulators
// are NaN until they may be read; and every access is held against a happens-before order, kept in vector clocks.
#pragma once

#include <stdint.h>

#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "../params.h"
#define DEVICE static inline __attribute__((unused))
#include "../sm90.cuh"
#include "simt.h"

namespace simt {

struct Worker;
struct Gang;
struct Block;
struct Fiber;

constexpr uint32_t kWindow = 1 << 18;    // address space of one block's shared memory
constexpr uint32_t kMaxShared = 232448;  // what a block may have of it
constexpr int kMaxWindows = 256;         // per worker
#ifdef SIMT_ASAN
constexpr uint64_t kStack = 1 << 18;  // bytes of a fiber's stack
#else
constexpr uint64_t kStack = 1 << 16;
#endif
constexpr int kAsyncClocks = 64;  // clocks of asynchronous work per gang

// ---- happens-before (checked launches) ----

// A component per fiber of the gang, then kAsyncClocks for asynchronous copies, then one per warp for its wgmmas.
// `foreign`: what has been seen of other gangs, by their numbers, through flags in global memory.
struct Clock;
using ClockRef = std::shared_ptr<const Clock>;
using Foreign = std::shared_ptr<const std::map<uint32_t, ClockRef>>;
struct Clock : std::vector<uint32_t> {
  using std::vector<uint32_t>::vector;
  Foreign foreign;
};

struct AsyncCopy;

// ---- fibers ----

// One accumulator tile of wgmmas in flight, 64 x n, and who holds which part of it.
struct Accumulator {
  int n = 0;
  std::vector<float> tile;
  float* registers[128] = {};
  int users = 0;    // threads that have not got their part back
  int last_op = 0;  // number of the last wgmma on it
};

struct Wgmma {
  int number;
  uint32_t clock = 0;
  int n;
  uint64_t a, b;
  bool a_in_registers, a_mn, b_mn, accumulate;
  WgmmaType type;
  std::shared_ptr<Accumulator> accumulator;
  uint32_t a_registers[128][4];
  const uint32_t* a_source[128];
  int issued = 0;
  bool executed = false;
  uint64_t operand_hash = 0;
};

struct Warpgroup {
  std::deque<std::shared_ptr<Wgmma>> ops;  // in flight, by number
  int first = 0;                           // number of ops.front()
  std::vector<std::shared_ptr<Accumulator>> accumulators;
};

// Registers of a thread that belong to a wgmma in flight.
struct Lent {
  uint64_t begin;
  uint32_t bytes;
  int op;  // its number
  bool accumulator;
};

struct Warp {
  int kind = 0, line = 0, arrived = 0;
  void* args[32] = {};
};

struct Fiber {
  Lane lane;
  void* sp = nullptr;
  char* stack = nullptr;
  Block* block = nullptr;
  int component = 0;  // in the gang's clocks
  bool done = false;
  const char* waits_for = nullptr;
  const void* object = nullptr;
  uint32_t detail = 0;
  void* fake_stack = nullptr;

  // wgmma: numbers of the next op, and of the first op after each committed group not yet waited for.
  int next_op = 0;
  std::deque<int> groups;
  int committed_upto = 0;
  bool registers_touched = true;  // a wgmma_fence is due
  std::vector<Lent> lent;
  uint32_t cluster_phase = 0;        // at the last cluster_arrive
  std::vector<int> register_counts;  // of every setmaxnreg
  // cp.async and bulk stores: committed groups, oldest first, and what is not committed yet.
  std::deque<std::vector<std::shared_ptr<AsyncCopy>>> copy_groups, store_groups;
  std::vector<std::shared_ptr<AsyncCopy>> open_copies, open_stores;
  bool pdl_waited = false;
  std::vector<Barrier*> unfenced_barriers;

  // happens-before
  ClockRef base;
  uint32_t own = 1;
  std::vector<uint32_t> fences;  // own clock at each proxy fence
  ClockRef fence_base;           // what this fiber had seen at its last one
  Foreign fence_device;          // what a relaxed atomic after fence_device() releases,
  Foreign unfenced;              // and what those before the next fence_device() have found
};

// What is known of one byte of shared memory.
struct Cell {
  uint32_t write_clock = 0;
  uint16_t writer = 0;
  bool atomic = false;
  std::vector<std::pair<uint16_t, uint32_t>> readers;
};

// How TMA laid out 16 bytes: swizzle (+ 1; 0: not by TMA), row and 16-byte column within its box.
struct ChunkTag {
  uint8_t swizzle = 0, column = 0;
  uint16_t row = 0;
};

struct NamedBarrier {
  int arrived = 0, expected = 0;
  std::vector<Fiber*> waiting;
  Clock clock;
};

struct BarrierClock {
  Clock phase;                // of the phase under way
  ClockRef completed;         // of the last completed one
  uint32_t fenced_clock = 0;  // the initialiser's, at mbarrier_init_fence
  uint16_t initialiser = 0;
};

struct Block {
  Gang* gang;
  int index[3];
  uint32_t rank;
  uint8_t* shared;
  std::vector<Fiber*> fibers;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  NamedBarrier barriers[16];
  std::vector<Fiber*> barrier_waiters;  // on mbarriers
  int live;
  std::vector<std::pair<uint16_t, uint32_t>> pdl_waits;  // component, clock
  // checked only
  std::vector<Cell> cells;
  // Who touched this block's shared memory from outside (by component: the clock then), and what its threads had seen when
  // they ended.
  Clock visitors, ended;
  std::vector<ChunkTag> tags;
  std::unordered_map<uint32_t, BarrierClock> barrier_clocks;  // by offset
};

// Blocks that run together: a cluster, or one block.
struct Gang {
  Worker* worker;
  uint32_t number;  // in the grid
  std::vector<std::unique_ptr<Block>> blocks;
  int live, live_at_start;
  int cluster_arrived = 0;
  uint32_t cluster_phase = 0;
  std::vector<Fiber*> cluster_waiting;
  Clock cluster_clock;
  int components;
  uint32_t async_clock[kAsyncClocks] = {};
  ClockRef zero;
};

// At most 16 bytes: `valid` of them from `from` (null: none), the rest zeros.
struct Piece {
  uint8_t* to;
  const uint8_t* from;
  uint32_t bytes, valid;
};

// Asynchronous work, queued in checked launches and done at once otherwise.
struct AsyncCopy {
  enum Kind { kToShared, kCpAsync, kStore } kind;
  Fiber* issuer;
  Block* block;  // whose barrier and shared memory
  std::string what;
  std::vector<Piece> pieces;
  std::vector<ChunkTag> tags;  // of tensor loads, per piece
  Barrier* barrier = nullptr;
  std::vector<Barrier*> complete_on;  // gets `bytes` when it is done; one per block of a multicast
  uint32_t bytes = 0;
  int async_component = -1;
  uint32_t async_clock = 0;
  ClockRef issued;                // the issuer's clock at issue
  std::vector<uint8_t> snapshot;  // of a store's source
  bool read_done = false, done = false;
  bool handed_over = false;                              // cp.async that an mbarrier waits for
  std::vector<std::shared_ptr<AsyncCopy>> arrive_after;  // cp.async.mbarrier.arrive: when these have landed
};

// ---- the machine ----

struct Machine {
  SimtLaunch launch;
  uint64_t clusters = 0;
  uint64_t next = 0;  // atomically taken
  uint32_t failed = 0;
  std::string report;
  uint64_t number = 0;  // of the launch, in this process
  // Of a checked launch: blocks with a pdl_wait(), and whether a pdl_launch_dependents() came before it.
  uint64_t waited_blocks = 0;
  bool launches_before_wait = false;
  // What was released through each flag in global memory.
  std::unordered_map<const void*, Foreign> flags;
  std::mutex flags_mutex;
};

struct Worker {
  Machine* machine = nullptr;
  int number = 0;
  bool checked = false;
  void* main_sp = nullptr;
  void* main_fake_stack = nullptr;
  void* main_bottom = nullptr;
  size_t main_size = 0;
  Fiber* running = nullptr;  // whose stack this thread is on, null: its own. `current` is whom a report would name.
  std::deque<Fiber*> ready;
  std::vector<Fiber*> pollers;
  std::vector<std::unique_ptr<Gang>> gangs;
  std::vector<Fiber*> free_fibers;
  std::vector<std::unique_ptr<Fiber>> fibers;
  uint8_t* windows = nullptr;
  std::vector<int> free_windows;
  std::vector<Block*> window_owner;
  std::vector<std::shared_ptr<AsyncCopy>> pending;  // asynchronous work to be delivered
  uint64_t random_state = 1;
  uint64_t polls = 0;

  uint32_t random(uint32_t end);
  Fiber* pop();
  void wake(Fiber* f);
  bool start_gang();
  void run();
};

extern __thread Fiber* current;
extern __thread Worker* worker;

// Stops the launch with a report about the current fiber; never returns.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
// Suspends the current fiber until something wakes it.
void suspend(const char* waits_for, const void* object, uint32_t detail);
// Lets the others run, if there are any.
void yield_polling(const char* waits_for, const void* object, uint32_t detail);

std::string describe(const Fiber* f);
// Who a clock component is.
std::string describe_component(const Gang* gang, int component);

inline Block* block_of_shared(const void* p) {
  const uint64_t offset = (const uint8_t*)p - worker->windows;
  return offset < (uint64_t)kMaxWindows * kWindow ? worker->window_owner[offset / kWindow] : nullptr;
}
inline uint32_t shared_offset(const void* p) { return (uint64_t)p & (kWindow - 1); }

// ---- check.cpp ----

uint32_t seen(const Fiber* f, int component);
void see(Fiber* f, int component, uint32_t clock);
void join(Fiber* f, const ClockRef& other);
void accumulate(Clock& clock, const Fiber* f);
// Releases: the fiber's clock goes on.
inline void advance(Fiber* f) { f->own++; }
ClockRef snapshot(const Fiber* f);

enum Access { kRead = 0, kWrite = 1, kAtomic = 2 };
// An ordinary access of the current fiber, anywhere.
void access(const void* p, uint32_t bytes, int kind);
// An access of asynchronous work: ordered after `clock` (and the issuer's own), done under component/clock.
void async_access(const AsyncCopy& copy, const void* p, uint32_t bytes, bool write);
// A read by the wgmma whose clocks are these, which lasts until wgmma_wait.
void wgmma_access(const void* p, uint32_t bytes, int component, uint32_t clock);
// cp_async_wait: bytes that a cp.async wrote are now as if the current fiber had written them.
void adopt(const void* p, uint32_t bytes);
// A component touches the shared memory of a block that is not its own.
void visit(Block* block, int component, uint32_t clock);
// The async proxy reads shared bytes on behalf of the current fiber: they must have been fenced.
void check_proxy(const void* p, uint32_t bytes, const char* reader);
// Global bytes touched by the current fiber, or by what it issues: bounds, PDL, races.
void check_global(const void* p, uint32_t bytes, int kind, const char* who);
// Order between blocks, through the flag at `p`: an atomic access that releases or acquires, and fence_device(), which makes
// the relaxed ones do so.
void release_flag(const void* p, bool relaxed);
void acquire_flag(const void* p, bool relaxed);
void fence_flags();
void note_global_write(const void* p, uint32_t bytes);
bool is_behind_wait(const Fiber* f);
void check_prefetch(const void* p, uint32_t bytes);
void end_of_launch(uint64_t stream, bool next_starts_behind_wait);
bool deliver_one(Worker& w, bool only_sometimes);
std::string describe_barrier(const Barrier* b);
void finish_thread(Fiber* f);

}  // namespace simt
