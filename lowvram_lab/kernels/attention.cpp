// Attention of many queries to all keys before them, in bfloat16: scores and sums in float32, softmax as the keys pass by
// (Milakov and Gimelshein 2018, arXiv:1805.02867), so that of the scores no more than a tile is ever there. For processors
// with AVX-512 and its products of bfloat16 pairs; on others it is not asked for.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "pieces.h"

#if defined(__AVX512BF16__) && defined(__AVX512VL__) && defined(__AVX512BW__)
#include <immintrin.h>

namespace {

constexpr int64_t QUERIES = 128;  // of a tile
constexpr int64_t KEYS = 64;      // of a tile
constexpr int ROWS = 4, VECTORS = 4, LANES = 16;

// Where a tensor (batch, heads, tokens, features) lies; features side by side.
struct States {
  const uint16_t* data;
  int64_t batch_step, head_step, token_step;
  const uint16_t* at(int64_t batch, int64_t head, int64_t token) const {
    return data + batch * batch_step + head * head_step + token * token_step;
  }
};

struct Task {
  States q, k, v;
  uint16_t* out;  // (batch, tokens, heads, features)
  const uint8_t* mask;  // (batch, tokens, keys) of booleans, or null
  int64_t batch, heads, kv_heads, queries, keys, width;
  int64_t mask_batch_step, mask_query_step;
  bool causal;  // the last query sees all keys
  float scale;
};

// ROWS rows times a matrix of pairs: to[row][column] += sum over pairs of rows[row][pair] . matrix[pair][column].
template <int COUNT>
void multiply(const uint32_t* rows, int64_t row_step, const uint32_t* matrix, int64_t matrix_step, int64_t pairs, bool more,
              float* to, int64_t to_step) {
  __m512 sums[ROWS][COUNT];
  EACH(row, ROWS) EACH(vector, COUNT)
    sums[row][vector] = more ? _mm512_loadu_ps(to + row * to_step + vector * LANES) : _mm512_setzero_ps();
  add_pairs(sums, rows, row_step, matrix, matrix_step, pairs);
  EACH(row, ROWS) EACH(vector, COUNT) _mm512_storeu_ps(to + row * to_step + vector * LANES, sums[row][vector]);
}

// What a thread works in.
struct Tile {
  const Task& task;
  int64_t pairs;                          // of a head's features
  std::vector<uint32_t> queries, keys, values, weights;  // as pairs: of features, (pair, key), (pair of keys, feature), of keys
  std::vector<float> scores, sums, most, totals;

  explicit Tile(const Task& task)
      : task(task), pairs(task.width / 2), queries(QUERIES * pairs), keys(pairs * KEYS), values(KEYS / 2 * task.width),
        weights(QUERIES * KEYS / 2), scores(QUERIES * KEYS), sums(QUERIES * task.width), most(QUERIES), totals(QUERIES) {}

  void attend(int64_t batch, int64_t head, int64_t first) {
    const int64_t count = std::min(QUERIES, task.queries - first), kv_head = head / (task.heads / task.kv_heads);
    const int64_t padded = (count + ROWS - 1) / ROWS * ROWS;
    std::fill(queries.begin(), queries.begin() + padded * pairs, 0);
    for (int64_t query = 0; query < count; query++)
      std::memcpy(queries.data() + query * pairs, task.q.at(batch, head, first + query), task.width * sizeof(uint16_t));
    std::fill(most.begin(), most.end(), -INFINITY);
    std::fill(totals.begin(), totals.end(), 0.0f);
    std::fill(sums.begin(), sums.begin() + padded * task.width, 0.0f);
    const int64_t before = task.keys - task.queries;
    const int64_t seen = task.causal ? std::min(task.keys, before + first + count) : task.keys;
    for (int64_t key = 0; key < seen; key += KEYS) {
      const int64_t some = std::min(KEYS, seen - key);
      read_keys(batch, kv_head, key, some);
      read_values(batch, kv_head, key, some);
      for (int64_t query = 0; query < count; query += ROWS)
        multiply<VECTORS>(queries.data() + query * pairs, pairs, keys.data(), KEYS, pairs, false, scores.data() + query * KEYS, KEYS);
      for (int64_t query = 0; query < count; query++) {
        int64_t last = some;
        if (task.causal) last = std::min(some, before + first + query + 1 - key);
        weigh(query, last, task.mask ? task.mask + batch * task.mask_batch_step + (first + query) * task.mask_query_step + key : nullptr);
      }
      for (int64_t query = 0; query < count; query += ROWS) add_values(query);
    }
    for (int64_t query = 0; query < count; query++) {
      const float total = totals[query] ? 1 / totals[query] : 0;
      uint16_t* to = task.out + ((batch * task.queries + first + query) * task.heads + head) * task.width;
      for (int64_t at = 0; at < task.width; at += LANES) {
        const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(sums.data() + query * task.width + at), _mm512_set1_ps(total));
        _mm256_storeu_si256((__m256i*)(to + at), (__m256i)_mm512_cvtneps_pbh(value));
      }
    }
  }

  void read_keys(int64_t batch, int64_t head, int64_t first, int64_t count) {
    for (int64_t key = 0; key < count; key++) {
      const uint16_t* from = task.k.at(batch, head, first + key);
      for (int64_t pair = 0; pair < pairs; pair++) std::memcpy(&keys[pair * KEYS + key], from + 2 * pair, sizeof(uint32_t));
    }
  }

  void read_values(int64_t batch, int64_t head, int64_t first, int64_t count) {
    for (int64_t key = 0; key < KEYS; key += 2) {
      const uint16_t* even = key < count ? task.v.at(batch, head, first + key) : nullptr;
      const uint16_t* odd = key + 1 < count ? task.v.at(batch, head, first + key + 1) : nullptr;
      uint32_t* to = values.data() + key / 2 * task.width;
      for (int64_t i = 0; i < task.width; i++) to[i] = (even ? even[i] : 0) | uint32_t(odd ? odd[i] : 0) << 16;
    }
  }

  // Scores of a query become weights; what was summed before is brought to the same maximum.
  void weigh(int64_t query, int64_t last, const uint8_t* mask) {
    float* from = scores.data() + query * KEYS;
    const __m512 none = _mm512_set1_ps(-INFINITY), scale = _mm512_set1_ps(task.scale);
    __m512 read[VECTORS], highest = none;
    EACH(vector, VECTORS) {
      const int64_t left = std::clamp<int64_t>(last - vector * LANES, 0, LANES);
      __mmask16 there = __mmask16((1u << left) - 1);
      if (mask && left) {
        const __m128i shown = _mm_maskz_loadu_epi8(there, mask + vector * LANES);
        there = _mm_test_epi8_mask(shown, shown);
      }
      read[vector] = _mm512_mask_mul_ps(none, there, _mm512_loadu_ps(from + vector * LANES), scale);
      highest = _mm512_max_ps(highest, read[vector]);
    }
    uint32_t* to = weights.data() + query * KEYS / 2;
    const float now = std::max(most[query], _mm512_reduce_max_ps(highest));
    if (now == -INFINITY) {
      std::memset(to, 0, KEYS * sizeof(uint16_t));
      return;
    }
    if (now > most[query]) {
      const float shrunk = std::exp(most[query] - now);
      float* held = sums.data() + query * task.width;
      for (int64_t at = 0; at < task.width; at += LANES)
        _mm512_storeu_ps(held + at, _mm512_mul_ps(_mm512_loadu_ps(held + at), _mm512_set1_ps(shrunk)));
      totals[query] *= shrunk;
      most[query] = now;
    }
    __m512 total = _mm512_setzero_ps();
    EACH(vector, VECTORS) {
      read[vector] = (__m512)exponential((Lanes)_mm512_sub_ps(read[vector], _mm512_set1_ps(now)));
      read[vector] = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(read[vector], _mm512_set1_ps(1e-37f), _CMP_GT_OQ), read[vector]);
      total = _mm512_add_ps(total, read[vector]);
    }
    totals[query] += _mm512_reduce_add_ps(total);
    for (int vector = 0; vector < VECTORS; vector += 2)
      _mm512_storeu_si512(to + vector * LANES / 2, (__m512i)_mm512_cvtne2ps_pbh(read[vector + 1], read[vector]));
  }

  void add_values(int64_t query) {
    const uint32_t* rows = weights.data() + query * KEYS / 2;
    float* to = sums.data() + query * task.width;
    int64_t at = 0;
    for (; at + VECTORS * LANES <= task.width; at += VECTORS * LANES)
      multiply<VECTORS>(rows, KEYS / 2, values.data() + at, task.width, KEYS / 2, true, to + at, task.width);
    for (; at < task.width; at += LANES)
      multiply<1>(rows, KEYS / 2, values.data() + at, task.width, KEYS / 2, true, to + at, task.width);
  }
};

}  // namespace

// Features of a head are a multiple of 16. steps: of q, k and v each from a batch, head and token to the next; of the mask
// from a batch and a query to the next. A row of keys that are all masked becomes 0.
extern "C" void lowvram_attention(const uint16_t* q, const uint16_t* k, const uint16_t* v, const uint8_t* mask,
                                  const int64_t* steps, int64_t batch, int64_t heads, int64_t kv_heads, int64_t queries,
                                  int64_t keys, int64_t width, bool causal, float scale, uint16_t* out) {
  const States states[] = {{q, steps[0], steps[1], steps[2]}, {k, steps[3], steps[4], steps[5]}, {v, steps[6], steps[7], steps[8]}};
  const Task task{states[0], states[1], states[2], out, mask, batch, heads, kv_heads, queries, keys, width,
                  steps[9], steps[10], causal, scale};
  const int64_t tiles = (queries + QUERIES - 1) / QUERIES;
#pragma omp parallel
  {
    Tile tile(task);
    // the last tiles see the most keys: they come first
#pragma omp for schedule(dynamic) collapse(2)
    for (int64_t back = 1; back <= tiles; back++)
      for (int64_t each = 0; each < batch * heads; each++)
        tile.attend(each / heads, each % heads, (tiles - back) * QUERIES);
  }
}

#else

extern "C" void lowvram_attention(const uint16_t*, const uint16_t*, const uint16_t*, const uint8_t*, const int64_t*, int64_t,
                                  int64_t, int64_t, int64_t, int64_t, int64_t, bool, float, uint16_t*) {}

#endif
