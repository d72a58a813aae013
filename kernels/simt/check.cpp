// Memory: the allocations of the host target, and in a checked launch every access: is it inside something, is it ordered, may
// this proxy see it. Instrumented kernels report their accesses through the thread sanitizer's callbacks, which are defined
// here in place of its runtime.
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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

void accumulate(Clock& clock, const Fiber* f) {
  if (clock.size() < f->base->size()) clock.resize(f->base->size());
  for (size_t i = 0; i < f->base->size(); i++) clock[i] = std::max(clock[i], (*f->base)[i]);
  clock[f->component] = std::max(clock[f->component], f->own);
}

ClockRef snapshot(const Fiber* f) {
  Clock clock = *f->base;
  clock[f->component] = f->own;
  return std::make_shared<const Clock>(std::move(clock));
}

void join(Fiber* f, const ClockRef& other) {
  if (!other || other == f->base || other->empty()) return;
  // Often one is the other's past.
  bool less = true;
  for (size_t i = 0; i < other->size() && less; i++) less = (*f->base)[i] <= (*other)[i];
  if (less) {
    f->base = other;
    return;
  }
  auto clock = std::make_shared<Clock>(*f->base);
  for (size_t i = 0; i < other->size(); i++) (*clock)[i] = std::max((*clock)[i], (*other)[i]);
  f->base = clock;
}

// ---- allocations ----

struct Allocation {
  uint64_t begin, end, stream;
  void* memory;
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
  if (at >= params && at < params + 4096) return true;
  const uint64_t tls = (uint64_t)&lane;
  if (at + 4096 > tls && at < tls + 4096) return true;
  for (const auto& f : worker->fibers)
    if (at >= (uint64_t)f->stack && at < (uint64_t)f->stack + kStack) return true;
  for (const Range& r : image())
    if (at >= r.begin && at < r.end) return true;
  return false;
}

// ---- global memory ----

static bool may_touch_before_wait(const Fiber* f) {
  if (f->pdl_waited || !worker->machine->launch.pdl) return true;
  for (const auto& [component, clock] : f->block->pdl_waits)
    if (seen(f, component) >= clock) return true;
  return false;
}

void check_global(const void* p, uint32_t bytes, bool write, const char* who) {
  Allocation* a = find(p);
  const uint64_t at = (uint64_t)p;
  if (!a || at + bytes > a->end) {
    if (is_ours(p)) return;
    fail("%s %s %u bytes at %p, outside of all device memory%s", who, write ? "writes" : "reads", bytes, p,
         at < 4096 ? " (a null pointer)" : "");
  }
  const Fiber* f = current;
  if (!worker->machine->launch.pdl || may_touch_before_wait(f)) return;
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

void end_of_launch(uint64_t stream) {
  std::shared_lock<std::shared_mutex> lock(allocations_mutex);
  for (auto& [end, a] : allocations)
    for (size_t i = 0; i < a->fresh.size() && a->stream == stream; i++) {
      a->dirty[i] |= a->fresh[i];
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
    check_global(p, bytes, kind != kRead, "the kernel");
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

extern "C" void* simt_alloc(uint64_t bytes, uint64_t stream) {
  const uint64_t size = (bytes + 1023) / 1024 * 1024;
  void* memory = nullptr;
  if (posix_memalign(&memory, 1024, size ? size : 1024)) return nullptr;
  memset(memory, 0xff, size);
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
  if (kind == kRead && at - (uint64_t)worker->machine->launch.params < 4096) return;
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
