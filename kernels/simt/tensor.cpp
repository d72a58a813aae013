// ldmatrix, stmatrix, mma.sync and wgmma, with the fragment and descriptor layouts of the PTX manual (9.7.14.5, 9.7.15.5).
#include <math.h>
#include <string.h>

#include <algorithm>

#include "machine.h"

namespace simt {

static float to_float(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

static uint16_t read16(const uint8_t* p) {
  uint16_t x;
  memcpy(&x, p, 2);
  return x;
}

void load_matrix_collective(void* arg, int line);
void store_matrix_collective(void* arg, int line);
void mma_collective(void* arg, int line);

// ---- ldmatrix, stmatrix ----

struct MatrixArg {
  Fiber* fiber;
  uint32_t* r;
  uint8_t* row;
  bool transpose;
};

static void check_row(const void* row, const char* what) {
  if (!block_of_shared(row)) fail("%s: the row's address is not in shared memory", what);
  if ((uint64_t)row % 16) fail("%s: the row at shared byte %u is not aligned to 16 bytes", what, shared_offset(row));
}

void load_matrix(uint32_t* r, const void* row, bool transpose, int line) {
  check_row(row, "ldmatrix");
  if (worker->checked) access(row, 16, kRead);
  MatrixArg arg = {current, r, (uint8_t*)row, transpose};
  load_matrix_collective(&arg, line);
}

void load_matrix_all(Block*, void** args) {
  for (int matrix = 0; matrix < 4; matrix++) {
    uint16_t m[8][8];
    for (int i = 0; i < 8; i++) memcpy(m[i], ((MatrixArg*)args[matrix * 8 + i])->row, 16);
    for (int l = 0; l < 32; l++) {
      MatrixArg& a = *(MatrixArg*)args[l];
      const int i = l / 4, j = 2 * (l % 4);
      a.r[matrix] = a.transpose ? m[j][i] | (uint32_t)m[j + 1][i] << 16 : m[i][j] | (uint32_t)m[i][j + 1] << 16;
    }
  }
}

void store_matrix(void* row, const uint32_t* r, bool transpose, int line) {
  check_row(row, "stmatrix");
  if (worker->checked) access(row, 16, kWrite);
  MatrixArg arg = {current, (uint32_t*)r, (uint8_t*)row, transpose};
  store_matrix_collective(&arg, line);
}

void store_matrix_all(Block*, void** args) {
  for (int matrix = 0; matrix < 4; matrix++) {
    uint16_t m[8][8];
    for (int l = 0; l < 32; l++) {
      const MatrixArg& a = *(MatrixArg*)args[l];
      const int i = l / 4, j = 2 * (l % 4);
      const uint16_t low = a.r[matrix], high = a.r[matrix] >> 16;
      if (a.transpose)
        m[j][i] = low, m[j + 1][i] = high;
      else
        m[i][j] = low, m[i][j + 1] = high;
    }
    for (int i = 0; i < 8; i++) memcpy(((MatrixArg*)args[matrix * 8 + i])->row, m[i], 16);
  }
}

// ---- mma.sync m16n8k16 ----

struct MmaArg {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
  bool f16;
};

void mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool f16, int line) {
  MmaArg arg = {d, a, {b0, b1}, f16};
  mma_collective(&arg, line);
}

// Four rows of c at a time, in registers: one alone would wait for each of its sums.
template <int kN>
__attribute__((always_inline)) static inline void multiply_narrow(float* c, const float* a, const float* b, int m) {
  typedef float Row __attribute__((vector_size(4 * kN), aligned(4), may_alias));
  const Row* columns = (const Row*)b;
  for (int i = 0; i < m; i += 4) {
    Row* rows = (Row*)(c + i * kN);
    Row r0 = rows[0], r1 = rows[1], r2 = rows[2], r3 = rows[3];
    for (int k = 0; k < 16; k++) {
      const float* x = a + i * 16 + k;
      r0 += x[0] * columns[k];
      r1 += x[16] * columns[k];
      r2 += x[32] * columns[k];
      r3 += x[48] * columns[k];
    }
    rows[0] = r0, rows[1] = r1, rows[2] = r2, rows[3] = r3;
  }
}

// c[m][n] += a[m][16] b[16][n], the inner loop of everything here. Products are summed in the order of k.
#if defined(__x86_64__) && !defined(SIMT_ASAN)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
static void
multiply(float* __restrict c, const float* __restrict a, const float* __restrict b, int m, int n) {
  if (n == 8) return multiply_narrow<8>(c, a, b, m);
  if (n == 16) return multiply_narrow<16>(c, a, b, m);
  for (int i = 0; i < m; i++) {
    float* row = c + i * n;
    for (int k = 0; k < 16; k++) {
      const float x = a[i * 16 + k];
      const float* column = b + k * n;
      for (int j = 0; j < n; j++) row[j] += x * column[j];
    }
  }
}

template <float (*to_float)(uint16_t)>
static void multiply_fragments(void** args) {
  float a[16 * 16], b[16 * 8], c[16 * 8];
  for (int l = 0; l < 32; l++) {
    const MmaArg& arg = *(MmaArg*)args[l];
    const int g = l / 4, t = 2 * (l % 4);
    for (int i = 0; i < 4; i++) {
      const int row = g + 8 * (i % 2), k = t + 8 * (i / 2);
      a[row * 16 + k] = to_float(arg.a[i]);
      a[row * 16 + k + 1] = to_float(arg.a[i] >> 16);
      c[(g + 8 * (i / 2)) * 8 + t + i % 2] = arg.d[i];
    }
    for (int i = 0; i < 2; i++) {
      b[(t + 8 * i) * 8 + g] = to_float(arg.b[i]);
      b[(t + 8 * i + 1) * 8 + g] = to_float(arg.b[i] >> 16);
    }
  }
  multiply(c, a, b, 16, 8);
  for (int l = 0; l < 32; l++)
    for (int i = 0; i < 4; i++) ((MmaArg*)args[l])->d[i] = c[(l / 4 + 8 * (i / 2)) * 8 + 2 * (l % 4) + i % 2];
}

void mma_all(Block*, void** args) {
  if (((MmaArg*)args[0])->f16)
    multiply_fragments<f16_to_float>(args);
  else
    multiply_fragments<to_float>(args);
}

// ---- wgmma ----

// An operand in shared memory: element (i, k), i along M or N.
struct Operand {
  const uint8_t* window;
  uint32_t start, leading, stride;
  int swizzle;
  bool mn_major;
  int row_bytes;

  Operand(uint64_t descriptor, bool mn, const uint8_t* window) : window(window), mn_major(mn) {
    start = (descriptor & 0x3fff) << 4;
    leading = (descriptor >> 16 & 0x3fff) << 4;
    stride = (descriptor >> 32 & 0x3fff) << 4;
    swizzle = descriptor >> 62;
    row_bytes = swizzle == kSwizzle128 ? 128 : swizzle == kSwizzle64 ? 64 : swizzle == kSwizzle32 ? 32 : 16;
    if (descriptor >> 49 & 7)
      fail("wgmma: a matrix descriptor with a base offset is not supported: align tiles to 1024 bytes");
    if (mn && swizzle == kSwizzleNone) fail("wgmma: an MN-major operand without swizzle is not supported");
  }

  // Byte offset in the window of element (i, k).
  uint32_t offset(int i, int k) const {
    uint32_t at;
    if (mn_major) {
      const int panel = row_bytes / 2;
      at = start + i / panel * leading + k / 8 * stride + k % 8 * row_bytes + i % panel * 2;
    } else if (swizzle == kSwizzleNone) {
      at = start + i / 8 * stride + k / 8 * leading + i % 8 * 16 + k % 8 * 2;
    } else {
      at = start + i / 8 * stride + i % 8 * row_bytes + k * 2;
    }
    if (swizzle == kSwizzle128) at ^= (at >> 7 & 7) << 4;
    if (swizzle == kSwizzle64) at ^= (at >> 7 & 3) << 4;
    if (swizzle == kSwizzle32) at ^= (at >> 7 & 1) << 4;
    return at & (kWindow - 1);
  }
};

// All 16-byte chunks of an operand, once each.
template <typename F>
static void each_chunk(const Operand& o, int rows, F f) {
  if (o.mn_major)
    for (int k = 0; k < 16; k++)
      for (int i = 0; i < rows; i += 8) f(i, k, o.offset(i, k));
  else
    for (int i = 0; i < rows; i++)
      for (int k = 0; k < 16; k += 8) f(i, k, o.offset(i, k));
}

static uint64_t hash_operand(const Operand& o, int rows) {
  uint64_t hash = 1469598103934665603ull;
  each_chunk(o, rows, [&](int, int, uint32_t at) {
    uint64_t words[2];
    memcpy(words, o.window + at, 16);
    for (uint64_t w : words) hash = (hash ^ w) * 1099511628211ull;
  });
  return hash;
}

// The clock component of the wgmmas of a warp.
static int wgmma_component(const Fiber* f, int warp) {
  const Block* block = f->block;
  return block->gang->live_at_start + kAsyncClocks + (int)(block->rank * block->warpgroups.size() * 4) + warp;
}

// In a checked launch: the bytes are there, fenced and in order; and if TMA wrote them, the descriptor reads them as they lie.
static void check_operand(const Wgmma& op, const Operand& o, int rows, const char* name) {
  Block* block = current->block;
  const int component = wgmma_component(current, current->lane.thread / 128 * 4);
  const uint32_t end = worker->machine->launch.shared_bytes;
  struct Expected {
    int swizzle, row, column;
  };
  each_chunk(o, rows, [&](int i, int k, uint32_t at) {
    if (at + 16 > end)
      fail("wgmma: operand %s reads shared bytes [%u,%u) of a block that has %u: wrong descriptor", name, at, at + 16,
           end);
    const uint8_t* p = block->shared + at;
    check_proxy(p, 16, "wgmma");
    wgmma_access(p, 16, component, op.clock);
    const ChunkTag tag = block->tags[at / 16];
    if (!tag.swizzle) return;
    if (tag.swizzle - 1 != o.swizzle)
      fail("wgmma: operand %s is read with swizzle %d but the tensor copy wrote it with swizzle %d (0 none, 1: 128 B)",
           name, o.swizzle, tag.swizzle - 1);
    // Neighbours in the operand are neighbours in the box, or the beginning of another box.
    const ChunkTag first = block->tags[o.offset(0, 0) / 16];
    const int row = first.row + (o.mn_major ? k : i), column = first.column + (o.mn_major ? i / 8 : k / 8);
    const int along = o.mn_major ? k : i;
    const bool same = tag.row == row && (o.mn_major ? tag.column == column % (o.row_bytes / 16) : tag.column == column);
    const bool other_box = along > 0 && along % 8 == 0 && tag.row % 8 == 0 && tag.row < row;
    const bool inside_other_box = along >= 8 && tag.row % 8 == along % 8 && tag.row < row;
    if (!same && !other_box && !inside_other_box)
      fail(
          "wgmma: operand %s, element (%d,%d): the descriptor (leading %u, stride %u, swizzle %d) leads to row %d, chunk %d of "
          "a tensor copy's box where row %d, chunk %d is due: wrong stride",
          name, i, k, o.leading, o.stride, o.swizzle, tag.row, tag.column, row, column);
  });
}

// The operand as floats: [rows][16], or transposed [16][rows].
template <float (*to_float)(uint16_t)>
static void fetch(const Operand& o, int rows, bool transposed, float* out) {
  const int along = transposed ? 1 : 16, across = transposed ? rows : 1;
  each_chunk(o, rows, [&](int i, int k, uint32_t at) {
    float* to = out + i * along + k * across;
    const int step = o.mn_major ? along : across;
    for (int e = 0; e < 8; e++) to[e * step] = to_float(read16(o.window + at + 2 * e));
  });
}

template <float (*to_float)(uint16_t)>
static void execute(Wgmma& op, const uint8_t* window) {
  alignas(64) float a[64 * 16];
  alignas(64) float b[16 * 256];
  if (op.a_in_registers) {
    for (int t = 0; t < 128; t++) {
      const int row = t / 32 * 16 + t % 32 / 4, k = 2 * (t % 4);
      for (int i = 0; i < 4; i++) {
        float* to = a + (row + 8 * (i % 2)) * 16 + k + 8 * (i / 2);
        to[0] = to_float(op.a_registers[t][i]);
        to[1] = to_float(op.a_registers[t][i] >> 16);
      }
    }
  } else {
    fetch<to_float>(Operand(op.a, op.a_mn, window), 64, false, a);
  }
  fetch<to_float>(Operand(op.b, op.b_mn, window), op.n, true, b);
  multiply(op.accumulator->tile.data(), a, b, 64, op.n);
  op.executed = true;
}

struct E4m3Numbers {
  float of[256];
  E4m3Numbers() {
    for (int i = 0; i < 256; i++) of[i] = e4m3_to_float(i);
  }
};
static const E4m3Numbers e4m3_numbers;

// One half of the 32 k of an operand in e4m3, which lie where 16 of a 16-bit type would: [rows][16], or transposed [16][rows].
static void fetch_half(const Operand& o, int half, int rows, bool transposed, float* out) {
  const int along = transposed ? 1 : 16, across = transposed ? rows : 1;
  each_chunk(o, rows, [&](int i, int k, uint32_t at) {
    if (k / 8 != half) return;
    for (int e = 0; e < 16; e++) out[i * along + e * across] = e4m3_numbers.of[o.window[at + e]];
  });
}

// Hopper's sums of fp8 keep 14 bits (DeepSeek-V3, arXiv 2412.19437, 3.3.2): what is below is cut off after every instruction.
static float keep_14_bits(float x) { return bits_to_float(float_to_bits(x) & 0xfffffc00u); }

static void execute_e4m3(Wgmma& op, const uint8_t* window) {
  alignas(64) float a[64 * 16];
  alignas(64) float b[16 * 256];
  std::vector<float>& tile = op.accumulator->tile;
  for (int half = 0; half < 2; half++) {
    fetch_half(Operand(op.a, false, window), half, 64, false, a);
    fetch_half(Operand(op.b, false, window), half, op.n, true, b);
    multiply(tile.data(), a, b, 64, op.n);
  }
  for (float& x : tile) x = keep_14_bits(x);
  op.executed = true;
}

static uint64_t operands_hash(const Wgmma& op, const uint8_t* window) {
  uint64_t hash = hash_operand(Operand(op.b, op.b_mn, window), op.n);
  if (!op.a_in_registers) hash = hash * 31 + hash_operand(Operand(op.a, op.a_mn, window), 64);
  return hash;
}

static void copy_fragment(Accumulator& acc, int t, float* d, bool out) {
  const int row = t / 32 * 16 + t % 32 / 4;
  for (int i = 0; i < acc.n / 2; i++) {
    float& x = acc.tile[(row + 8 * (i / 2 % 2)) * acc.n + 8 * (i / 4) + 2 * (t % 4) + i % 2];
    if (out)
      d[i] = x;
    else
      x = d[i];
  }
}

void wgmma_fence() { current->registers_touched = false; }

void wgmma(float* d, int n, uint64_t a, const uint32_t* a_registers, uint64_t b, bool a_mn, bool b_mn, bool accumulate,
           WgmmaType type) {
  Fiber* f = current;
  Block* block = f->block;
  const int t = f->lane.thread % 128;
  Warpgroup& group = block->warpgroups[f->lane.thread / 128];
  if (f->registers_touched && worker->checked)
    fail("wgmma without wgmma_fence(): accumulators or A registers were touched since the last one");

  const int number = f->next_op++;
  if (number - group.first == (int)group.ops.size()) {
    auto op = std::make_shared<Wgmma>();
    op->number = number;
    op->clock = number + 1;
    op->n = n, op->a = a, op->b = b;
    op->a_in_registers = a_registers != nullptr;
    op->a_mn = a_mn, op->b_mn = b_mn, op->accumulate = accumulate, op->type = type;
    for (auto& acc : group.accumulators)
      if (acc->registers[t] == d && acc->users > 0) op->accumulator = acc;
    if (op->accumulator && op->accumulator->n != n) fail("wgmma: accumulators in flight are used with another N");
    if (!op->accumulator) {
      op->accumulator = std::make_shared<Accumulator>();
      op->accumulator->n = n;
      op->accumulator->tile.assign(64 * n, 0.f);
      group.accumulators.push_back(op->accumulator);
    }
    op->accumulator->last_op = number;
    group.ops.push_back(std::move(op));
  }
  Wgmma& op = *group.ops[number - group.first];
  if (op.n != n || op.a != a || op.b != b || op.a_in_registers != (a_registers != nullptr) ||
      op.accumulate != accumulate || op.type != type)
    fail("wgmma: the threads of a warpgroup disagree about the instruction (shape, type, descriptors or accumulate)");
  Accumulator& acc = *op.accumulator;
  if (acc.registers[t] != d) {
    if (acc.registers[t]) fail("wgmma: the threads of a warpgroup disagree about the accumulator");
    acc.registers[t] = d;
    acc.users++;
    if (accumulate) copy_fragment(acc, t, d, false);
    if (worker->checked) {
      for (int i = 0; i < n / 2; i++) d[i] = NAN;
      f->lent.push_back({(uint64_t)d, (uint32_t)n * 2, number, true});
    }
  }
  if (worker->checked)
    for (Lent& lent : f->lent)
      if (lent.begin == (uint64_t)d) lent.op = number;
  if (a_registers) {
    if (worker->checked) f->lent.push_back({(uint64_t)a_registers, 16, number, false});
    memcpy(op.a_registers[t], a_registers, 16);
    op.a_source[t] = a_registers;
  }
  if (worker->checked && t == 0) {
    // Thread 0 stands for the warpgroup: what it may read, all may, for they meet in the instruction.
    check_operand(op, Operand(b, b_mn, block->shared), n, "B");
    if (!a_registers) check_operand(op, Operand(a, a_mn, block->shared), 64, "A");
  }
  if (++op.issued == 128 && worker->checked) op.operand_hash = operands_hash(op, block->shared);
}

void wgmma_commit() {
  Fiber* f = current;
  f->groups.push_back(f->next_op);
}

void wgmma_wait(int pending) {
  Fiber* f = current;
  Block* block = f->block;
  Warpgroup& group = block->warpgroups[f->lane.thread / 128];
  const int t = f->lane.thread % 128;
  int upto = f->committed_upto;
  while ((int)f->groups.size() > pending) {
    upto = f->groups.front();
    f->groups.pop_front();
  }
  if (upto == f->committed_upto) return;
  f->committed_upto = upto;
  // All warps must have issued what this one waits for.
  while (group.first + (int)group.ops.size() < upto || group.first < upto) {
    bool issued = true;
    for (int i = 0; i < (int)group.ops.size() && group.ops[i]->number < upto; i++)
      issued = issued && group.ops[i]->issued == 128;
    if (issued) break;
    yield_polling("the other warps of its warpgroup to issue wgmma", nullptr, 0);
  }
  for (auto& ref : group.ops) {
    Wgmma& op = *ref;
    if (op.number >= upto) break;
    if (op.executed) continue;
    if (worker->checked) {
      if (operands_hash(op, block->shared) != op.operand_hash)
        fail("wgmma: its operands in shared memory changed while it was in flight (written before wgmma_wait)");
    }
    if (!op.accumulate) std::fill(op.accumulator->tile.begin(), op.accumulator->tile.end(), 0.f);
    switch (op.type) {
      case WgmmaType::kBf16:
        execute<to_float>(op, block->shared);
        break;
      case WgmmaType::kF16:
        execute<f16_to_float>(op, block->shared);
        break;
      case WgmmaType::kE4m3:
        execute_e4m3(op, block->shared);
        break;
    }
  }
  if (worker->checked) {
    see(f, wgmma_component(f, f->lane.thread / 32), upto);
    f->lent.erase(std::remove_if(f->lent.begin(), f->lent.end(), [&](const Lent& lent) { return lent.op < upto; }),
                  f->lent.end());
    for (auto& ref : group.ops)
      if (ref->number < upto && ref->a_in_registers && memcmp(ref->a_source[t], ref->a_registers[t], 16))
        fail("wgmma: registers of A were overwritten while it was in flight (before wgmma_wait)");
  }
  for (auto& acc : group.accumulators) {
    if (acc->last_op >= upto || !acc->registers[t]) continue;
    copy_fragment(*acc, t, acc->registers[t], true);
    acc->registers[t] = nullptr;
    acc->users--;
    f->registers_touched = true;
  }
  group.accumulators.erase(
      std::remove_if(group.accumulators.begin(), group.accumulators.end(), [](auto& acc) { return acc->users == 0; }),
      group.accumulators.end());
  // Ops that every thread has waited for go.
  while (!group.ops.empty() && group.ops.front()->executed) {
    const int number = group.ops.front()->number;
    const size_t first_thread = (size_t)f->lane.thread / 128 * 128;
    bool all = true;
    for (size_t i = first_thread; i < first_thread + 128 && i < block->fibers.size(); i++)
      all = all && block->fibers[i]->committed_upto > number;
    if (!all) break;
    group.ops.pop_front();
    group.first++;
  }
}

}  // namespace simt
