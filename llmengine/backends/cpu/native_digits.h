// Products of int8 weights with activations of 8 bits, or of 16 bits by two byte products each: such an activation is
// 256 * high + low, two signed bytes. The integer sum is that of `multiply_panels`, and so is every bit of the result.

#pragma once

#include "native_bytes.h"
#include "native_products.h"

namespace llmengine {

constexpr int kGroupColumns = 32;
constexpr int kQuadBytes = 4 * kPanelRows;  // of 8-bit codes of a panel's rows and four columns
#if defined(__AVX512F__)
constexpr int kManyPanels = 2, kTileOfBytes = 6;
#elif defined(__AVX2__)
constexpr int kManyPanels = 1, kTileOfBytes = 4;
#else
constexpr int kManyPanels = 1, kTileOfBytes = 1;
#endif

constexpr int kStreamTokens = 1;
constexpr int64_t kStreamAhead = 4096;  // bytes of weights that are fetched before they are needed

inline int64_t num_groups(int64_t columns) { return (columns + kGroupColumns - 1) / kGroupColumns; }

// Where a token's activations lie: tokens are in tiles of up to `kTileOfBytes`, group after group of each tile, so that a
// product walks through a tile with one pointer.
struct TilePlace {
  int64_t first, place, stride;

  TilePlace(int64_t token, int64_t num_tokens) : first(token / kTileOfBytes * kTileOfBytes), place(token - first) {
    stride = num_tokens - first < kTileOfBytes ? num_tokens - first : kTileOfBytes;
  }
};

struct DigitActivations {
  int8_t* values;        // tiles of n tokens: [groups, n, digits, kGroupColumns]
  float* scales;         // [tokens]
  int32_t* corrections;  // [tokens], of the codes' offset
  int64_t num_tokens, groups;
  int64_t digits;  // 1: kBytes, 2: kShorts
};

inline int64_t digit_activations_floats(int64_t columns, int64_t digits) {
  return num_groups(columns) * digits * kGroupColumns / 4 + 2;
}

inline DigitActivations digit_activations_at(float* workspace, int64_t num_tokens, int64_t columns, int64_t digits) {
  const int64_t groups = num_groups(columns);
  float* scales = workspace + num_tokens * groups * digits * kGroupColumns / 4;
  int32_t* corrections = reinterpret_cast<int32_t*>(scales + num_tokens);
  return {reinterpret_cast<int8_t*>(workspace), scales, corrections, num_tokens, groups, digits};
}

template <int kDigits, typename TokenRounding>
inline void quantize_digits(const float* x, int64_t columns, const TokenRounding& rounding, int64_t token,
                            const DigitActivations& to) {
  const TilePlace at(token, to.num_tokens);
  int32_t sum = 0;
  for (int64_t g = 0; g < to.groups; g++) {
    int8_t* values = to.values + (at.first * to.groups + g * at.stride + at.place) * kDigits * kGroupColumns;
    const int64_t left = columns - g * kGroupColumns, count = left < kGroupColumns ? left : kGroupColumns;
    if (count < kGroupColumns) std::memset(values, 0, kDigits * kGroupColumns);
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < count; k++) {
      const int16_t value = rounding(x[g * kGroupColumns + k]);
      const int8_t low = static_cast<int8_t>(value);
      if (kDigits == 2) values[k] = static_cast<int8_t>((value - low) >> 8);
      values[(kDigits - 1) * kGroupColumns + k] = low;
      sum += value;
    }
  }
  to.scales[token] = rounding.scale;
  to.corrections[token] = -kByteOffset * sum;
}

// out[m] (+)= x[m] . w + bias for the `kTokens` tokens of a tile and neighbouring panels, whose weights are
// [columns / 4, kPanelRows, 4] with the offset kByteOffset. For few tokens every second quad has sums of its own: an
// addition waits for the one before it to the same sum.
template <int kDigits, int kTokens, int kPanels>
void multiply_digit_tile(const DigitActivations& x, int64_t m, const Matrix& matrix, int64_t panel, Prefetch prefetch,
                         float* out, bool accumulate) {
  constexpr int kVectors = kPanels * kPanelVectors, kQuads = kGroupColumns / 4;
  constexpr int kRuns = kTokens * kVectors <= 2 ? 2 : 1;
  const int64_t panel_bytes = x.groups * kQuads * kQuadBytes;
  const uint8_t* codes_at = static_cast<const uint8_t*>(matrix.weight) + panel * panel_bytes;
  const int8_t* values = x.values + m * x.groups * kDigits * kGroupColumns;
  CodeSums<255, kQuads / kRuns> sums[kRuns][kTokens][kDigits][kVectors] = {};
  for (int64_t g = 0; g < x.groups; g++) {
#pragma GCC unroll 16
    for (int q = 0; q < kQuads; q++) {
      __builtin_prefetch(prefetch.next);
      prefetch.next += prefetch.step;
      Codes codes[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; v++)
        codes[v] = load_codes(codes_at + v / kPanelVectors * panel_bytes + q * kQuadBytes + v % kPanelVectors * kWidth * 4);
#pragma GCC unroll 16
      for (int i = 0; i < kTokens; i++)
#pragma GCC unroll 16
        for (int d = 0; d < kDigits; d++) {
          const Ints quad = repeat_quad(values + (i * kDigits + d) * kGroupColumns + 4 * q);
#pragma GCC unroll 16
          for (int v = 0; v < kVectors; v++) sums[q % kRuns][i][d][v].add(q / kRuns, codes[v], quad);
        }
    }
    codes_at += kQuads * kQuadBytes;
    values += kTokens * kDigits * kGroupColumns;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTokens; i++) {
    Floats results[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; v++) {
      Ints sum = Ints{} + x.corrections[m + i];
      for (int run = 0; run < kRuns; run++) {
        sum += sums[run][i][kDigits - 1][v].total;
        if (kDigits == 2) sum += sums[run][i][0][v].total << 8;
      }
      const Floats row_scale = load(matrix.row_scales() + panel * kPanelRows + v * kWidth);
      results[v] = scaled_sum(sum, row_scale, x.scales[m + i], kDigits == 1);
    }
    store_results<kPanels>(results, m + i, matrix, panel, out, accumulate);
  }
}

template <int kDigits, int kTokens, int kPanels, typename... Arguments>
inline void multiply_digit_tile_for(int64_t num_tokens, const Arguments&... arguments) {
  if constexpr (kTokens > 1)
    if (num_tokens < kTokens) return multiply_digit_tile_for<kDigits, kTokens - 1, kPanels>(num_tokens, arguments...);
  multiply_digit_tile<kDigits, kTokens, kPanels>(arguments...);
}

// `panels` of out (+)= x . w + bias for `tokens`, which begin with a tile and end with one or with all tokens.
template <int kDigits>
inline void multiply_digit_panels(const DigitActivations& x, Range tokens, const Matrix& matrix, Range panels, float* out,
                                  bool accumulate) {
  const int64_t num_tokens = tokens.end - tokens.begin, tiles = (num_tokens + kTileOfBytes - 1) / kTileOfBytes;
  const int64_t quads = x.groups * kGroupColumns / 4;
  const char* weights = static_cast<const char*>(matrix.weight);
  int64_t panel = panels.begin;
  // Few tokens wait for memory, which likes one stream.
  for (; num_tokens <= kStreamTokens && panel < panels.end; panel++) {
    const Prefetch ahead{weights + panel * quads * kQuadBytes + kStreamAhead, kQuadBytes};
    multiply_digit_tile_for<kDigits, kStreamTokens, 1>(num_tokens, x, tokens.begin, matrix, panel, ahead, out, accumulate);
  }
  for (int64_t width; panel < panels.end; panel += width) {
    width = panels.end - panel >= kManyPanels ? kManyPanels : 1;
    // While the tokens pass over these panels, each tile of them fetches its share of the next.
    const int64_t share = width * quads * kQuadBytes / tiles;
    const char* next = weights + (panel + width) * quads * kQuadBytes;
    for (int64_t m = tokens.begin; m < tokens.end; m += kTileOfBytes, next += share) {
      const Prefetch ahead{next, (share + quads - 1) / quads};
      const int64_t left = tokens.end - m;
      if (width == kManyPanels)
        multiply_digit_tile_for<kDigits, kTileOfBytes, kManyPanels>(left, x, m, matrix, panel, ahead, out, accumulate);
      else
        multiply_digit_tile_for<kDigits, kTileOfBytes, 1>(left, x, m, matrix, panel, ahead, out, accumulate);
    }
  }
}

}  // namespace llmengine
