// The functions of plain_memory.h, byte by byte: the sanitizers cost more than they do. Compiled so that their loops
// do not become calls of themselves.
#include <cstddef>

extern "C" {

void* emulator_memcpy(void* to, const void* from, size_t bytes) {
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  for (size_t i = 0; i < bytes; i++) out[i] = in[i];
  return to;
}

void* emulator_memmove(void* to, const void* from, size_t bytes) {
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  if (out <= in) return emulator_memcpy(to, from, bytes);
  for (size_t i = bytes; i > 0; i--) out[i - 1] = in[i - 1];
  return to;
}

void* emulator_memset(void* to, int value, size_t bytes) {
  char* out = static_cast<char*>(to);
  for (size_t i = 0; i < bytes; i++) out[i] = static_cast<char>(value);
  return to;
}

int emulator_memcmp(const void* a, const void* b, size_t bytes) {
  const unsigned char* left = static_cast<const unsigned char*>(a);
  const unsigned char* right = static_cast<const unsigned char*>(b);
  for (size_t i = 0; i < bytes; i++) {
    if (left[i] != right[i]) return left[i] < right[i] ? -1 : 1;
  }
  return 0;
}

}  // extern "C"
