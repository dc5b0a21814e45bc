// Products of fp32 activations with bf16 and e4m3 weights, which become fp32 in registers.
//
// A panel's weights are [(columns + 1) / 2, kPanelRows, 2], with a zero after an odd column: one load has two columns of
// each row. Columns are added in their order, whatever is beside a token or a row.

#pragma once

#include "native_bytes.h"
#include "native_products.h"

namespace llmengine {

#if defined(__AVX512F__)
constexpr int kFloatPanels = 4, kFloatTile = 6;  // as many sums as registers hold
#elif defined(__AVX2__)
constexpr int kFloatPanels = 1, kFloatTile = 6;
#else
constexpr int kFloatPanels = 1, kFloatTile = 2;
#endif
constexpr int64_t kFewFloatTokens = 4;  // for more, e4m3 weights become bf16 once for all

inline bool has_float_panels(const Matrix& matrix) { return matrix.format >= kBf16Panels; }

inline int64_t float_panel_bytes(const Matrix& matrix) {
  return even(matrix.columns) * kPanelRows * (matrix.format == kBf16Panels ? 2 : 1);
}

struct Bf16Pair {
  static constexpr int kBytes = 4;
  static void load(const uint8_t* from, Floats& first, Floats& second) {
    Words both;
    std::memcpy(&both, from, sizeof(both));
    first = bit_cast<Floats>(both << 16);
    second = bit_cast<Floats>(both & 0xffff0000u);
  }
};

// e4m3 numbers over 256: their bits are those of fp16 numbers. NaN becomes a number; the row's scale is NaN then.
struct Fp8Pair {
  static constexpr int kBytes = 2;
  static void load(const uint8_t* from, Floats& first, Floats& second) {
    const Halves both = load_halves(from);
    const Halves low = both << 7, sign = both << 8, high = both >> 1;
    first = floats_of_fp16((low & 0x3f80) | (sign & 0x8000));
    second = floats_of_fp16((high & 0x3f80) | (both & 0x8000));
  }
};

constexpr float kFp8Unit = 256.0f;

// What the sums of a group of columns are multiplied by.
struct FloatScales {
  const float* scales;  // [panels, groups, kPanelRows]; kFp8Blocks: [panels, groups]
  int64_t groups, group_columns;
  bool of_panels;

  explicit FloatScales(const Matrix& matrix) : scales(matrix.row_scales()), of_panels(matrix.format == kFp8Blocks) {
    groups = ((matrix.columns - 1) >> matrix.group_shift) + 1;
    group_columns = groups == 1 ? matrix.columns : int64_t{1} << matrix.group_shift;
  }
  Floats operator()(int64_t panel, int64_t group, int vector) const {
    const int64_t at = panel * groups + group;
    return of_panels ? repeat(scales[at]) : load(scales + at * kPanelRows + vector * kWidth);
  }
};

// Neighbouring panels of `columns` columns, one `stride` bytes after the other.
template <typename ThePair, bool kHasScales>
struct FloatPanels {
  using Pair = ThePair;
  static constexpr bool kIsScaled = kHasScales;
  const uint8_t* weights;
  int64_t stride;

  void load(int64_t pair, int v, Floats& first, Floats& second) const {
    const uint8_t* panel = weights + v / kPanelVectors * stride;
    Pair::load(panel + (pair * kPanelRows + v % kPanelVectors * kWidth) * Pair::kBytes, first, second);
  }
};

// sums[i][v] += x[i] . w over the columns [begin, end); `begin` is even.
template <int kTokens, int kVectors, typename Panels>
[[gnu::always_inline]] inline void add_float_products(const float* x, int64_t stride, int64_t begin, int64_t end,
                                                      const Panels& w, Prefetch& prefetch,
                                                      Floats (&sums)[kTokens][kVectors]) {
  int64_t k = begin;
  for (; k + 2 <= end; k += 2) {
    __builtin_prefetch(prefetch.next);
    prefetch.next += prefetch.step;
    Floats first[kVectors], second[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; v++) w.load(k / 2, v, first[v], second[v]);
#pragma GCC unroll 16
    for (int i = 0; i < kTokens; i++) {
      const Floats one = repeat(x[i * stride + k]), two = repeat(x[i * stride + k + 1]);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; v++) {
        sums[i][v] = multiply_add(first[v], one, sums[i][v]);
        sums[i][v] = multiply_add(second[v], two, sums[i][v]);
      }
    }
  }
  if (k == end) return;
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; v++) {
    Floats first, second;
    w.load(k / 2, v, first, second);
#pragma GCC unroll 16
    for (int i = 0; i < kTokens; i++) sums[i][v] = multiply_add(first, repeat(x[i * stride + k]), sums[i][v]);
  }
}

template <int kTokens, int kPanels, typename Panels>
void multiply_float_tile(const float* x, int64_t m, const Matrix& matrix, int64_t panel, const Panels& w,
                         Prefetch prefetch, float* out, bool accumulate) {
  constexpr int kVectors = kPanels * kPanelVectors;
  const int64_t columns = matrix.columns;
  Floats totals[kTokens][kVectors] = {};
  if constexpr (!Panels::kIsScaled) {
    add_float_products(x + m * columns, columns, 0, columns, w, prefetch, totals);
  } else {
    const FloatScales scales(matrix);
    for (int64_t g = 0; g < scales.groups; g++) {
      const int64_t begin = g * scales.group_columns, end = begin + scales.group_columns;
      Floats sums[kTokens][kVectors] = {};
      add_float_products(x + m * columns, columns, begin, end < columns ? end : columns, w, prefetch, sums);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; v++) {
        const Floats scale = scales(panel + v / kPanelVectors, g, v % kPanelVectors);
#pragma GCC unroll 16
        for (int i = 0; i < kTokens; i++) totals[i][v] = multiply_add(sums[i][v] * kFp8Unit, scale, totals[i][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTokens; i++) store_results<kPanels>(totals[i], m + i, matrix, panel, out, accumulate);
}

template <int kTokens, int kPanels, typename... Arguments>
inline void multiply_float_tile_for(int64_t num_tokens, const Arguments&... arguments) {
  if constexpr (kTokens > 1)
    if (num_tokens < kTokens) return multiply_float_tile_for<kTokens - 1, kPanels>(num_tokens, arguments...);
  multiply_float_tile<kTokens, kPanels>(arguments...);
}

// Neighbouring panels from `panel` on. While the tokens pass over them, each tile fetches its share of the next.
template <int kTile, int kPanels, typename Panels>
void multiply_float_panels_at(const float* x, Range tokens, const Matrix& matrix, int64_t panel, const Panels& w,
                              const uint8_t* next, float* out, bool accumulate) {
  const int64_t tiles = (tokens.end - tokens.begin + kTile - 1) / kTile, pairs = even(matrix.columns) / 2;
  const int64_t share = kPanels * float_panel_bytes(matrix) / tiles;
  Prefetch ahead{reinterpret_cast<const char*>(next), (share + pairs - 1) / pairs};
  for (int64_t m = tokens.begin; m < tokens.end; m += kTile, ahead.next += share)
    multiply_float_tile_for<kTile, kPanels>(tokens.end - m, x, m, matrix, panel, w, ahead, out, accumulate);
}

// e4m3 panels as bf16 ones, over kFp8Unit.
template <int kPanels>
inline void unpack_fp8(const uint8_t* weights, int64_t panel_bytes, uint8_t* to) {
  for (int64_t at = 0; at < kPanels * panel_bytes; at += kWidth * Fp8Pair::kBytes) {
    Floats first, second;
    Fp8Pair::load(weights + at, first, second);
    const Words both = (bit_cast<Words>(first) >> 16) | bit_cast<Words>(second);
    std::memcpy(to + 2 * at, &both, sizeof(both));
  }
}

template <int kPanels>
void multiply_floats(const float* x, Range tokens, const Matrix& matrix, int64_t panel, float* out, bool accumulate,
                     uint8_t* scratch) {
  const int64_t panel_bytes = float_panel_bytes(matrix);
  const uint8_t* weights = static_cast<const uint8_t*>(matrix.weight) + panel * panel_bytes;
  const uint8_t* next = weights + kPanels * panel_bytes;
  if (matrix.format == kBf16Panels) {
    const FloatPanels<Bf16Pair, false> w{weights, panel_bytes};
    return multiply_float_panels_at<kFloatTile, kPanels>(x, tokens, matrix, panel, w, next, out, accumulate);
  }
  if (tokens.end - tokens.begin <= kFewFloatTokens) {
    constexpr int kTile = kFloatTile < kFewFloatTokens ? kFloatTile : kFewFloatTokens;
    const FloatPanels<Fp8Pair, true> w{weights, panel_bytes};
    return multiply_float_panels_at<kTile, kPanels>(x, tokens, matrix, panel, w, next, out, accumulate);
  }
  unpack_fp8<kPanels>(weights, panel_bytes, scratch);
  const FloatPanels<Bf16Pair, true> w{scratch, 2 * panel_bytes};
  multiply_float_panels_at<kFloatTile, kPanels>(x, tokens, matrix, panel, w, next, out, accumulate);
}

// Bytes of the scratch of `multiply_float_panels`.
inline int64_t float_scratch_bytes(int64_t columns) { return kFloatPanels * kPanelRows * 2 * even(columns); }

// `panels` of out (+)= x . w + bias for `tokens`.
inline void multiply_float_panels(const float* x, Range tokens, const Matrix& matrix, Range panels, float* out,
                                  bool accumulate, uint8_t* scratch) {
  int64_t panel = panels.begin;
  for (; panel + kFloatPanels <= panels.end; panel += kFloatPanels)
    multiply_floats<kFloatPanels>(x, tokens, matrix, panel, out, accumulate, scratch);
  if constexpr (kFloatPanels > 1)
    for (; panel < panels.end; panel++) multiply_floats<1>(x, tokens, matrix, panel, out, accumulate, scratch);
}

// A row of the matrix as fp32.
inline void widen_row(const Matrix& matrix, int64_t row, float* out) {
  const int64_t panel = row / kPanelRows, place = row % kPanelRows;
  const uint8_t* weights = static_cast<const uint8_t*>(matrix.weight) + panel * float_panel_bytes(matrix);
  const int64_t vector = place / kWidth, lane = place % kWidth;
  const bool is_bf16 = matrix.format == kBf16Panels;
  for (int64_t k = 0; k < matrix.columns; k += 2) {
    Floats first, second;
    const int64_t at = k / 2 * kPanelRows + vector * kWidth;
    if (is_bf16)
      Bf16Pair::load(weights + at * Bf16Pair::kBytes, first, second);
    else
      Fp8Pair::load(weights + at * Fp8Pair::kBytes, first, second);
    const float scale = is_bf16 ? 1.0f : FloatScales(matrix)(panel, k >> matrix.group_shift, vector)[lane];
    const float unit = is_bf16 ? 1.0f : kFp8Unit;
    out[k] = first[lane] * unit * scale;
    if (k + 1 < matrix.columns) out[k + 1] = second[lane] * unit * scale;
  }
}

}  // namespace llmengine
