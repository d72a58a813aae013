// Memory: the allocations of the host target, and in a checked launch every access: is it inside something, is it ordered, may
// this proxy see it. Instrumented kernels report their accesses through the thread sanitizer's callbacks, which are defined
// here in place of its runtime.
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <shared_mutex>

#include "machine.h"

namespace simt {

// ---- clocks ----

uint32_t seen(const Fiber* f, int component) { return component == f->component ? f->own : (*f->base)[component]; }

void see(Fiber* f, int component, uint32_t clock) {
  if ((*f->base)[component] >= clock) return;
  auto base = std::make_shared<Clock>(*f->base);
  (*base)[component] = clock;
  f->base = base;
}

static bool covers(const Clock& big, const Clock& small) {
  for (size_t i = 0; i < small.size(); i++)
    if (big[i] < small[i]) return false;
  return true;
}

static bool covers(const Foreign& big, const Foreign& small) {
  if (!small || big == small) return true;
  if (!big) return false;
  for (const auto& [gang, clock] : *small) {
    const auto mine = big->find(gang);
    if (mine == big->end() || (mine->second != clock && !covers(*mine->second, *clock))) return false;
  }
  return true;
}

static Foreign merge(const Foreign& a, const Foreign& b) {
  if (covers(b, a)) return b;
  if (covers(a, b)) return a;
  auto both = std::make_shared<std::map<uint32_t, ClockRef>>(*a);
  for (const auto& [gang, clock] : *b) {
    ClockRef& mine = (*both)[gang];
    if (!mine || covers(*clock, *mine)) {
      mine = clock;
    } else if (!covers(*mine, *clock)) {
      auto most = std::make_shared<Clock>(*mine);
      for (size_t i = 0; i < clock->size(); i++) (*most)[i] = std::max((*most)[i], (*clock)[i]);
      mine = most;
    }
  }
  return both;
}

void accumulate(Clock& clock, const Fiber* f) {
  if (clock.size() < f->base->size()) clock.resize(f->base->size());
  for (size_t i = 0; i < f->base->size(); i++) clock[i] = std::max(clock[i], (*f->base)[i]);
  clock[f->component] = std::max(clock[f->component], f->own);
  clock.foreign = merge(clock.foreign, f->base->foreign);
}

ClockRef snapshot(const Fiber* f) {
  Clock clock = *f->base;
  clock[f->component] = f->own;
  return std::make_shared<const Clock>(std::move(clock));
}

void join(Fiber* f, const ClockRef& other) {
  if (!other || other == f->base || other->empty()) return;
  const Foreign foreign = merge(f->base->foreign, other->foreign);
  // Often one is the other's past.
  if (covers(*other, *f->base) && foreign == other->foreign) {
    f->base = other;
    return;
  }
  auto clock = std::make_shared<Clock>(*f->base);
  for (size_t i = 0; i < other->size(); i++) (*clock)[i] = std::max((*clock)[i], (*other)[i]);
  clock->foreign = foreign;
  f->base = clock;
}

// ---- flags in global memory ----

// All that a fiber has seen, its own gang's part as one of many.
static Foreign all_seen(Fiber* f) {
  auto own = std::make_shared<std::map<uint32_t, ClockRef>>();
  (*own)[f->block->gang->number] = snapshot(f);
  advance(f);
  return merge(f->base->foreign, own);
}

static void learn(Fiber* f, const Foreign& seen) {
  if (!seen) return;
  const auto own = seen->find(f->block->gang->number);
  if (own != seen->end()) join(f, own->second);
  if (covers(f->base->foreign, seen)) return;
  auto base = std::make_shared<Clock>(*f->base);
  base->foreign = merge(base->foreign, seen);
  f->base = base;
}

void release_flag(const void* p, bool relaxed) {
  Fiber* f = current;
  const Foreign released = relaxed ? f->fence_device : all_seen(f);
  if (!released) return;
  Machine& m = *worker->machine;
  std::lock_guard<std::mutex> lock(m.flags_mutex);
  Foreign& flag = m.flags[p];
  flag = merge(flag, released);
}

void acquire_flag(const void* p, bool relaxed) {
  Fiber* f = current;
  Foreign found;
  {
    Machine& m = *worker->machine;
    std::lock_guard<std::mutex> lock(m.flags_mutex);
    const auto flag = m.flags.find(p);
    if (flag != m.flags.end()) found = flag->second;
  }
  if (relaxed)
    f->unfenced = merge(f->unfenced, found);
  else
    learn(f, found);
}

void fence_flags() {
  learn(current, current->unfenced);
  current->fence_device = all_seen(current);
}

// ---- allocations ----

// Who last wrote and who last read two bytes of global memory in this launch: from the top 11 bits for the launch, 20 for the
// gang's number, 13 for the component, 19 for its clock, 1 for an atomic access. 0: nobody.
constexpr uint64_t kLaunchesPerEpoch = 2047;  // told apart by those 11 bits, of which 0 stands for none
static uint64_t launch_bits() { return (worker->machine->number % kLaunchesPerEpoch + 1) << 53; }

struct GlobalCell {
  uint64_t writer, reader;
};

struct Allocation {
  uint64_t begin, end, stream;
  void* memory;
  GlobalCell* cells = nullptr;  // one for every two bytes, mapped when a checked launch first comes here
  uint64_t cells_epoch = 0;     // of the launches that the cells tell apart, counted from 1
  std::mutex cells_mutex;
  ~Allocation() {
    if (cells) munmap(cells, cells_bytes());
  }
  uint64_t cells_bytes() const { return ((end - begin) / 2 + 1) * sizeof(GlobalCell); }
  // A bit per 16 bytes: written by a launch that has not been waited for; and by the launch that runs now.
  std::vector<uint64_t> dirty, fresh;
};

static std::shared_mutex allocations_mutex;
static std::map<uint64_t, std::shared_ptr<Allocation>> allocations;  // by end
static uint64_t allocations_version = 1;

static Allocation* find(const void* p) {
  static __thread uint64_t version;
  static thread_local std::shared_ptr<Allocation> last;
  const uint64_t at = (uint64_t)p;
  if (version == __atomic_load_n(&allocations_version, __ATOMIC_ACQUIRE) && last && at >= last->begin && at < last->end)
    return last.get();
  std::shared_lock<std::shared_mutex> lock(allocations_mutex);
  auto it = allocations.upper_bound(at);
  if (it == allocations.end() || it->second->begin > at) return nullptr;
  version = allocations_version;
  last = it->second;
  return last.get();
}

struct Range {
  uint64_t begin, end;
};

// The program's own segments: constants that kernels read.
static const std::vector<Range>& image() {
  static const std::vector<Range> ranges = [] {
    std::vector<Range> found;
    dl_iterate_phdr(
        [](struct dl_phdr_info* info, size_t, void* data) {
          for (int i = 0; i < info->dlpi_phnum; i++)
            if (info->dlpi_phdr[i].p_type == PT_LOAD) {
              const uint64_t begin = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
              ((std::vector<Range>*)data)->push_back({begin, begin + info->dlpi_phdr[i].p_memsz});
            }
          return 0;
        },
        &found);
    return found;
  }();
  return ranges;
}

// Memory of the machine and of the program: stacks, what a thread knows about itself, params, constants.
static bool is_ours(const void* p) {
  const uint64_t at = (uint64_t)p;
  const uint64_t params = (uint64_t)worker->machine->launch.params;
  if (at >= params && at < params + worker->machine->launch.params_bytes) return true;
  const uint64_t tls = (uint64_t)&lane;
  if (at + 4096 > tls && at < tls + 4096) return true;
  for (const auto& f : worker->fibers)
    if (at >= (uint64_t)f->stack && at < (uint64_t)f->stack + kStack) return true;
  for (const Range& r : image())
    if (at >= r.begin && at < r.end) return true;
  return false;
}

// ---- global memory ----

bool is_behind_wait(const Fiber* f) {
  if (f->pdl_waited || !worker->machine->launch.pdl) return true;
  for (const auto& [component, clock] : f->block->pdl_waits)
    if (seen(f, component) >= clock) return true;
  return false;
}

static GlobalCell* cells_of(Allocation* a) {
  const uint64_t epoch = worker->machine->number / kLaunchesPerEpoch + 1;
  if (__atomic_load_n(&a->cells_epoch, __ATOMIC_ACQUIRE) == epoch) return a->cells;
  std::lock_guard<std::mutex> lock(a->cells_mutex);
  if (a->cells_epoch == epoch) return a->cells;
  if (a->cells) {
    madvise(a->cells, a->cells_bytes(), MADV_DONTNEED);
  } else {
    void* memory =
        mmap(nullptr, a->cells_bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for the race checker");
    a->cells = (GlobalCell*)memory;
  }
  __atomic_store_n(&a->cells_epoch, epoch, __ATOMIC_RELEASE);
  return a->cells;
}

// Is what `cell` says of an access, of this launch, not ordered before the current fiber?
static bool unordered(uint64_t cell, uint64_t mine) {
  if (cell >> 53 != mine >> 53) return false;
  const Fiber* f = current;
  const uint32_t gang = cell >> 33 & 0xfffff, component = cell >> 20 & 0x1fff, clock = cell >> 1 & 0x7ffff;
  if (gang == f->block->gang->number) return component != (uint32_t)f->component && seen(f, component) < clock;
  if (!f->base->foreign) return true;
  const auto seen_of = f->base->foreign->find(gang);
  return seen_of == f->base->foreign->end() || (*seen_of->second)[component] < clock;
}

[[noreturn]] static void global_race(const char* who, int kind, const void* p, uint64_t cell, bool was_read) {
  const SimtLaunch& launch = worker->machine->launch;
  const uint64_t component = cell >> 20 & 0x1fff,
                 block = (cell >> 33 & 0xfffff) * launch.cluster + component / launch.threads;
  fail("race: %s %s %p, which block (%u,%u,%u), thread %u %s with no barrier or fence in between", who,
       kind == kRead    ? "reads"
       : kind == kWrite ? "writes"
                        : "atomically updates",
       p, (uint32_t)(block % launch.grid[0]), (uint32_t)(block / launch.grid[0] % launch.grid[1]),
       (uint32_t)(block / launch.grid[0] / launch.grid[1]), (uint32_t)(component % launch.threads),
       was_read ? "reads" : "wrote");
}

// Of the readers of two bytes only the last is remembered; accesses to one byte alone are not followed, nor are gangs beyond
// the first 2^20. Everybody writes down what it does before it looks, so that of two blocks on different cores one sees the
// other.
static void check_global_race(Allocation* a, uint64_t at, uint32_t bytes, int kind, const char* who) {
  const Fiber* f = current;
  if (f->block->gang->number >> 20) return;
  const uint64_t mine = launch_bits() | (uint64_t)f->block->gang->number << 33 | (uint64_t)f->component << 20 |
                        (uint64_t)(f->own & 0x7ffff) << 1 | (kind == kAtomic);
  GlobalCell* cells = cells_of(a) + (at - a->begin) / 2;
  const uint32_t count = bytes / 2;
  const auto found = [&](uint32_t i, uint64_t cell, bool was_read) {
    if (unordered(cell, mine)) global_race(who, kind, (const void*)(at + 2 * i), cell, was_read);
  };
  if (kind == kRead) {
    for (uint32_t i = 0; i < count; i++) __atomic_store_n(&cells[i].reader, mine, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    for (uint32_t i = 0; i < count; i++) found(i, __atomic_load_n(&cells[i].writer, __ATOMIC_RELAXED), false);
    return;
  }
  for (uint32_t i = 0; i < count; i++) {
    const uint64_t writer = __atomic_exchange_n(&cells[i].writer, mine, __ATOMIC_SEQ_CST);
    if (!(kind == kAtomic && writer & 1)) found(i, writer, false);
    found(i, __atomic_load_n(&cells[i].reader, __ATOMIC_SEQ_CST), true);
  }
}

void check_global(const void* p, uint32_t bytes, int kind, const char* who) {
  Allocation* a = find(p);
  const uint64_t at = (uint64_t)p;
  const bool write = kind != kRead;
  if (!a || at + bytes > a->end) {
    if (is_ours(p)) return;
    fail("%s %s %u bytes at %p, outside of all device memory%s", who, write ? "writes" : "reads", bytes, p,
         at < 4096 ? " (a null pointer)" : "");
  }
  check_global_race(a, at, bytes, kind, who);
  const Fiber* f = current;
  if (!worker->machine->launch.pdl || is_behind_wait(f)) return;
  for (uint64_t i = (at - a->begin) / 16; i <= (at + bytes - 1 - a->begin) / 16; i++)
    if (a->dirty[i / 64] >> (i % 64) & 1)
      fail("%s %s %u bytes at %p, which an earlier launch has written, before pdl_wait()", who,
           write ? "writes" : "reads", bytes, p);
}

void note_global_write(const void* p, uint32_t bytes) {
  Allocation* a = find(p);
  if (!a) return;
  const uint64_t at = (uint64_t)p;
  for (uint64_t i = (at - a->begin) / 16; i <= (at + bytes - 1 - a->begin) / 16; i++)
    __atomic_fetch_or(&a->fresh[i / 64], 1ull << (i % 64), __ATOMIC_RELAXED);
}

void check_prefetch(const void* p, uint32_t bytes) {
  const Allocation* a = find(p);
  if ((uint64_t)p % 16 || bytes % 16) fail("bulk_prefetch of %u bytes at %p: both are multiples of 16", bytes, p);
  if (!a || (uint64_t)p + bytes > a->end)
    fail("bulk_prefetch of %u bytes at %p, outside of all device memory", bytes, p);
}

// What the next launch may overlap: this one; and what this one may overlap, unless the next one can only start when all blocks
// of this one are behind their wait.
void end_of_launch(uint64_t stream, bool next_starts_behind_wait) {
  std::shared_lock<std::shared_mutex> lock(allocations_mutex);
  for (auto& [end, a] : allocations)
    for (size_t i = 0; i < a->fresh.size() && a->stream == stream; i++) {
      a->dirty[i] = a->fresh[i] | (next_starts_behind_wait ? 0 : a->dirty[i]);
      a->fresh[i] = 0;
    }
}

// ---- shared memory ----

static std::string who(const Block* block, uint16_t component) { return describe_component(block->gang, component); }

// Why a byte that is read holds nothing: the copy under way that is to bring it, if there is one.
static std::string who_brings(const uint8_t* p) {
  for (const auto& copy : worker->pending)
    if (!copy->done)
      for (const Piece& piece : copy->pieces)
        if (p - piece.to >= 0 && p - piece.to < (int64_t)piece.bytes)
          return "before the " + copy->what + " of " + describe_component(copy->block->gang, copy->issuer->component) +
                 " has brought it: its mbarrier or group is not waited for";
  return "which nothing has written yet";
}

// One byte, by a component whose view of the others is `view`.
template <typename View>
static void touch(Block* block, uint32_t offset, int kind, int component, uint32_t clock, const char* doing,
                  View view) {
  Cell& cell = block->cells[offset];
  // A wgmma reads until all four warps have waited for it; it is known by the first one's component.
  const auto saw = [&](int reader) {
    if (reader < block->gang->live_at_start + kAsyncClocks) return view(reader);
    return std::min(std::min(view(reader), view(reader + 1)), std::min(view(reader + 2), view(reader + 3)));
  };
  // Rows of a wgmma that nobody wants may hold anything.
  if (kind != kWrite && !cell.write_clock && component < block->gang->live_at_start)
    fail("%s shared byte %u, %s", doing, offset, who_brings(block->shared + offset).c_str());
  if (cell.write_clock && cell.writer != component && view(cell.writer) < cell.write_clock &&
      !(kind == kAtomic && cell.atomic))
    fail("race: %s shared byte %u, which %s wrote with no barrier in between", doing, offset,
         who(block, cell.writer).c_str());
  if (kind == kRead) {
    auto& readers = cell.readers;
    for (size_t i = 0; i < readers.size();) {
      if (readers[i].first == component || saw(readers[i].first) >= readers[i].second) {
        readers[i] = readers.back();
        readers.pop_back();
      } else {
        i++;
      }
    }
    readers.push_back({(uint16_t)component, clock});
    return;
  }
  for (const auto& [reader, when] : cell.readers)
    if (reader != component && saw(reader) < when)
      fail("race: %s shared byte %u, which %s reads with no barrier in between", doing, offset,
           who(block, reader).c_str());
  cell.readers.clear();
  cell.writer = component;
  cell.write_clock = clock;
  cell.atomic = kind == kAtomic;
}

void visit(Block* block, int component, uint32_t clock) {
  if (block->visitors.empty()) block->visitors.resize(block->gang->components);
  block->visitors[component] = std::max(block->visitors[component], clock);
}

static Block* check_shared(const void* p, uint32_t bytes, const char* doing) {
  Block* block = worker->window_owner[((const uint8_t*)p - worker->windows) / kWindow];
  const uint32_t offset = shared_offset(p), size = worker->machine->launch.shared_bytes;
  if (!block || block->gang != current->block->gang)
    fail("%s shared memory of a block that has exited or is not in this cluster", doing);
  if (block != current->block && block->live == 0)
    fail("%s shared memory of block rank %u of the cluster, which has exited", doing, block->rank);
  if (offset + bytes > size)
    fail("%s shared bytes [%u,%u) of a block that has %u: out of bounds", doing, offset, offset + bytes, size);
  return block;
}

void access(const void* p, uint32_t bytes, int kind) {
  Fiber* f = current;
  const uint64_t in_windows = (const uint8_t*)p - worker->windows;
  const char* doing = kind == kRead ? "reads" : kind == kWrite ? "writes" : "atomically updates";
  if (in_windows >= (uint64_t)kMaxWindows * kWindow) {
    check_global(p, bytes, kind, "the kernel");
    if (kind != kRead) note_global_write(p, bytes);
    return;
  }
  Block* block = check_shared(p, bytes, doing);
  if (block != f->block) visit(block, f->component, f->own);
  const uint32_t offset = shared_offset(p);
  for (uint32_t i = 0; i < bytes; i++)
    touch(block, offset + i, kind, f->component, f->own, doing, [f](int c) { return seen(f, c); });
  if (kind != kRead)
    for (uint32_t chunk = offset / 16; chunk <= (offset + bytes - 1) / 16; chunk++) block->tags[chunk] = ChunkTag();
}

void wgmma_access(const void* p, uint32_t bytes, int component, uint32_t clock) {
  const Fiber* f = current;
  Block* block = check_shared(p, bytes, "wgmma reads");
  for (uint32_t i = 0; i < bytes; i++)
    touch(block, shared_offset(p) + i, kRead, component, clock, "wgmma reads", [f](int c) { return seen(f, c); });
}

void adopt(const void* p, uint32_t bytes) {
  Cell* cells = &block_of_shared(p)->cells[shared_offset(p)];
  for (uint32_t i = 0; i < bytes; i++) cells[i].writer = current->component, cells[i].write_clock = current->own;
}

void async_access(const AsyncCopy& copy, const void* p, uint32_t bytes, bool write) {
  Block* block = check_shared(p, bytes, "an asynchronous copy writes");
  const uint32_t offset = shared_offset(p);
  const std::string doing = std::string("a ").append(copy.what).append(" issued by this thread writes");
  for (uint32_t i = 0; i < bytes; i++)
    touch(block, offset + i, write ? kWrite : kRead, copy.async_component, copy.async_clock, doing.c_str(),
          [&](int c) { return (*copy.issued)[c]; });
}

void check_proxy(const void* p, uint32_t bytes, const char* reader) {
  Fiber* f = current;
  Block* block = block_of_shared(p);
  if (!block) return;
  const int threads = block->gang->live_at_start;
  for (uint32_t i = 0; i < bytes; i++) {
    const uint32_t offset = shared_offset(p) + i;
    if (offset >= block->cells.size()) return;
    const Cell& cell = block->cells[offset];
    if (!cell.write_clock || cell.writer >= threads) continue;
    const Fiber* writer = nullptr;
    for (const auto& b : block->gang->blocks)
      if (cell.writer / (int)b->fibers.size() == (int)b->rank) writer = b->fibers[cell.writer % b->fibers.size()];
    const auto fence = std::lower_bound(writer->fences.begin(), writer->fences.end(), cell.write_clock);
    const bool writer_fenced = fence != writer->fences.end() && seen(f, cell.writer) >= *fence;
    const bool reader_fenced = f->fence_base && (*f->fence_base)[cell.writer] >= cell.write_clock;
    if (!writer_fenced && !reader_fenced)
      fail("%s reads shared byte %u, which %s wrote with ordinary stores and no fence_proxy_async() before the barrier",
           reader, offset, who(block, cell.writer).c_str());
  }
}

}  // namespace simt

using namespace simt;

extern "C" void* simt_alloc(uint64_t bytes, uint64_t stream, uint32_t nan) {
  const uint64_t size = (bytes + 1023) / 1024 * 1024;
  void* memory = nullptr;
  if (posix_memalign(&memory, 1024, size ? size : 1024)) return nullptr;
  if (nan) memset(memory, 0xff, size);
  auto a = std::make_shared<Allocation>();
  a->begin = (uint64_t)memory;
  a->end = a->begin + bytes;
  a->memory = memory;
  a->stream = stream;
  a->dirty.resize(bytes / 1024 + 1);
  a->fresh.resize(bytes / 1024 + 1);
  std::unique_lock<std::shared_mutex> lock(allocations_mutex);
  allocations[a->end] = a;
  __atomic_fetch_add(&allocations_version, 1, __ATOMIC_RELEASE);
  return memory;
}

extern "C" void simt_free(void* p) {
  std::unique_lock<std::shared_mutex> lock(allocations_mutex);
  for (auto it = allocations.upper_bound((uint64_t)p); it != allocations.end(); ++it)
    if (it->second->memory == p) {
      allocations.erase(it);
      __atomic_fetch_add(&allocations_version, 1, __ATOMIC_RELEASE);
      free(p);
      return;
    }
}

extern "C" void simt_sync(uint64_t stream) {
  std::shared_lock<std::shared_mutex> lock(allocations_mutex);
  for (auto& [end, a] : allocations)
    if (a->stream == stream) std::fill(a->dirty.begin(), a->dirty.end(), 0);
}

// ---- the callbacks of instrumented code ----

// Registers, which a kernel's arrays stand for, while a wgmma uses them.
static void check_lent(const Fiber* f, uint64_t at, uint32_t bytes, int kind) {
  for (const Lent& lent : f->lent)
    if (at + bytes > lent.begin && at < lent.begin + lent.bytes && (lent.accumulator || kind != kRead))
      fail("%s of a wgmma in flight %s before wgmma_wait()", lent.accumulator ? "accumulators" : "registers of A",
           kind == kRead ? "are read" : "are overwritten");
}

static inline void instrumented(const void* p, uint32_t bytes, int kind) {
  Fiber* f = current;
  if (!f) return;
  // Most accesses are to what is a thread's own: its stack, what it knows about itself, its params.
  const uint64_t at = (uint64_t)p;
  if (!f->lent.empty()) check_lent(f, at, bytes, kind);
  if (at - (uint64_t)f->stack < kStack || at - (uint64_t)f < sizeof(Fiber) || at - (uint64_t)&lane < sizeof lane)
    return;
  const SimtLaunch& launch = worker->machine->launch;
  if (kind == kRead && at - (uint64_t)launch.params < launch.params_bytes) return;
  access(p, bytes, kind);
}

extern "C" {
#define SIMT_CALLBACKS(n)                                                 \
  void __tsan_read##n(void* p) { instrumented(p, n, kRead); }             \
  void __tsan_write##n(void* p) { instrumented(p, n, kWrite); }           \
  void __tsan_unaligned_read##n(void* p) { instrumented(p, n, kRead); }   \
  void __tsan_unaligned_write##n(void* p) { instrumented(p, n, kWrite); } \
  void __tsan_volatile_read##n(void* p) { instrumented(p, n, kRead); }    \
  void __tsan_volatile_write##n(void* p) { instrumented(p, n, kWrite); }
SIMT_CALLBACKS(1)
SIMT_CALLBACKS(2)
SIMT_CALLBACKS(4)
SIMT_CALLBACKS(8)
SIMT_CALLBACKS(16)
void __tsan_read_range(void* p, unsigned long bytes) { instrumented(p, bytes, kRead); }
void __tsan_write_range(void* p, unsigned long bytes) { instrumented(p, bytes, kWrite); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}
void* __tsan_memcpy(void* to, const void* from, unsigned long bytes) {
  instrumented(from, bytes, kRead);
  instrumented(to, bytes, kWrite);
  return memcpy(to, from, bytes);
}
void* __tsan_memset(void* to, int value, unsigned long bytes) {
  instrumented(to, bytes, kWrite);
  return memset(to, value, bytes);
}
void* __tsan_memmove(void* to, const void* from, unsigned long bytes) {
  instrumented(from, bytes, kRead);
  instrumented(to, bytes, kWrite);
  return memmove(to, from, bytes);
}
}
