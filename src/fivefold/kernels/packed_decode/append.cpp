// The newest token of each row into the last exact slot that `spans` says there is.
#include <cstdint>
#include <cstring>

// keys, values: [rows, bytes]; table: [rows, columns, 2], addresses in units of 16 bytes; spans: [rows, span].
extern "C" void append(const char* keys, const char* values, const int64_t* table, int columns, const int* spans,
                       int span, int rows, int bytes) {
  for (int64_t row = 0; row < rows; row++) {
    const int slot = spans[row * span + 4] - 1;
    if (slot < 0) continue;
    const int64_t* page = table + (row * columns + slot / 32) * 2;
    memcpy((char*)(page[0] * 16) + slot % 32 * bytes, keys + row * bytes, bytes);
    memcpy((char*)(page[1] * 16) + slot % 32 * bytes, values + row * bytes, bytes);
  }
}
