// Fibers, scheduling, barriers, warp collectives, launches.
//
// What the machine itself costs (tests/simt.rs, what_the_machine_itself_costs; 2026-11-23, 2 shared cores, one worker): plain,
// 18 ns for a fiber to reach a barrier and the next to run, 4.5 us for a block of 128 threads, 17 us for a launch of one
// block, queue included; with every access checked 0.3 us, 39 us and 50 us.
#include "machine.h"

#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#ifdef SIMT_ASAN
extern "C" void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
extern "C" void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
#endif

namespace simt {

__thread Lane* lane;
__thread Fiber* current;
__thread Worker* worker;

// ---- fibers ----

// Saves the callee-saved registers on the old stack and continues on the new one.
extern "C" void simt_switch(void** old_sp, void* new_sp);
#if defined(__x86_64__)
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
constexpr int kSavedWords = 6;
#elif defined(__aarch64__)
asm(R"(
.text
.globl simt_switch
.type simt_switch, %function
simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size simt_switch, .-simt_switch
)");
#else
#error "the SIMT machine knows x86-64 and aarch64"
#endif

static void enter(Fiber* f) {
  current = f;
  lane = &f->lane;
}

// From whatever runs to `next` (null: the worker's own stack).
static void switch_to(Fiber* next) {
  Fiber* self = worker->running;
  void** from = self ? &self->sp : &worker->main_sp;
#ifdef SIMT_ASAN
  void** fake = self ? &self->fake_stack : &worker->main_fake_stack;
  if (next)
    __sanitizer_start_switch_fiber(self && self->done ? nullptr : fake, next->stack, kStack);
  else
    __sanitizer_start_switch_fiber(self && self->done ? nullptr : fake, worker->main_bottom, worker->main_size);
#endif
  worker->running = next;
  if (next)
    enter(next);
  else
    current = nullptr;
  simt_switch(from, next ? next->sp : worker->main_sp);
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(*fake, nullptr, nullptr);
#endif
}

static void run_next() {
  Worker& w = *worker;
  if (w.checked) deliver_one(w, true);
  Fiber* next = w.pop();
  if (next == w.running) return;
  switch_to(next);
}

static const char* const kNamedBarrier = "a barrier";

void suspend(const char* waits_for, const void* object, uint32_t detail) {
  Fiber* self = current;
  self->waits_for = waits_for;
  self->object = object;
  self->detail = detail;
  run_next();
  self->waits_for = nullptr;
}

void yield_polling(const char* waits_for, const void* object, uint32_t detail) {
  Fiber* self = current;
  self->waits_for = waits_for;
  self->object = object;
  self->detail = detail;
  worker->pollers.push_back(self);
  run_next();
  self->waits_for = nullptr;
}

static void fiber_main() {
  Fiber* self = current;
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  const SimtLaunch& launch = worker->machine->launch;
  launch.kernel(launch.params);
  finish_thread(self);
  self->done = true;
  self->block->live--;
  self->block->gang->live--;
  run_next();
  abort();  // nobody resumes a finished fiber
}

static Fiber* new_fiber(Worker& w) {
  auto f = std::make_unique<Fiber>();
  char* memory =
      (char*)mmap(nullptr, kStack + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    fprintf(stderr, "ponder: no memory for the stacks of the host target\n");
    exit(1);
  }
  mprotect(memory, 4096, PROT_NONE);
  f->stack = memory + 4096;
  w.fibers.push_back(std::move(f));
  return w.fibers.back().get();
}

// The first switch to a fiber enters fiber_main. Stacks start at different offsets, lest all their tops share cache sets.
static void prepare(Fiber* f, int number) {
  uint64_t top = ((uint64_t)f->stack + kStack - 256 - (uint64_t)(number % 32) * 192) & ~15ull;
  uint64_t* sp = (uint64_t*)top;
#if defined(__x86_64__)
  *--sp = 0;
  *--sp = (uint64_t)&fiber_main;
  sp -= kSavedWords;
#else
  sp -= 20;
  sp[11] = (uint64_t)&fiber_main;
#endif
  f->sp = sp;
}

// ---- errors ----

static std::mutex report_mutex;

std::string describe(const Fiber* f) {
  char text[160];
  const Block* b = f->block;
  snprintf(text, sizeof text, "block (%d,%d,%d), thread %d", b->index[0], b->index[1], b->index[2], f->lane.thread);
  return text;
}

std::string describe_component(const Gang* gang, int component) {
  int first = 0;
  for (const auto& b : gang->blocks) {
    if (component < first + (int)b->fibers.size()) {
      const Fiber* f = b->fibers[component - first];
      const bool same = current && current->block == b.get();
      return same ? std::string("thread ") + std::to_string(f->lane.thread) : describe(f);
    }
    first += b->fibers.size();
  }
  return component < first + kAsyncClocks ? "an asynchronous copy" : "a wgmma in flight";
}

struct Failed {};

void fail(const char* format, ...) {
  char text[1024];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  Machine& m = *worker->machine;
  {
    std::lock_guard<std::mutex> lock(report_mutex);
    if (!__atomic_load_n(&m.failed, __ATOMIC_RELAXED)) {
      m.report = std::string("kernel ") + m.launch.name +
                 (current ? std::string(", ").append(describe(current)) : std::string()) + ": " + text;
      __atomic_store_n(&m.failed, 1u, __ATOMIC_RELEASE);
    }
  }
  // The worker's loop sees the flag and abandons all fibers.
  worker->ready.clear();
  worker->pollers.clear();
  if (!worker->running) throw Failed();  // a late copy, delivered from that loop
  switch_to(nullptr);
  abort();
}

// What a fiber waits for, in words.
static std::string describe_wait(const Fiber* f) {
  if (f->object && block_of_shared(f->object)) return describe_barrier((const Barrier*)f->object);
  char text[160];
  if (f->waits_for == kNamedBarrier) {
    const NamedBarrier& b = f->block->barriers[f->detail];
    snprintf(text, sizeof text, "%s, where %d of %d threads are",
             f->detail ? ("named barrier " + std::to_string(f->detail)).c_str() : "sync_threads()", b.arrived,
             b.expected);
  } else if (f->object) {
    snprintf(text, sizeof text, "%s at %p", f->waits_for, f->object);
  } else if (f->detail) {
    snprintf(text, sizeof text, "%s (line %u)", f->waits_for, f->detail);
  } else {
    return f->waits_for;
  }
  return text;
}

static void report_deadlock(Worker& w) {
  std::map<std::string, std::pair<int, std::string>> groups;
  int exited = 0;
  for (const auto& gang : w.gangs)
    for (const auto& b : gang->blocks)
      for (const Fiber* f : b->fibers) {
        exited += f->done;
        if (f->done || !f->waits_for) continue;
        auto& group = groups[describe_wait(f)];
        if (!group.first++) group.second = describe(f);
      }
  std::string text("deadlock:");
  for (const auto& [what, who] : groups)
    text += " " + std::to_string(who.first) + " threads (first: " + who.second + ") wait for " + what + ";";
  if (exited) text += " " + std::to_string(exited) + " threads of these blocks have exited;";
  text.pop_back();
  current = nullptr;
  Machine& m = *w.machine;
  std::lock_guard<std::mutex> lock(report_mutex);
  if (!m.failed) {
    m.report = std::string("kernel ") + m.launch.name + ": " + text;
    __atomic_store_n(&m.failed, 1u, __ATOMIC_RELEASE);
  }
}

// ---- scheduling ----

uint32_t Worker::random(uint32_t end) {
  uint64_t z = random_state += 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return (uint32_t)((z ^ (z >> 31)) % end);
}

Fiber* Worker::pop() {
  if (ready.empty()) return nullptr;
  if (machine->launch.order == SIMT_RANDOM) std::swap(ready.front(), ready[random(ready.size())]);
  Fiber* f = ready.front();
  ready.pop_front();
  return f;
}

void Worker::wake(Fiber* f) {
  polls = 0;
  if (machine->launch.order == SIMT_DESCENDING)
    ready.push_front(f);
  else
    ready.push_back(f);
}

bool Worker::start_gang() {
  const SimtLaunch& launch = machine->launch;
  if (__atomic_load_n(&machine->failed, __ATOMIC_RELAXED)) return false;
  if (free_windows.size() < launch.cluster) return false;
  const uint64_t number = __atomic_fetch_add(&machine->next, 1, __ATOMIC_RELAXED);
  if (number >= machine->clusters) return false;

  auto gang = std::make_unique<Gang>();
  gang->worker = this;
  gang->number = number;
  gang->live = gang->live_at_start = launch.cluster * launch.threads;
  gang->components = gang->live + kAsyncClocks + launch.cluster * ((launch.threads + 127) / 128) * 4;
  if (checked) gang->zero = std::make_shared<Clock>(gang->components);
  const uint64_t first = number * launch.cluster;
  for (uint32_t rank = 0; rank < launch.cluster; rank++) {
    auto block = std::make_unique<Block>();
    const uint64_t index = first + rank;
    block->gang = gang.get();
    block->index[0] = index % launch.grid[0];
    block->index[1] = index / launch.grid[0] % launch.grid[1];
    block->index[2] = index / launch.grid[0] / launch.grid[1];
    block->rank = rank;
    const int window = free_windows.back();
    free_windows.pop_back();
    window_owner[window] = block.get();
    block->shared = windows + (uint64_t)window * kWindow;
    block->live = launch.threads;
    block->warps.resize(launch.threads / 32);
    block->warpgroups.resize((launch.threads + 127) / 128);
    if (checked) {
      memset(block->shared, 0xff, launch.shared_bytes);
      block->cells.resize(launch.shared_bytes);
      block->tags.resize(launch.shared_bytes / 16 + 1);
    }
    for (uint32_t t = 0; t < launch.threads; t++) {
      Fiber* f;
      if (free_fibers.empty()) {
        f = new_fiber(*this);
      } else {
        f = free_fibers.back();
        free_fibers.pop_back();
        char* stack = f->stack;
        if (checked) {
          f->~Fiber();
          new (f) Fiber();
        } else {
          f->done = f->pdl_waited = false;
          f->waits_for = nullptr;
          f->next_op = f->committed_upto = 0;
          f->register_counts.clear();
          f->groups.clear();
          f->fake_stack = nullptr;
        }
        f->stack = stack;
      }
      f->block = block.get();
      f->component = rank * launch.threads + t;
      Lane& l = f->lane;
      l.thread = t, l.threads = launch.threads;
      for (int d = 0; d < 3; d++) l.block[d] = block->index[d], l.grid[d] = launch.grid[d];
      l.rank = rank, l.cluster = launch.cluster;
      l.shared = block->shared;
      f->base = gang->zero;
      prepare(f, t);
      block->fibers.push_back(f);
      wake(f);
    }
    gang->blocks.push_back(std::move(block));
  }
  gangs.push_back(std::move(gang));
  return true;
}

static void release(Worker& w, Gang& gang) {
  for (auto& block : gang.blocks) {
    const int window = (block->shared - w.windows) / kWindow;
    w.window_owner[window] = nullptr;
    w.free_windows.push_back(window);
    // Last first: the next block's thread t gets the stack that this one's had.
    for (size_t i = block->fibers.size(); i-- > 0;) w.free_fibers.push_back(block->fibers[i]);
  }
}

// Polls in vain after which a launch counts as hung, if nothing else moves.
constexpr uint64_t kHung = 20000000;

void Worker::run() {
  while (!__atomic_load_n(&machine->failed, __ATOMIC_RELAXED)) {
    if (Fiber* next = pop()) {
      switch_to(next);
      continue;
    }
    bool finished = false;
    for (size_t i = 0; i < gangs.size(); i++)
      if (gangs[i]->live == 0 && (!checked || std::none_of(pending.begin(), pending.end(), [&](auto& c) {
            return c->block->gang == gangs[i].get();
          }))) {
        release(*this, *gangs[i]);
        gangs.erase(gangs.begin() + i);
        finished = true;
        break;
      }
    if (finished) continue;
    try {
      if (checked && deliver_one(*this, false)) continue;
    } catch (Failed) {
      break;
    }
    if (gangs.empty()) {
      if (start_gang()) continue;
      break;
    }
    if (!pollers.empty()) {
      // Whoever spins may wait for a block that has not begun.
      if (!start_gang()) {
        if (++polls > kHung / (pollers.size() + 1)) {
          report_deadlock(*this);
          break;
        }
        if (polls > 100) sched_yield();
      }
      for (Fiber* f : pollers) ready.push_back(f);
      pollers.clear();
      continue;
    }
    report_deadlock(*this);
    break;
  }
  // After an error fibers are abandoned where they stand.
  for (auto& gang : gangs) release(*this, *gang);
  gangs.clear();
  ready.clear();
  pollers.clear();
  pending.clear();
}

// ---- the pool of workers ----

struct Pool {
  std::vector<std::unique_ptr<Worker>> workers;
  std::vector<std::thread> threads;
  std::mutex mutex;
  std::condition_variable begin;
  uint64_t generation = 0;
  uint32_t wanted = 0;
  std::atomic<uint64_t> announced{0};
  std::atomic<uint32_t> running{0};
  Machine* machine = nullptr;
  std::mutex launch_mutex;

  Worker& get(size_t i) {
    while (workers.size() <= i) {
      auto w = std::make_unique<Worker>();
      w->number = workers.size();
      const size_t bytes = (size_t)kMaxWindows * kWindow;
      uint8_t* memory = (uint8_t*)mmap(nullptr, bytes + kWindow, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) {
        fprintf(stderr, "ponder: no memory for the shared memory of the host target\n");
        exit(1);
      }
      w->windows = (uint8_t*)(((uint64_t)memory + kWindow - 1) & ~(uint64_t)(kWindow - 1));
      w->window_owner.resize(kMaxWindows);
      for (int i = kMaxWindows; i-- > 0;) w->free_windows.push_back(i);
      workers.push_back(std::move(w));
    }
    return *workers[i];
  }

  static void work(Worker& w, Machine& m) {
    worker = &w;
#ifdef SIMT_ASAN
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &w.main_bottom, &w.main_size);
    pthread_attr_destroy(&attributes);
#endif
    w.machine = &m;
    w.checked = m.launch.checked;
    w.random_state = m.launch.seed * 0x9e3779b97f4a7c15ull + w.number + 1;
    w.polls = 0;
    w.running = current = nullptr;
    w.run();
  }

  void thread_main(size_t i) {
    uint64_t seen_generation = 0;
    for (;;) {
      // Launches follow each other closely: look for a while before sleeping.
      for (int spin = 0; spin < 2000 && announced.load(std::memory_order_acquire) == seen_generation; spin++) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
      {
        std::unique_lock<std::mutex> lock(mutex);
        begin.wait(lock, [&] { return generation != seen_generation; });
        seen_generation = generation;
        if (i >= wanted) continue;
      }
      work(*workers[i], *machine);
      running.fetch_sub(1, std::memory_order_release);
    }
  }

  void run(Machine& m) {
    std::lock_guard<std::mutex> launching(launch_mutex);
    const uint32_t most = m.launch.workers ? m.launch.workers : 1;
    const uint32_t count = (uint32_t)std::min<uint64_t>(most, m.clusters);
    get(0);
    if (count > 1) {
      std::lock_guard<std::mutex> lock(mutex);
      for (size_t i = 1; i < count; i++) get(i);
      while (threads.size() + 1 < count) {
        const size_t i = threads.size() + 1;
        threads.emplace_back([this, i] { thread_main(i); });
        threads.back().detach();
      }
      machine = &m;
      wanted = count;
      running.store(count - 1, std::memory_order_relaxed);
      generation++;
      announced.store(generation, std::memory_order_release);
      begin.notify_all();
    }
    work(*workers[0], m);
    for (int spin = 0; running.load(std::memory_order_acquire) != 0; spin++)
      if (spin > 100) sched_yield();
  }
};

static Pool& pool() {
  static Pool* p = new Pool();  // threads live as long as the process
  return *p;
}

// ---- barriers ----

static void leave_barrier(NamedBarrier& b) {
  const bool checked = worker->checked;
  ClockRef clock = checked ? std::make_shared<const Clock>(b.clock) : nullptr;
  auto order = b.waiting;
  b.waiting.clear();
  b.arrived = 0;
  b.clock.clear();
  for (Fiber* f : order) {
    if (checked) join(f, clock);
    if (f != current) worker->wake(f);
  }
}

void block_barrier(int id, int threads, bool wait) {
  Fiber* f = current;
  Block* block = f->block;
  if (id < 0 || id > 15) fail("named barrier %d does not exist: ids are 0 to 15", id);
  if (threads <= 0 || threads % 32 || threads > f->lane.threads)
    fail("named barrier %d is for %d threads, which is not a multiple of 32 up to the block's %d", id, threads,
         f->lane.threads);
  NamedBarrier& b = block->barriers[id];
  if (b.arrived == 0)
    b.expected = threads;
  else if (b.expected != threads)
    fail("named barrier %d is used with %d threads here and with %d by others", id, threads, b.expected);
  b.arrived++;
  if (worker->checked) {
    accumulate(b.clock, f);
    advance(f);
  }
  if (wait) b.waiting.push_back(f);
  if (b.arrived == b.expected) {
    leave_barrier(b);
    return;
  }
  if (wait) suspend(kNamedBarrier, nullptr, id);
}

void cluster_arrive() {
  Fiber* f = current;
  Gang* gang = f->block->gang;
  if (worker->checked) {
    accumulate(gang->cluster_clock, f);
    advance(f);
  }
  f->cluster_phase = gang->cluster_phase;
  if (++gang->cluster_arrived == (int)(f->lane.cluster * f->lane.threads)) {
    gang->cluster_arrived = 0;
    gang->cluster_phase++;
    ClockRef clock = worker->checked ? std::make_shared<const Clock>(gang->cluster_clock) : nullptr;
    gang->cluster_clock.clear();
    gang->zero = worker->checked ? clock : gang->zero;
    auto order = gang->cluster_waiting;
    gang->cluster_waiting.clear();
    for (Fiber* w : order) worker->wake(w);
  }
}

void cluster_wait() {
  Fiber* f = current;
  Gang* gang = f->block->gang;
  if (gang->cluster_phase == f->cluster_phase) {
    gang->cluster_waiting.push_back(f);
    suspend("the cluster barrier", nullptr, 0);
  }
  if (worker->checked) join(f, gang->zero);
}

void* cluster_map(void* p, uint32_t rank) {
  Fiber* f = current;
  if (rank >= f->lane.cluster) fail("cluster_map to rank %u in a cluster of %u", rank, f->lane.cluster);
  if (block_of_shared(p) == nullptr) fail("cluster_map of an address that is not in shared memory");
  return f->block->gang->blocks[rank]->shared + shared_offset(p);
}

void set_registers(int count, bool) {
  Fiber* f = current;
  if (count < 24 || count > 256 || count % 8) fail("setmaxnreg %d: the count is a multiple of 8 from 24 to 256", count);
  f->register_counts.push_back(count);
}

void pdl_wait() {
  Fiber* f = current;
  f->pdl_waited = true;
  if (!worker->checked) return;
  if (f->block->pdl_waits.empty()) __atomic_fetch_add(&worker->machine->waited_blocks, 1, __ATOMIC_RELAXED);
  f->block->pdl_waits.push_back({(uint16_t)f->component, f->own});
}
void pdl_launch_dependents() {
  if (worker->checked && !is_behind_wait(current))
    __atomic_store_n(&worker->machine->launches_before_wait, true, __ATOMIC_RELAXED);
}
void bulk_prefetch(const void* src, uint32_t bytes) {
  if (worker->checked) check_prefetch(src, bytes);
}

// A word of the host, which looks at it when the launch is over.
void graph_set_condition(uint64_t condition, bool again) {
  __atomic_store_n((uint32_t*)condition, (uint32_t)again, __ATOMIC_RELEASE);
}

// ---- warp collectives ----

enum Collective { kShuffle = 1, kVote, kWarpSync, kElect, kLoadMatrix, kStoreMatrix, kMma };
static const char* const kCollectiveNames[] = {"",          "shuffle",  "vote",     "sync_warp",
                                               "elect_one", "ldmatrix", "stmatrix", "mma"};

// Every lane of a warp brings its argument; the last one to come calls `run` for all.
static void collective(int kind, int line, void* arg, void (*run)(Block*, void**)) {
  Fiber* f = current;
  Block* block = f->block;
  const int warp_number = f->lane.thread / 32;
  Warp& warp = block->warps[warp_number];
  if (warp.arrived == 0) {
    warp.kind = kind;
    warp.line = line;
  } else if (warp.kind != kind || warp.line != line) {
    fail("divergent warp: this lane is at %s (line %d) while other lanes of warp %d are at %s (line %d)",
         kCollectiveNames[kind], line, warp_number, kCollectiveNames[warp.kind], warp.line);
  }
  warp.args[f->lane.thread % 32] = arg;
  if (++warp.arrived < 32) {
    suspend(kCollectiveNames[kind], nullptr, line);
    return;
  }
  run(block, warp.args);
  warp.arrived = 0;
  for (int l = 0; l < 32; l++) {
    Fiber* other = block->fibers[warp_number * 32 + l];
    if (other != f) worker->wake(other);
  }
}

struct ShuffleArg {
  uint64_t value, result;
  int source;
};

uint64_t shuffle(uint64_t value, int source, int line) {
  ShuffleArg arg = {value, 0, source};
  collective(kShuffle, line, &arg, [](Block*, void** args) {
    for (int l = 0; l < 32; l++) {
      ShuffleArg& a = *(ShuffleArg*)args[l];
      a.result = ((ShuffleArg*)args[a.source & 31])->value;
    }
  });
  return arg.result;
}

struct VoteArg {
  bool value;
  uint32_t result;
};

uint32_t vote(bool value, int line) {
  VoteArg arg = {value, 0};
  collective(kVote, line, &arg, [](Block*, void** args) {
    uint32_t all = 0;
    for (int l = 0; l < 32; l++) all |= (uint32_t)((VoteArg*)args[l])->value << l;
    for (int l = 0; l < 32; l++) ((VoteArg*)args[l])->result = all;
  });
  return arg.result;
}

void warp_sync(int line) {
  Fiber* self = current;
  collective(kWarpSync, line, self, [](Block*, void** args) {
    if (!worker->checked) return;
    Clock clock;
    for (int l = 0; l < 32; l++) accumulate(clock, (Fiber*)args[l]);
    const ClockRef ref = std::make_shared<const Clock>(std::move(clock));
    for (int l = 0; l < 32; l++) {
      join((Fiber*)args[l], ref);
      advance((Fiber*)args[l]);
    }
  });
}

// Which lane is elected is the hardware's choice: here the lowest, or in a checked launch any.
bool elect(int line) {
  Fiber* f = current;
  if (!worker->checked) return f->lane.thread % 32 == 0;
  VoteArg arg = {false, 0};
  collective(kElect, line, &arg, [](Block*, void** args) { ((VoteArg*)args[worker->random(32)])->value = true; });
  return arg.value;
}

void load_matrix_all(Block* block, void** args);
void store_matrix_all(Block* block, void** args);
void mma_all(Block* block, void** args);

void load_matrix_collective(void* arg, int line) { collective(kLoadMatrix, line, arg, load_matrix_all); }
void store_matrix_collective(void* arg, int line) { collective(kStoreMatrix, line, arg, store_matrix_all); }
void mma_collective(void* arg, int line) { collective(kMma, line, arg, mma_all); }

// ---- atomics: on the host's own, so they work between blocks on different cores ----

template <typename T>
static T exchange_loop(T* p, T (*next)(T, T), T v, bool relaxed = true) {
  const bool flag = worker->checked && !block_of_shared(p);
  if (worker->checked) access(p, sizeof(T), kAtomic);
  if (flag) release_flag(p, relaxed);
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(p, &old, next(old, v), true, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
  }
  if (flag) acquire_flag(p, relaxed);
  return old;
}

uint32_t atomic_inc_wrap(uint32_t* p, uint32_t last, bool relaxed) {
  return exchange_loop<uint32_t>(p, [](uint32_t x, uint32_t most) { return x >= most ? 0 : x + 1; }, last, relaxed);
}
uint32_t atomic_add(uint32_t* p, uint32_t v) {
  return exchange_loop<uint32_t>(p, [](uint32_t x, uint32_t y) { return x + y; }, v);
}
uint64_t atomic_add(uint64_t* p, uint64_t v) {
  return exchange_loop<uint64_t>(p, [](uint64_t x, uint64_t y) { return x + y; }, v);
}
uint32_t atomic_max(uint32_t* p, uint32_t v) {
  return exchange_loop<uint32_t>(p, [](uint32_t x, uint32_t y) { return x > y ? x : y; }, v);
}
uint32_t atomic_min(uint32_t* p, uint32_t v) {
  return exchange_loop<uint32_t>(p, [](uint32_t x, uint32_t y) { return x < y ? x : y; }, v);
}

void fence() {
  if (worker->checked) fence_flags();
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

uint32_t load_acquire(const uint32_t* p) {
  if (worker->checked) access(p, 4, kAtomic);
  // Whoever reads a flag may be waiting for it: let the others run.
  yield_polling("a flag in memory", p, 0);
  const uint32_t value = __atomic_load_n(p, __ATOMIC_ACQUIRE);
  if (worker->checked) acquire_flag(p, false);
  return value;
}

// Of a word that the host alone writes: for the launches a plain read.
uint32_t load_acquire_system(const uint32_t* p) {
  if (worker->checked) access(p, 4, kRead);
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

void store_release(uint32_t* p, uint32_t v) {
  if (worker->checked) {
    access(p, 4, kAtomic);
    release_flag(p, false);
  }
  __atomic_store_n(p, v, __ATOMIC_RELEASE);
}

}  // namespace simt

extern "C" int simt_run(const SimtLaunch* launch, char* report, uint64_t capacity) {
  using namespace simt;
  static std::atomic<uint64_t> launches{0};
  Machine m;
  m.launch = *launch;
  m.number = ++launches;
  std::string problem;
  const uint64_t blocks = (uint64_t)launch->grid[0] * launch->grid[1] * launch->grid[2];
  if (blocks == 0)
    problem = "the grid is empty";
  else if (launch->cluster == 0 || launch->grid[0] % launch->cluster)
    problem = "the grid's x is not a multiple of the cluster size " + std::to_string(launch->cluster);
  else if (launch->cluster > 8)
    problem = "a cluster has at most 8 blocks";
  else if (launch->threads == 0 || launch->threads % 32 || launch->threads > 1024)
    problem = "threads are not whole warps up to 1024";
  else if (launch->shared_bytes > kMaxShared)
    problem = std::to_string(launch->shared_bytes) + " bytes of shared memory are more than a block can have (232448)";
  if (!problem.empty()) {
    snprintf(report, capacity, "kernel %s: %s", launch->name, problem.c_str());
    return 1;
  }
  m.clusters = blocks / launch->cluster;
  pool().run(m);
  if (launch->checked)
    end_of_launch(launch->stream, !launch->pdl || (!m.launches_before_wait && m.waited_blocks == blocks));
  if (!m.failed) return 0;
  snprintf(report, capacity, "%s", m.report.c_str());
  return 1;
}
