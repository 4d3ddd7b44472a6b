// Gives memcpy and its kin other names, so that the sanitizers, which replace the C library's, do not see those of the
// emulator: it fills shared memory across the red zones of arrays. The compiler then uses the names for the calls that
// it makes up itself, too. Included by the build script ahead of the emulator's sources, and only for a sanitizer.
#pragma once

#include <cstddef>

extern "C" {
void* memcpy(void* to, const void* from, size_t bytes) noexcept asm("emulator_memcpy");
void* memmove(void* to, const void* from, size_t bytes) noexcept asm("emulator_memmove");
void* memset(void* to, int value, size_t bytes) noexcept asm("emulator_memset");
int memcmp(const void* a, const void* b, size_t bytes) noexcept asm("emulator_memcmp");
}
