// A libcuda.so.1 whose one device is the emulator, for tests of the host side: memory, argument lists, streams, graphs
// and tensor maps go through the same cudarc calls as on a GPU.
//
//   fake_device.cpp    the device, its context, what it says of itself
//   fake_memory.cpp    allocations, copies, fills
//   fake_streams.cpp   the queue of work, streams, events, graphs
//   fake_launch.cpp    modules, functions, launches, tensor maps
//
// Settings, from the environment:
//
//   FAKE_CUDA_CAPABILITY=90          80, 86, 89, 90, 100 or 120; its limits of shared memory hold
//   FAKE_CUDA_MULTIPROCESSORS=132
//   FAKE_CUDA_MEMORY_MIB=2048
//   FAKE_CUDA_SCHEDULE=forward       or backward, or a number that seeds a random schedule
//   FAKE_CUDA_ASYNC=late             or early: when copies, wgmma and the work of streams take effect; late, a
//                                    dependent launch (programmatic stream serialization) begins before the kernel
//                                    that it follows
//   FAKE_CUDA_FAIL_AFTER=N           launch N, from 1 (a graph's is one), and all that follows fails with
//                                    CUDA_ERROR_ILLEGAL_ADDRESS
//
// What a GPU would fault or hang on aborts the process with a message. It does not emulate concurrency between streams,
// several devices, managed memory, or anything that cudarc does not call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>

#include "fibers.h"

namespace fake {

// The driver's results (CUresult) that can occur here.
enum Result : int {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  INVALID_DEVICE = 101,
  INVALID_CONTEXT = 201,
  INVALID_HANDLE = 400,
  NOT_FOUND = 500,
  NOT_READY = 600,
  ILLEGAL_ADDRESS = 700,
  LAUNCH_OUT_OF_RESOURCES = 701,
  NOT_SUPPORTED = 801,
  STREAM_CAPTURE_UNSUPPORTED = 900,
};

#define DRIVER_API extern "C" __attribute__((visibility("default"))) fake::Result

using DevicePointer = uint64_t;

struct Work {
  std::function<void()> run;
  const emulator::Kernel* kernel = nullptr;
  // Of a dependent launch: what it does before it waits for the previous kernel.
  std::function<void(const emulator::Kernel& previous)> begin = nullptr;
  // Where it was submitted: a launch depends on the one before it there, not on those of others.
  const void* stream = nullptr;
};

struct Device {
  int capability;
  int multiprocessors;
  size_t memory_bytes;
  uint64_t fail_after;  // 0: never
  emulator::Options options;
  int max_dynamic_shared_bytes;  // of a block
  int multiprocessor_shared_bytes;
  int multiprocessor_threads;
};
const Device& device();

// Held by every call; the driver's state is one.
std::recursive_mutex& state_mutex();

// What every call that needs a context returns first: SUCCESS, INVALID_CONTEXT, or the sticky error.
Result context_status();
// Counts a launch against FAKE_CUDA_FAIL_AFTER.
Result count_launch();

// Whether [pointer, pointer + bytes) lies in one live allocation.
bool is_device_memory(DevicePointer pointer, size_t bytes);
// Aborts if something wrote behind an allocation.
void check_allocations(const char* kernel);

struct Stream;
// A null handle, and the driver's two special ones, are the default stream.
Stream& stream_of(void* handle);
bool is_capturing(const Stream& stream);
// Captures the work, or queues it, or does it, as stream and settings say.
Result submit(void* stream, Work work);
// Does all queued work.
void drain();

}  // namespace fake
