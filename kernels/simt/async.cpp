// mbarriers, and what completes them: cp.async, bulk copies and tensor copies. In a checked launch a copy is queued at issue and
// delivered at a random later point, at the latest when nothing else can run; otherwise it is done at once.
#include <stdio.h>
#include <string.h>

#include <algorithm>

#include "machine.h"

namespace simt {

// ---- mbarrier: phase 1 bit, tag 3, expected 16, pending 16, bytes 28 (signed) ----

struct State {
  uint32_t phase, tag, expected, pending;
  int32_t bytes;
};
constexpr uint32_t kTag = 5;

static State unpack(uint64_t x) {
  return {(uint32_t)(x & 1), (uint32_t)(x >> 1 & 7), (uint32_t)(x >> 4 & 0xffff), (uint32_t)(x >> 20 & 0xffff),
          (int32_t)((int64_t)x >> 36)};
}
static uint64_t pack(const State& s) {
  return s.phase | (uint64_t)s.tag << 1 | (uint64_t)s.expected << 4 | (uint64_t)s.pending << 20 |
         (uint64_t)(int64_t)s.bytes << 36;
}

std::string describe_barrier(const Barrier* b) {
  const State s = unpack(*b);
  char text[160];
  snprintf(text, sizeof text, "the mbarrier at shared byte %u, phase %u: %u of %u arrivals and %d bytes are missing",
           shared_offset(b), s.phase, s.pending, s.expected, s.bytes);
  return text;
}

static Block* owner(const Barrier* b, const char* what) {
  Block* block = block_of_shared(b);
  if (!block) fail("%s: the mbarrier is not in shared memory, or its block has exited", what);
  if ((uint64_t)b % 8) fail("%s: the mbarrier at shared byte %u is not aligned to 8 bytes", what, shared_offset(b));
  return block;
}

static State load(Barrier* b, const char* what) {
  const State s = unpack(*b);
  if (s.tag != kTag) fail("%s on the mbarrier at shared byte %u, which was never initialised", what, shared_offset(b));
  if (worker->checked) {
    Block* block = block_of_shared(b);
    const BarrierClock& c = block->barrier_clocks[shared_offset(b)];
    if (c.initialiser != current->component && seen(current, c.initialiser) < c.fenced_clock)
      fail(
          "%s on the mbarrier at shared byte %u, whose initialisation by %s is not ordered before: "
          "mbarrier_init_fence() and a block or cluster barrier must follow it",
          what, shared_offset(b), describe_component(block->gang, c.initialiser).c_str());
  }
  return s;
}

static void wake_waiters(Block* block, Barrier* b, uint32_t phase) {
  auto& waiters = block->barrier_waiters;
  for (size_t i = 0; i < waiters.size();) {
    Fiber* f = waiters[i];
    if (f->object == b && f->detail != phase) {
      waiters.erase(waiters.begin() + i);
      worker->wake(f);
    } else {
      i++;
    }
  }
}

// Takes off arrivals and bytes, and ends the phase when both are zero.
static void progress(Block* block, Barrier* b, State s) {
  if (s.pending == 0 && s.bytes < 0)
    fail("the mbarrier at shared byte %u got %d bytes more than were expected of it", shared_offset(b), -s.bytes);
  if (s.pending == 0 && s.bytes == 0) {
    s.phase ^= 1;
    s.pending = s.expected;
    if (worker->checked) {
      BarrierClock& c = block->barrier_clocks[shared_offset(b)];
      c.completed = std::make_shared<const Clock>(std::move(c.phase));
      c.phase.clear();
    }
    *b = pack(s);
    wake_waiters(block, b, s.phase);
    return;
  }
  *b = pack(s);
}

void barrier_init(Barrier* b, uint32_t count) {
  Block* block = owner(b, "mbarrier_init");
  if (count == 0 || count > 0xffff) fail("mbarrier_init with a count of %u", count);
  if (worker->checked) {
    access(b, 8, kWrite);
    for (Fiber* f : block->barrier_waiters)
      if (f->object == b)
        fail("the mbarrier at shared byte %u is initialised again while %s waits on it", shared_offset(b),
             describe(f).c_str());
    block->barrier_clocks[shared_offset(b)] = BarrierClock();
    block->barrier_clocks[shared_offset(b)].initialiser = current->component;
    block->barrier_clocks[shared_offset(b)].fenced_clock = UINT32_MAX;
    current->unfenced_barriers.push_back(b);
  }
  *b = pack({0, kTag, count, count, 0});
}

void barrier_init_fence() {
  if (!worker->checked) return;
  for (Barrier* b : current->unfenced_barriers)
    current->block->barrier_clocks[shared_offset(b)].fenced_clock = current->own;
  current->unfenced_barriers.clear();
}

void barrier_arrive(Barrier* b, uint32_t expect_bytes, bool arrive) {
  Block* block = owner(b, "mbarrier_arrive");
  State s = load(b, "mbarrier_arrive");
  s.bytes += expect_bytes;
  if (s.bytes >= 1 << 20)
    fail("the mbarrier at shared byte %u is to expect %d bytes: the limit is 2^20 - 1", shared_offset(b), s.bytes);
  if (arrive) {
    if (s.pending == 0)
      fail("too many arrivals on the mbarrier at shared byte %u: %u per phase were agreed in mbarrier_init",
           shared_offset(b), s.expected);
    s.pending--;
    if (worker->checked) {
      accumulate(block->barrier_clocks[shared_offset(b)].phase, current);
      advance(current);
    }
  }
  progress(block, b, s);
}

void barrier_arrive_remote(Barrier* b, uint32_t rank) {
  if (rank >= current->lane.cluster)
    fail("mbarrier_arrive_cluster to rank %u in a cluster of %u", rank, current->lane.cluster);
  Block* block = current->block->gang->blocks[rank].get();
  if (block->live == 0) fail("mbarrier_arrive_cluster to block rank %u of the cluster, which has exited", rank);
  if (worker->checked && block != current->block) visit(block, current->component, current->own);
  barrier_arrive((Barrier*)(block->shared + shared_offset(b)), 0, true);
}

bool barrier_test(Barrier* b, uint32_t parity) {
  Block* block = owner(b, "mbarrier_try_wait");
  if (load(b, "mbarrier_try_wait").phase == parity) {
    yield_polling("an mbarrier phase (try_wait)", b, parity);
    if (unpack(*b).phase == parity) return false;
  }
  if (worker->checked) join(current, block->barrier_clocks[shared_offset(b)].completed);
  return true;
}

void barrier_wait(Barrier* b, uint32_t parity) {
  Block* block = owner(b, "mbarrier_wait");
  if (parity > 1) fail("mbarrier_wait for parity %u", parity);
  while (load(b, "mbarrier_wait").phase == parity) {
    block->barrier_waiters.push_back(current);
    suspend("the mbarrier", b, parity);
  }
  if (worker->checked) join(current, block->barrier_clocks[shared_offset(b)].completed);
}

void proxy_fence() {
  Fiber* f = current;
  if (!worker->checked) return;
  if (f->fences.empty() || f->fences.back() != f->own) f->fences.push_back(f->own);
  f->fence_base = snapshot(f);
}

// ---- copies ----

using Copy = std::shared_ptr<AsyncCopy>;

static Copy new_copy(AsyncCopy::Kind kind, const char* what) {
  auto c = std::make_shared<AsyncCopy>();
  c->kind = kind;
  c->issuer = current;
  c->block = current->block;
  c->what = what;
  if (worker->checked) {
    c->issued = snapshot(current);
    advance(current);
  }
  return c;
}

static bool in_shared(const void* p) { return block_of_shared(p) != nullptr; }

static void complete_bytes(const Copy& c, Barrier* b, uint32_t bytes) {
  Block* block = block_of_shared(b);
  if (!block) fail("%s completes on an mbarrier of a block that has exited", c->what.c_str());
  State s = unpack(*b);
  if (s.tag != kTag)
    fail("%s completes on the mbarrier at shared byte %u, which was never initialised", c->what.c_str(),
         shared_offset(b));
  s.bytes -= bytes;
  if (worker->checked) {
    Clock& clock = block->barrier_clocks[shared_offset(b)].phase;
    if (clock.size() < c->issued->size()) clock.resize(c->issued->size());
    clock[c->async_component] = std::max(clock[c->async_component], c->async_clock);
  }
  progress(block, b, s);
}

// The part of a copy that writes its destination.
static void move_pieces(const AsyncCopy& c) {
  for (size_t i = 0; i < c.pieces.size(); i++) {
    const Piece& p = c.pieces[i];
    if (worker->checked && c.kind != AsyncCopy::kStore) {
      async_access(c, p.to, p.bytes, true);
      Block* block = block_of_shared(p.to);
      if (p.bytes == 16) block->tags[shared_offset(p.to) / 16] = i < c.tags.size() ? c.tags[i] : ChunkTag();
    }
    if (c.kind == AsyncCopy::kStore) {
      const uint8_t* from = worker->checked ? c.snapshot.data() + (size_t)i * 16 : p.from;
      memcpy(p.to, from, p.bytes);
      if (worker->checked) note_global_write(p.to, p.bytes);
    } else if (p.from) {
      memcpy(p.to, p.from, p.valid);
      memset(p.to + p.valid, 0, p.bytes - p.valid);
    } else {
      memset(p.to, 0, p.bytes);
    }
  }
}

static void deliver(const Copy& c);

static void arrive_for(const Copy& c) {
  for (const Copy& earlier : c->arrive_after) deliver(earlier);
  Barrier* b = c->barrier;
  State s = unpack(*b);
  if (s.pending == 0) fail("cp_async_arrive: too many arrivals on the mbarrier at shared byte %u", shared_offset(b));
  s.pending--;
  Block* block = block_of_shared(b);
  if (worker->checked) {
    Clock& clock = block->barrier_clocks[shared_offset(b)].phase;
    if (clock.size() < c->issued->size()) clock.resize(c->issued->size());
    for (size_t i = 0; i < clock.size(); i++) clock[i] = std::max(clock[i], (*c->issued)[i]);
    clock[c->async_component] = std::max(clock[c->async_component], c->async_clock);
    clock.foreign = c->issued->foreign;
  }
  progress(block, b, s);
}

static void read_source(AsyncCopy& c) {
  if (c.read_done || !worker->checked) return;
  c.read_done = true;
  for (size_t i = 0; i < c.pieces.size(); i++)
    if (memcmp(c.pieces[i].from, c.snapshot.data() + i * 16, c.pieces[i].bytes))
      fail(
          "%s: its source at shared byte %u was overwritten before bulk_wait_read() or bulk_wait() (store issued by %s)",
          c.what.c_str(), shared_offset(c.pieces[i].from), describe(c.issuer).c_str());
}

static void deliver(const Copy& c) {
  if (c->done) return;
  c->done = true;
  if (c->kind == AsyncCopy::kStore) {
    read_source(*c);
    move_pieces(*c);
    return;
  }
  move_pieces(*c);
  for (Barrier* b : c->complete_on) complete_bytes(c, b, c->bytes);
  if (c->kind == AsyncCopy::kCpAsync && c->barrier) arrive_for(c);
}

static void issue(const Copy& c) {
  if (!worker->checked) {
    deliver(c);
    return;
  }
  if (c->kind != AsyncCopy::kStore) {
    Gang* gang = c->block->gang;
    const int slot =
        (c->kind == AsyncCopy::kToShared ? shared_offset(c->barrier) / 8 : c->issuer->component) % kAsyncClocks;
    c->async_component = gang->live_at_start + slot;
    c->async_clock = ++gang->async_clock[slot];
    for (Barrier* b : c->complete_on) visit(block_of_shared(b), c->async_component, c->async_clock);
  }
  worker->pending.push_back(c);
}

// In a checked launch: delivers one pending copy, or with `only_sometimes` perhaps none.
bool deliver_one(Worker& w, bool only_sometimes) {
  if (w.pending.empty()) return false;
  if (only_sometimes && w.random(16) != 0) return false;
  // Stores first stay behind: nobody waits for them but their issuer, who delivers them itself.
  const size_t i = w.random(w.pending.size());
  Copy c = w.pending[i];
  if (!c->done && only_sometimes && c->kind == AsyncCopy::kStore) return false;
  w.pending.erase(w.pending.begin() + i);
  if (c->done) return !only_sometimes;
  Fiber* running = current;
  current = c->issuer;  // for reports
  worker = &w;
  deliver(c);
  current = running;
  return true;
}

// ---- cp.async ----

void cp_async(void* dst, const void* src, int valid) {
  if (!in_shared(dst)) fail("cp_async: the destination is not in shared memory");
  if ((uint64_t)dst % 16 || (uint64_t)src % 16) fail("cp_async: source and destination must be aligned to 16 bytes");
  if (valid < 0 || valid > 16) fail("cp_async: %d valid bytes of 16", valid);
  if (worker->checked && valid) check_global(src, valid, kRead, "cp_async");
  Copy c = new_copy(AsyncCopy::kCpAsync, "cp_async");
  c->pieces.push_back({(uint8_t*)dst, (const uint8_t*)src, 16, (uint32_t)valid});
  issue(c);
  if (worker->checked) current->open_copies.push_back(c);
}

void cp_async_commit() {
  if (!worker->checked) return;
  current->copy_groups.push_back(std::move(current->open_copies));
  current->open_copies.clear();
}

void cp_async_wait(int pending) {
  if (!worker->checked) return;
  auto& groups = current->copy_groups;
  while ((int)groups.size() > pending) {
    for (auto& c : groups.front()) {
      deliver(c);
      see(current, c->async_component, c->async_clock);
      if (!c->handed_over)
        for (auto& p : c->pieces) adopt(p.to, p.bytes);
    }
    groups.pop_front();
  }
}

void cp_async_arrive(Barrier* b) {
  owner(b, "cp_async_arrive");
  Copy c = new_copy(AsyncCopy::kCpAsync, "cp_async_arrive");
  c->barrier = b;
  if (!worker->checked) {
    deliver(c);
    return;
  }
  c->arrive_after = current->open_copies;
  for (auto& g : current->copy_groups) c->arrive_after.insert(c->arrive_after.end(), g.begin(), g.end());
  for (auto& earlier : c->arrive_after) earlier->handed_over = true;
  issue(c);
}

// ---- bulk copies ----

void bulk_load(void* dst, const void* src, uint32_t bytes, Barrier* b) {
  owner(b, "bulk_load");
  if (!in_shared(dst)) fail("bulk_load: the destination is not in shared memory");
  if ((uint64_t)dst % 16 || (uint64_t)src % 16 || bytes % 16 || bytes == 0)
    fail("bulk_load: addresses and size (%u) must be multiples of 16 bytes", bytes);
  if (worker->checked) check_global(src, bytes, kRead, "bulk_load");
  Copy c = new_copy(AsyncCopy::kToShared, "bulk_load");
  for (uint32_t i = 0; i < bytes; i += 16) c->pieces.push_back({(uint8_t*)dst + i, (const uint8_t*)src + i, 16, 16});
  c->barrier = b;
  c->complete_on.push_back(b);
  c->bytes = bytes;
  issue(c);
}

static void issue_store(const Copy& c) {
  if (worker->checked) {
    for (const Piece& p : c->pieces) {
      check_proxy(p.from, p.bytes, c->what.c_str());
      access(p.from, p.bytes, kRead);
      c->snapshot.resize(c->snapshot.size() + 16);
      memcpy(c->snapshot.data() + c->snapshot.size() - 16, p.from, p.bytes);
    }
    current->open_stores.push_back(c);
  }
  issue(c);
}

void bulk_store(void* dst, const void* src, uint32_t bytes) {
  if (!in_shared(src)) fail("bulk_store: the source is not in shared memory");
  if ((uint64_t)dst % 16 || (uint64_t)src % 16 || bytes % 16 || bytes == 0)
    fail("bulk_store: addresses and size (%u) must be multiples of 16 bytes", bytes);
  if (worker->checked) check_global(dst, bytes, kWrite, "bulk_store");
  Copy c = new_copy(AsyncCopy::kStore, "bulk_store");
  for (uint32_t i = 0; i < bytes; i += 16) c->pieces.push_back({(uint8_t*)dst + i, (const uint8_t*)src + i, 16, 16});
  issue_store(c);
}

void bulk_commit() {
  if (!worker->checked) return;
  current->store_groups.push_back(std::move(current->open_stores));
  current->open_stores.clear();
}

void bulk_wait(int pending, bool read_only) {
  if (!worker->checked) return;
  auto& groups = current->store_groups;
  if (read_only) {
    for (size_t i = 0; i + pending < groups.size(); i++)
      for (auto& c : groups[i])
        if (!c->done) read_source(*c);
    return;
  }
  while ((int)groups.size() > pending) {
    for (auto& c : groups.front()) deliver(c);
    groups.pop_front();
  }
}

// With its last thread a block's shared memory goes, and what its warpgroups did can be compared.
static void finish_block(const Block* block) {
  for (size_t c = 0; c < block->visitors.size(); c++)
    if (block->visitors[c] > block->ended[c])
      fail(
          "the block exits while %s may still access its shared memory: wait for it, or for a cluster barrier after it",
          describe_component(block->gang, c).c_str());
  for (size_t t = 0; t < block->fibers.size(); t++)
    if (block->fibers[t]->register_counts != block->fibers[t / 128 * 128]->register_counts)
      fail("setmaxnreg is for whole warpgroups, but threads %zu and %zu of one called it differently", t / 128 * 128,
           t);
}

void finish_thread(Fiber* f) {
  if (!worker->checked) return;
  for (auto& g : f->store_groups)
    for (auto& c : g)
      if (!c->read_done)
        fail("%s: the thread exits without bulk_wait_read() while its shared source may still be read",
             c->what.c_str());
  if (!f->open_stores.empty()) fail("a bulk or tensor store was never committed");
  auto unwaited = [](const std::vector<Copy>& copies) {
    return std::any_of(copies.begin(), copies.end(), [](const Copy& c) { return !c->handed_over; });
  };
  if (unwaited(f->open_copies) || std::any_of(f->copy_groups.begin(), f->copy_groups.end(), unwaited))
    fail("the thread exits with a cp_async in flight: cp_async_wait() is due");
  if (!f->lent.empty()) fail("the thread exits with a wgmma in flight: wgmma_wait() is due");
  Block* block = f->block;
  Warp& warp = block->warps[f->lane.thread / 32];
  if (warp.arrived)
    fail("divergent warp: this lane exits while others of its warp wait in a collective (line %d)", warp.line);
  accumulate(block->ended, f);
  if (block->live == 1) finish_block(block);
}

// ---- tensor copies ----

// Every row of the box (its innermost dimension) with its place in shared memory; `f(pieces...)` as copies of 16 bytes or less.
template <typename F>
static void each_piece(const SimtTensorMap& m, const int* c, uint8_t* shared, const char* what, F f) {
  const uint32_t row_bytes = m.box[0] * m.element_bytes;
  if (row_bytes % 16) fail("%s: rows of the box are %u bytes: a multiple of 16 is needed", what, row_bytes);
  const int64_t count = 16 / m.element_bytes;
  uint32_t rows = 1;
  for (uint32_t d = 1; d < m.rank; d++) rows *= m.box[d];
  const uint32_t mask = m.swizzle == kSwizzle128 ? 7 : m.swizzle == kSwizzle64 ? 3 : m.swizzle == kSwizzle32 ? 1 : 0;
  for (uint32_t row = 0; row < rows; row++) {
    bool inside = true;
    uint64_t address = m.base;
    uint32_t rest = row;
    for (uint32_t d = 1; d < m.rank; d++) {
      const int64_t at = (int64_t)c[d] + rest % m.box[d];
      rest /= m.box[d];
      inside = inside && at >= 0 && at < (int64_t)m.dims[d];
      address += at * m.strides[d - 1];
    }
    for (uint32_t chunk = 0; chunk < row_bytes / 16; chunk++) {
      uint64_t to = (uint64_t)shared + row * row_bytes + chunk * 16;
      to ^= (to >> 7 & mask) << 4;
      const int64_t first = c[0] + chunk * count;
      int64_t valid = inside && first >= 0 ? (int64_t)m.dims[0] - first : 0;
      valid = valid < 0 ? 0 : valid > count ? count : valid;
      if (first < 0 && first + count > 0) fail("%s: coordinate %d is not a multiple of 16 bytes", what, c[0]);
      f((uint8_t*)to, (uint8_t*)(address + first * m.element_bytes), (uint32_t)(valid * m.element_bytes),
        ChunkTag{(uint8_t)(m.swizzle + 1), (uint8_t)chunk, (uint16_t)row});
    }
  }
}

static const SimtTensorMap& map_of(const TensorMap* map, int rank, const void* shared, const char* what) {
  const SimtTensorMap& m = *(const SimtTensorMap*)map;
  if (m.magic != SIMT_MAP_MAGIC) fail("%s: not a tensor map", what);
  if ((int)m.rank != rank) fail("%s: %d coordinates for a tensor map of rank %u", what, rank, m.rank);
  if (!in_shared(shared)) fail("%s: the box's address is not in shared memory", what);
  if ((uint64_t)shared % 128)
    fail("%s: the box at shared byte %u is not aligned to 128 bytes", what, shared_offset(shared));
  return m;
}

void tensor_load(void* dst, const TensorMap* map, Barrier* b, uint32_t blocks, int rank, const int* coordinates) {
  owner(b, "tma_load");
  const SimtTensorMap& m = map_of(map, rank, dst, "tma_load");
  Gang* gang = current->block->gang;
  Copy c = new_copy(AsyncCopy::kToShared, "tma_load");
  const uint32_t to_blocks = blocks ? blocks : 1u << current->block->rank;
  for (uint32_t r = 0; r < 32; r++) {
    if (!(to_blocks >> r & 1)) continue;
    if (r >= gang->blocks.size()) fail("tma_load_multicast to rank %u in a cluster of %zu", r, gang->blocks.size());
    uint8_t* shared = gang->blocks[r]->shared;
    each_piece(m, coordinates, shared + shared_offset(dst), "tma_load",
               [&](uint8_t* to, uint8_t* from, uint32_t valid, ChunkTag tag) {
                 if (r == (blocks ? (uint32_t)__builtin_ctz(blocks) : current->block->rank)) c->bytes += 16;
                 if (!worker->checked) {  // lands at once
                   if (valid < 16) memset(to, 0, 16);
                   if (valid == 16) memcpy(to, from, 16);
                   if (valid > 0 && valid < 16) memcpy(to, from, valid);
                   return;
                 }
                 if (valid) check_global(from, valid, kRead, "tma_load");
                 if (shared_offset(to) + 16 > worker->machine->launch.shared_bytes)
                   fail("tma_load writes shared bytes [%u,%u) of a block that has %u", shared_offset(to),
                        shared_offset(to) + 16, worker->machine->launch.shared_bytes);
                 c->pieces.push_back({to, valid ? from : nullptr, 16, valid});
                 c->tags.push_back(tag);
               });
    c->complete_on.push_back((Barrier*)(shared + shared_offset(b)));
  }
  c->barrier = b;
  issue(c);
}

void tensor_store(const TensorMap* map, const void* src, int rank, const int* coordinates) {
  const SimtTensorMap& m = map_of(map, rank, src, "tma_store");
  Copy c = new_copy(AsyncCopy::kStore, "tma_store");
  each_piece(m, coordinates, (uint8_t*)src, "tma_store", [&](uint8_t* from, uint8_t* to, uint32_t valid, ChunkTag) {
    if (!valid) return;
    if (worker->checked) check_global(to, valid, kWrite, "tma_store");
    c->pieces.push_back({to, from, valid, valid});
  });
  issue_store(c);
}

}  // namespace simt
