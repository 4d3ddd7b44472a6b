// cp.async, mbarriers and bulk tensor copies.
#include "asynchronous.h"

#include <algorithm>
#include <cstring>

#include "instructions.h"
#include "sanitizers.h"

namespace emulator {

// ---- engines ---------------------------------------------------------------------------------------------------

Engines* create_engines() { return new Engines; }

void reset_engines(Engines& engines, uint32_t num_threads) {
  if (!engines.used) return;
  engines.used = false;
  engines.bulk_copies.clear();
  engines.waiting_warps = 0;
  for (uint32_t i = 0; i < num_threads; i++) {
    engines.copies[i].pending.clear();
    engines.copies[i].num_committed = 0;
  }
  for (WarpTensorCore& core : engines.tensor_cores) {
    core.pending.clear();
    core.num_retired = 0;
    core.num_awaited = 0;
    std::fill_n(core.num_issued, LANES, 0u);
    std::fill_n(core.num_committed, LANES, 0u);
  }
  for (Warpgroup& group : engines.warpgroups) {
    group.recent.clear();
    group.num_forgotten = 0;
    std::fill_n(group.num_issued, Warpgroup::WARPS, 0u);
  }
}

const char* unfinished_work(const Engines& engines) {
  if (!engines.used) return nullptr;
  if (!engines.bulk_copies.empty()) return "the block ended before its bulk tensor copies";
  return unfinished_wgmma(engines);
}

// ---- cp.async --------------------------------------------------------------------------------------------------

static void perform(const AsyncCopy& copy) {
  note_write(copy.shared, copy.num_bytes);
  if (copy.valid) {
    note_read(copy.global, copy.num_bytes);
    memcpy(copy.shared, copy.global, copy.num_bytes);
  } else {
    memset(copy.shared, 0, copy.num_bytes);
  }
}

void issue_async_copy(void* shared, const void* global, uint32_t num_bytes, bool valid) {
  for (const void* address : {static_cast<const void*>(shared), global}) {
    if (reinterpret_cast<uintptr_t>(address) % num_bytes != 0) {
      die("cp.async: %s address %p is not a multiple of %u", address == shared ? "shared" : "global", address,
          num_bytes);
    }
  }
  here().block->engines->used = true;
  AsyncCopies& copies = here().block->engines->copies[here().linear];
  AsyncCopy copy{static_cast<char*>(shared), static_cast<const char*>(global), copies.num_committed, num_bytes,
                 valid};
  if (here().block->early) {
    perform(copy);
  } else {
    copies.pending.push_back(copy);
  }
}

void commit_async_copies() {
  here().block->engines->used = true;
  here().block->engines->copies[here().linear].num_committed++;
}

void wait_async_copies(uint32_t max_in_flight) {
  AsyncCopies& copies = here().block->engines->copies[here().linear];
  auto due = [&](const AsyncCopy& copy) { return copy.group + max_in_flight < copies.num_committed; };
  size_t num_due = 0;
  while (num_due < copies.pending.size() && due(copies.pending[num_due])) perform(copies.pending[num_due++]);
  copies.pending.erase(copies.pending.begin(), copies.pending.begin() + static_cast<ptrdiff_t>(num_due));
}

// ---- mbarriers -------------------------------------------------------------------------------------------------

namespace {

// An mbarrier's 64 bits. Poisoned memory and zeros have the wrong mark.
struct Mbarrier {
  static constexpr uint64_t MARK = 1;
  uint64_t mark : 2;
  uint64_t phase : 1;
  uint64_t expected : 20;  // arrivals of a phase
  uint64_t pending : 20;   // arrivals that this phase still waits for
  int64_t bytes : 21;      // of copies that this phase still waits for; negative if they came before they were expected
};
static_assert(sizeof(Mbarrier) == sizeof(uint64_t));

}  // namespace

static Mbarrier load(const uint64_t* barrier) {
  if (reinterpret_cast<uintptr_t>(barrier) % 8 != 0) die("mbarrier %p is not a multiple of 8", barrier);
  Mbarrier value;
  memcpy(&value, barrier, sizeof value);
  if (value.mark != Mbarrier::MARK) die("the mbarrier at %p was not initialised, or was overwritten", barrier);
  return value;
}

// Stores it, and turns the phase when the last arrival and the last byte have come.
static void settle(uint64_t* barrier, Mbarrier value) {
  bool completes = value.pending == 0 && value.bytes == 0;
  if (completes) {
    value.phase ^= 1;
    value.pending = value.expected;
  }
  memcpy(barrier, &value, sizeof value);
  if (completes) wake_mbarrier_waiters(barrier);
}

void initialise_mbarrier(uint64_t* barrier, uint32_t arrivals) {
  if (arrivals == 0 || arrivals >= 1u << 20) die("mbarrier: %u arrivals", arrivals);
  note_write(barrier, sizeof *barrier);
  Mbarrier value{Mbarrier::MARK, 0, arrivals, arrivals, 0};
  memcpy(barrier, &value, sizeof value);
}

void arrive_at_mbarrier(uint64_t* barrier, uint32_t bytes) {
  note_read(barrier, sizeof *barrier);
  order_release(barrier);
  Mbarrier value = load(barrier);
  if (value.pending == 0) die("mbarrier: more than %u arrivals in one phase", static_cast<unsigned>(value.expected));
  if (bytes >= 1u << 20) die("mbarrier: %u bytes in one phase", bytes);
  value.pending--;
  value.bytes += static_cast<int64_t>(bytes);
  settle(barrier, value);
}

void wait_at_mbarrier(const uint64_t* barrier, uint32_t parity) {
  note_read(barrier, sizeof *barrier);
  while (load(barrier).phase == (parity & 1)) wait_for_mbarrier(barrier);
  order_acquire(barrier);
}

static void complete_bytes(uint64_t* barrier, uint32_t bytes) {
  order_release(barrier);
  Mbarrier value = load(barrier);
  value.bytes -= static_cast<int64_t>(bytes);
  settle(barrier, value);
}

// ---- bulk tensor copies ----------------------------------------------------------------------------------------

uint32_t shared_offset(const void* address) {
  ptrdiff_t offset = static_cast<const char*>(address) - here().block->dynamic_shared;
  if (offset < 0 || static_cast<size_t>(offset) >= here().block->dynamic_shared_bytes) {
    die("address %p does not lie in dynamic shared memory", address);
  }
  return static_cast<uint32_t>(offset);
}

static uint32_t box_rows(const TensorMapFields& map) { return map.box[1] * (map.rank == 3 ? map.box[2] : 1); }

// Row (y, z) of the box, zeros where it lies outside the tensor.
static void read_row(const BulkCopy& copy, int64_t y, int64_t z, char* row) {
  const TensorMapFields& map = copy.map;
  memset(row, 0, map.box[0] * map.element_bytes);
  auto dim = [&](int i) { return static_cast<int64_t>(map.dims[i]); };
  bool inside = y >= 0 && y < dim(1) && (map.rank == 2 || (z >= 0 && z < dim(2)));
  int64_t first = std::max<int64_t>(copy.start[0], 0);
  int64_t end = std::min(copy.start[0] + map.box[0], dim(0));
  if (!inside || first >= end) return;
  const char* from = map.address + y * static_cast<int64_t>(map.strides[1]) + first * map.element_bytes;
  if (map.rank == 3) from += z * static_cast<int64_t>(map.strides[2]);
  size_t bytes = static_cast<size_t>(end - first) * map.element_bytes;
  note_read(from, bytes);
  memcpy(row + (first - copy.start[0]) * map.element_bytes, from, bytes);
}

static void write_row(const BulkCopy& copy, uint32_t row_index, const char* row) {
  uint32_t row_bytes = copy.map.box[0] * copy.map.element_bytes;
  uint32_t begin = copy.shared_offset + row_index * row_bytes;
  for (uint32_t i = 0; i < row_bytes; i += 16) {
    uint32_t offset = copy.map.swizzle_128 ? swizzle_128(begin + i) : begin + i;
    note_write(here().block->dynamic_shared + offset, 16);
    memcpy(here().block->dynamic_shared + offset, row + i, 16);
  }
}

static void copy_box(const BulkCopy& copy) {
  constexpr uint32_t MAX_BOX = 256, MAX_ELEMENT_BYTES = 8;
  char row[MAX_BOX * MAX_ELEMENT_BYTES];
  for (uint32_t i = 0; i < box_rows(copy.map); i++) {
    read_row(copy, copy.start[1] + i % copy.map.box[1], copy.start[2] + i / copy.map.box[1], row);
    write_row(copy, i, row);
  }
  complete_bytes(copy.barrier, copy.map.box[0] * copy.map.element_bytes * box_rows(copy.map));
}

static void perform(Engines& engines, const BulkCopy& copy) {
  AsEngine as_engine(engines.copy_order);
  copy_box(copy);
}

static void perform_a_bulk_copy(Engines& engines) {
  uint32_t num_copies = static_cast<uint32_t>(engines.bulk_copies.size());
  uint32_t chosen = order() == Order::BACKWARD ? num_copies - 1 : random_below(num_copies);
  BulkCopy copy = engines.bulk_copies[chosen];
  engines.bulk_copies.erase(engines.bulk_copies.begin() + chosen);
  perform(engines, copy);
}

// ---- the order of asynchronous work ----------------------------------------------------------------------------

// Whether wgmma comes before bulk copies, when both are pending.
static bool prefers_wgmma() { return order() == Order::BACKWARD || random_below(2) == 1; }

bool advance_engines(Engines& engines) {
  bool has_copies = !engines.bulk_copies.empty(), has_wgmma = engines.waiting_warps != 0;
  if (has_wgmma && (!has_copies || prefers_wgmma())) {
    finish_awaited_wgmma(engines, static_cast<uint32_t>(__builtin_ctz(engines.waiting_warps)));
    return true;
  }
  if (has_copies) perform_a_bulk_copy(engines);
  return has_copies;
}

// ---- bulk tensor copies are issued -----------------------------------------------------------------------------

void issue_bulk_copy(void* shared, const void* tensor_map, uint64_t* barrier, const int* start, uint32_t rank) {
  BulkCopy copy{};
  // The map is copied: as a kernel's parameter it dies with the thread.
  memcpy(&copy.map, tensor_map, sizeof copy.map);
  if (copy.map.magic != TensorMapFields::MAGIC) die("tma: %p is not a tensor map", tensor_map);
  if (copy.map.rank != rank) die("tma: a load of rank %u with a map of rank %u", rank, copy.map.rank);
  copy.shared_offset = shared_offset(shared);
  uint32_t alignment = copy.map.swizzle_128 ? 1024 : 128;
  if (copy.shared_offset % alignment != 0) {
    die("tma: shared offset %u is not a multiple of %u", copy.shared_offset, alignment);
  }
  uint32_t bytes = copy.map.box[0] * copy.map.element_bytes * box_rows(copy.map);
  bool fits = copy.shared_offset + bytes <= here().block->dynamic_shared_bytes;
  if (!fits) die("tma: the box reaches past dynamic shared memory");
  copy.barrier = barrier;
  note_read(barrier, sizeof *barrier);
  load(barrier);
  for (uint32_t i = 0; i < rank; i++) copy.start[i] = start[i];
  Engines& all = (*here().block->engines);
  all.used = true;
  order_release(&all.copy_order.issued);
  if (here().block->early) {
    perform(all, copy);
  } else {
    all.bulk_copies.push_back(copy);
  }
}

}  // namespace emulator
