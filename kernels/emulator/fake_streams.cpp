// The queue of work, streams, events and graphs.
//
// All streams share one queue, in the order of submission, which is an order that any program may observe. Early, work
// is done when it is submitted; late, when something waits for it, so that a host that forgets to wait reads stale
// memory.
#include <chrono>
#include <deque>
#include <memory>
#include <vector>

#include "fake_driver.h"

namespace fake {

struct Graph {
  std::vector<Work> work;
};

struct Stream {
  std::unique_ptr<Graph> captured;  // while a capture is under way
};

namespace {

struct Event {
  bool recorded = false;
  double time_ms = 0.0;
};

struct Queue {
  std::deque<Work> work;
};

}  // namespace

static Queue& queue() {
  static Queue queue;
  return queue;
}

Stream& stream_of(void* handle) {
  static Stream default_stream;
  constexpr uintptr_t LAST_SPECIAL_HANDLE = 2;  // CU_STREAM_LEGACY is 1, CU_STREAM_PER_THREAD 2
  if (reinterpret_cast<uintptr_t>(handle) <= LAST_SPECIAL_HANDLE) return default_stream;
  return *static_cast<Stream*>(handle);
}

bool is_capturing(const Stream& stream) { return stream.captured != nullptr; }

void drain() {
  Queue& all = queue();
  while (!all.work.empty()) {
    Work work = std::move(all.work.front());
    all.work.pop_front();
    if (work.kernel != nullptr && !all.work.empty()) {
      Work& next = all.work.front();
      if (next.begin != nullptr && next.stream == work.stream) next.begin(*work.kernel);
    }
    work.run();
  }
}

Result submit(void* handle, Work work) {
  Stream& stream = stream_of(handle);
  if (is_capturing(stream)) {
    stream.captured->work.push_back(std::move(work));
    return SUCCESS;
  }
  work.stream = &stream;
  queue().work.push_back(std::move(work));
  if (device().options.asynchrony == emulator::Asynchrony::EARLY) drain();
  return SUCCESS;
}

static double now_ms() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// What waiting for a stream does: everything that was submitted.
static Result wait_for(void* handle) {
  std::lock_guard lock(state_mutex());
  if (Result status = context_status()) return status;
  if (is_capturing(stream_of(handle))) return STREAM_CAPTURE_UNSUPPORTED;
  drain();
  return SUCCESS;
}

}  // namespace fake

using namespace fake;

// ---- streams ---------------------------------------------------------------------------------------------------

DRIVER_API cuStreamCreate(void** stream, unsigned) {
  if (Result status = context_status()) return status;
  *stream = new Stream;
  return SUCCESS;
}
DRIVER_API cuStreamCreateWithPriority(void** stream, unsigned flags, int) { return cuStreamCreate(stream, flags); }
DRIVER_API cuStreamDestroy_v2(void* stream) {
  std::lock_guard lock(state_mutex());
  drain();
  delete static_cast<Stream*>(stream);
  return SUCCESS;
}
DRIVER_API cuStreamSynchronize(void* stream) { return wait_for(stream); }
DRIVER_API cuStreamQuery(void* stream) {
  std::lock_guard lock(state_mutex());
  if (Result status = context_status()) return status;
  if (is_capturing(stream_of(stream))) return STREAM_CAPTURE_UNSUPPORTED;
  // Late work is not ready when first asked for, and ready when asked again.
  bool is_ready = queue().work.empty();
  drain();
  return is_ready ? SUCCESS : NOT_READY;
}
DRIVER_API cuStreamWaitEvent(void*, void*, unsigned) { return context_status(); }
DRIVER_API cuLaunchHostFunc(void* stream, void (*function)(void*), void* data) {
  std::lock_guard lock(state_mutex());
  if (Result status = context_status()) return status;
  return submit(stream, {[=] { function(data); }});
}

// ---- events ----------------------------------------------------------------------------------------------------

DRIVER_API cuEventCreate(void** event, unsigned) {
  if (Result status = context_status()) return status;
  *event = new Event;
  return SUCCESS;
}
DRIVER_API cuEventDestroy_v2(void* event) {
  std::lock_guard lock(state_mutex());
  drain();
  delete static_cast<Event*>(event);
  return SUCCESS;
}
DRIVER_API cuEventRecord(void* handle, void* stream) {
  std::lock_guard lock(state_mutex());
  if (Result status = context_status()) return status;
  Event* event = static_cast<Event*>(handle);
  return submit(stream, {[=] {
    event->recorded = true;
    event->time_ms = now_ms();
  }});
}
DRIVER_API cuEventSynchronize(void*) { return wait_for(nullptr); }
DRIVER_API cuEventQuery(void*) { return cuStreamQuery(nullptr); }
DRIVER_API cuEventElapsedTime_v2(float* elapsed_ms, void* start, void* end) {
  std::lock_guard lock(state_mutex());
  if (Result status = context_status()) return status;
  const Event& first = *static_cast<Event*>(start);
  const Event& last = *static_cast<Event*>(end);
  if (!first.recorded || !last.recorded) return queue().work.empty() ? INVALID_HANDLE : NOT_READY;
  *elapsed_ms = static_cast<float>(last.time_ms - first.time_ms);
  return SUCCESS;
}
DRIVER_API cuEventElapsedTime(float* elapsed_ms, void* start, void* end) {
  return cuEventElapsedTime_v2(elapsed_ms, start, end);
}

// ---- graphs ----------------------------------------------------------------------------------------------------

DRIVER_API cuStreamBeginCapture_v2(void* handle, int) {
  std::lock_guard lock(state_mutex());
  if (Result status = context_status()) return status;
  Stream& stream = stream_of(handle);
  bool is_default = &stream == &stream_of(nullptr);
  if (is_default || is_capturing(stream)) return STREAM_CAPTURE_UNSUPPORTED;
  stream.captured = std::make_unique<Graph>();
  return SUCCESS;
}
DRIVER_API cuStreamEndCapture(void* handle, void** graph) {
  std::lock_guard lock(state_mutex());
  Stream& stream = stream_of(handle);
  if (!is_capturing(stream)) return INVALID_VALUE;
  *graph = stream.captured.release();
  return context_status();
}
DRIVER_API cuStreamIsCapturing(void* handle, int* status) {
  std::lock_guard lock(state_mutex());
  *status = is_capturing(stream_of(handle));
  return SUCCESS;
}
DRIVER_API cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
  if (Result status = context_status()) return status;
  *executable = new Graph(*static_cast<Graph*>(graph));
  return SUCCESS;
}
DRIVER_API cuGraphUpload(void*, void*) { return context_status(); }
DRIVER_API cuGraphLaunch(void* executable, void* stream) {
  std::lock_guard lock(state_mutex());
  if (Result status = context_status()) return status;
  if (Result status = count_launch()) return status;
  for (const Work& work : static_cast<Graph*>(executable)->work) submit(stream, work);
  return SUCCESS;
}
DRIVER_API cuGraphDestroy(void* graph) {
  delete static_cast<Graph*>(graph);
  return SUCCESS;
}
DRIVER_API cuGraphExecDestroy(void* executable) { return cuGraphDestroy(executable); }
