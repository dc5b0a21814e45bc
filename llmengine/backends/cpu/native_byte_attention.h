// Attention over keys and values of 8 bits, with one scale for each position and head; see `byte_kv_layout`.
//
// Queries are rounded to signed bytes with one scale each. The weights of values, exponentials times the values' scales,
// are rounded to unsigned bytes with one scale for each group of positions. Both products are then sums of integers, which
// are exact; groups are added in their order, in fp32. So a row's result does not depend on the rows beside it.
//
// What is beyond a row's context may hold anything: its scores are overwritten, and its weights are zero.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "native_bytes.h"

namespace llmengine {

constexpr int kGroupPositions = 32;  // block_size and head_dim are multiples of it
constexpr int kMostHeadDim = 256;
#if defined(__AVX512F__)
constexpr int kMostByteRows = 6;  // queries that share every load of keys and values
#elif defined(__AVX2__)
constexpr int kMostByteRows = 3;
#else
constexpr int kMostByteRows = 2;
#endif

// One layer's blocks.
struct ByteKv {
  uint8_t* keys;   // [blocks, kv_heads, dim / 4, block_size, 4], with 128 added
  int8_t* values;  // [blocks, kv_heads, block_size / 4, dim, 4]
  float *key_scales, *value_scales;  // [blocks, kv_heads, block_size]
  int64_t num_kv_heads, dim, block_size;
};

// A query, the number of positions it sees, and where its result goes.
struct ByteRow {
  const float* query;  // [dim]
  int64_t context;
  float* out;  // [dim]
};

namespace byte_kv {

// total += four products of unsigned and signed bytes, in each lane. Without byte products, those of the first two bytes
// fit into 16 bits together, and so do those of the last two.
inline void add_byte_products(Ints& total, Codes u, Codes s) {
#if defined(__AVX512VNNI__)
  total = bit_cast<Ints>(_mm512_dpbusd_epi32(bit_cast<__m512i>(total), bit_cast<__m512i>(u), bit_cast<__m512i>(s)));
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
  total = bit_cast<Ints>(_mm256_dpbusd_avx_epi32(bit_cast<__m256i>(total), bit_cast<__m256i>(u), bit_cast<__m256i>(s)));
#elif defined(__AVX512BW__)
  const __m512i pairs = _mm512_maddubs_epi16(bit_cast<__m512i>(u), bit_cast<__m512i>(s));
  total += bit_cast<Ints>(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_maddubs_epi16(bit_cast<__m256i>(u), bit_cast<__m256i>(s));
  total += bit_cast<Ints>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#elif defined(__SSE2__)
  total += bit_cast<Ints>(quad_products<false>(bit_cast<__m128i>(u), bit_cast<__m128i>(s)));
#else
  for (int i = 0; i < kWidth; i++)
    for (int j = 0; j < 4; j++) total[i] += int32_t{u[4 * i + j]} * static_cast<int8_t>(s[4 * i + j]);
#endif
  keep(total);
}

constexpr float kMostWeight = kByteProducts ? 255.0f : 127.0f;

// What a sum of key products begins with, given the sum of the query's bytes.
inline int32_t first_key_sum(int32_t query_sum) { return kByteProducts ? -128 * query_sum : 0; }

// total += four products of a query's bytes with those of keys, in each lane; `first_key_sum` takes the 128 off.
inline void add_key_products(Ints& total, Codes keys, Codes query) {
  if constexpr (kByteProducts) return add_byte_products(total, keys, query);
  const Codes values = keys ^ uint8_t{128};
#if defined(__AVX512BW__)
  const __m512i k = bit_cast<__m512i>(values), q = bit_cast<__m512i>(query);
  const __m512i turned = _mm512_mask_sub_epi8(q, _mm512_movepi8_mask(k), _mm512_setzero_si512(), q);
  add_byte_products(total, bit_cast<Codes>(_mm512_abs_epi8(k)), bit_cast<Codes>(turned));
#elif defined(__AVX2__)
  const __m256i k = bit_cast<__m256i>(values), q = bit_cast<__m256i>(query);
  add_byte_products(total, bit_cast<Codes>(_mm256_abs_epi8(k)), bit_cast<Codes>(_mm256_sign_epi8(q, k)));
#elif defined(__SSE2__)
  total += bit_cast<Ints>(quad_products<true>(bit_cast<__m128i>(values), bit_cast<__m128i>(query)));
#else
  for (int i = 0; i < kWidth; i++)
    for (int j = 0; j < 4; j++)
      total[i] += int32_t{static_cast<int8_t>(values[4 * i + j])} * static_cast<int8_t>(query[4 * i + j]);
#endif
}

inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline float largest_of(Floats values) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(values);
#else
  float largest = values[0];
  for (int i = 1; i < kWidth; i++) largest = values[i] > largest ? values[i] : largest;
  return largest;
#endif
}

// Floats without a sign order as integers, NaN last.
inline float largest_of(Ints bits) {
#if defined(__AVX512F__)
  return bit_cast<float>(_mm512_reduce_max_epi32(bit_cast<__m512i>(bits)));
#else
  int32_t largest = bits[0];
  for (int i = 1; i < kWidth; i++) largest = bits[i] > largest ? bits[i] : largest;
  return bit_cast<float>(largest);
#endif
}

// As `exp_negative` of floats.
inline Floats exp_negative(Floats x) {
  x = larger(repeat(-87.0f), x);  // NaN stays: of two operands, the second
  const Floats shifted = multiply_add(x, repeat(1.44269504f), repeat(12582912.0f));
  const Floats n = shifted - 12582912.0f;
  const Floats r = multiply_add(n, repeat(2.12194440e-4f), multiply_add(n, repeat(-0.693359375f), x));
  Floats p = repeat(1.9875691500e-4f);
  p = multiply_add(p, r, repeat(1.3981999507e-3f));
  p = multiply_add(p, r, repeat(8.3334519073e-3f));
  p = multiply_add(p, r, repeat(4.1665795894e-2f));
  p = multiply_add(p, r, repeat(1.6666665459e-1f));
  p = multiply_add(p, r, repeat(5.0000001201e-1f));
  p = multiply_add(p, r * r, r) + 1.0f;
  return p * bit_cast<Floats>((bit_cast<Words>(shifted) + 127) << 23);
}

// Signed bytes of x [dim], at a distance of `stride`, and their scale. What is not finite makes the scale so.
inline float round_to_bytes(const float* x, int64_t dim, int8_t* to) {
  Ints most{};
  for (int64_t k = 0; k < dim; k += kWidth) {
    const Ints bits = bit_cast<Ints>(load(x + k)) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  float largest = largest_of(most);
  largest = largest < 1e-30f ? 1e-30f : largest;
  const float factor = 127.0f / largest;
  for (int64_t k = 0; k < dim; k += kWidth) {
    // 1.5 * 2^23 leaves the rounded integer in the low bits.
    const Ints words = bit_cast<Ints>(load(x + k) * factor + 12582912.0f);
    store_low_bytes(to + k, words);
  }
  return largest / 127.0f;
}

inline void store_weights(uint8_t* to, Floats values) {
  store_low_bytes(reinterpret_cast<int8_t*>(to), bit_cast<Ints>(values + 12582912.0f));
}

template <int kRows>
struct Queries {
  int8_t values[kRows][kMostHeadDim];
  float scales[kRows];
  int32_t sums[kRows];  // see `first_key_sum`
};

// scores[r][position] for the positions of one group.
template <int kRows>
[[gnu::noinline]] void group_scores(const Queries<kRows>& queries, const uint8_t* keys, const float* scales, int64_t dim,
                                    int64_t block_size, float* scores, int64_t stride) {
  constexpr int kVectors = 2;
  for (int from = 0; from < kGroupPositions; from += kVectors * kWidth) {
    Ints sums[kRows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; v++) {
        sums[r][v] = Ints{} + queries.sums[r];
        keep(sums[r][v]);
      }
    const uint8_t* next = keys + 4 * from;
    for (int64_t d = 0; d < dim; d += 4, next += 4 * block_size) {
      Codes quads[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; v++) quads[v] = load_codes(next + 4 * v * kWidth);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; r++) {
        const Codes query = bit_cast<Codes>(repeat_quad(queries.values[r] + d));
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; v++) add_key_products(sums[r][v], quads[v], query);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; v++)
        store(scores + r * stride + from + v * kWidth,
              __builtin_convertvector(sums[r][v], Floats) * (load(scales + from + v * kWidth) * queries.scales[r]));
  }
}

// Weights of one group of one row: bytes, and their scale, which is returned. Adds the exponentials to `sum`.
template <bool kIsCut>
inline float group_weights(const float* scores, Floats most, int64_t context, const float* value_scales, uint8_t* weights,
                           Floats& sum) {
  constexpr int kParts = kGroupPositions / kWidth;
  Floats parts[kParts];
  Ints largest{};
#pragma GCC unroll 16
  for (int i = 0; i < kParts; i++) {
    Floats e = exp_negative(load(scores + i * kWidth) - most), scale = load(value_scales + i * kWidth);
    if constexpr (kIsCut) {
      Ints position;
      for (int j = 0; j < kWidth; j++) position[j] = i * kWidth + j;
      const Ints is_seen = position < static_cast<int32_t>(context < kGroupPositions ? context : kGroupPositions);
      e = bit_cast<Floats>(bit_cast<Ints>(e) & is_seen);
      scale = bit_cast<Floats>(bit_cast<Ints>(scale) & is_seen);
    }
    sum += e;
    parts[i] = e * scale;
    const Ints bits = bit_cast<Ints>(parts[i]) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  const float limit = largest_of(largest), factor = limit > 1e-30f ? kMostWeight / limit : 0.0f;
#pragma GCC unroll 16
  for (int i = 0; i < kParts; i++) store_weights(weights + i * kWidth, parts[i] * factor);
  return limit * (1.0f / kMostWeight);
}

// Where the rows of one request and one head of keys are read, and what is kept of them between the two products.
struct Reads {
  const ByteKv& kv;
  const int32_t* blocks;
  int64_t kv_head, num_groups;
  float* scores;         // [rows, stride]
  uint8_t* weights;      // [num_groups, rows, kGroupPositions]
  float* weight_scales;  // [num_groups, rows]

  // Number of a group's first position among those of all blocks and heads, times block_size.
  int64_t position(int64_t group) const {
    const int64_t first = group * kGroupPositions, mask = kv.block_size - 1;
    return (blocks[first >> __builtin_ctzll(kv.block_size)] * kv.num_kv_heads + kv_head) * kv.block_size + (first & mask);
  }
};

// Scores of a row to its weights; returns the sum of the exponentials. Neither this nor the two products are inlined:
// together they are too much for GCC's register allocation.
template <int kRows>
[[gnu::noinline]] float row_weights(const Reads& reads, int row, int64_t context, float* scores) {
  const int64_t num_groups = reads.num_groups, whole = context / kGroupPositions;
  for (int64_t k = context; k < num_groups * kGroupPositions; k++) scores[k] = -INFINITY;
  Floats largest[2] = {repeat(-INFINITY), repeat(-INFINITY)};
  for (int64_t k = 0; k < num_groups * kGroupPositions; k += 2 * kWidth)
    for (int i = 0; i < 2; i++) largest[i] = larger(largest[i], load(scores + k + i * kWidth));
  const Floats most = repeat(largest_of(larger(largest[0], largest[1])));
  Floats sum{};
  for (int64_t g = 0; g < num_groups; g++) {
    const float *group = scores + g * kGroupPositions, *value_scales = reads.kv.value_scales + reads.position(g);
    uint8_t* weights = reads.weights + (g * kRows + row) * kGroupPositions;
    const int64_t left = context - g * kGroupPositions;
    reads.weight_scales[g * kRows + row] = g < whole ? group_weights<false>(group, most, left, value_scales, weights, sum)
                                                     : group_weights<true>(group, most, left, value_scales, weights, sum);
  }
  return llmengine::sum(sum);
}

template <int kRows>
[[gnu::noinline]] void weighted_values(const Reads& reads, const float* totals, const ByteRow* rows) {
  constexpr int kVectors = 2;
  const int64_t dim = reads.kv.dim;
  for (int64_t d = 0; d < dim; d += kVectors * kWidth) {
    Floats sums[kRows][kVectors] = {};
    for (int64_t g = 0; g < reads.num_groups; g++) {
      Ints parts[kRows][kVectors];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; r++)
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; v++) {
          parts[r][v] = Ints{};
          keep(parts[r][v]);
        }
      const int8_t* values = reads.kv.values + reads.position(g) * dim + 4 * d;
      const uint8_t* weights = reads.weights + g * kRows * kGroupPositions;
      for (int q = 0; q < kGroupPositions / 4; q++) {
        Codes quads[kVectors];
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; v++) quads[v] = load_codes(reinterpret_cast<const uint8_t*>(values) + (q * dim + v * kWidth) * 4);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; r++) {
          const Codes weight = bit_cast<Codes>(repeat_quad(weights + r * kGroupPositions + 4 * q));
#pragma GCC unroll 16
          for (int v = 0; v < kVectors; v++) add_byte_products(parts[r][v], weight, quads[v]);
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; r++)
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; v++)
          sums[r][v] = multiply_add(__builtin_convertvector(parts[r][v], Floats),
                                    repeat(reads.weight_scales[g * kRows + r]), sums[r][v]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; v++) store(rows[r].out + d + v * kWidth, sums[r][v] / totals[r]);
  }
}

template <int kRows>
void attend(const ByteKv& kv, const int32_t* blocks, int64_t kv_head, const ByteRow* rows, float* scratch) {
  Queries<kRows> queries;
  int64_t context = 0;
  for (int r = 0; r < kRows; r++) {
    queries.scales[r] = round_to_bytes(rows[r].query, kv.dim, queries.values[r]);
    int32_t sum = 0;
    for (int64_t k = 0; k < kv.dim; k++) sum += queries.values[r][k];
    queries.sums[r] = first_key_sum(sum);
    context = rows[r].context > context ? rows[r].context : context;
  }
  const int64_t num_groups = (context + kGroupPositions - 1) / kGroupPositions, stride = num_groups * kGroupPositions;
  float* weight_scales = scratch + kRows * stride;
  uint8_t* weights = reinterpret_cast<uint8_t*>(weight_scales + kRows * num_groups);
  const Reads reads{kv, blocks, kv_head, num_groups, scratch, weights, weight_scales};
  for (int64_t g = 0; g < num_groups; g++) {
    const int64_t position = reads.position(g), offset = position & (kv.block_size - 1);
    const uint8_t* keys = kv.keys + (position - offset) * kv.dim + 4 * offset;
    group_scores<kRows>(queries, keys, kv.key_scales + position, kv.dim, kv.block_size, scratch + g * kGroupPositions,
                        stride);
  }
  float totals[kRows];
  for (int r = 0; r < kRows; r++) totals[r] = row_weights<kRows>(reads, r, rows[r].context, scratch + r * stride);
  weighted_values<kRows>(reads, totals, rows);
}

}  // namespace byte_kv

// Floats that `attend_bytes` needs.
inline int64_t byte_attention_floats(int64_t max_context) {
  const int64_t groups = (max_context + kGroupPositions - 1) / kGroupPositions;
  return kMostByteRows * groups * (kGroupPositions + kGroupPositions / 4 + 1);
}

// Up to kMostByteRows rows of one request that attend to the same head of keys.
template <int kRows = kMostByteRows>
void attend_bytes(const ByteKv& kv, const int32_t* blocks, int64_t kv_head, const ByteRow* rows, int64_t count,
                  float* scratch) {
  if constexpr (kRows > 1)
    if (count < kRows) return attend_bytes<kRows - 1>(kv, blocks, kv_head, rows, count, scratch);
  byte_kv::attend<kRows>(kv, blocks, kv_head, rows, scratch);
}

inline void write_byte_key(const ByteKv& kv, int64_t block, int64_t offset, int64_t kv_head, const float* key) {
  const int64_t head = block * kv.num_kv_heads + kv_head, size = kv.block_size;
  int8_t bytes[kMostHeadDim];
  kv.key_scales[head * size + offset] = byte_kv::round_to_bytes(key, kv.dim, bytes);
  uint8_t* keys = kv.keys + head * kv.dim * size + 4 * offset;
  for (int64_t k = 0; k < kv.dim; k += 4) {
    uint32_t quad;
    std::memcpy(&quad, bytes + k, 4);
    quad ^= 0x80808080;
    std::memcpy(keys + k * size, &quad, 4);
  }
}

inline void write_byte_value(const ByteKv& kv, int64_t block, int64_t offset, int64_t kv_head, const float* value) {
  const int64_t head = block * kv.num_kv_heads + kv_head, size = kv.block_size;
  int8_t bytes[kMostHeadDim];
  kv.value_scales[head * size + offset] = byte_kv::round_to_bytes(value, kv.dim, bytes);
  int8_t* values = kv.values + (head * size + offset / 4 * 4) * kv.dim + offset % 4;
  for (int64_t k = 0; k < kv.dim; k++) values[4 * k] = bytes[k];
}

}  // namespace llmengine
