// What several kernels are made of.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define EACH(name, count) _Pragma("GCC unroll 16") for (int name = 0; name < count; name++)

namespace {

constexpr int64_t VECTOR_LANES = 16;

typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Whole __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));

inline float from_bf16(uint16_t bits) {
  uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

inline uint16_t to_bf16(float value) {  // rounds to the nearest, ties to even; a NaN from bfloat16 stays one
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof wide);
  return uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
}

inline Lanes read_bf16(const uint16_t* at) {
  return (Lanes)(__builtin_convertvector(*reinterpret_cast<const Halves*>(at), Bits) << 16);
}

inline Lanes rounded_to_bf16(Lanes value) {  // as to_bf16; stays in 32 bits
  const Bits wide = (Bits)value;
  return (Lanes)((wide + 0x7fff + (wide >> 16 & 1)) & 0xffff0000u);
}

inline void store_bf16(Lanes value, uint16_t* to) {
  *reinterpret_cast<Halves*>(to) = __builtin_convertvector((Bits)rounded_to_bf16(value) >> 16, Halves);
}

// e^x of an x up to 88. Relative error below 2e-7; below -87 it is nearly 0.
inline Lanes exponential(Lanes x) {
  const Lanes least = Lanes{} - 87.0f, round = Lanes{} + 12582912.0f;
  const Lanes power = (x < least ? least : x) * 1.44269504f;
  const Lanes whole = (power + round) - round, rest = power - whole;
  const float terms[] = {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f};
  Lanes sum = Lanes{} + 1.54035304e-4f;
  for (float term : terms) sum = sum * rest + term;
  return (Lanes)((Whole)sum + (__builtin_convertvector(whole, Whole) << 23));
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
