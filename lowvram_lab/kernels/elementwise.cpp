// What lies between a prompt's matrix products, in one pass each: norms, rotary positions and gates of rows in bfloat16.
// Every value is rounded where torch's own operators, one after the other, round it.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "pieces.h"

namespace {

constexpr int64_t LANES = VECTOR_LANES;
constexpr int64_t SMALL = 1 << 15;  // elements; a thread's start costs more than so few take

// Each vector of a row, and what is left of it by one element at a time.
template <class VECTOR, class ELEMENT>
inline void each(int64_t count, VECTOR of_vector, ELEMENT of_element) {
  int64_t at = 0;
  for (; at + LANES <= count; at += LANES) of_vector(at);
  for (; at < count; at++) of_element(at);
}

inline float rounded(float value) { return from_bf16(to_bf16(value)); }

inline float total(Lanes of) {
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += of[i];
  return sum;
}

inline Lanes silu(Lanes x) {  // below -88 nothing is left of it
  const Lanes least = Lanes{} - 88.0f, bounded = x < least ? least : x;
  return bounded / (1.0f + exponential(-bounded));
}

inline float silu(float x) { return silu(Lanes{} + x)[0]; }

}  // namespace

// (rows, columns) over the root of their mean square, and times weight.
extern "C" void lowvram_rms_norm(const uint16_t* rows, const uint16_t* weight, int64_t count, int64_t columns, float eps,
                                 uint16_t* out) {
#pragma omp parallel for schedule(static) if (count * columns >= SMALL)
  for (int64_t row = 0; row < count; row++) {
    const uint16_t* from = rows + row * columns;
    uint16_t* to = out + row * columns;
    Lanes squares = {};
    float rest = 0;
    each(
        columns, [&](int64_t at) { const Lanes x = read_bf16(from + at); squares += x * x; },
        [&](int64_t at) { const float x = from_bf16(from[at]); rest += x * x; });
    const float by = 1 / std::sqrt((total(squares) + rest) / columns + eps);
    each(
        columns, [&](int64_t at) { store_bf16(rounded_to_bf16(read_bf16(from + at) * by) * read_bf16(weight + at), to + at); },
        [&](int64_t at) { to[at] = to_bf16(rounded(from_bf16(from[at]) * by) * from_bf16(weight[at])); });
  }
}

// States (batch, tokens, heads, width) turned by their positions' angles: cos and sin (batch or 1, tokens, width).
extern "C" void lowvram_rotated(const uint16_t* states, const uint16_t* cos, const uint16_t* sin, int64_t batch,
                                int64_t angles_step, int64_t tokens, int64_t heads, int64_t width, uint16_t* out) {
  const int64_t half = width / 2;
#pragma omp parallel for schedule(static) if (batch * tokens * heads * width >= SMALL)
  for (int64_t token = 0; token < batch * tokens; token++) {
    const int64_t angle = token / tokens * angles_step + token % tokens * width;
    for (int64_t head = 0; head < heads; head++) {
      const int64_t first = (token * heads + head) * width;
      for (int64_t begin : {int64_t(0), half}) {
        const uint16_t *x = states + first + begin, *other = states + first + (begin ? 0 : half);
        const uint16_t *c = cos + angle + begin, *s = sin + angle + begin;
        uint16_t* to = out + first + begin;
        const float sign = begin ? 1 : -1;
        each(
            half,
            [&](int64_t at) {
              const Lanes kept = read_bf16(x + at) * read_bf16(c + at);
              const Lanes turned = read_bf16(other + at) * sign * read_bf16(s + at);
              store_bf16(rounded_to_bf16(kept) + rounded_to_bf16(turned), to + at);
            },
            [&](int64_t at) {
              const float kept = from_bf16(x[at]) * from_bf16(c[at]), turned = from_bf16(other[at]) * sign * from_bf16(s[at]);
              to[at] = to_bf16(rounded(kept) + rounded(turned));
            });
      }
    }
  }
}

// silu(gate) * up of so many elements.
extern "C" void lowvram_gated(const uint16_t* gate, const uint16_t* up, int64_t count, uint16_t* out) {
  constexpr int64_t PART = 4096;
#pragma omp parallel for schedule(static) if (count >= SMALL)
  for (int64_t first = 0; first < count; first += PART) {
    const uint16_t *gates = gate + first, *ups = up + first;
    uint16_t* to = out + first;
    each(
        std::min(PART, count - first),
        [&](int64_t at) { store_bf16(rounded_to_bf16(silu(read_bf16(gates + at))) * read_bf16(ups + at), to + at); },
        [&](int64_t at) { to[at] = to_bf16(rounded(silu(from_bf16(gates[at]))) * from_bf16(ups[at])); });
  }
}
