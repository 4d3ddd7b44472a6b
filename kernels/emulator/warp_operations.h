// Shuffles, votes and reductions of a warp, below the templates of emulator.h.
#pragma once

#include <cstdint>

namespace emulator {

enum class Shuffle { INDEX, XOR, UP, DOWN };
uint64_t shuffle(uint32_t mask, Shuffle kind, uint64_t bits, int by, int width);
uint32_t ballot(uint32_t mask, bool predicate);

enum class Reduction { ADD, MIN, MAX, MIN_SIGNED, MAX_SIGNED, AND, OR, XOR };
uint32_t reduce(uint32_t mask, Reduction kind, uint32_t value);

void sync_warp(uint32_t mask);

}  // namespace emulator
