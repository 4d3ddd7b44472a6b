// Tests of the fake driver, through the driver's own functions: what it refuses, when work takes effect, and that a
// fault stays. Each runs in a process of its own, with its own settings, since the driver reads those once.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "instructions.h"
#include "sanitizers.h"

using Pointer = uint64_t;

extern "C" {
int cuInit(unsigned);
int cuDevicePrimaryCtxRetain(void**, int);
int cuCtxSetCurrent(void*);
int cuCtxSynchronize();
int cuDeviceGetAttribute(int*, int, int);
int cuMemAlloc_v2(Pointer*, size_t);
int cuMemFree_v2(Pointer);
int cuMemGetInfo_v2(size_t*, size_t*);
int cuMemHostAlloc(void**, size_t, unsigned);
int cuMemcpyHtoD_v2(Pointer, const void*, size_t);
int cuMemcpyHtoDAsync_v2(Pointer, const void*, size_t, void*);
int cuMemcpyDtoH_v2(void*, Pointer, size_t);
int cuMemcpyDtoHAsync_v2(void*, Pointer, size_t, void*);
int cuMemcpyDtoDAsync_v2(Pointer, Pointer, size_t, void*);
int cuMemsetD32Async(Pointer, unsigned, size_t, void*);
int cuStreamCreate(void**, unsigned);
int cuStreamSynchronize(void*);
int cuStreamQuery(void*);
int cuStreamBeginCapture_v2(void*, int);
int cuStreamEndCapture(void*, void**);
int cuStreamIsCapturing(void*, int*);
int cuGraphInstantiateWithFlags(void**, void*, unsigned long long);
int cuGraphLaunch(void*, void*);
int cuModuleLoadData(void**, const void*);
int cuModuleGetFunction(void**, void*, const char*);
int cuFuncSetAttribute(void*, int, int);
int cuLaunchKernelEx(const struct LaunchConfig*, void*, void**, void**);
int cuLaunchKernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
int cuTensorMapEncodeTiled(void*, int, unsigned, void*, const uint64_t*, const uint64_t*, const uint32_t*,
                           const uint32_t*, int, int, int, int);
}

// ---- helpers ---------------------------------------------------------------------------------------------------

// CUDA's numbers, written once more on purpose: these tests see the driver as a program that links it does.
enum : int {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  INVALID_CONTEXT = 201,
  NOT_FOUND = 500,
  NOT_READY = 600,
  ILLEGAL_ADDRESS = 700,
  LAUNCH_OUT_OF_RESOURCES = 701,
  NOT_SUPPORTED = 801,
  STREAM_CAPTURE_UNSUPPORTED = 900,
};

static int num_failures;

static void expect_at(int line, const char* what, long long got, long long wanted) {
  if (got == wanted) return;
  printf("driver_tests.cpp:%d: %s is %lld, not %lld\n", line, what, got, wanted);
  num_failures++;
}
#define EXPECT(expression, wanted) expect_at(__LINE__, #expression, static_cast<long long>(expression), wanted)

static void* load_kernel(const char* name) {
  void *module, *function = nullptr;
  EXPECT(cuModuleLoadData(&module, ""), SUCCESS);
  EXPECT(cuModuleGetFunction(&function, module, name), SUCCESS);
  return function;
}

static void enter_context() {
  void* context;
  EXPECT(cuInit(0), SUCCESS);
  EXPECT(cuDevicePrimaryCtxRetain(&context, 0), SUCCESS);
  EXPECT(cuCtxSetCurrent(context), SUCCESS);
}

constexpr int COUNT = 64;

struct LaunchAttribute {  // CUlaunchAttribute
  int id;
  char padding[4];
  int value[16];
};
struct LaunchConfig {  // CUlaunchConfig
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  LaunchAttribute* attributes;
  unsigned num_attributes;
};

// A launch that may start while the kernel before it runs.
static int launch_dependent(const char* name, Pointer in, Pointer out, void* stream) {
  constexpr int PROGRAMMATIC_STREAM_SERIALIZATION = 6;
  int count = COUNT;
  void* arguments[] = {&in, &count, &out};
  LaunchAttribute attribute{PROGRAMMATIC_STREAM_SERIALIZATION, {}, {1}};
  LaunchConfig config{{1, 1, 1}, {COUNT, 1, 1}, 0, stream, &attribute, 1};
  return cuLaunchKernelEx(&config, load_kernel(name), arguments, nullptr);
}

// `reverse_after_exit` over COUNT numbers.
struct Reverse {
  void* function = load_kernel("reverse_after_exit");
  Pointer in = 0, out = 0;
  int count = COUNT;

  Reverse() {
    std::vector<int> numbers(COUNT);
    for (int i = 0; i < COUNT; i++) numbers[static_cast<size_t>(i)] = i;
    EXPECT(cuMemAlloc_v2(&in, COUNT * sizeof(int)), SUCCESS);
    EXPECT(cuMemAlloc_v2(&out, COUNT * sizeof(int)), SUCCESS);
    EXPECT(cuMemcpyHtoD_v2(in, numbers.data(), COUNT * sizeof(int)), SUCCESS);
  }
  int launch(void* stream, unsigned threads = 256, unsigned shared_bytes = 0, unsigned blocks = 1) {
    void* arguments[] = {&in, &count, &out};
    return cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, shared_bytes, stream, arguments, nullptr);
  }
  int first() {
    int value = -1;
    EXPECT(cuMemcpyDtoH_v2(&value, out, sizeof value), SUCCESS);
    return value;
  }
};

// ---- tests -----------------------------------------------------------------------------------------------------

static void refuses_without_a_context() {
  Pointer pointer;
  EXPECT(cuMemAlloc_v2(&pointer, 16), INVALID_CONTEXT);
  EXPECT(cuCtxSynchronize(), INVALID_CONTEXT);
}

static void describes_the_device() {
  int value;
  const int wanted[][2] = {{75, 8}, {76, 6}, {16, 7}, {97, 99 * 1024}, {81, 100 * 1024}, {39, 1536}, {10, 32}};
  for (auto [attribute, number] : wanted) {
    EXPECT(cuDeviceGetAttribute(&value, attribute, 0), SUCCESS);
    EXPECT(value, number);
  }
}

static void checks_memory() {
  Pointer a, b;
  char host[64] = {};
  EXPECT(cuMemAlloc_v2(&a, 0), INVALID_VALUE);
  EXPECT(cuMemAlloc_v2(&a, 64), SUCCESS);
  EXPECT(cuMemAlloc_v2(&b, 32), SUCCESS);
  EXPECT(a % 256, 0);
  EXPECT(cuMemcpyHtoD_v2(a + 32, host, 32), SUCCESS);
  EXPECT(cuMemcpyHtoD_v2(a + 33, host, 32), INVALID_VALUE);
  EXPECT(cuMemcpyDtoH_v2(host, b, 33), INVALID_VALUE);
  EXPECT(cuMemcpyDtoDAsync_v2(b, a, 64, nullptr), INVALID_VALUE);
  EXPECT(cuMemsetD32Async(b, 5, 8, nullptr), SUCCESS);
  EXPECT(cuMemsetD32Async(b, 5, 9, nullptr), INVALID_VALUE);
  EXPECT(cuMemsetD32Async(b + 2, 5, 1, nullptr), INVALID_VALUE);
  EXPECT(cuMemFree_v2(a + 1), INVALID_VALUE);
  EXPECT(cuMemFree_v2(a), SUCCESS);
  EXPECT(cuMemFree_v2(a), INVALID_VALUE);
  EXPECT(cuMemcpyHtoD_v2(a, host, 1), INVALID_VALUE);
  size_t free_bytes, total_bytes;
  EXPECT(cuMemGetInfo_v2(&free_bytes, &total_bytes), SUCCESS);
  EXPECT(total_bytes, 3 << 20);
  EXPECT(free_bytes, (3 << 20) - 32);
  EXPECT(cuMemAlloc_v2(&a, free_bytes + 1), OUT_OF_MEMORY);
}

static void checks_launches() {
  constexpr int MAX_DYNAMIC_SHARED_SIZE_BYTES = 8;
  Reverse reverse;
  EXPECT(reverse.launch(nullptr, 256, 48 * 1024 + 1), INVALID_VALUE);
  EXPECT(cuFuncSetAttribute(reverse.function, MAX_DYNAMIC_SHARED_SIZE_BYTES, 227 * 1024 + 1), INVALID_VALUE);
  EXPECT(cuFuncSetAttribute(reverse.function, MAX_DYNAMIC_SHARED_SIZE_BYTES, 227 * 1024), SUCCESS);
  EXPECT(reverse.launch(nullptr, 256, 227 * 1024), SUCCESS);
  EXPECT(reverse.launch(nullptr, 257), LAUNCH_OUT_OF_RESOURCES);
  EXPECT(reverse.launch(nullptr, 1025), INVALID_VALUE);
  EXPECT(reverse.launch(nullptr, 0), INVALID_VALUE);
  EXPECT(reverse.launch(nullptr, 256, 0, 0), INVALID_VALUE);
  EXPECT(reverse.first(), COUNT - 1);
  void *module, *function;
  EXPECT(cuModuleLoadData(&module, ""), SUCCESS);
  EXPECT(cuModuleGetFunction(&function, module, "no_such_kernel"), NOT_FOUND);
}

// Work is done where something waits for it, and a copy from pinned memory reads it then.
static void works_late() {
  Reverse reverse;
  void *stream, *pinned;
  EXPECT(cuStreamCreate(&stream, 0), SUCCESS);
  EXPECT(cuMemHostAlloc(&pinned, COUNT * sizeof(int), 0), SUCCESS);
  int* numbers = static_cast<int*>(pinned);
  numbers[COUNT - 1] = 100;
  EXPECT(cuMemcpyHtoDAsync_v2(reverse.in, numbers, COUNT * sizeof(int), stream), SUCCESS);
  EXPECT(reverse.launch(stream), SUCCESS);
  EXPECT(cuMemcpyDtoHAsync_v2(numbers, reverse.out, sizeof(int), stream), SUCCESS);
  numbers[0] = 0, numbers[COUNT - 1] = 200;
  EXPECT(cuStreamQuery(stream), NOT_READY);
  EXPECT(cuStreamSynchronize(stream), SUCCESS);
  EXPECT(numbers[0], 200);
  EXPECT(cuStreamQuery(stream), SUCCESS);
}

static void works_early() {
  Reverse reverse;
  void* pinned;
  EXPECT(cuMemHostAlloc(&pinned, sizeof(int), 0), SUCCESS);
  EXPECT(reverse.launch(nullptr), SUCCESS);
  EXPECT(cuMemcpyDtoHAsync_v2(pinned, reverse.out, sizeof(int), nullptr), SUCCESS);
  EXPECT(*static_cast<int*>(pinned), COUNT - 1);
}

static void replays_graphs() {
  Reverse reverse;
  void *stream, *graph, *executable;
  int is_capturing;
  EXPECT(cuStreamBeginCapture_v2(nullptr, 0), STREAM_CAPTURE_UNSUPPORTED);
  EXPECT(cuStreamCreate(&stream, 0), SUCCESS);
  EXPECT(cuStreamBeginCapture_v2(stream, 0), SUCCESS);
  EXPECT(cuStreamIsCapturing(stream, &is_capturing), SUCCESS);
  EXPECT(is_capturing, 1);
  EXPECT(reverse.launch(stream), SUCCESS);
  EXPECT(cuStreamSynchronize(stream), STREAM_CAPTURE_UNSUPPORTED);
  EXPECT(cuStreamEndCapture(stream, &graph), SUCCESS);
  EXPECT(cuGraphInstantiateWithFlags(&executable, graph, 0), SUCCESS);
  EXPECT(reverse.first(), -1);
  for (int number : {7, 8}) {
    EXPECT(cuMemcpyHtoD_v2(reverse.in + (COUNT - 1) * sizeof(int), &number, sizeof number), SUCCESS);
    EXPECT(cuGraphLaunch(executable, stream), SUCCESS);
    EXPECT(cuStreamSynchronize(stream), SUCCESS);
    EXPECT(reverse.first(), number);
  }
}

// A kernel that reads before it waits reads what was there before the kernel that it follows, from a graph as well.
static void begins_dependent_launches_early() {
  if (emulator::CHECKS_ORDER) return;  // ThreadSanitizer reports it
  Reverse reverse;
  Pointer back;
  void *stream, *graph, *executable;
  int value = 7;
  auto first = [&] {
    EXPECT(cuMemcpyDtoH_v2(&value, back, sizeof value), SUCCESS);
    return value;
  };
  EXPECT(cuMemAlloc_v2(&back, COUNT * sizeof(int)), SUCCESS);
  EXPECT(cuStreamCreate(&stream, 0), SUCCESS);
  EXPECT(cuMemsetD32Async(reverse.out, 7, COUNT, stream), SUCCESS);
  EXPECT(reverse.launch(stream, COUNT), SUCCESS);
  EXPECT(launch_dependent("chained_reads_early", reverse.out, back, stream), SUCCESS);
  EXPECT(first(), 7);
  EXPECT(reverse.launch(stream, COUNT), SUCCESS);
  EXPECT(launch_dependent("chained_right", reverse.out, back, stream), SUCCESS);
  EXPECT(first(), 0);
  // Behind a fill it is a launch like any other.
  EXPECT(cuMemsetD32Async(reverse.out, 8, COUNT, stream), SUCCESS);
  EXPECT(launch_dependent("chained_reads_early", reverse.out, back, stream), SUCCESS);
  EXPECT(first(), 8);
  EXPECT(cuStreamBeginCapture_v2(stream, 0), SUCCESS);
  EXPECT(reverse.launch(stream, COUNT), SUCCESS);
  EXPECT(launch_dependent("chained_reads_early", reverse.out, back, stream), SUCCESS);
  EXPECT(cuStreamEndCapture(stream, &graph), SUCCESS);
  EXPECT(cuGraphInstantiateWithFlags(&executable, graph, 0), SUCCESS);
  EXPECT(cuGraphLaunch(executable, stream), SUCCESS);
  EXPECT(first(), 8);
}

static void refuses_dependent_launches_before_hopper() {
  Reverse reverse;
  EXPECT(launch_dependent("chained_right", reverse.in, reverse.out, nullptr), NOT_SUPPORTED);
}

static void stays_failed() {
  Reverse reverse;
  EXPECT(reverse.launch(nullptr), SUCCESS);
  EXPECT(reverse.first(), COUNT - 1);
  EXPECT(reverse.launch(nullptr), ILLEGAL_ADDRESS);
  EXPECT(reverse.launch(nullptr), ILLEGAL_ADDRESS);
  EXPECT(cuCtxSynchronize(), ILLEGAL_ADDRESS);
  EXPECT(cuMemFree_v2(reverse.in), ILLEGAL_ADDRESS);
}

namespace {

struct MapCase {
  int wanted;
  unsigned rank;
  uint64_t address_offset;
  uint64_t dims[3], strides[2];
  uint32_t box[3], element_strides[3];
  int interleave, swizzle;
};

}  // namespace

static void checks_tensor_maps() {
  constexpr int BFLOAT16 = 9;
  const MapCase cases[] = {
      {SUCCESS, 2, 0, {64, 8}, {128}, {64, 8}, {1, 1}, 0, 3},
      {SUCCESS, 2, 16, {64, 7}, {128}, {64, 256}, {1, 1}, 0, 3},
      {SUCCESS, 3, 0, {64, 4, 2}, {128, 512}, {64, 64, 1}, {1, 1, 1}, 0, 3},
      {SUCCESS, 2, 0, {100, 4}, {208}, {128, 1}, {1, 1}, 0, 0},
      {INVALID_VALUE, 2, 8, {64, 7}, {128}, {64, 8}, {1, 1}, 0, 3},             // address not a multiple of 16
      {INVALID_VALUE, 2, 0, {60, 8}, {120}, {64, 8}, {1, 1}, 0, 3},             // nor is the stride
      {INVALID_VALUE, 3, 0, {64, 2, 2}, {128, 320}, {64, 8, 1}, {1, 1, 1}, 0, 3},  // not a multiple of the first
      {INVALID_VALUE, 2, 0, {64, 8}, {1ull << 40}, {64, 8}, {1, 1}, 0, 3},
      {INVALID_VALUE, 2, 0, {128, 4}, {256}, {128, 4}, {1, 1}, 0, 3},           // rows wider than the swizzle
      {INVALID_VALUE, 2, 0, {64, 8}, {128}, {4, 8}, {1, 1}, 0, 0},              // rows narrower than 16 bytes
      {INVALID_VALUE, 2, 0, {64, 8}, {128}, {64, 257}, {1, 1}, 0, 3},
      {INVALID_VALUE, 2, 0, {64, 8}, {128}, {64, 0}, {1, 1}, 0, 3},
      {INVALID_VALUE, 2, 0, {64, 0}, {128}, {64, 8}, {1, 1}, 0, 3},
      {INVALID_VALUE, 2, 0, {64, 8}, {128}, {64, 8}, {1, 0}, 0, 3},
      {INVALID_VALUE, 0, 0, {64, 8}, {128}, {64, 8}, {1, 1}, 0, 3},
      {INVALID_VALUE, 2, 0, {64, 8}, {128}, {64, 8}, {1, 1}, 0, 7},
      {NOT_SUPPORTED, 2, 0, {64, 8}, {128}, {32, 8}, {1, 1}, 0, 2},             // not emulated
  };
  Pointer memory;
  EXPECT(cuMemAlloc_v2(&memory, 1024), SUCCESS);
  TensorMap map[2];
  auto encode = [&](const MapCase& c, void* to) {
    return cuTensorMapEncodeTiled(to, BFLOAT16, c.rank, reinterpret_cast<void*>(memory + c.address_offset), c.dims,
                                  c.strides, c.box, c.element_strides, c.interleave, c.swizzle, 0, 0);
  };
  for (const MapCase& c : cases) expect_at(static_cast<int>(&c - cases), "tensor map", encode(c, map), c.wanted);
  EXPECT(encode(cases[0], reinterpret_cast<char*>(map) + 32), INVALID_VALUE);
}

// ---- running them ----------------------------------------------------------------------------------------------

namespace {

struct Test {
  const char* name;
  void (*run)();
  std::vector<const char*> settings;  // NAME=VALUE
  bool has_context = true;
};

}  // namespace

static bool passes(const Test& test) {
  fflush(stdout);
  pid_t child = fork();
  if (child == 0) {
    for (const char* setting : test.settings) putenv(const_cast<char*>(setting));
    if (test.has_context) enter_context();
    test.run();
    fflush(stdout);
    _exit(num_failures != 0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

int main() {
  const Test tests[] = {
      {"refuses_without_a_context", refuses_without_a_context, {}, false},
      {"describes_the_device", describes_the_device, {"FAKE_CUDA_CAPABILITY=86", "FAKE_CUDA_MULTIPROCESSORS=7"}},
      {"checks_memory", checks_memory, {"FAKE_CUDA_MEMORY_MIB=3"}},
      {"checks_launches", checks_launches, {}},
      {"works_late", works_late, {"FAKE_CUDA_ASYNC=late"}},
      {"works_early", works_early, {"FAKE_CUDA_ASYNC=early"}},
      {"replays_graphs", replays_graphs, {}},
      {"begins_dependent_launches_early", begins_dependent_launches_early, {}},
      {"refuses_dependent_launches_before_hopper", refuses_dependent_launches_before_hopper,
       {"FAKE_CUDA_CAPABILITY=80"}},
      {"stays_failed", stays_failed, {"FAKE_CUDA_FAIL_AFTER=2"}},
      {"checks_tensor_maps", checks_tensor_maps, {}},
  };
  int num_failed = 0;
  for (const Test& test : tests) {
    bool ok = passes(test);
    printf("%-6s driver: %s\n", ok ? "ok" : "FAILED", test.name);
    num_failed += !ok;
  }
  return num_failed != 0;
}
