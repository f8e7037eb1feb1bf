// Attention of the newest token of each sequence, or of one sequence's newest tokens, to all that a decoder layer keeps, read as it lies: keys and values in 16 or 32
// bits, as int8 codes or in 4 bits, and the token's own written behind them first. Sums are in float32.
//
// A head's tokens are taken in chunks of one size, each with a softmax of its own, which are brought together at the end
// (Dao et al. 2023, «Flash-Decoding»): so all threads have work where there are few heads, and the result does not depend on
// how many they are.
//
// Derived in: notebooks/06_the_engine.ipynb

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "pieces.h"
#include "shim.h"

namespace {

constexpr int64_t LANES = VECTOR_LANES;
constexpr int64_t CHUNK = 256;        // tokens
constexpr int64_t GROUP = 32;         // of int4: tokens of a key's channel, channels of a value, that share a scale
constexpr int64_t SMALL = 1 << 17;    // bytes; a thread's start costs more than reading so few
constexpr float TINY = 1.17549435e-38f;

#if defined(__AVX512F__)
constexpr int HELD = 16;  // sums that stay in registers
#else
constexpr int HELD = 4;
#endif

typedef int16_t Shorts __attribute__((vector_size(32), aligned(2), may_alias));
typedef int8_t Bytes __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint8_t Codes __attribute__((vector_size(16), aligned(1), may_alias));

Lanes load(const float* at) { return *reinterpret_cast<const Lanes*>(at); }
void store(Lanes what, float* to) { *reinterpret_cast<Lanes*>(to) = what; }

// Bytes in 32 bits each. GCC 12 makes a loop of it, element by element, unless it is told the instruction or each step.
#if defined(__AVX512F__)
Whole widened(const Bytes* at) { return (Whole)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)at)); }
Bits widened(const Codes* at) { return (Bits)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)at)); }
#else
Whole widened(const Bytes* at) { return __builtin_convertvector(__builtin_convertvector(*at, Shorts), Whole); }
Bits widened(const Codes* at) { return __builtin_convertvector(__builtin_convertvector(*at, Halves), Bits); }
#endif

float total(Lanes of) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)of);
#else
  float each[LANES];
  store(of, each);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) each[i] += each[i + half];
  return each[0];
#endif
}

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// How elements are stored: read as float32, and written rounded to the nearest, ties to even.

struct BFloat16 {
  using Stored = uint16_t;
  static Lanes read(const Stored* at) { return read_bf16(at); }
  static Stored rounded(float value) { return to_bf16(value); }
};

struct Float16 {
  using Stored = uint16_t;
  static Lanes read(const Stored* at) {
    const Bits bits = __builtin_convertvector(*reinterpret_cast<const Halves*>(at), Bits);
    return (Lanes)((Bits)((Lanes)((bits & 0x7fff) << 13) * 0x1p112f) | (bits & 0x8000) << 16);
  }
  static Stored rounded(float value) {
    const uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size >= 0x477ff000) return Stored(sign | 0x7c00);  // 65520: infinite
    if (size < 0x38800000) return Stored(sign | (to_bits(from_bits(size) + 0.5f) - 0x3f000000));  // steps of 2^-24
    return Stored(sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13);
  }
};

struct Float32 {
  using Stored = float;
  static Lanes read(const Stored* at) { return load(at); }
  static Stored rounded(float value) { return value; }
};

struct Int8 {
  using Stored = int8_t;
  static Lanes read(const Stored* at) {
    return __builtin_convertvector(widened(reinterpret_cast<const Bytes*>(at)), Lanes);
  }
};

struct Call {
  const float *q, *k, *v;  // (batch, heads, step), (batch, kv_heads, width)
  float* out;              // (batch, heads, width)
  void *keys, *values, *recent;
  uint16_t *key_scale, *value_scale;
  int64_t batch, heads, kv_heads, width, room, tokens;
  float scale;
  int64_t step;  // the width in whole vectors: of queries and sums, with zeros behind
  int64_t shared() const { return heads / kv_heads; }  // queries of a key head
};

// The sums of a chunk: weights' greatest exponent, their total, and the weighted values.
struct Sums {
  float most, total;
  float* values;
};

// Scores become weights, in place; entries up to the next whole vector are written too.
void weigh(float* scores, int64_t count, Sums& sums) {
  for (int64_t i = count; i % LANES; i++) scores[i] = -INFINITY;
  float most = -INFINITY;
  for (int64_t i = 0; i < count; i++) most = std::max(most, scores[i]);
  Lanes sum = Lanes{};
  for (int64_t i = 0; i < count; i += LANES) {
    const Lanes weights = exponential(load(scores + i) - most);
    store(weights, scores + i);
    for (int64_t lane = 0; lane < LANES; lane++)
      if (i + lane >= count) scores[i + lane] = 0;
    sum += load(scores + i);
  }
  sums.most = most;
  sums.total = total(sum);
}

// Keys and values whose elements lie one beside the other, with a scale for each token or none.
template <class FORMAT>
struct Plain {
  using Stored = typename FORMAT::Stored;
  static constexpr bool SCALED = sizeof(Stored) == 1;
  const Call& call;

  int64_t place(int64_t head) const { return head * call.room; }  // of a head's first token
  const Stored* row(const void* held, int64_t head, int64_t token) const {
    return static_cast<const Stored*>(held) + (place(head) + token) * call.width;
  }

  Lanes read(const Stored* from, int64_t at) const {
    if (at + LANES <= call.width) return FORMAT::read(from + at);
    Stored last[LANES] = {};
    std::memcpy(last, from + at, (call.width - at) * sizeof(Stored));
    return FORMAT::read(last);
  }

  void append(int64_t head) const {
    write(call.k + head * call.width, call.keys, call.key_scale, place(head) + call.tokens - 1);
    write(call.v + head * call.width, call.values, call.value_scale, place(head) + call.tokens - 1);
  }

  void write(const float* from, void* held, uint16_t* scales, int64_t token) const {
    Stored* to = static_cast<Stored*>(held) + token * call.width;
    if constexpr (SCALED) {
      float most = 0;
      for (int64_t i = 0; i < call.width; i++) most = std::max(most, std::fabs(from[i]));
      scales[token] = to_bf16(std::max(most / 127, TINY));
      const float scale = from_bf16(scales[token]);
      for (int64_t i = 0; i < call.width; i++) to[i] = Stored(std::clamp(std::nearbyint(from[i] / scale), -127.0f, 127.0f));
    } else {
      for (int64_t i = 0; i < call.width; i++) to[i] = FORMAT::rounded(from[i]);
    }
  }

  // (QUERIES, CHUNK) of scores
  template <int QUERIES>
  void score(int64_t head, int64_t first, int64_t count, const float* q, float* scores) const {
    for (int64_t token = 0; token < count; token++) {
      const Stored* from = row(call.keys, head, first + token);
      Lanes sums[QUERIES] = {};
      for (int64_t at = 0; at < call.width; at += LANES) {
        const Lanes key = read(from, at);
        EACH(query, QUERIES) sums[query] += load(q + query * call.step + at) * key;
      }
      const float scale = call.scale * scale_of(call.key_scale, head, first + token);
      EACH(query, QUERIES) scores[query * CHUNK + token] = total(sums[query]) * scale;
    }
  }

  float scale_of(const uint16_t* scales, int64_t head, int64_t token) const {
    if constexpr (SCALED) return from_bf16(scales[place(head) + token]);
    return 1;
  }

  template <int QUERIES>
  void mix(int64_t head, int64_t first, int64_t count, float* weights, Sums* sums) const {
    if constexpr (SCALED)
      for (int64_t token = 0; token < count; token++) {
        const float scale = scale_of(call.value_scale, head, first + token);
        EACH(query, QUERIES) weights[query * CHUNK + token] *= scale;
      }
    constexpr int VECTORS = HELD / QUERIES < 8 ? HELD / QUERIES : 8;
    int64_t at = 0;
    for (; at + VECTORS * LANES <= call.width; at += VECTORS * LANES)
      mix_some<QUERIES, VECTORS>(row(call.values, head, first), count, weights, at, sums);
    for (; at < call.width; at += LANES)
      mix_some<QUERIES, 1>(row(call.values, head, first), count, weights, at, sums);
  }

  template <int QUERIES, int VECTORS>
  void mix_some(const Stored* from, int64_t count, const float* weights, int64_t at, Sums* sums) const {
    Lanes held[QUERIES][VECTORS] = {};
    for (int64_t token = 0; token < count; token++, from += call.width)
      EACH(vector, VECTORS) {
        const Lanes value = read(from, at + vector * LANES);
        EACH(query, QUERIES) held[query][vector] += value * weights[query * CHUNK + token];
      }
    EACH(query, QUERIES) EACH(vector, VECTORS) store(held[query][vector], sums[query].values + at + vector * LANES);
  }
};

// In 4 bits: keys with a scale and a zero for a channel of 32 tokens, the newest of them as they came; values with a scale
// and a zero for 32 channels of a token.
template <class FORMAT>
struct Int4 {
  using Stored = typename FORMAT::Stored;
  const Call& call;

  int64_t blocks() const { return (call.room + GROUP - 1) / GROUP; }
  uint8_t* key_block(int64_t head, int64_t block) const {
    return static_cast<uint8_t*>(call.keys) + (head * blocks() + block) * GROUP / 2 * call.width;
  }
  uint16_t* key_scales(int64_t head, int64_t block) const { return call.key_scale + (head * blocks() + block) * 2 * call.width; }
  Stored* newest(int64_t head) const { return static_cast<Stored*>(call.recent) + head * GROUP * call.width; }
  uint8_t* value_row(int64_t head, int64_t token) const {
    return static_cast<uint8_t*>(call.values) + (head * call.room + token) * call.width / 2;
  }
  uint16_t* value_scales(int64_t head, int64_t token) const {
    return call.value_scale + (head * call.room + token) * 2 * (call.width / GROUP);
  }

  struct Grid {
    uint16_t scale, zero;
    Grid(float low, float high)
        : scale(to_bf16(std::max((high - low) / 15, TINY))), zero(to_bf16(low)) {}
    uint8_t code(float value) const {
      return uint8_t(std::clamp(std::nearbyint((value - from_bf16(zero)) / from_bf16(scale)), 0.0f, 15.0f));
    }
  };

  void append(int64_t head) const {
    const int64_t token = call.tokens - 1;
    append_value(head, token);
    Stored* rows = newest(head);
    const float* key = call.k + head * call.width;
    for (int64_t i = 0; i < call.width; i++) rows[token % GROUP * call.width + i] = FORMAT::rounded(key[i]);
    if (call.tokens % GROUP == 0) close_block(head, token / GROUP);
  }

  void append_value(int64_t head, int64_t token) const {
    const float* from = call.v + head * call.width;
    uint8_t* to = value_row(head, token);
    uint16_t* grid = value_scales(head, token);
    const int64_t groups = call.width / GROUP;
    for (int64_t group = 0; group < groups; group++, from += GROUP, to += GROUP / 2) {
      const auto [low, high] = std::minmax_element(from, from + GROUP);
      const Grid found(*low, *high);
      grid[group] = found.scale;
      grid[groups + group] = found.zero;
      for (int64_t i = 0; i < GROUP / 2; i++) to[i] = uint8_t(found.code(from[2 * i]) | found.code(from[2 * i + 1]) << 4);
    }
  }

  // The newest 32 keys are a whole block: quantised, channel by channel.
  void close_block(int64_t head, int64_t block) const {
    const Stored* rows = newest(head);
    uint8_t* to = key_block(head, block);
    uint16_t* grid = key_scales(head, block);
    for (int64_t first = 0; first < call.width; first += LANES) {
      float keys[GROUP][LANES];
      for (int64_t token = 0; token < GROUP; token++) store(FORMAT::read(rows + token * call.width + first), keys[token]);
      for (int64_t i = 0; i < LANES; i++) {
        float low = keys[0][i], high = low;
        for (int64_t token = 1; token < GROUP; token++) {
          low = std::min(low, keys[token][i]);
          high = std::max(high, keys[token][i]);
        }
        const Grid found(low, high);
        grid[first + i] = found.scale;
        grid[call.width + first + i] = found.zero;
        for (int64_t pair = 0; pair < GROUP / 2; pair++)
          to[pair * call.width + first + i] = uint8_t(found.code(keys[2 * pair][i]) | found.code(keys[2 * pair + 1][i]) << 4);
      }
    }
  }

  static Lanes wide(Bits codes) { return __builtin_convertvector((Whole)codes, Lanes); }

  template <int QUERIES>
  void score(int64_t head, int64_t first, int64_t count, const float* q, float* scores) const {
    int64_t token = 0;
    for (; token + GROUP <= count; token += GROUP) score_block<QUERIES>(head, (first + token) / GROUP, q, scores + token);
    for (; token < count; token++) {
      const Stored* from = newest(head) + (first + token) % GROUP * call.width;
      Lanes sums[QUERIES] = {};
      for (int64_t at = 0; at < call.width; at += LANES)
        EACH(query, QUERIES) sums[query] += load(q + query * call.step + at) * FORMAT::read(from + at);
      EACH(query, QUERIES) scores[query * CHUNK + token] = total(sums[query]) * call.scale;
    }
  }

  // q . (code * scale + zero) = (q * scale) . code + q . zero, and the first factor is the same for all 32
  template <int QUERIES>
  void score_block(int64_t head, int64_t block, const float* q, float* scores) const {
    const uint16_t* grid = key_scales(head, block);
    const uint8_t* codes = key_block(head, block);
    std::vector<float>& scaled = workspace();
    scaled.resize(QUERIES * call.width);
    float zeros[QUERIES];
    EACH(query, QUERIES) {
      Lanes sum = Lanes{};
      for (int64_t at = 0; at < call.width; at += LANES) {
        const Lanes asked = load(q + query * call.step + at);
        store(asked * BFloat16::read(grid + at), scaled.data() + query * call.width + at);
        sum += asked * BFloat16::read(grid + call.width + at);
      }
      zeros[query] = total(sum);
    }
    for (int64_t pair = 0; pair < GROUP / 2; pair++, codes += call.width) {
      Lanes even[QUERIES] = {}, odd[QUERIES] = {};
      for (int64_t at = 0; at < call.width; at += LANES) {
        const Bits both = widened(reinterpret_cast<const Codes*>(codes + at));
        const Lanes low = wide(both & 15), high = wide(both >> 4);
        EACH(query, QUERIES) {
          const Lanes asked = load(scaled.data() + query * call.width + at);
          even[query] += asked * low;
          odd[query] += asked * high;
        }
      }
      EACH(query, QUERIES) {
        scores[query * CHUNK + 2 * pair] = (total(even[query]) + zeros[query]) * call.scale;
        scores[query * CHUNK + 2 * pair + 1] = (total(odd[query]) + zeros[query]) * call.scale;
      }
    }
  }

  static std::vector<float>& workspace() {
    thread_local std::vector<float> kept;
    return kept;
  }

  template <int QUERIES>
  void mix(int64_t head, int64_t first, int64_t count, float* weights, Sums* sums) const {
    for (int64_t group = 0; group < call.width / GROUP; group++) mix_group<QUERIES>(head, first, count, weights, group, sums);
  }

  template <int QUERIES>
  void mix_group(int64_t head, int64_t first, int64_t count, const float* weights, int64_t group, Sums* sums) const {
    const int64_t groups = call.width / GROUP;
    const uint8_t* codes = value_row(head, first) + group * LANES;
    const uint16_t* grid = value_scales(head, first) + group;
    Lanes even[QUERIES] = {}, odd[QUERIES] = {};
    float zeros[QUERIES] = {};
    for (int64_t token = 0; token < count; token++, codes += call.width / 2, grid += 2 * groups) {
      const Bits both = widened(reinterpret_cast<const Codes*>(codes));
      const Lanes low = wide(both & 15), high = wide(both >> 4);
      const float scale = from_bf16(grid[0]), zero = from_bf16(grid[groups]);
      EACH(query, QUERIES) {
        const float weight = weights[query * CHUNK + token];
        even[query] += low * (weight * scale);
        odd[query] += high * (weight * scale);
        zeros[query] += weight * zero;
      }
    }
    EACH(query, QUERIES) {
      float* to = sums[query].values + group * GROUP;
      EACH(lane, LANES) {
        to[2 * lane] = even[query][lane] + zeros[query];
        to[2 * lane + 1] = odd[query][lane] + zeros[query];
      }
    }
  }
};

template <class HELD_AS, int QUERIES>
void attend_some(const HELD_AS& held, int64_t head, int64_t first, int64_t count, const float* q, Sums* sums) {
  alignas(64) float scores[QUERIES * CHUNK];
  held.template score<QUERIES>(head, first, count, q, scores);
  EACH(query, QUERIES) weigh(scores + query * CHUNK, count, sums[query]);
  held.template mix<QUERIES>(head, first, count, scores, sums);
}

template <class HELD_AS>
void attend(Call call) {
  std::vector<float> padded;
  if (call.step != call.width) {
    padded.resize(call.batch * call.heads * call.step);
    for (int64_t each = 0; each < call.batch * call.heads; each++)
      std::memcpy(padded.data() + each * call.step, call.q + each * call.width, call.width * sizeof(float));
    call.q = padded.data();
  }
  const HELD_AS held{call};
  const int64_t shared = call.shared(), chunks = (call.tokens + CHUNK - 1) / CHUNK, heads = call.batch * call.kv_heads;
  std::vector<Sums> sums(heads * chunks * shared);  // by key head, chunk and query
  const bool direct = chunks == 1 && call.step == call.width;
  std::vector<float> values(direct ? 0 : sums.size() * call.step);
  for (size_t i = 0; i < sums.size(); i++) sums[i].values = (direct ? call.out : values.data()) + i * call.step;
#pragma omp parallel if (heads * call.tokens * call.width >= SMALL)
  {
#pragma omp for schedule(static)
    for (int64_t each = 0; each < heads * chunks; each++) {
      const int64_t head = each / chunks, first = each % chunks * CHUNK, count = std::min(CHUNK, call.tokens - first);
      if (first + count == call.tokens) held.append(head);
      const float* q = call.q + head * shared * call.step;
      Sums* to = sums.data() + each * shared;
      int64_t query = 0;
      for (; query + 4 <= shared; query += 4) attend_some<HELD_AS, 4>(held, head, first, count, q + query * call.step, to + query);
      for (; query + 2 <= shared; query += 2) attend_some<HELD_AS, 2>(held, head, first, count, q + query * call.step, to + query);
      for (; query < shared; query++) attend_some<HELD_AS, 1>(held, head, first, count, q + query * call.step, to + query);
    }
#pragma omp for schedule(static)
    for (int64_t each = 0; each < heads * shared; each++) {
      const Sums* of = sums.data() + each / shared * chunks * shared + each % shared;
      float most = -INFINITY, total = 0;
      for (int64_t chunk = 0; chunk < chunks; chunk++) most = std::max(most, of[chunk * shared].most);
      for (int64_t chunk = 0; chunk < chunks; chunk++) total += of[chunk * shared].total * std::exp(of[chunk * shared].most - most);
      float* to = call.out + each * call.width;
      for (int64_t at = 0; at < call.width; at += LANES) {
        Lanes sum = Lanes{};
        for (int64_t chunk = 0; chunk < chunks; chunk++)
          sum += load(of[chunk * shared].values + at) * (std::exp(of[chunk * shared].most - most) / total);
        std::memcpy(to + at, &sum, std::min(LANES, call.width - at) * sizeof(float));
      }
    }
  }
}

enum Kind : int64_t { BFLOAT16, FLOAT16, FLOAT32, INT8 };

}  // namespace

// sizes: batch, heads, kv_heads, width, room, tokens (the newest among them), rows. kind: of the keys, or of an int4 cache's
// newest. Several rows are the newest tokens of one sequence, each of which sees those before it and itself.
extern "C" void lowvram_token_attention(const float* q, const float* k, const float* v, void* keys, void* values, void* key_scale,
                                        void* value_scale, void* recent, const int64_t* sizes, int64_t kind, float scale,
                                        float* out) {
  Call call{q, k, v, out, keys, values, recent, static_cast<uint16_t*>(key_scale), static_cast<uint16_t*>(value_scale),
            sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5] - sizes[6] + 1, scale, (sizes[3] + LANES - 1) / LANES * LANES};
  const bool int4 = recent != nullptr;
  for (int64_t row = 0; row < sizes[6]; row++) {
    switch (kind) {
      case BFLOAT16: int4 ? attend<Int4<BFloat16>>(call) : attend<Plain<BFloat16>>(call); break;
      case FLOAT16: int4 ? attend<Int4<Float16>>(call) : attend<Plain<Float16>>(call); break;
      case FLOAT32: int4 ? attend<Int4<Float32>>(call) : attend<Plain<Float32>>(call); break;
      case INT8: attend<Plain<Int8>>(call); break;
    }
    call.q += call.heads * call.width;
    call.out += call.heads * call.width;
    call.k += call.kv_heads * call.width;
    call.v += call.kv_heads * call.width;
    call.tokens++;
  }
}

// The same as a library that torch's compiler made calls it; what there may be is a pointer to its handle.
extern "C" int32_t aoti_torch_cpu_token_attention(void* q, void* k, void* v, void* keys, void* values, void** key_scale,
                                                  void** value_scale, void** recent, int64_t tokens, double scale,
                                                  void** result) {
  void *given[5], *into, *optional[3] = {};
  void* const handles[] = {q, k, v, keys, values};
  void** const perhaps[] = {key_scale, value_scale, recent};
  int64_t *asked, *kept, *held;
  int32_t dtype;
  for (int i = 0; i < 5; i++)
    if (const int32_t failed = aoti_torch_get_data_ptr(handles[i], given + i)) return failed;
  for (int i = 0; i < 3; i++)
    if (perhaps[i])
      if (const int32_t failed = aoti_torch_get_data_ptr(*perhaps[i], optional + i)) return failed;
  int32_t failed = aoti_torch_get_sizes(q, &asked) || aoti_torch_get_sizes(k, &kept) || aoti_torch_get_sizes(values, &held) ||
                   aoti_torch_get_dtype(recent ? *recent : keys, &dtype);
  if (failed) return failed;
  const int32_t float32 = aoti_torch_dtype_float32(), cpu = aoti_torch_device_type_cpu();
  const int64_t strided[] = {asked[1] * asked[2], asked[2], 1};
  failed = aoti_torch_empty_strided(3, asked, strided, float32, cpu, 0, result) || aoti_torch_get_data_ptr(*result, &into);
  if (failed) return failed;
  const int64_t sizes[] = {held[0], asked[1], kept[1], asked[2], held[2], tokens, asked[0] / held[0]};
  const int64_t kind = dtype == aoti_torch_dtype_int8()      ? INT8
                       : dtype == float32                    ? FLOAT32
                       : dtype == aoti_torch_dtype_float16() ? FLOAT16
                                                             : BFLOAT16;
  lowvram_token_attention((const float*)given[0], (const float*)given[1], (const float*)given[2], given[3], given[4],
                          optional[0], optional[1], optional[2], sizes, kind, float(scale), (float*)into);
  return 0;
}
