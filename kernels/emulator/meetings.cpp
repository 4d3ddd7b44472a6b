// Barriers and warp operations: where the threads of a block wait for each other; and the wait for the previous kernel.
#include "block.h"

namespace emulator {

// ---- barriers --------------------------------------------------------------------------------------------------

static void complete(Block& block, Barrier& barrier) {
  barrier.arrived = 0;
  barrier.num_uses++;
  for (uint32_t warp = 0; warp < block.num_warps; warp++) {
    make_ready(block, warp, barrier.waiting[warp]);
    barrier.waiting[warp] = 0;
  }
}

void leave_barriers(Block& block) {
  Barrier& barrier = block.barriers[0];
  if (barrier.arrived != 0 && barrier.expected == 0 && barrier.arrived == block.live) complete(block, barrier);
}

void barrier_sync(uint32_t id, uint32_t threads) {
  Block& block = this_block();
  Thread& thread = this_thread();
  if (id >= NUM_BARRIERS) die("barrier %u does not exist", id);
  if (threads % LANES != 0) die("barrier %u joins %u threads, not whole warps", id, threads);
  Barrier& barrier = block.barriers[id];
  if (barrier.arrived != 0 && barrier.expected != threads) {
    die("barrier %u is joined with %u threads and with %u", id, barrier.expected, threads);
  }
  char* token = &barrier.tokens[barrier.num_uses % 2];
  order_release(token);
  barrier.expected = threads;
  uint32_t awaited = threads == 0 ? block.live : threads;
  if (++barrier.arrived == awaited) {
    complete(block, barrier);
  } else {
    barrier.waiting[thread.warp] |= 1u << thread.lane;
    thread.barrier_id = id;
    park(block, thread, Wait::BARRIER);
  }
  order_acquire(token);
}

// ---- warp operations -------------------------------------------------------------------------------------------

static void refuse_meeting(const Thread& thread, const Meeting& meeting, uint32_t mask, Operation operation) {
  if (meeting.mask == mask && meeting.operation != operation) {
    die("lanes of warp %u meet in %s and in %s", thread.warp, name_of(meeting.operation), name_of(operation));
  }
  if ((meeting.mask & mask) != 0) {
    die("lane %u calls %s with mask %08x while %s with mask %08x is under way", thread.lane, name_of(operation), mask,
        name_of(meeting.operation), meeting.mask);
  }
}

// The meeting that lanes of `mask` hold already, or a new one.
static uint32_t find_meeting(const Thread& thread, Warp& warp, uint32_t mask, Operation operation) {
  for (uint32_t open = warp.open_meetings; open != 0; open &= open - 1) {
    uint32_t index = static_cast<uint32_t>(__builtin_ctz(open));
    const Meeting& meeting = warp.meetings[index];
    if (meeting.mask == mask && meeting.operation == operation) return index;
    refuse_meeting(thread, meeting, mask, operation);
  }
  uint32_t index = static_cast<uint32_t>(__builtin_ctz(~warp.open_meetings));
  if (index >= Warp::MAX_MEETINGS) die("too many warp operations at once in warp %u", thread.warp);
  warp.open_meetings |= 1u << index;
  warp.meetings[index].mask = mask;
  warp.meetings[index].arrived = 0;
  warp.meetings[index].operation = operation;
  return index;
}

void meet(uint32_t mask, Operation operation, void* argument, Act act) {
  Block& block = this_block();
  Thread& thread = this_thread();
  Warp& warp = block.warps[thread.warp];
  uint32_t own = 1u << thread.lane;
  if ((mask & own) == 0) die("lane %u calls %s with mask %08x, without itself", thread.lane, name_of(operation), mask);
  uint32_t index = find_meeting(thread, warp, mask, operation);
  Meeting& meeting = warp.meetings[index];
  bool orders_memory = operation == Operation::SYNC;
  if (orders_memory) order_release(&meeting);
  meeting.arguments[thread.lane] = argument;
  meeting.arrived |= own;
  bool is_over = false;
  if (meeting.arrived == mask) {
    is_over = act == nullptr || act(mask, meeting.arguments) == Resume::NOW;
    warp.open_meetings &= ~(1u << index);
    if (is_over) make_ready(block, thread.warp, mask & ~own);
  }
  if (!is_over) {
    thread.operation = operation;
    park(block, thread, Wait::WARP_OPERATION);
  }
  if (orders_memory) order_acquire(&meeting);
}

void wake_lanes(uint32_t warp, uint32_t mask) { make_ready(this_block(), warp, mask); }

// ---- mbarriers -------------------------------------------------------------------------------------------------

void wait_for_mbarrier(const uint64_t* barrier) {
  Block& block = this_block();
  Thread& thread = this_thread();
  thread.mbarrier = barrier;
  block.mbarrier_waiters.push_back(&thread);
  park(block, thread, Wait::MBARRIER);
}

void wake_mbarrier_waiters(const uint64_t* barrier) {
  Block& block = this_block();
  size_t num_left = 0;
  for (Thread* thread : block.mbarrier_waiters) {
    if (thread->mbarrier == barrier) {
      make_ready(block, thread->warp, 1u << thread->lane);
    } else {
      block.mbarrier_waiters[num_left++] = thread;
    }
  }
  block.mbarrier_waiters.resize(num_left);
}

// ---- the previous kernel ---------------------------------------------------------------------------------------

void wait_for_previous_kernel() {
  Block& block = this_block();
  Thread& thread = this_thread();
  thread.has_waited = block.has_waited = true;
  if (!block.is_early) return;
  block.num_held++;
  park(block, thread, Wait::PREVIOUS_KERNEL);
  order_acquire(&block.start_token);
}

void let_next_kernel_start() {
  if (!this_thread().has_waited) die("let_next_kernel_start before wait_for_previous_kernel");
}

}  // namespace emulator
