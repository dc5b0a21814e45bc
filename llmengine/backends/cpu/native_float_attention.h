// Attention over fp32 keys and values. What is beyond a row's context may hold anything, and adds nothing.

#pragma once

#include "native_pool.h"
#include "native_vectors.h"

namespace llmengine {

// One layer's blocks.
struct FloatKv {
  const float* keys;    // [blocks, kv_heads, dim, block_size]
  const float* values;  // [blocks, block_size, kv_heads, dim]
  int64_t num_kv_heads, dim, block_size;

  const float* block_keys(int64_t block, int64_t kv_head) const {
    return keys + (block * num_kv_heads + kv_head) * dim * block_size;
  }
  const float* block_values(int64_t block, int64_t kv_head) const {
    return values + (block * block_size * num_kv_heads + kv_head) * dim;
  }
};

// Rows of a KV block and their factors; strides in floats.
struct WeightedRows {
  const float* factors;  // [heads, count]
  int64_t factor_stride, count;
  const float* rows;  // [count, size]
  int64_t row_stride, size;
  float* out;  // [heads, size]
  int64_t out_stride;
};

template <int kHeads, int kVectors>
inline void weighted_columns(const WeightedRows& block, int64_t j, bool accumulate) {
  Floats parts[kHeads][kVectors] = {};
  if (accumulate)
    for (int h = 0; h < kHeads; h++)
      for (int v = 0; v < kVectors; v++) parts[h][v] = load(block.out + h * block.out_stride + j + v * kWidth);
  for (int64_t i = 0; i < block.count; i++) {
    for (int v = 0; v < kVectors; v++) {
      const Floats row = load(block.rows + i * block.row_stride + j + v * kWidth);
      for (int h = 0; h < kHeads; h++)
        parts[h][v] = multiply_add(repeat(block.factors[h * block.factor_stride + i]), row, parts[h][v]);
    }
  }
  for (int h = 0; h < kHeads; h++)
    for (int v = 0; v < kVectors; v++) store(block.out + h * block.out_stride + j + v * kWidth, parts[h][v]);
}

// out[h] (+)= sum over i of factors[h][i] * rows[i], for `kHeads` heads, which share every load of a row.
template <int kHeads>
inline void weighted_sums(const WeightedRows& block, bool accumulate) {
  int64_t j = 0;
  for (; j + 4 * kWidth <= block.size; j += 4 * kWidth) weighted_columns<kHeads, 4>(block, j, accumulate);
  for (; j + 2 * kWidth <= block.size; j += 2 * kWidth) weighted_columns<kHeads, 2>(block, j, accumulate);
  for (; j + kWidth <= block.size; j += kWidth) weighted_columns<kHeads, 1>(block, j, accumulate);
  for (; j < block.size; j++) {
    for (int h = 0; h < kHeads; h++) {
      float& out = block.out[h * block.out_stride + j];
      float part = accumulate ? out : 0.0f;
      for (int64_t i = 0; i < block.count; i++)
        part = multiply_add(block.factors[h * block.factor_stride + i], block.rows[i * block.row_stride + j], part);
      out = part;
    }
  }
}

constexpr int64_t kMaxSharedHeads = 3;  // as many as leave registers for the rows
constexpr int64_t kTileSums = 6;        // rows of a tile that share a load

// Replaces scores by the exponentials of their distances to the largest; returns the sum.
inline float exponentials(float* scores, int64_t count) {
  float largest = scores[0], total = 0.0f;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < count; i++) largest = scores[i] > largest ? scores[i] : largest;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < count; i++) {
    scores[i] = exp_negative(scores[i] - largest);
    total += scores[i];
  }
  return total;
}

// One token's neighbouring heads, which share the keys of `kv_head`, over its whole context.
template <int kHeads>
void attend_heads(const FloatKv& kv, const int32_t* blocks, int64_t kv_head, const float* queries, int64_t context,
                  float* out, float* scores, int64_t stride) {
  const int64_t dim = kv.dim, size = kv.block_size;
  // Scores beyond the context come from rows that may hold anything, and are never used.
  for (int64_t begin = 0; begin < context; begin += size) {
    const float* keys = kv.block_keys(blocks[begin / size], kv_head);
    weighted_sums<kHeads>({queries, dim, dim, keys, size, size, scores + begin, stride}, false);
  }
  float totals[kHeads];
  for (int h = 0; h < kHeads; h++) totals[h] = exponentials(scores + h * stride, context);
  for (int64_t begin = 0; begin < context; begin += size) {
    const float* values = kv.block_values(blocks[begin / size], kv_head);
    const int64_t count = context - begin < size ? context - begin : size;
    weighted_sums<kHeads>({scores + begin, stride, count, values, kv.num_kv_heads * dim, dim, out, dim}, begin > 0);
  }
  for (int h = 0; h < kHeads; h++)
    for (int64_t k = 0; k < dim; k++) out[h * dim + k] /= totals[h];
}

// Neighbouring tokens of one request and neighbouring heads that share keys: a tile's rows are token after token, and head
// after head of each.
struct FloatTile {
  const float* queries;  // of the first token's first head; tokens are `query_stride` floats apart
  int64_t query_stride;
  float* out;  // likewise
  int64_t out_stride;
  int64_t num_tokens, num_heads;
  int64_t shared;  // keys that all rows see: the first token's context
};

inline void sum_tile(WeightedRows tile, int64_t rows, bool accumulate) {
  for (; rows >= kTileSums; rows -= kTileSums) {
    weighted_sums<kTileSums>(tile, accumulate);
    tile.factors += kTileSums * tile.factor_stride;
    tile.out += kTileSums * tile.out_stride;
  }
  for (; rows > 0; rows--) {
    weighted_sums<1>(tile, accumulate);
    tile.factors += tile.factor_stride;
    tile.out += tile.out_stride;
  }
}

// `scratch`: rows times (stride + 2 * dim) floats; `stride`: at least the context in whole blocks.
inline void attend_tile(const FloatKv& kv, const int32_t* blocks, int64_t kv_head, const FloatTile& tile, float* scratch,
                        int64_t stride) {
  const int64_t dim = kv.dim, size = kv.block_size, kv_size = kv.num_kv_heads * dim, shared = tile.shared;
  const int64_t num_heads = tile.num_heads, rows = tile.num_tokens * num_heads, context = shared + tile.num_tokens - 1;
  const int64_t token_bytes = num_heads * dim * sizeof(float);
  float *queries = scratch, *out = queries + rows * dim, *scores = out + rows * dim;
  for (int64_t m = 0; m < tile.num_tokens; m++)
    std::memcpy(queries + m * num_heads * dim, tile.queries + m * tile.query_stride, token_bytes);
  for (int64_t begin = 0; begin < context; begin += size) {
    const float* keys = kv.block_keys(blocks[begin / size], kv_head);
    sum_tile({queries, dim, dim, keys, size, size, scores + begin, stride}, rows, false);
  }
  for (int64_t row = 0; row < rows; row++) {
    const int64_t own = shared + row / num_heads;
    const float factor = 1.0f / exponentials(scores + row * stride, own);
#pragma omp simd
    for (int64_t i = 0; i < own; i++) scores[row * stride + i] *= factor;
  }
  for (int64_t begin = 0; begin < context; begin += size) {
    const float* values = kv.block_values(blocks[begin / size], kv_head);
    const int64_t common = shared - begin < size ? shared - begin : size;
    if (common > 0) sum_tile({scores + begin, stride, common, values, kv_size, dim, out, dim}, rows, begin > 0);
    // What a row does not see is not multiplied, not even by zero.
    const int64_t done = common > 0 ? common : 0;
    for (int64_t row = 0; row < rows; row++) {
      const int64_t own = shared + row / num_heads - begin, count = (own < size ? own : size) - done;
      const float* factors = scores + row * stride + begin + done;
      if (count <= 0) continue;
      weighted_sums<1>({factors, stride, count, values + done * kv_size, kv_size, dim, out + row * dim, dim},
                       begin + done > 0);
    }
  }
  for (int64_t m = 0; m < tile.num_tokens; m++)
    std::memcpy(tile.out + m * tile.out_stride, out + m * num_heads * dim, token_bytes);
}

}  // namespace llmengine
