// Products of a few rows with a quantised weight, read as its codes lie: the weight is never dequantised.
//
// A row of the weight is a stream of codes; 32 of them are a unit. Integers of 2 to 6 bits follow one another, the first
// in the lowest bits; int8 codes are bytes; of nf4 codes two share a byte, the first in its upper half. Groups of codes
// share a scale, and perhaps a zero: weight = code * scale + zero. Of one row of the input and of several the sums are
// taken in the same order: a row's result does not depend on how many there are.
//
// Derived in: notebooks/06_the_engine.ipynb

#include <cstdint>
#include <cstring>
#include <vector>

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
constexpr int64_t AHEAD = 768;      // bytes; memory that is not asked for ahead comes at a third of its rate
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

struct Weight {
  const uint8_t* codes;   // row by row
  const void* scale;      // of group g and feature f at g * group_step + f * feature_step
  const uint16_t* zero;   // bfloat16, at the same places, or null
  bool wide_scale;        // float32, else bfloat16
  int64_t features, columns, group, group_step, feature_step;
};

int64_t units_of(int64_t codes) { return (codes + UNIT - 1) / UNIT; }

float from_bf16(uint16_t bits) {
  uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

uint16_t to_bf16(float value) {  // rounds to the nearest, ties to even; no value here is NaN
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof wide);
  return uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
}

float scale_at(const Weight& weight, int64_t place) {
  return weight.wide_scale ? static_cast<const float*>(weight.scale)[place]
                           : from_bf16(static_cast<const uint16_t*>(weight.scale)[place]);
}

// How codes of a format lie and what they are: BYTES of a unit, OFFSET of a code from its value.
template <int WIDTH>
struct Integer {
  static constexpr int BITS = WIDTH, BYTES = 4 * WIDTH, OFFSET = 1 << (WIDTH - 1);
};
struct Nf4 {
  static constexpr int BITS = 4, BYTES = 16, OFFSET = 0;
};
struct Int8 {
  static constexpr int BITS = 8, BYTES = 32, OFFSET = 0;
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

void round_unit(const float* from, Input* to, float* sums) {
  const __m512i pairs = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + LANES), _mm512_loadu_ps(from));
  _mm512_storeu_si512(to, pairs);
  const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))));
  _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), _mm512_add_ps(even, odd)));
}

// Codes of less than a byte: each in 16 bits of its own.
template <class FORMAT>
struct Spread {
  __m256i places, shifts;
  Spread() {
    alignas(32) uint8_t place[32], shift[32];
    for (int eight = 0; eight < 4; eight++)
      for (int i = 0; i < 8; i++) {
        place[8 * eight + i] = uint8_t(i < FORMAT::BITS ? FORMAT::BITS * eight + i : 31);
        shift[8 * eight + i] = uint8_t(bit_of<FORMAT>(i));
      }
    places = _mm256_load_si256((const __m256i*)place);
    shifts = _mm256_load_si256((const __m256i*)shift);
  }
  // the upper bits of each are those of its neighbours
  __m512i read(const uint8_t* at) const {
    const __m256i bytes = _mm256_maskz_loadu_epi8(__mmask32((uint64_t(1) << FORMAT::BYTES) - 1), at);
    return _mm512_cvtepu8_epi16(_mm256_multishift_epi64_epi8(shifts, _mm256_permutexvar_epi8(places, bytes)));
  }
};

template <class FORMAT>
struct Values;

// A code under the exponent of 128 is the bfloat16 128 + code: bits are put beside it, nothing is converted. What 128 and
// the codes' own offset add to a group's sum depends on the input alone, and is where that sum starts.
template <int BITS>
struct Values<Integer<BITS>> : Spread<Integer<BITS>> {
  static constexpr float ADDED = 128 + Integer<BITS>::OFFSET;
  __m512bh of(const uint8_t* at) const {
    const __m512i mask = _mm512_set1_epi16((1 << BITS) - 1), exponent = _mm512_set1_epi16(0x4300);
    return (__m512bh)_mm512_ternarylogic_epi32(this->read(at), mask, exponent, 0xEA);  // (code & mask) | exponent
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
  __m512bh of(const uint8_t* at) const { return (__m512bh)_mm512_permutexvar_epi16(this->read(at), table); }
};

template <>
struct Values<Int8> {
  static constexpr float ADDED = 0;
  __m512bh of(const uint8_t* at) const {
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)at)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(at + LANES))));
    return _mm512_cvtne2ps_pbh(high, low);
  }
};

using Unit = __m512bh;
void store(const Unit& unit, float* to) {
  const __m512i all = (__m512i)unit;
  const __m256i halves[] = {_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1)};
  for (int half = 0; half < 2; half++)
    _mm512_storeu_si512(to + LANES * half, _mm512_slli_epi32(_mm512_cvtepu16_epi32(halves[half]), 16));
}
Sum add_products(Sum to, const Unit& unit, const Input* input) {
  return _mm512_dpbf16_ps(to, unit, (__m512bh)_mm512_loadu_si512(input));
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
  Unit of(const uint8_t* at) const {
    Unit unit;
    for (int eight = 0; eight < 4; eight++) unit.eights[eight] = _mm256_cvtepi32_ps(this->read(at, eight));
    return unit;
  }
};

template <>
struct Values<Nf4> : Spread<Nf4> {
  static constexpr float ADDED = 0;
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
  Unit of(const uint8_t* at) const {
    Unit unit;
    for (int eight = 0; eight < 4; eight++)
      unit.eights[eight] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(at + 8 * eight))));
    return unit;
  }
};

void store(const Unit& unit, float* to) {
  for (int eight = 0; eight < 4; eight++) _mm256_storeu_ps(to + 8 * eight, unit.eights[eight]);
}
Sum add_products(Sum to, const Unit& unit, const Input* input) {
  for (int eight = 0; eight < 4; eight++) to = _mm256_fmadd_ps(unit.eights[eight], load(input + 8 * eight), to);
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

void store(const Unit& unit, float* to) { std::memcpy(to, unit.values, sizeof unit.values); }
Sum add_products(Sum to, const Unit& unit, const Input* input) {
  for (int64_t i = 0; i < UNIT; i++) to.lane[i % LANES] += unit.values[i] * input[i];
  return to;
}

#endif

// The input as the kernel reads it, each row up to whole units; and where the sum of each row and group starts, lane by
// lane: at what the offset of its codes will have added too much.
struct Prepared {
  int64_t width, groups;
  std::vector<Input> input;
  std::vector<float> starts;
  Prepared(const float* rows, int64_t count, const Weight& weight, float added)
      : width(units_of(weight.columns) * UNIT),
        groups(weight.columns / weight.group),
        input(count * width),
        starts(count * groups * LANES) {
    for (int64_t row = 0; row < count; row++)
      for (int64_t group = 0; group < groups; group++) {
        float* start = starts.data() + (row * groups + group) * LANES;
        const int64_t first = group * weight.group, last = first + weight.group;
        for (int64_t at = first; at < last; at += UNIT) {
          float unit[UNIT] = {};
          std::memcpy(unit, rows + row * weight.columns + at, (last - at < UNIT ? last - at : UNIT) * sizeof(float));
          round_unit(unit, input.data() + row * width + at, start);
        }
        for (int lane = 0; lane < LANES; lane++) start[lane] *= -added;
      }
  }
};

template <class FORMAT, int ROWS>
void features_of(const Prepared& prepared, const Weight& weight, float* out, int64_t first, int64_t last) {
  const Values<FORMAT> values;
  const int64_t bytes = weight.columns * FORMAT::BITS / 8, groups = prepared.groups;
  const int64_t units = weight.group / UNIT, rest = weight.group % UNIT;  // a rest there is in int8 alone
  for (int64_t feature = first; feature < last; feature++) {
    const uint8_t* at = weight.codes + feature * bytes;
    const Input* input = prepared.input.data();
    Sum whole[ROWS];
    for (int row = 0; row < ROWS; row++) whole[row] = zeros();
    for (int64_t group = 0; group < groups; group++) {
      const float* start = prepared.starts.data() + group * LANES;
      Sum part[ROWS];
      for (int row = 0; row < ROWS; row++) part[row] = load(start + row * groups * LANES);
      for (int64_t unit = 0; unit < units; unit++, at += FORMAT::BYTES, input += UNIT) {
        __builtin_prefetch(at + AHEAD);
        const Unit read = values.of(at);
        for (int row = 0; row < ROWS; row++) part[row] = add_products(part[row], read, input + row * prepared.width);
      }
      if (FORMAT::BITS == 8 && rest) {
        uint8_t codes[FORMAT::BYTES] = {};
        std::memcpy(codes, at, rest);
        const Unit read = values.of(codes);
        for (int row = 0; row < ROWS; row++) part[row] = add_products(part[row], read, input + row * prepared.width);
      }
      const int64_t place = group * weight.group_step + feature * weight.feature_step;
      const float scale = scale_at(weight, place);
      for (int row = 0; row < ROWS; row++) whole[row] = add_scaled(whole[row], part[row], scale);
      if (Values<FORMAT>::ADDED != 0 && weight.zero) {
        const float zero = from_bf16(weight.zero[place]) / -Values<FORMAT>::ADDED;
        for (int row = 0; row < ROWS; row++) whole[row] = add_scaled(whole[row], load(start + row * groups * LANES), zero);
      }
    }
    for (int row = 0; row < ROWS; row++) out[row * weight.features + feature] = total(whole[row]);
  }
}

template <class FORMAT, int ROWS>
void multiply(const float* rows, const Weight& weight, float* out) {
  const Prepared prepared(rows, ROWS, weight, Values<FORMAT>::ADDED);
  const int64_t tiles = (weight.features + TILE - 1) / TILE;
#pragma omp parallel for schedule(static) if (weight.features * weight.columns >= SMALL)
  for (int64_t tile = 0; tile < tiles; tile++) {
    const int64_t last = (tile + 1) * TILE;
    features_of<FORMAT, ROWS>(prepared, weight, out, tile * TILE, last < weight.features ? last : weight.features);
  }
}

template <class FORMAT>
void multiply(const float* rows, int64_t count, const Weight& weight, float* out) {
  using Multiply = void (*)(const float*, const Weight&, float*);
  constexpr Multiply of[] = {multiply<FORMAT, 1>, multiply<FORMAT, 2>, multiply<FORMAT, 3>, multiply<FORMAT, 4>,
                             multiply<FORMAT, 5>, multiply<FORMAT, 6>, multiply<FORMAT, 7>, multiply<FORMAT, 8>};
  constexpr int64_t MOST = sizeof of / sizeof *of;
  for (int64_t first = 0; first < count; first += MOST) {
    const int64_t some = count - first < MOST ? count - first : MOST;
    of[some - 1](rows + first * weight.columns, weight, out + first * weight.features);
  }
}

void put(float* to, int64_t at, float value) { to[at] = value; }
void put(uint16_t* to, int64_t at, float value) { to[at] = to_bf16(value); }

// The weight itself, rounded once.
template <class FORMAT, class VALUE>
void dequantise(const Weight& weight, VALUE* out) {
  const int64_t groups = weight.columns / weight.group;
#pragma omp parallel for schedule(static) if (weight.features * weight.columns >= SMALL)
  for (int64_t feature = 0; feature < weight.features; feature++) {
    const Values<FORMAT> values;
    const uint8_t* at = weight.codes + feature * weight.columns * FORMAT::BITS / 8;
    VALUE* to = out + feature * weight.columns;
    for (int64_t group = 0; group < groups; group++) {
      const int64_t place = group * weight.group_step + feature * weight.feature_step;
      const float scale = scale_at(weight, place), zero = weight.zero ? from_bf16(weight.zero[place]) : 0;
      for (int64_t unit = 0; unit < weight.group / UNIT; unit++, at += FORMAT::BYTES, to += UNIT) {
        float codes[UNIT];
        __builtin_prefetch(at + AHEAD);
        store(values.of(at), codes);
        for (int64_t i = 0; i < UNIT; i++) put(to, i, (codes[i] - Values<FORMAT>::ADDED) * scale + zero);
      }
    }
  }
}

template <class FORMAT>
void dequantise(const Weight& weight, void* out, bool wide) {
  if (wide)
    dequantise<FORMAT>(weight, static_cast<float*>(out));
  else
    dequantise<FORMAT>(weight, static_cast<uint16_t*>(out));
}

}  // namespace

// What a weight's format is called here: 2 to 6 for integers of so many bits, NF4_CODES, INT8_CODES.
extern "C" void lowvram_product(const float* rows, int64_t count, const uint8_t* codes, const void* scale,
                                const uint16_t* zero, bool wide_scale, int64_t features, int64_t columns,
                                int64_t format, int64_t group, int64_t group_step, int64_t feature_step, float* out) {
  constexpr int64_t NF4_CODES = 0, INT8_CODES = 8;
  const Weight weight{codes, scale, zero, wide_scale, features, columns, group, group_step, feature_step};
  switch (format) {
    case NF4_CODES: return multiply<Nf4>(rows, count, weight, out);
    case 2: return multiply<Integer<2>>(rows, count, weight, out);
    case 3: return multiply<Integer<3>>(rows, count, weight, out);
    case 4: return multiply<Integer<4>>(rows, count, weight, out);
    case 5: return multiply<Integer<5>>(rows, count, weight, out);
    case 6: return multiply<Integer<6>>(rows, count, weight, out);
    case INT8_CODES: return multiply<Int8>(rows, count, weight, out);
  }
}

// Of integers of 2 to 6 bits, in bfloat16 or (wide) float32.
extern "C" void lowvram_dequantise(const uint8_t* codes, const void* scale, const uint16_t* zero, int64_t features,
                                   int64_t columns, int64_t bits, int64_t group, int64_t group_step,
                                   int64_t feature_step, bool wide, void* out) {
  const Weight weight{codes, scale, zero, false, features, columns, group, group_step, feature_step};
  switch (bits) {
    case 2: return dequantise<Integer<2>>(weight, out, wide);
    case 3: return dequantise<Integer<3>>(weight, out, wide);
    case 4: return dequantise<Integer<4>>(weight, out, wide);
    case 5: return dequantise<Integer<5>>(weight, out, wide);
    case 6: return dequantise<Integer<6>>(weight, out, wide);
  }
}

// The product as an operator of a library that torch's compiler made: it calls a C function with handles of tensors, for
// which torch exports the functions below (torch/csrc/inductor/aoti_torch/c/shim.h).
extern "C" {

int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_get_data_ptr(void* tensor, void** pointer);
int32_t aoti_torch_get_dtype(void* tensor, int32_t* dtype);
int32_t aoti_torch_get_dim(void* tensor, int64_t* count);
int32_t aoti_torch_get_numel(void* tensor, int64_t* count);
int32_t aoti_torch_get_sizes(void* tensor, int64_t** sizes);
int32_t aoti_torch_get_strides(void* tensor, int64_t** strides);
int32_t aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                 int32_t device_type, int32_t device_index, void** tensor);

int32_t aoti_torch_cpu_quantized_product(void* rows, void* codes, void* scales, int64_t features, int64_t format,
                                         void** result) {
  void *from, *stored, *scaled, *into;
  int64_t *shape, *sizes, *strides, dims, count;
  int32_t dtype;
  int32_t failed = aoti_torch_get_data_ptr(rows, &from) || aoti_torch_get_sizes(rows, &shape) ||
                   aoti_torch_get_data_ptr(codes, &stored) || aoti_torch_get_data_ptr(scales, &scaled) ||
                   aoti_torch_get_sizes(scales, &sizes) || aoti_torch_get_strides(scales, &strides) ||
                   aoti_torch_get_dim(scales, &dims) || aoti_torch_get_numel(scales, &count) ||
                   aoti_torch_get_dtype(scales, &dtype);
  if (failed) return failed;
  const int64_t sized[] = {shape[0], features}, strided[] = {features, 1};
  const int32_t float32 = aoti_torch_dtype_float32(), cpu = aoti_torch_device_type_cpu();
  failed = aoti_torch_empty_strided(2, sized, strided, float32, cpu, 0, result) || aoti_torch_get_data_ptr(*result, &into);
  if (failed) return failed;
  // (features,) or (features * groups,); (features, groups); (groups, features, 2) of scales and zeros
  const bool zeros = dims == 3;
  const int64_t groups = dims == 1 ? count / features : sizes[zeros ? 0 : 1];
  const int64_t group_step = dims == 1 ? 1 : strides[zeros ? 0 : 1];
  const int64_t feature_step = dims == 1 ? groups : strides[zeros ? 1 : 0];
  lowvram_product(static_cast<const float*>(from), shape[0], static_cast<const uint8_t*>(stored), scaled,
                  zeros ? static_cast<const uint16_t*>(scaled) + 1 : nullptr, dtype == float32, features, shape[1],
                  format, shape[1] / groups, group_step, feature_step, static_cast<float*>(into));
  return 0;
}

}  // extern "C"
