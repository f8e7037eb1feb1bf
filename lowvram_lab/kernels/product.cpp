// Products of a few rows with a quantised weight, read as its codes lie: the weight is never dequantised.
//
// A row of the weight is a stream of codes; 32 of them are a unit. Integers of 2 to 6 bits follow one another, the first
// in the lowest bits; int8 codes are bytes; of nf4 codes two share a byte, the first in its upper half. Groups of codes
// share a scale, and perhaps a zero: weight = code * scale + zero. A group is some units, or half of one. Of one row of the
// input and of several the sums are taken in the same order: a row's result does not depend on how many there are.
//
// Derived in: notebooks/06_the_engine.ipynb

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "pieces.h"
#include "shim.h"

#if defined(__AVX512VBMI__) && defined(__AVX512BF16__) && defined(__AVX512VL__)
#define LOWVRAM_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__)
#define LOWVRAM_AVX2 1
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t UNIT = 32;        // codes
constexpr int64_t AHEAD = 8192;     // bytes
constexpr int LINE = 64;            // bytes that memory is read in
constexpr int64_t SMALL = 1 << 16;  // codes; a thread's start costs more than so few take
constexpr int64_t TILE = 16;        // rows of the weight that a thread takes at a time

// nf4's values: Dettmers et al. 2023, arXiv:2305.14314, appendix E.
constexpr float NF4[16] = {-1.0f,
                           -0.6961928009986877f,
                           -0.5250730514526367f,
                           -0.39491748809814453f,
                           -0.28444138169288635f,
                           -0.18477343022823334f,
                           -0.09105003625154495f,
                           0.0f,
                           0.07958029955625534f,
                           0.16093020141124725f,
                           0.24611230194568634f,
                           0.33791524171829224f,
                           0.44070982933044434f,
                           0.5626170039176941f,
                           0.7229568362236023f,
                           1.0f};

enum ScaleKind : int64_t { BFLOAT16, FLOAT32, WITH_ZEROS };

struct Weight {
  const uint8_t* codes;
  const void* scale;  // (features, groups); with zeros (groups, features, 2) in bfloat16
  int64_t kind, features, columns, group;
  int64_t group_step;  // with zeros, elements from a group to the next: a weight may be part of a wider one
  int64_t out_step;    // from a row of the product to the next: other products may lie beside it
  const uint8_t* next = nullptr;  // codes that are read after these
  int64_t groups() const { return columns / group; }
  bool halves() const { return group == UNIT / 2 && columns % UNIT == 0; }  // else a whole row of int8
  // What is read when so many bytes more have been: codes of this weight, whose rows have row_bytes, or of the next.
  const uint8_t* behind(const uint8_t* at, int64_t more, int64_t row_bytes) const {
    const uint8_t* end = codes + features * row_bytes;
    return next && at + more >= end ? next + (at + more - end) : at + more;
  }
  const uint32_t* pairs(int64_t of_group, int64_t feature) const {
    return reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(scale) + of_group * group_step) + feature;
  }
};

int64_t units_of(int64_t codes) { return (codes + UNIT - 1) / UNIT; }

// How codes of a format lie and what they are: BYTES of a unit, OFFSET of a code from its value. A unit that is read as
// PADDED may be read beyond its end.
template <int WIDTH>
struct Integer {
  static constexpr int BITS = WIDTH, BYTES = 4 * WIDTH, OFFSET = 1 << (WIDTH - 1);
  static constexpr bool MAY_HAVE_HALVES = WIDTH != 4;
};
struct Nf4 {
  static constexpr int BITS = 4, BYTES = 16, OFFSET = 0;
  static constexpr bool MAY_HAVE_HALVES = false;
};
struct Int8 {
  static constexpr int BITS = 8, BYTES = 32, OFFSET = 0;
  static constexpr bool MAY_HAVE_HALVES = true;
};

// Where eight codes of a format begin, in bits of the BITS bytes that hold them.
template <class FORMAT>
constexpr int bit_of(int code) {
  return FORMAT::BITS * code;
}
template <>
constexpr int bit_of<Nf4>(int code) {
  return 4 * (code ^ 1);
}

// Eight codes of a unit in the lowest bits; no byte outside of the unit is touched.
template <class FORMAT>
uint64_t eight_codes(const uint8_t* unit, int eight) {
  const int wanted = FORMAT::BITS * eight, last = FORMAT::BYTES - 8, first = wanted < last ? wanted : last;
  uint64_t bytes;
  std::memcpy(&bytes, unit + first, sizeof bytes);
  return bytes >> (8 * (wanted - first));
}

#if defined(LOWVRAM_AVX512)

constexpr int LANES = 16;
using Sum = __m512;
using Input = uint16_t;  // bfloat16

Sum load(const float* at) { return _mm512_loadu_ps(at); }
Sum zeros() { return _mm512_setzero_ps(); }
Sum add_scaled(Sum to, Sum what, float by) { return _mm512_fmadd_ps(what, _mm512_set1_ps(by), to); }
float total(Sum of) { return _mm512_reduce_add_ps(of); }

// A row in bfloat16; behind its last value zeros stay.
void round_row(const float* from, int64_t columns, uint32_t* to) {
  int64_t at = 0;
  for (; at + UNIT <= columns; at += UNIT, to += UNIT / 2)
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(load(from + at + LANES), load(from + at)));
  if (at == columns) return;
  float last[UNIT] = {};
  std::memcpy(last, from + at, (columns - at) * sizeof(float));
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(load(last + LANES), load(last)));
}

void round_row(const uint16_t* from, int64_t columns, uint32_t* to) { std::memcpy(to, from, columns * sizeof(uint16_t)); }

void keep_unit(__m512i pairs, Input* to, float* sums) {
  _mm512_storeu_si512(to, pairs);
  const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))));
  _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), _mm512_add_ps(even, odd)));
}
void round_unit(const float* from, Input* to, float* sums) {
  keep_unit((__m512i)_mm512_cvtne2ps_pbh(load(from + LANES), load(from)), to, sums);
}
void round_unit(const uint16_t* from, Input* to, float* sums) { keep_unit(_mm512_loadu_si512(from), to, sums); }

// Codes of less than a byte: each in 16 bits of its own.
template <class FORMAT>
struct Spread {
  __m512i places, shifts;
  Spread() {
    alignas(64) uint8_t place[64];
    alignas(64) uint16_t shift[32];
    for (int i = 0; i < UNIT; i++) {
      const int bit = FORMAT::BITS * (i & ~7) + bit_of<FORMAT>(i & 7);
      place[2 * i] = uint8_t(bit / 8);
      place[2 * i + 1] = uint8_t(bit / 8 + 1);
      shift[i] = uint16_t(bit % 8);
    }
    places = _mm512_load_si512(place);
    shifts = _mm512_load_si512(shift);
  }
  // the upper bits of each are those of its neighbours
  template <bool PADDED>
  __m512i read(const uint8_t* at) const {
    constexpr __mmask32 unit = __mmask32((uint64_t(1) << FORMAT::BYTES) - 1);
    const __m256i bytes = PADDED ? _mm256_loadu_si256((const __m256i*)at) : _mm256_maskz_loadu_epi8(unit, at);
    return _mm512_srlv_epi16(_mm512_permutexvar_epi8(places, _mm512_castsi256_si512(bytes)), shifts);
  }
};

template <class FORMAT>
struct Values;

// A code under the exponent of 128 is the bfloat16 128 + code: bits are put beside it, nothing is converted. What 128 and
// the codes' own offset add to a group's sum depends on the input alone, and is where that sum starts.
template <int BITS>
struct Values<Integer<BITS>> : Spread<Integer<BITS>> {
  static constexpr float ADDED = 128 + Integer<BITS>::OFFSET;
  template <bool PADDED = false>
  __m512bh of(const uint8_t* at) const {
    const __m512i mask = _mm512_set1_epi16((1 << BITS) - 1), exponent = _mm512_set1_epi16(0x4300);
    const __m512i codes = this->template read<PADDED>(at);
    return (__m512bh)_mm512_ternarylogic_epi32(codes, mask, exponent, 0xEA);  // (code & mask) | exponent
  }
};

template <>
struct Values<Nf4> : Spread<Nf4> {
  static constexpr float ADDED = 0;
  __m512i table;
  Values() {
    alignas(64) uint16_t values[32];
    for (int i = 0; i < 32; i++) values[i] = to_bf16(NF4[i % 16]);  // twice: bit 4 is a neighbour's
    table = _mm512_load_si512(values);
  }
  template <bool PADDED = false>
  __m512bh of(const uint8_t* at) const {
    return (__m512bh)_mm512_permutexvar_epi16(this->template read<PADDED>(at), table);
  }
};

template <>
struct Values<Int8> {
  static constexpr float ADDED = 0;
  template <bool PADDED = false>
  __m512bh of(const uint8_t* at) const {
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)at)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(at + LANES))));
    return _mm512_cvtne2ps_pbh(high, low);
  }
};

using Unit = __m512bh;
__m512i half_of(__m512i unit, int half) {  // its 16 bits as the lower ones of 32
  return _mm512_cvtepu16_epi32(half ? _mm512_extracti64x4_epi64(unit, 1) : _mm512_castsi512_si256(unit));
}
template <class FORMAT>
void read_exactly(const Values<FORMAT>& values, const uint8_t* at, Sum* to) {
  const __m512i unit = (__m512i)values.of(at);
  for (int half = 0; half < 2; half++) to[half] = _mm512_castsi512_ps(_mm512_slli_epi32(half_of(unit, half), 16));
}
void read_exactly(const Values<Nf4>& values, const uint8_t* at, Sum* to) {
  const __m512i codes = values.read<false>(at);
  for (int half = 0; half < 2; half++) to[half] = _mm512_permutexvar_ps(half_of(codes, half), load(NF4));
}
void store(const Sum* values, float* to) {
  for (int half = 0; half < 2; half++) _mm512_storeu_ps(to + LANES * half, values[half]);
}
void store(const Sum* values, uint16_t* to) { _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(values[1], values[0])); }
Sum scaled(Sum what, float less, float by, float plus) {
  return _mm512_fmadd_ps(_mm512_sub_ps(what, _mm512_set1_ps(less)), _mm512_set1_ps(by), _mm512_set1_ps(plus));
}
Sum add_products(Sum to, const Unit& unit, const Input* input) {
  return _mm512_dpbf16_ps(to, unit, (__m512bh)_mm512_loadu_si512(input));
}

float wide(Input value) { return from_bf16(value); }
using Two = Sum;  // the lower eight lanes are of a unit's first half
Two two(float first, float second) { return _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(first), _mm512_set1_ps(second)); }
Sum add_halves(Sum to, const float* start, const Two& by) { return _mm512_fmadd_ps(load(start), by, to); }
Sum add_halves(Sum to, const float* start, const Unit& unit, const Input* input, const Two& by) {
  return _mm512_fmadd_ps(add_products(load(start), unit, input), by, to);
}

#elif defined(LOWVRAM_AVX2)

constexpr int LANES = 8;
using Sum = __m256;
using Input = float;

Sum load(const float* at) { return _mm256_loadu_ps(at); }
Sum zeros() { return _mm256_setzero_ps(); }
Sum add_scaled(Sum to, Sum what, float by) { return _mm256_fmadd_ps(what, _mm256_set1_ps(by), to); }
float total(Sum of) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(of), _mm256_extractf128_ps(of, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

void round_unit(const float* from, Input* to, float* sums) {
  for (int64_t i = 0; i < UNIT; i += LANES) {
    const Sum values = load(from + i);
    _mm256_storeu_ps(to + i, values);
    _mm256_storeu_ps(sums, _mm256_add_ps(load(sums), values));
  }
}

struct Unit {
  __m256 eights[4];
};

// Codes of less than a byte: each in 32 bits of its own.
template <class FORMAT>
struct Spread {
  __m256i places, shifts;
  Spread() {
    alignas(32) uint8_t place[32];
    alignas(32) uint32_t shift[8];
    for (int i = 0; i < 8; i++) {
      const int byte = bit_of<FORMAT>(i) / 8;
      shift[i] = uint32_t(bit_of<FORMAT>(i) % 8);
      for (int b = 0; b < 4; b++) place[4 * i + b] = uint8_t(b < 2 && byte + b < 8 ? byte + b : 0x80);
    }
    places = _mm256_load_si256((const __m256i*)place);
    shifts = _mm256_load_si256((const __m256i*)shift);
  }
  __m256i read(const uint8_t* at, int eight) const {
    const __m256i bytes = _mm256_set1_epi64x((long long)eight_codes<FORMAT>(at, eight));
    const __m256i codes = _mm256_srlv_epi32(_mm256_shuffle_epi8(bytes, places), shifts);
    return _mm256_and_si256(codes, _mm256_set1_epi32((1 << FORMAT::BITS) - 1));
  }
};

template <class FORMAT>
struct Values : Spread<FORMAT> {
  static constexpr float ADDED = FORMAT::OFFSET;
  template <bool PADDED = false>
  Unit of(const uint8_t* at) const {
    Unit unit;
    for (int eight = 0; eight < 4; eight++) unit.eights[eight] = _mm256_cvtepi32_ps(this->read(at, eight));
    return unit;
  }
};

template <>
struct Values<Nf4> : Spread<Nf4> {
  static constexpr float ADDED = 0;
  template <bool PADDED = false>
  Unit of(const uint8_t* at) const {
    Unit unit;
    for (int eight = 0; eight < 4; eight++) {
      const __m256i codes = this->read(at, eight);
      const __m256 low = _mm256_permutevar8x32_ps(load(NF4), codes), high = _mm256_permutevar8x32_ps(load(NF4 + 8), codes);
      unit.eights[eight] = _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
    }
    return unit;
  }
};

template <>
struct Values<Int8> {
  static constexpr float ADDED = 0;
  template <bool PADDED = false>
  Unit of(const uint8_t* at) const {
    Unit unit;
    for (int eight = 0; eight < 4; eight++)
      unit.eights[eight] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(at + 8 * eight))));
    return unit;
  }
};

template <class FORMAT>
void read_exactly(const Values<FORMAT>& values, const uint8_t* at, Sum* to) {
  const Unit unit = values.of(at);
  for (int eight = 0; eight < 4; eight++) to[eight] = unit.eights[eight];
}
void store(const Sum* values, float* to) {
  for (int eight = 0; eight < 4; eight++) _mm256_storeu_ps(to + 8 * eight, values[eight]);
}
void store(const Sum* values, uint16_t* to) {
  float all[UNIT];
  store(values, all);
  for (int64_t i = 0; i < UNIT; i++) to[i] = to_bf16(all[i]);
}
Sum scaled(Sum what, float less, float by, float plus) {
  return _mm256_fmadd_ps(_mm256_sub_ps(what, _mm256_set1_ps(less)), _mm256_set1_ps(by), _mm256_set1_ps(plus));
}
Sum add_products(Sum to, const Unit& unit, const Input* input) {
  for (int eight = 0; eight < 4; eight++) to = _mm256_fmadd_ps(unit.eights[eight], load(input + 8 * eight), to);
  return to;
}
Sum add_half(Sum to, const Unit& unit, const Input* input, int half) {
  for (int eight = 2 * half; eight < 2 * half + 2; eight++)
    to = _mm256_fmadd_ps(unit.eights[eight], load(input + 8 * eight), to);
  return to;
}

#else

constexpr int LANES = 8;
struct Sum { float lane[LANES]; };
using Input = float;

Sum load(const float* at) {
  Sum sum;
  std::memcpy(sum.lane, at, sizeof sum.lane);
  return sum;
}
Sum zeros() { return Sum{}; }
Sum add_scaled(Sum to, const Sum& what, float by) {
  for (int i = 0; i < LANES; i++) to.lane[i] += what.lane[i] * by;
  return to;
}
float total(const Sum& of) {
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += of.lane[i];
  return sum;
}

void round_unit(const float* from, Input* to, float* sums) {
  std::memcpy(to, from, UNIT * sizeof(float));
  for (int64_t i = 0; i < UNIT; i++) sums[i % LANES] += from[i];
}

struct Unit {
  float values[UNIT];
};

template <class FORMAT>
float value_of(uint64_t code) {
  return float(code);
}
template <>
float value_of<Nf4>(uint64_t code) {
  return NF4[code];
}
template <>
float value_of<Int8>(uint64_t code) {
  return float(int8_t(code));
}

template <class FORMAT>
struct Values {
  static constexpr float ADDED = FORMAT::OFFSET;
  template <bool PADDED = false>
  Unit of(const uint8_t* at) const {
    Unit unit;
    for (int eight = 0; eight < 4; eight++) {
      const uint64_t bytes = eight_codes<FORMAT>(at, eight);
      for (int i = 0; i < 8; i++) {
        const uint64_t code = bytes >> bit_of<FORMAT>(i) & ((1 << FORMAT::BITS) - 1);
        unit.values[8 * eight + i] = value_of<FORMAT>(code);
      }
    }
    return unit;
  }
};

template <class FORMAT>
void read_exactly(const Values<FORMAT>& values, const uint8_t* at, Sum* to) {
  const Unit unit = values.of(at);
  std::memcpy(to, unit.values, sizeof unit.values);
}
void store(const Sum* values, float* to) { std::memcpy(to, values, UNIT * sizeof(float)); }
void store(const Sum* values, uint16_t* to) {
  for (int64_t i = 0; i < UNIT; i++) to[i] = to_bf16(values[i / LANES].lane[i % LANES]);
}
Sum scaled(Sum what, float less, float by, float plus) {
  for (int i = 0; i < LANES; i++) what.lane[i] = (what.lane[i] - less) * by + plus;
  return what;
}
Sum add_some(Sum to, const Unit& unit, const Input* input, int64_t first, int64_t count) {
  for (int64_t i = first; i < first + count; i++) to.lane[i % LANES] += unit.values[i] * input[i];
  return to;
}
Sum add_products(Sum to, const Unit& unit, const Input* input) { return add_some(to, unit, input, 0, UNIT); }
Sum add_half(Sum to, const Unit& unit, const Input* input, int half) {
  return add_some(to, unit, input, half * UNIT / 2, UNIT / 2);
}

#endif

#if !defined(LOWVRAM_AVX512)

float wide(Input value) { return value; }
struct Two {
  float first, second;
};
Two two(float first, float second) { return {first, second}; }
Sum add_halves(Sum to, const float* start, const Two& by) {
  return add_scaled(add_scaled(to, load(start), by.first), load(start + LANES), by.second);
}
Sum add_halves(Sum to, const float* start, const Unit& unit, const Input* input, const Two& by) {
  to = add_scaled(to, add_half(load(start), unit, input, 0), by.first);
  return add_scaled(to, add_half(load(start + LANES), unit, input, 1), by.second);
}

#endif

constexpr int64_t HALF_LANES = 8;  // that sum half a unit

// The input as the kernel reads it: a unit of each row, then the next unit of each. And where the sum of each group and
// row starts, lane by lane: at what the offset of its codes will have added too much.
struct Prepared {
  int64_t groups;
  std::vector<Input> input;
  std::vector<float> starts;
  Prepared(const float* rows, int64_t count, const Weight& weight, float added)
      : groups(weight.groups()),
        input(count * (weight.halves() ? weight.columns : groups * units_of(weight.group) * UNIT)),
        starts(count * groups * (weight.halves() ? HALF_LANES : LANES)) {
    Input* to = input.data();
    float* start = starts.data();
    const int64_t together = std::max(weight.group, weight.halves() ? UNIT : 0);
    for (int64_t first = 0; first < weight.columns; first += together, start += count * lanes(weight))
      for (int64_t at = 0; at < together; at += UNIT)
        for (int64_t row = 0; row < count; row++, to += UNIT) {
          float unit[UNIT] = {}, sums[LANES] = {}, *its_start = start + row * lanes(weight);
          std::memcpy(unit, rows + row * weight.columns + first + at, std::min(together - at, UNIT) * sizeof(float));
          round_unit(unit, to, weight.halves() ? sums : its_start);
          if (weight.halves())
            for (int64_t i = 0; i < UNIT; i++) its_start[2 * i / UNIT * HALF_LANES + i % HALF_LANES] += wide(to[i]);
        }
    for (float& lane : starts) lane *= -added;
  }
  static int64_t lanes(const Weight& weight) { return weight.halves() ? 2 * HALF_LANES : LANES; }
};

// Scales and zeros of a tile in float32: of group g and the tile's feature f at g * group_step + f * feature_step.
struct Scales {
  const Weight& weight;
  int64_t groups, group_step, feature_step;
  std::vector<float> scale, zero;

  explicit Scales(const Weight& weight)
      : weight(weight),
        groups(weight.groups()),
        group_step(weight.kind == WITH_ZEROS ? TILE : 1),
        feature_step(weight.kind == WITH_ZEROS ? 1 : groups),
        scale(TILE * groups),
        zero(weight.kind == WITH_ZEROS ? TILE * groups : 0) {}

  void read(int64_t first, int64_t features) {
    if (weight.kind == FLOAT32) {
      const float* from = static_cast<const float*>(weight.scale) + first * groups;
      std::memcpy(scale.data(), from, features * groups * sizeof(float));
    } else if (weight.kind == BFLOAT16) {
      const uint16_t* from = static_cast<const uint16_t*>(weight.scale) + first * groups;
      for (int64_t i = 0; i < features * groups; i++) scale[i] = from_bf16(from[i]);
    } else {
      for (int64_t group = 0; group < groups; group++) {
        const uint32_t* pairs = weight.pairs(group, first);
        __builtin_prefetch(pairs + TILE);
        float *scales = scale.data() + group * TILE, *zeros = zero.data() + group * TILE;
        for (int64_t i = 0; i < features; i++) scales[i] = from_bf16(uint16_t(pairs[i]));
        for (int64_t i = 0; i < features; i++) zeros[i] = from_bf16(uint16_t(pairs[i] >> 16));
      }
    }
  }
};

// Rows of the weight with a unit's readable bytes behind them: the last ones are copied.
struct Padded {
  const Weight& weight;
  int64_t bytes;  // of a row
  std::vector<uint8_t> last;
  Padded(const Weight& weight, int64_t bytes) : weight(weight), bytes(bytes) {}

  const uint8_t* rows(int64_t first, int64_t count) {
    const uint8_t* at = weight.codes + first * bytes;
    if ((weight.features - first - count) * bytes >= UNIT) return at;
    last.resize(count * bytes + UNIT);
    std::memcpy(last.data(), at, count * bytes);
    return last.data();
  }
};

// FEATURES rows of the weight at once: they share what is loaded of the input, and none waits for its own last sum.
// HALVES: a group is half a unit.
template <class FORMAT, int ROWS, int FEATURES, bool HALVES>
void features_of(const Values<FORMAT>& values, const Prepared& prepared, const Weight& weight, const Scales& scales,
                 Padded& padded, int64_t tile, int64_t first, float* out) {
  const int64_t bytes = weight.columns * FORMAT::BITS / 8, groups = prepared.groups;
  const int64_t units = HALVES ? 1 : weight.group / UNIT, rest = HALVES ? 0 : weight.group % UNIT;  // a rest in int8 alone
  const int64_t group_step = scales.group_step, feature_step = scales.feature_step;
  const uint8_t* at = padded.rows(tile + first, FEATURES);
  // unasked for, memory comes at a sixth of its rate
  const uint8_t* next = weight.behind(weight.codes + (tile + first) * bytes, std::max(AHEAD, FEATURES * bytes), bytes);
  constexpr int LINES = (FEATURES * FORMAT::BYTES + LINE - 1) / LINE;
  const float *scale = scales.scale.data() + first * feature_step, *start = prepared.starts.data();
  const float* zero = weight.kind == WITH_ZEROS ? scales.zero.data() + first * feature_step : nullptr;
  const Input* input = prepared.input.data();
  Sum whole[FEATURES][ROWS];
  EACH(feature, FEATURES) EACH(row, ROWS) whole[feature][row] = zeros();
  Sum part[FEATURES][ROWS];
  const auto begin_group = [&] {
    EACH(row, ROWS) EACH(feature, FEATURES) part[feature][row] = load(start + row * LANES);
  };
  const auto end_group = [&] {
    EACH(feature, FEATURES)
      EACH(row, ROWS) whole[feature][row] = add_scaled(whole[feature][row], part[feature][row], scale[feature * feature_step]);
    if (Values<FORMAT>::ADDED != 0 && zero) {
      EACH(row, ROWS) {
        EACH(feature, FEATURES)
          whole[feature][row] = add_scaled(whole[feature][row], load(start + row * LANES), zero[feature * feature_step] / -Values<FORMAT>::ADDED);
      }
      zero += group_step;
    }
    start += ROWS * LANES;
    scale += group_step;
  };
  const auto add_two_groups = [&](const Unit* read, const Input* input) {
    constexpr float ADDED = Values<FORMAT>::ADDED;
    EACH(feature, FEATURES) {
      const float* its_scale = scale + feature * feature_step;
      const Two by = two(its_scale[0], its_scale[group_step]);
      EACH(row, ROWS)
        whole[feature][row] =
            add_halves(whole[feature][row], start + 2 * HALF_LANES * row, read[feature], input + row * UNIT, by);
      if (ADDED != 0 && zero) {
        const float* its_zero = zero + feature * feature_step;
        const Two plus = two(its_zero[0] / -ADDED, its_zero[group_step] / -ADDED);
        EACH(row, ROWS) whole[feature][row] = add_halves(whole[feature][row], start + 2 * HALF_LANES * row, plus);
      }
    }
    start += ROWS * 2 * HALF_LANES;
    scale += 2 * group_step;
    if (zero) zero += 2 * group_step;
  };
  for (int64_t group = 0; group < groups; group += HALVES ? 2 : 1) {
    if (!HALVES) begin_group();
    for (int64_t unit = 0; unit < units; unit++, at += FORMAT::BYTES, input += ROWS * UNIT) {
      EACH(line, LINES) __builtin_prefetch(next + line * LINE);
      next += FEATURES * FORMAT::BYTES;
      Unit read[FEATURES];
      EACH(feature, FEATURES) read[feature] = values.template of<true>(at + feature * bytes);
      if (HALVES) {
        add_two_groups(read, input);
      } else {
        EACH(row, ROWS)
          EACH(feature, FEATURES) part[feature][row] = add_products(part[feature][row], read[feature], input + row * UNIT);
      }
    }
    if (FORMAT::BITS == 8 && rest)
      for (int feature = 0; feature < FEATURES; feature++) {
        uint8_t codes[FORMAT::BYTES] = {};
        std::memcpy(codes, at + feature * bytes, rest);
        const Unit read = values.of(codes);
        for (int row = 0; row < ROWS; row++)
          part[feature][row] = add_products(part[feature][row], read, input + row * UNIT);
      }
    if (!HALVES) end_group();
  }
  out += tile + first;
  for (int feature = 0; feature < FEATURES; feature++)
    for (int row = 0; row < ROWS; row++) out[row * weight.out_step + feature] = total(whole[feature][row]);
}

template <class FORMAT, int ROWS, bool HALVES>
void multiply(const float* rows, const Weight& weight, float* out) {
  constexpr int FEATURES = ROWS == 1 ? 8 : ROWS == 2 ? 4 : 2;
  const Prepared prepared(rows, ROWS, weight, Values<FORMAT>::ADDED);
#pragma omp parallel if (weight.features * weight.columns >= SMALL)
  {
    const Values<FORMAT> values;
    Scales scales(weight);
    Padded padded(weight, weight.columns * FORMAT::BITS / 8);
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < weight.features; tile += TILE) {
      const int64_t features = weight.features - tile < TILE ? weight.features - tile : TILE;
      scales.read(tile, features);
      int64_t first = 0;
      for (; first + FEATURES <= features; first += FEATURES)
        features_of<FORMAT, ROWS, FEATURES, HALVES>(values, prepared, weight, scales, padded, tile, first, out);
      for (; first < features; first++)
        features_of<FORMAT, ROWS, 1, HALVES>(values, prepared, weight, scales, padded, tile, first, out);
    }
  }
}

template <class FORMAT, int ROWS>
void multiply(const float* rows, const Weight& weight, float* out) {
  if constexpr (FORMAT::MAY_HAVE_HALVES)
    if (weight.halves()) return multiply<FORMAT, ROWS, true>(rows, weight, out);
  multiply<FORMAT, ROWS, false>(rows, weight, out);
}

// A unit whose halves have each a scale and a zero.
template <class FORMAT, class VALUE>
void dequantise_unit(const Values<FORMAT>& values, const uint8_t* at, const float* scale, const float* zero, VALUE* to) {
  constexpr int VECTORS_OF_UNIT = UNIT / LANES;
  Sum read[VECTORS_OF_UNIT];
  read_exactly(values, at, read);
  for (int i = 0; i < VECTORS_OF_UNIT; i++) {
    const int half = 2 * i / VECTORS_OF_UNIT;
    read[i] = scaled(read[i], Values<FORMAT>::ADDED, scale[half], zero[half]);
  }
  store(read, to);
}

// Rows of a tile, rounded once, each so many values behind the one before.
template <class FORMAT, class VALUE>
void dequantise_rows(const Values<FORMAT>& values, const Weight& weight, const Scales& scales, int64_t tile,
                     int64_t features, VALUE* out, int64_t step) {
  const uint8_t* at = weight.codes + tile * (weight.columns * FORMAT::BITS / 8);
  for (int64_t feature = 0; feature < features; feature++) {
    VALUE* to = out + feature * step;
    for (int64_t group = 0; group < weight.groups(); group += weight.halves() ? 2 : 1) {
      float scale[2], zero[2];
      for (int half = 0; half < 2; half++) {
        const int64_t place = (group + half * weight.halves()) * scales.group_step + feature * scales.feature_step;
        scale[half] = scales.scale[place];
        zero[half] = weight.kind == WITH_ZEROS ? scales.zero[place] : 0;
      }
      int64_t left = std::max(weight.group, weight.halves() ? UNIT : 0);
      for (; left >= UNIT; left -= UNIT, at += FORMAT::BYTES, to += UNIT) {
        __builtin_prefetch(at + AHEAD);
        dequantise_unit(values, at, scale, zero, to);
      }
      if (FORMAT::BITS == 8 && left) {
        uint8_t some[FORMAT::BYTES] = {};
        VALUE all[UNIT];
        std::memcpy(some, at, left);
        dequantise_unit(values, some, scale, zero, all);
        std::memcpy(to, all, left * sizeof(VALUE));
        at += left, to += left;
      }
    }
  }
}

// The weight itself.
template <class FORMAT, class VALUE>
void dequantise(const Weight& weight, VALUE* out) {
#pragma omp parallel if (weight.features * weight.columns >= SMALL)
  {
    const Values<FORMAT> values;
    Scales scales(weight);
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < weight.features; tile += TILE) {
      const int64_t features = weight.features - tile < TILE ? weight.features - tile : TILE;
      scales.read(tile, features);
      dequantise_rows(values, weight, scales, tile, features, out + tile * weight.columns, weight.columns);
    }
  }
}

#if defined(LOWVRAM_AVX512)

// Many rows: tiles of the weight are dequantised to bfloat16, turned so that a vector is a pair of columns of 16 features,
// and multiplied with all rows before the next tile. No more of the weight is ever in memory.
constexpr int ROWS_AT_ONCE = 12, VECTORS = 2;
constexpr int64_t WIDE = VECTORS * TILE;

// 16 features of 16 pairs (of columns) become 16 pairs of 16 features.
void turn(const uint32_t* from, int64_t step, uint32_t* to) {
  __m512i row[16], mixed[16];
  EACH(i, 16) row[i] = _mm512_loadu_si512(from + i * step);
  EACH(i, 8) {
    mixed[2 * i] = _mm512_unpacklo_epi32(row[2 * i], row[2 * i + 1]);
    mixed[2 * i + 1] = _mm512_unpackhi_epi32(row[2 * i], row[2 * i + 1]);
  }
  EACH(i, 4) EACH(half, 2) {
    row[4 * i + 2 * half] = _mm512_unpacklo_epi64(mixed[4 * i + half], mixed[4 * i + 2 + half]);
    row[4 * i + 2 * half + 1] = _mm512_unpackhi_epi64(mixed[4 * i + half], mixed[4 * i + 2 + half]);
  }
  EACH(i, 4) EACH(half, 2) {  // rows i, 4 + i, 8 + i, 12 + i hold pair i of each quarter
    mixed[8 * half + i] = _mm512_shuffle_i32x4(row[8 * half + i], row[8 * half + 4 + i], 0x88);
    mixed[8 * half + 4 + i] = _mm512_shuffle_i32x4(row[8 * half + i], row[8 * half + 4 + i], 0xdd);
  }
  EACH(i, 4) {
    _mm512_storeu_si512(to + i * WIDE, _mm512_shuffle_i32x4(mixed[i], mixed[8 + i], 0x88));
    _mm512_storeu_si512(to + (8 + i) * WIDE, _mm512_shuffle_i32x4(mixed[i], mixed[8 + i], 0xdd));
    _mm512_storeu_si512(to + (4 + i) * WIDE, _mm512_shuffle_i32x4(mixed[4 + i], mixed[12 + i], 0x88));
    _mm512_storeu_si512(to + (12 + i) * WIDE, _mm512_shuffle_i32x4(mixed[4 + i], mixed[12 + i], 0xdd));
  }
}

void store_some(Sum values, int64_t count, float* to) { _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), values); }
void store_some(Sum values, int64_t count, uint16_t* to) {
  _mm256_mask_storeu_epi16(to, __mmask16((1u << count) - 1), (__m256i)_mm512_cvtneps_pbh(values));
}

template <int ROWS, class VALUE>
void multiply_tile(const uint32_t* input, int64_t pairs, const uint32_t* tile, int64_t features, VALUE* out, int64_t step) {
  Sum sums[ROWS][VECTORS];
  EACH(row, ROWS) EACH(vector, VECTORS) sums[row][vector] = zeros();
  add_pairs(sums, input, pairs, tile, WIDE, pairs);
  EACH(row, ROWS) EACH(vector, VECTORS)
    store_some(sums[row][vector], std::clamp<int64_t>(features - vector * LANES, 0, LANES), out + row * step + vector * LANES);
}

template <class FORMAT, class VALUE>
void multiply_many(const VALUE* rows, int64_t count, const Weight& weight, VALUE* out) {
  using Multiply = void (*)(const uint32_t*, int64_t, const uint32_t*, int64_t, VALUE*, int64_t);
  constexpr Multiply of[] = {multiply_tile<1>, multiply_tile<2>, multiply_tile<3>, multiply_tile<4>,
                             multiply_tile<5>, multiply_tile<6>, multiply_tile<7>, multiply_tile<8>,
                             multiply_tile<9>, multiply_tile<10>, multiply_tile<11>, multiply_tile<12>};
  const int64_t pairs = units_of(weight.columns) * UNIT / 2;  // a row's, with zeros behind
  std::vector<uint32_t> input(count * pairs);
#pragma omp parallel if (weight.features * weight.columns >= SMALL)
  {
    const Values<FORMAT> values;
    Scales scales(weight);
    std::vector<uint32_t> flat(TILE * pairs), tile(WIDE * pairs);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < count; row++) round_row(rows + row * weight.columns, weight.columns, input.data() + row * pairs);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < weight.features; first += WIDE) {
      const int64_t features = std::min(WIDE, weight.features - first);
      for (int64_t part = 0; part < features; part += TILE) {
        const int64_t some = std::min(TILE, features - part);
        scales.read(first + part, some);
        dequantise_rows(values, weight, scales, first + part, some, reinterpret_cast<uint16_t*>(flat.data()), 2 * pairs);
        for (int64_t pair = 0; pair < pairs; pair += LANES) turn(flat.data() + pair, pairs, tile.data() + pair * WIDE + part);
      }
      // passes of about as many rows each: with few there are too few sums to keep the multipliers busy
      int64_t passes = (count + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
      for (int64_t row = 0, some; row < count; row += some, passes--) {
        some = (count - row + passes - 1) / passes;
        of[some - 1](input.data() + row * pairs, pairs, tile.data(), features, out + row * weight.out_step + first, weight.out_step);
      }
    }
  }
}

#endif

constexpr int64_t MOST = 8;  // rows that share one pass over the codes

template <class FORMAT>
void multiply_few(const float* rows, int64_t count, const Weight& weight, float* out) {
  using Multiply = void (*)(const float*, const Weight&, float*);
  constexpr Multiply of[] = {multiply<FORMAT, 1>, multiply<FORMAT, 2>, multiply<FORMAT, 3>, multiply<FORMAT, 4>,
                             multiply<FORMAT, 5>, multiply<FORMAT, 6>, multiply<FORMAT, 7>, multiply<FORMAT, 8>};
  of[count - 1](rows, weight, out);
}

template <class FORMAT>
void multiply_few(const uint16_t* rows, int64_t count, const Weight& weight, uint16_t* out) {
  std::vector<float> wide(count * weight.columns), found(count * weight.out_step);
  for (size_t i = 0; i < wide.size(); i++) wide[i] = from_bf16(rows[i]);
  multiply_few<FORMAT>(wide.data(), count, weight, found.data());
  for (int64_t row = 0; row < count; row++)
    for (int64_t i = row * weight.out_step; i < row * weight.out_step + weight.features; i++) out[i] = to_bf16(found[i]);
}

template <class FORMAT, class VALUE>
void multiply(const VALUE* rows, int64_t count, const Weight& weight, VALUE* out) {
#if defined(LOWVRAM_AVX512)
  if (count > MOST) return multiply_many<FORMAT>(rows, count, weight, out);
#endif
  for (int64_t first = 0; first < count; first += MOST)
    multiply_few<FORMAT>(rows + first * weight.columns, std::min(MOST, count - first), weight, out + first * weight.out_step);
}

template <class FORMAT>
void dequantise(const Weight& weight, void* out, bool wide) {
  if (wide)
    dequantise<FORMAT>(weight, static_cast<float*>(out));
  else
    dequantise<FORMAT>(weight, static_cast<uint16_t*>(out));
}

#if defined(LOWVRAM_AVX512)

// Int4 as torch packs it for processors with AVX-512: blocks of 64 rows. Of a column they are 32 bytes; row 0 to 31 are in
// the lower halves of bytes 0 to 31, row 32 to 63 in the upper. A vector holds two columns of 16 rows, so that each of its
// sums is of one row of the weight, and groups cost next to nothing.
constexpr int64_t BLOCK = 64;
constexpr int VECTOR = 16;  // rows of a block in a vector
constexpr int64_t PASSES = 16;  // of rows of the input, which find a block in the cache that the first has read

struct PairedInput {
  std::vector<Input> input;  // each row in bfloat16
  std::vector<float> sums;   // of each group and row

  template <class VALUE>
  PairedInput(const VALUE* rows, int64_t count, const Weight& weight)
      : input(count * weight.columns), sums(count * weight.groups()) {
    for (int64_t row = 0; row < count; row++)
      for (int64_t group = 0; group < weight.groups(); group++) {
        float lanes[LANES] = {};
        for (int64_t at = group * weight.group; at < (group + 1) * weight.group; at += UNIT)
          round_unit(rows + row * weight.columns + at, input.data() + row * weight.columns + at, lanes);
        sums[group * count + row] = total(load(lanes));
      }
  }
};

// A part is 32 rows of a block: a vector of lower halves, a vector of upper ones. Twice as many sums as fit: a half block.
template <int ROWS>
struct Block {
  static constexpr int PARTS = ROWS <= 6 ? 2 : 1;
  __m512i places[2];

  Block() {
    for (int part = 0; part < 2; part++) {
      alignas(64) uint8_t place[64] = {};
      for (int i = 0; i < VECTOR; i++) {
        place[4 * i] = uint8_t(VECTOR * part + i);
        place[4 * i + 2] = uint8_t(32 + VECTOR * part + i);
      }
      places[part] = _mm512_load_si512(place);
    }
  }

  template <class VALUE>
  void multiply(const PairedInput& prepared, const Weight& weight, int64_t block, VALUE* out) const {
    for (int first = 0; first < 2; first += PARTS) parts(prepared, weight, block, first, out);
  }

  template <class VALUE>
  void parts(const PairedInput& prepared, const Weight& weight, int64_t block, int first, VALUE* out) const {
    constexpr float ADDED = 128 + 8;
    const __m512i mask = _mm512_set1_epi16(15), exponent = _mm512_set1_epi16(0x4300);
    const uint8_t* at = weight.codes + block * weight.columns / 2;
    const uint8_t *ahead = weight.behind(at, AHEAD, weight.columns / 2), *end = weight.codes + weight.features * weight.columns / 2;
    const uint8_t* after = weight.next ? weight.next : end;
    const Input* input = prepared.input.data();
    const float* sums = prepared.sums.data();
    Sum whole[2 * PARTS][ROWS];
    EACH(vector, 2 * PARTS) EACH(row, ROWS) whole[vector][row] = zeros();
    for (int64_t group = 0; group < weight.groups(); group++, sums += ROWS) {
      Sum part[2 * PARTS][ROWS];
      EACH(vector, 2 * PARTS) EACH(row, ROWS) part[vector][row] = _mm512_set1_ps(-ADDED * sums[row]);
      for (int64_t pair = 0; pair < weight.group / 2; pair++, at += BLOCK, input += 2) {
        __builtin_prefetch(ahead);
        ahead = ahead + BLOCK == end ? after : ahead + BLOCK;
        const __m512i both = _mm512_loadu_si512(at);
        __m512bh read[2 * PARTS];
        EACH(p, PARTS) {
          const __m512i codes = _mm512_maskz_permutexvar_epi8(0x5555555555555555, places[first + p], both);
          read[p] = (__m512bh)_mm512_ternarylogic_epi32(codes, mask, exponent, 0xEA);
          read[PARTS + p] = (__m512bh)_mm512_ternarylogic_epi32(_mm512_srli_epi32(codes, 4), mask, exponent, 0xEA);
        }
        EACH(row, ROWS) {
          int32_t two;
          std::memcpy(&two, input + row * weight.columns, sizeof two);
          const __m512bh x = (__m512bh)_mm512_set1_epi32(two);
          EACH(vector, 2 * PARTS) part[vector][row] = _mm512_dpbf16_ps(part[vector][row], read[vector], x);
        }
      }
      EACH(vector, 2 * PARTS) {
        const uint32_t* pairs = weight.pairs(group, block + row_of(vector, first));
        __builtin_prefetch(pairs + BLOCK);
        const __m512i both = _mm512_loadu_si512(pairs);
        const Sum scale = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        const Sum zero = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000))));
        EACH(row, ROWS) {
          whole[vector][row] = _mm512_fmadd_ps(part[vector][row], scale, whole[vector][row]);
          whole[vector][row] = _mm512_fmadd_ps(_mm512_set1_ps(sums[row]), zero, whole[vector][row]);
        }
      }
    }
    EACH(vector, 2 * PARTS)
      EACH(row, ROWS) store_some(whole[vector][row], LANES, out + row * weight.out_step + block + row_of(vector, first));
  }

  static int row_of(int vector, int first) { return 32 * (vector / PARTS) + VECTOR * (first + vector % PARTS); }
};

template <int ROWS, class VALUE>
void multiply_block(const PairedInput& prepared, const Weight& weight, int64_t block, VALUE* out) {
  Block<ROWS>().multiply(prepared, weight, block, out);
}

template <class VALUE>
void multiply_blocks(const VALUE* rows, int64_t count, const Weight& weight, VALUE* out) {
  using Multiply = void (*)(const PairedInput&, const Weight&, int64_t, VALUE*);
  constexpr Multiply of[] = {multiply_block<1>, multiply_block<2>, multiply_block<3>, multiply_block<4>,
                             multiply_block<5>, multiply_block<6>, multiply_block<7>, multiply_block<8>};
  for (int64_t begin = 0; begin < count; begin += PASSES * MOST) {
    const int64_t end = count - begin < PASSES * MOST ? count : begin + PASSES * MOST;
    std::vector<PairedInput> passes;
    for (int64_t row = begin; row < end; row += MOST)
      passes.emplace_back(rows + row * weight.columns, end - row < MOST ? end - row : MOST, weight);
#pragma omp parallel for schedule(static) if (weight.features * weight.columns >= SMALL)
    for (int64_t block = 0; block < weight.features; block += BLOCK)
      for (int64_t pass = 0; pass < int64_t(passes.size()); pass++) {
        const int64_t row = begin + pass * MOST, some = end - row < MOST ? end - row : MOST;
        of[some - 1](passes[pass], weight, block, out + row * weight.out_step);
      }
  }
}

#else

template <class VALUE>
void multiply_blocks(const VALUE*, int64_t, const Weight&, VALUE*) {}  // not asked for: torch packs in another way there

#endif

// What a weight's format is called here: 2 to 6 for integers of so many bits, and these.
constexpr int64_t NF4_CODES = 0, INT8_CODES = 8, INT4_BLOCKS = 64;

template <class VALUE>
void multiply(const VALUE* rows, int64_t count, const Weight& weight, int64_t format, VALUE* out) {
  switch (format) {
    case NF4_CODES: return multiply<Nf4>(rows, count, weight, out);
    case 2: return multiply<Integer<2>>(rows, count, weight, out);
    case 3: return multiply<Integer<3>>(rows, count, weight, out);
    case 4: return multiply<Integer<4>>(rows, count, weight, out);
    case 5: return multiply<Integer<5>>(rows, count, weight, out);
    case 6: return multiply<Integer<6>>(rows, count, weight, out);
    case INT8_CODES: return multiply<Int8>(rows, count, weight, out);
    case INT4_BLOCKS: return multiply_blocks(rows, count, weight, out);
  }
}

}  // namespace

// Products of the same rows with several weights, side by side; rows and results in float32 or (narrow) bfloat16. sizes: of
// each weight kind, features, format, group and group_step.
extern "C" void lowvram_products(const void* rows, bool narrow, int64_t count, int64_t columns, int64_t weights,
                                 const uint8_t* const* codes, const void* const* scales, const int64_t* sizes, void* out) {
  int64_t width = 0;
  for (int64_t i = 0; i < weights; i++) width += sizes[5 * i + 1];
  for (int64_t i = 0, first = 0; i < weights; first += sizes[5 * i + 1], i++) {
    const int64_t *of = sizes + 5 * i, features = of[1];
    const uint8_t* next = i + 1 < weights ? codes[i + 1] : nullptr;
    const Weight weight{codes[i], scales[i], of[0], features, columns, of[3], of[4], width, next};
    if (narrow)
      multiply(static_cast<const uint16_t*>(rows), count, weight, of[2], static_cast<uint16_t*>(out) + first);
    else
      multiply(static_cast<const float*>(rows), count, weight, of[2], static_cast<float*>(out) + first);
  }
}

// In bfloat16 or (wide) float32; not of blocks.
extern "C" void lowvram_dequantise(const uint8_t* codes, const void* scale, int64_t kind, int64_t features,
                                   int64_t columns, int64_t format, int64_t group, int64_t group_step, bool wide,
                                   void* out) {
  const Weight weight{codes, scale, kind, features, columns, group, group_step, features};
  switch (format) {
    case NF4_CODES: return dequantise<Nf4>(weight, out, wide);
    case 2: return dequantise<Integer<2>>(weight, out, wide);
    case 3: return dequantise<Integer<3>>(weight, out, wide);
    case 4: return dequantise<Integer<4>>(weight, out, wide);
    case 5: return dequantise<Integer<5>>(weight, out, wide);
    case 6: return dequantise<Integer<6>>(weight, out, wide);
    case INT8_CODES: return dequantise<Int8>(weight, out, wide);
  }
}

// The products as a library that torch's compiler made calls them.
extern "C" int32_t aoti_torch_cpu_quantized_products(void* rows, void** codes, int64_t weights, void** scales, int64_t,
                                                     const int64_t* features, int64_t, const int64_t* formats, int64_t,
                                                     void** result) {
  constexpr int64_t MOST_WEIGHTS = 8;
  if (weights > MOST_WEIGHTS) return 1;
  const int32_t float32 = aoti_torch_dtype_float32(), cpu = aoti_torch_device_type_cpu();
  const uint8_t* stored[MOST_WEIGHTS];
  const void* scaled[MOST_WEIGHTS];
  int64_t lie[5 * MOST_WEIGHTS], *shape, *sizes, *strides, dims, count, width = 0;
  void *from, *into, *address;
  int32_t dtype, failed = aoti_torch_get_data_ptr(rows, &from) || aoti_torch_get_sizes(rows, &shape);
  for (int64_t i = 0; i < weights && !failed; i++) {
    failed = aoti_torch_get_data_ptr(codes[i], &address);
    stored[i] = static_cast<const uint8_t*>(address);
    failed = failed || aoti_torch_get_data_ptr(scales[i], &address) || aoti_torch_get_sizes(scales[i], &sizes) ||
             aoti_torch_get_strides(scales[i], &strides) || aoti_torch_get_dim(scales[i], &dims) ||
             aoti_torch_get_numel(scales[i], &count) || aoti_torch_get_dtype(scales[i], &dtype);
    if (failed) return failed;
    scaled[i] = address;
    // (features,) or (features * groups,); (features, groups); (groups, features, 2) of scales and zeros
    const int64_t groups = dims == 3 ? sizes[0] : count / features[i];
    const int64_t kind = dims == 3 ? WITH_ZEROS : dtype == float32 ? FLOAT32 : BFLOAT16;
    const int64_t found[] = {kind, features[i], formats[i], shape[1] / groups, strides[0]};
    std::copy(found, found + 5, lie + 5 * i);
    width += features[i];
  }
  const int64_t sized[] = {shape[0], width}, strided[] = {width, 1};
  failed = failed || aoti_torch_empty_strided(2, sized, strided, float32, cpu, 0, result) ||
           aoti_torch_get_data_ptr(*result, &into);
  if (failed) return failed;
  lowvram_products(from, false, shape[0], shape[1], weights, stored, scaled, lie, into);
  return 0;
}
