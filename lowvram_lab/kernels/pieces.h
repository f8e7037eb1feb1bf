// What several kernels are made of.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__) && defined(__AVX512VL__)
#include <immintrin.h>
#endif

#define EACH(name, count) _Pragma("GCC unroll 16") for (int name = 0; name < count; name++)

namespace {

inline float from_bf16(uint16_t bits) {
  uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

inline uint16_t to_bf16(float value) {  // rounds to the nearest, ties to even; no value here is NaN
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof wide);
  return uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
}

#if defined(__AVX512BF16__) && defined(__AVX512VL__)

// ROWS rows times a matrix, both in pairs of bfloat16: sums[row] += sum over pairs of rows[row][pair] . matrix[pair], of
// which a row is so many vectors of 16 columns.
template <int ROWS, int VECTORS>
inline void add_pairs(__m512 (&sums)[ROWS][VECTORS], const uint32_t* rows, int64_t row_step, const uint32_t* matrix,
                      int64_t matrix_step, int64_t pairs) {
  for (int64_t pair = 0; pair < pairs; pair++) {
    __m512bh read[VECTORS];
    EACH(vector, VECTORS) read[vector] = (__m512bh)_mm512_loadu_si512(matrix + pair * matrix_step + 16 * vector);
    EACH(row, ROWS) {
      const __m512bh x = (__m512bh)_mm512_set1_epi32(int(rows[row * row_step + pair]));
      EACH(vector, VECTORS) sums[row][vector] = _mm512_dpbf16_ps(sums[row][vector], read[vector], x);
    }
  }
}

#endif

}  // namespace
