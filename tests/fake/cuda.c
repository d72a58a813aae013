// A libcuda.so for machines without a GPU: it records the calls that engine/device/cuda.rs makes, one line each on standard
// error, and runs no kernel. Device memory is host memory. It copies from page-locked memory as late as a driver may: when somebody
// waits for the copy, or for what comes after it. What it pretends to be comes from the environment:
// FAKE_VERSION (13000), FAKE_CAPABILITY (90), FAKE_FREE (1000 bytes of memory), FAKE_KERNELS ("name bytes threads name bytes threads ...").
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;
typedef uint64_t Address;
enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500 };

// One call, so that threads do not write into each other's lines.
#define LOG(format, ...) fprintf(stderr, "cuda: " format "\n", ##__VA_ARGS__)

static int number(const char* name, int otherwise) { return getenv(name) ? atoi(getenv(name)) : otherwise; }

struct Kernel {
  char name[64];
  int bytes, threads;
};
static struct Kernel kernels[256];
static int kernel_count;

// ---- the device and its context ----

Result cuInit(unsigned flags) {
  const char* text = getenv("FAKE_KERNELS");
  int used = 0;
  struct Kernel* k = kernels;
  while (text && sscanf(text, "%63s %d %d%n", k->name, &k->bytes, &k->threads, &used) == 3) text += used, k++;
  kernel_count = (int)(k - kernels);
  return SUCCESS;
}
Result cuDriverGetVersion(int* version) { return *version = number("FAKE_VERSION", 13000), SUCCESS; }
Result cuDeviceGetCount(int* count) { return *count = 1, SUCCESS; }
Result cuDeviceGet(int* device, int ordinal) { return *device = ordinal, SUCCESS; }
Result cuDeviceGetName(char* name, int size, int device) { return snprintf(name, size, "Fake GPU"), SUCCESS; }
Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  int capability = number("FAKE_CAPABILITY", 90);
  switch (attribute) {
    case 16:
      *value = 132;
      return SUCCESS;  // multiprocessors
    case 75:
      *value = capability / 10;
      return SUCCESS;  // compute capability, major
    case 76:
      *value = capability % 10;
      return SUCCESS;  // minor
    case 97:
      *value = 232448;
      return SUCCESS;  // shared memory per block, opt-in
  }
  return INVALID_VALUE;
}
Result cuDevicePrimaryCtxRetain(void** context, int device) { return *context = (void*)1, SUCCESS; }
Result cuCtxSetCurrent(void* context) { return context == (void*)1 ? SUCCESS : INVALID_VALUE; }
Result cuGetErrorName(int error, const char** text) { return *text = "CUDA_ERROR_FAKE", SUCCESS; }
Result cuGetErrorString(int error, const char** text) { return *text = "pretended", SUCCESS; }

// ---- kernels ----

Result cuModuleLoadData(void** module, const void* image) {
  if (memcmp(image, "\177ELF", 4)) return INVALID_VALUE;
  return *module = (void*)2, SUCCESS;
}
Result cuModuleGetFunction(void** function, void* module, const char* name) {
  for (int i = 0; i < kernel_count; i++)
    if (!strcmp(kernels[i].name, name)) return *function = &kernels[i], SUCCESS;
  return NOT_FOUND;
}
Result cuFuncGetParamInfo(struct Kernel* k, size_t index, size_t* offset, size_t* size) {
  if (index) return INVALID_VALUE;
  return *offset = 0, *size = k->bytes, SUCCESS;
}
Result cuFuncGetAttribute(int* value, int attribute, struct Kernel* k) {
  return *value = attribute == 0 ? k->threads : attribute == 1 ? 1024 : -1, SUCCESS;  // threads; static shared memory
}
Result cuFuncSetAttribute(struct Kernel* k, int attribute, int value) {
  return LOG("%s attribute %d = %d", k->name, attribute, value), SUCCESS;
}
Result cuFuncLoad(struct Kernel* k) { return LOG("%s loaded", k->name), SUCCESS; }

typedef struct {
  int id;
  char pad[4];
  int value[16];
} Attribute;
typedef struct {
  unsigned grid[3], block[3], shared;
  void* stream;
  Attribute* attributes;
  unsigned count;
} Config;
Result cuLaunchKernelEx(const Config* c, struct Kernel* k, void** params, void** extra) {
  uint32_t sum = 0;
  for (int i = 0; i < k->bytes; i++) sum = sum * 31 + ((uint8_t*)params[0])[i];
  fprintf(stderr, "cuda: launch %s grid %u %u %u block %u shared %u", k->name, c->grid[0], c->grid[1], c->grid[2],
          c->block[0], c->shared);
  for (unsigned i = 0; i < c->count; i++)
    fprintf(stderr, " attribute %d = %d", c->attributes[i].id, c->attributes[i].value[0]);
  fprintf(stderr, " params %u\n", sum);
  return c->grid[0] == 0 ? INVALID_VALUE : SUCCESS;
}

// ---- copies from page-locked memory ----

enum { MOST = 1 << 16 };
static struct {
  void* begin;
  size_t bytes;
} locked[MOST];
static struct {
  void* to;
  const void* from;
  size_t bytes;
} copies[MOST];
static size_t locked_count, enqueued, finished;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

// Makes the first so many copies.
static void finish(size_t count) {
  pthread_mutex_lock(&lock);
  for (; finished < count; finished++) memcpy(copies[finished].to, copies[finished].from, copies[finished].bytes);
  pthread_mutex_unlock(&lock);
}

static int enqueue(Address to, const void* from, size_t bytes) {
  int is_locked = 0;
  pthread_mutex_lock(&lock);
  for (size_t i = 0; i < locked_count; i++)
    is_locked |= (char*)from >= (char*)locked[i].begin && (char*)from < (char*)locked[i].begin + locked[i].bytes;
  if (is_locked) copies[enqueued].to = (void*)to, copies[enqueued].from = from, copies[enqueued++].bytes = bytes;
  if (enqueued == MOST) abort();
  pthread_mutex_unlock(&lock);
  return is_locked;
}

// ---- streams, events, graphs ----

Result cuStreamCreate(void** stream, unsigned flags) { return *stream = (void*)3, SUCCESS; }
Result cuStreamDestroy_v2(void* stream) { return LOG("destroy stream"), SUCCESS; }
Result cuStreamSynchronize(void* stream) { return finish(enqueued), LOG("synchronize"), SUCCESS; }
Result cuStreamQuery(void* stream) { return SUCCESS; }
// An event is the number of copies before it.
Result cuEventCreate(size_t** event, unsigned flags) { return *event = calloc(1, sizeof(size_t)), SUCCESS; }
Result cuEventRecord(size_t* event, void* stream) {
  pthread_mutex_lock(&lock);
  *event = enqueued;
  pthread_mutex_unlock(&lock);
  return LOG("record event"), SUCCESS;
}
Result cuEventSynchronize(const size_t* event) { return finish(*event), SUCCESS; }
Result cuEventElapsedTime_v2(float* ms, void* start, void* end) { return *ms = 2.5f, SUCCESS; }
Result cuEventDestroy_v2(void* event) { return free(event), LOG("destroy event"), SUCCESS; }
Result cuStreamBeginCapture_v2(void* stream, int mode) { return LOG("begin capture, mode %d", mode), SUCCESS; }
Result cuStreamEndCapture(void* stream, void** graph) { return *graph = (void*)5, LOG("end capture"), SUCCESS; }
Result cuGraphCreate(void** graph, unsigned flags) { return *graph = (void*)7, LOG("create graph"), SUCCESS; }
Result cuGraphConditionalHandleCreate(uint64_t* handle, void* graph, void* context, unsigned value, unsigned flags) {
  if (graph != (void*)7 || context != (void*)1) return INVALID_VALUE;
  return *handle = 77, LOG("create condition, at launch %u, flags %u", value, flags), SUCCESS;
}
typedef struct {
  int type, reserved[3];
  uint64_t handle;
  int kind;
  unsigned size;
  void** bodies;
  void* context;
} ConditionalNode;
Result cuGraphAddNode_v2(void** node, void* graph, void** before, void* edges, size_t count, ConditionalNode* p) {
  static void* body = (void*)8;
  if (graph != (void*)7 || p->type != 13 || p->handle != 77 || p->context != (void*)1) return INVALID_VALUE;
  *node = (void*)9, p->bodies = &body;
  return LOG("add conditional node, kind %d, %u body, after %zu nodes", p->kind, p->size, count), SUCCESS;
}
Result cuStreamBeginCaptureToGraph(void* stream, void* graph, void** before, void* edges, size_t count, int mode) {
  if (graph != (void*)8) return INVALID_VALUE;
  return LOG("begin capture of the body after %zu nodes, mode %d", count, mode), SUCCESS;
}
Result cuGraphInstantiateWithFlags(void** exec, void* graph, unsigned long long flags) {
  return *exec = (void*)6, LOG("instantiate graph %p", graph), SUCCESS;
}
Result cuGraphDestroy(void* graph) { return LOG("destroy graph %p", graph), SUCCESS; }
Result cuGraphExecDestroy(void* exec) { return LOG("destroy executable graph"), SUCCESS; }
Result cuGraphUpload(void* exec, void* stream) { return LOG("upload graph"), SUCCESS; }
Result cuGraphLaunch(void* exec, void* stream) { return LOG("launch graph"), SUCCESS; }

// ---- memory ----

Result cuMemGetInfo_v2(size_t* free, size_t* total) {
  return *free = number("FAKE_FREE", 1000), *total = 2000, SUCCESS;
}
Result cuMemAlloc_v2(Address* address, size_t bytes) {
  if (bytes > 4ull << 30) return OUT_OF_MEMORY;
  // As badly aligned as the driver may: 256 bytes.
  return *address = (Address)aligned_alloc(1024, (bytes / 1024 + 2) * 1024) + 256, SUCCESS;
}
Result cuMemFree_v2(Address address) { return free((void*)(address - 256)), LOG("free"), SUCCESS; }
Result cuMemHostAlloc(void** p, size_t bytes, unsigned flags) {
  *p = malloc(bytes);
  memset(*p, 0xaa, bytes);
  pthread_mutex_lock(&lock);
  locked[locked_count].begin = *p, locked[locked_count++].bytes = bytes;
  pthread_mutex_unlock(&lock);
  return LOG("allocate %zu host bytes, flags %u", bytes, flags), SUCCESS;
}
Result cuMemHostGetDevicePointer_v2(Address* address, void* p, unsigned flags) {
  return *address = (Address)p, SUCCESS;
}
Result cuMemFreeHost(void* p) {
  // What is copied from it later finds nothing of what was there.
  pthread_mutex_lock(&lock);
  for (size_t i = 0; i < locked_count; i++)
    if (locked[i].begin == p) memset(p, 0xbb, locked[i].bytes);
  pthread_mutex_unlock(&lock);
  return LOG("free host"), SUCCESS;
}
Result cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t bytes, void* stream) {
  if (enqueue(to, from, bytes)) return LOG("copy %zu bytes", bytes), SUCCESS;
  return finish(enqueued), memcpy((void*)to, from, bytes), SUCCESS;
}
Result cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, void* stream) {
  return finish(enqueued), memcpy(to, (void*)from, bytes), SUCCESS;
}
Result cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, void* stream) {
  return finish(enqueued), memcpy((void*)to, (void*)from, bytes), SUCCESS;
}
Result cuMemsetD8Async(Address to, unsigned char value, size_t bytes, void* stream) {
  return finish(enqueued), memset((void*)to, value, bytes), SUCCESS;
}
Result cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* address, const uint64_t* dims,
                              const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                              int interleave, int swizzle, int promotion, int fill) {
  LOG("tensor map of type %d, rank %u, dims %lu %lu, stride %lu, box %u %u, element strides %u %u, swizzle %d", type,
      rank, (unsigned long)dims[0], (unsigned long)dims[1], (unsigned long)strides[0], box[0], box[1],
      element_strides[0], element_strides[1], swizzle);
  memset(map, 7, 128);
  return SUCCESS;
}
