// Products of 8-bit activations with weights of 2 to 6 and 8 bits, as AWQ, GPTQ, MXFP4 and GGUF have them.
//
// A weight is scale * (code - offset) or scale * code + minimum, with an unsigned code. Activations are signed bytes with
// one scale for each group of 32 columns. The sum over a group's codes times activations is an integer and exact; what the
// offset of the codes adds to it is known from the group's sum of activations, from which the integer sum starts. Groups
// are added in their order, in fp32, so that a token's result depends neither on the tokens beside it nor on how the rows
// are cut.
//
// Codes of 16 rows (a panel) and 16 columns (a strip) lie together, four columns of each row side by side, so that one
// vector serves 16 rows. For few tokens they are unpacked in registers; for many, panels are unpacked once for all.

#pragma once

#include "native_digits.h"

namespace llmengine {

constexpr int kStripColumns = 16, kGroupStrips = kGroupColumns / kStripColumns;
#if defined(__AVX512F__)
constexpr int kFewTokens = 4;
#elif defined(__AVX2__)
constexpr int kFewTokens = 2;
#else
constexpr int kFewTokens = 1;
#endif

// ---- weights ----

// Codes of `kBits` bits, strip after strip; `vector` is of the panel's kPanelVectors.
template <int kBits>
struct CodeStrip;

template <>
struct CodeStrip<8> {
  static constexpr int kBytes = 4 * kQuadBytes, kMaxCode = 255;
  static Codes load(const uint8_t* strip, int quad, int vector) {
    return load_codes(strip + quad * kQuadBytes + vector * kWidth * 4);
  }
};

// Even quads are in the low half of a byte, odd ones in the high half.
template <>
struct CodeStrip<4> {
  static constexpr int kBytes = 2 * kQuadBytes, kMaxCode = 15;
  static Codes load(const uint8_t* strip, int quad, int vector) {
    const Codes both = load_codes(strip + quad / 2 * kQuadBytes + vector * kWidth * 4);
    return (quad % 2 ? shifted_right<4>(both) : both) & (Codes{} + 15);
  }
};

// The fifth bits, one quad after the other, follow the others.
template <>
struct CodeStrip<5> {
  static constexpr int kBytes = 2 * kQuadBytes + kQuadBytes / 2, kMaxCode = 31;
  static Codes load(const uint8_t* strip, int quad, int vector) {
    const uint8_t* bits = strip + 2 * kQuadBytes + quad * kQuadBytes / 8 + vector * kWidth / 2;
    return with_bits<16>(CodeStrip<4>::load(strip, quad, vector), bits);
  }
};

// Bytes with the two high bits of all four quads follow the others.
template <>
struct CodeStrip<6> {
  static constexpr int kBytes = 3 * kQuadBytes, kMaxCode = 63;
  static Codes load(const uint8_t* strip, int quad, int vector) {
    const Codes high = load_codes(strip + 2 * kQuadBytes + vector * kWidth * 4), mask = Codes{} + 0x30;
    const Codes low = CodeStrip<4>::load(strip, quad, vector);
    switch (quad) {
      case 0: return low | (shifted_left<4>(high) & mask);
      case 1: return low | (shifted_left<2>(high) & mask);
      case 2: return low | (high & mask);
      default: return low | (shifted_right<2>(high) & mask);
    }
  }
};

// The four quads share their bytes.
template <>
struct CodeStrip<2> {
  static constexpr int kBytes = kQuadBytes, kMaxCode = 3;
  static Codes load(const uint8_t* strip, int quad, int vector) {
    const Codes all = load_codes(strip + vector * kWidth * 4), mask = Codes{} + 3;
    switch (quad) {
      case 0: return all & mask;
      case 1: return shifted_right<2>(all) & mask;
      case 2: return shifted_right<4>(all) & mask;
      default: return shifted_right<6>(all) & mask;
    }
  }
};

// The third bits, one quad after the other, follow the others.
template <>
struct CodeStrip<3> {
  static constexpr int kBytes = kQuadBytes + kQuadBytes / 2, kMaxCode = 7;
  static Codes load(const uint8_t* strip, int quad, int vector) {
    const uint8_t* bits = strip + kQuadBytes + quad * kQuadBytes / 8 + vector * kWidth / 2;
    return with_bits<4>(CodeStrip<2>::load(strip, quad, vector), bits);
  }
};

// Numbers of a table by codes of 4 bits.
template <typename Table>
struct TableStrip {
  static constexpr int kBytes = CodeStrip<4>::kBytes, kMaxCode = Table::kMaxCode;
  static Codes load(const uint8_t* strip, int quad, int vector) {
    return looked_up(CodeStrip<4>::load(strip, quad, vector), Table::kNumbers);
  }
};

// Twice the numbers of MXFP4.
struct E2m1 {
  static constexpr int kMaxCode = 24, kOffset = 12;
  static constexpr uint8_t kNumbers[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
};

constexpr uint8_t byte_code(int value) { return static_cast<uint8_t>(value + kByteOffset); }

// The numbers of GGUF's IQ4_NL and IQ4_XS, as 8-bit codes.
struct NonLinear {
  static constexpr int kMaxCode = 255, kOffset = kByteOffset;
  static constexpr uint8_t kNumbers[16] = {
      byte_code(-127), byte_code(-104), byte_code(-83), byte_code(-65), byte_code(-49), byte_code(-35),
      byte_code(-22),  byte_code(-10),  byte_code(1),   byte_code(13),  byte_code(25),  byte_code(38),
      byte_code(53),   byte_code(69),   byte_code(89),  byte_code(113)};
};

enum class Minimum { kNone, kStored, kZeroPoint };

// For each panel and group of 2^shift columns: scales [kPanelRows], fp16, fp32 or e8m0, then as many minima, fp16, or zero points,
// bytes. The minimum that a zero point stands for is (kZeroOffset - zero point) * scale.
template <Minimum kMinimum, typename Scale = Fp16, int kLeastColumns = kGroupColumns, int kZeroOffset = 0>
struct GroupScales {
  static constexpr bool kHasMinimum = kMinimum != Minimum::kNone, kHasZeroPoint = kMinimum == Minimum::kZeroPoint;
  static constexpr int kSumColumns = kLeastColumns, kScaleBytes = sizeof(Scale);
  static constexpr int kMinimumBytes = kMinimum == Minimum::kNone ? 0 : kMinimum == Minimum::kStored ? 2 : 1;
  static constexpr int kGroupBytes = (kScaleBytes + kMinimumBytes) * kPanelRows;
  static int64_t panel_bytes(int64_t padded_columns, int64_t shift) {
    return (((padded_columns - 1) >> shift) + 1) * kGroupBytes;
  }
  static Floats scale(const uint8_t* panel, int64_t column, int64_t shift, int vector) {
    return load(reinterpret_cast<const Scale*>(panel + (column >> shift) * kGroupBytes) + vector * kWidth);
  }
  static Floats minimum(const uint8_t* panel, int64_t column, int64_t shift, int vector) {
    if constexpr (kMinimum == Minimum::kZeroPoint)
      return negative_zero_point(panel, column, shift, vector) * scale(panel, column, shift, vector);
    else
      return load(reinterpret_cast<const Fp16*>(minima(panel, column, shift)) + vector * kWidth);
  }
  static Floats negative_zero_point(const uint8_t* panel, int64_t column, int64_t shift, int vector) {
    return static_cast<float>(kZeroOffset) - floats_of_bytes(minima(panel, column, shift) + vector * kWidth);
  }
  static const uint8_t* minima(const uint8_t* panel, int64_t column, int64_t shift) {
    return panel + (column >> shift) * kGroupBytes + kScaleBytes * kPanelRows;
  }
};

// GGUF's K formats: for each panel and 256 columns fp16 factors of scales [kPanelRows] (then of minima), and for each
// `kColumns` of the columns a byte by which these are multiplied. Where there are no minima, the byte has an offset of 128.
template <int kColumns, bool kMinimum>
struct SuperScales {
  static constexpr bool kHasMinimum = kMinimum, kHasZeroPoint = false;
  static constexpr int kSumColumns = kColumns, kParts = kMinimum ? 2 : 1;
  static constexpr int kHeadBytes = kParts * 2 * kPanelRows, kBytes = kHeadBytes + kParts * kPanelRows * (256 / kColumns);
  static int64_t panel_bytes(int64_t padded_columns, int64_t) { return padded_columns / 256 * kBytes; }
  static Floats part(const uint8_t* panel, int64_t column, int vector, int which) {
    const uint8_t* block = panel + column / 256 * kBytes;
    const Floats factor = load(reinterpret_cast<const Fp16*>(block) + which * kPanelRows + vector * kWidth);
    const uint8_t* bytes = block + kHeadBytes + (column % 256 / kColumns * kParts + which) * kPanelRows + vector * kWidth;
    const Floats steps = floats_of_bytes(bytes);
    return (kMinimum ? steps : steps - 128.0f) * factor;
  }
  static Floats scale(const uint8_t* panel, int64_t column, int64_t, int vector) { return part(panel, column, vector, 0); }
  static Floats minimum(const uint8_t* panel, int64_t column, int64_t, int vector) { return part(panel, column, vector, 1); }
};

template <int kCodeBits, int kCodeOffset, typename TheScales>
struct CodeFormat {
  static constexpr int kOffset = kCodeOffset;
  using Strip = CodeStrip<kCodeBits>;
  using Scales = TheScales;
};

template <typename Table, typename TheScales>
struct TableFormat {
  static constexpr int kOffset = Table::kOffset;
  using Strip = TableStrip<Table>;
  using Scales = TheScales;
};

// Calls `use` with the format of a matrix.
template <typename Use>
inline auto with_code_format(int64_t format, Use use) {
  constexpr auto kNone = Minimum::kNone, kStored = Minimum::kStored, kZero = Minimum::kZeroPoint;
  constexpr int kShift = 128 - kByteOffset;  // 8-bit codes are less by this where they are two's complement
  switch (format) {
    case kCodes8: return use(CodeFormat<8, kByteOffset, GroupScales<kNone>>());
    case kCodes4: return use(CodeFormat<4, 8, GroupScales<kNone>>());
    case kCodes4Minimum: return use(CodeFormat<4, 0, GroupScales<kStored>>());
    case kCodes4Zero: return use(CodeFormat<4, 0, GroupScales<kZero>>());
    case kCodes5: return use(CodeFormat<5, 16, GroupScales<kNone>>());
    case kCodes5Minimum: return use(CodeFormat<5, 0, GroupScales<kStored>>());
    case kCodes4Super: return use(CodeFormat<4, 0, SuperScales<32, true>>());
    case kCodes5Super: return use(CodeFormat<5, 0, SuperScales<32, true>>());
    case kCodes6Super: return use(CodeFormat<6, 32, SuperScales<16, false>>());
    case kCodes4Strips: return use(CodeFormat<4, 8, GroupScales<kNone, Fp16, kStripColumns>>());
    case kCodes4ZeroStrips: return use(CodeFormat<4, 0, GroupScales<kZero, Fp16, kStripColumns>>());
    case kCodes4Wide: return use(CodeFormat<4, 8, GroupScales<kNone, float>>());
    case kCodes4ZeroWide: return use(CodeFormat<4, 0, GroupScales<kZero, float>>());
    case kCodes8Zero: return use(CodeFormat<8, 0, GroupScales<kZero, Fp16, kGroupColumns, kShift>>());
    case kCodes8Wide: return use(CodeFormat<8, kByteOffset, GroupScales<kNone, float>>());
    case kCodesE2m1: return use(TableFormat<E2m1, GroupScales<kNone, E8m0>>());
    case kCodes2: return use(CodeFormat<2, 1, GroupScales<kNone>>());
    case kCodes2Super: return use(CodeFormat<2, 0, SuperScales<16, true>>());
    case kCodes3Super: return use(CodeFormat<3, 4, SuperScales<16, false>>());
    case kCodesNl: return use(TableFormat<NonLinear, GroupScales<kNone>>());
    case kCodesNlSuper: return use(TableFormat<NonLinear, SuperScales<32, false>>());
    default: return use(CodeFormat<8, 0, GroupScales<kZero, float, kGroupColumns, kShift>>());  // kCodes8ZeroWide
  }
}

inline bool has_codes(const Matrix& matrix) { return matrix.format > kInt8 && matrix.format < kBf16Panels; }

inline int64_t code_panel_bytes(const Matrix& matrix) {
  const int64_t strips = num_groups(matrix.columns) * kGroupStrips;
  return with_code_format(matrix.format, [=](auto format) { return strips * decltype(format)::Strip::kBytes; });
}

// ---- activations ----

// Tiles of n tokens (see `TilePlace`): values [groups, n, kGroupColumns], and of each group kFacts rows of n numbers: the
// scale, the scaled sum of values (fp32), and as integers the sums, negative, of the group and of each of its strips.
struct ByteActivations {
  int8_t* values;
  float* facts;
  int64_t num_tokens, groups;
};

enum Fact { kScale, kScaledSum, kGroupSum, kStripSum, kFacts = kStripSum + kGroupStrips };

inline int64_t byte_activations_floats(int64_t columns) { return num_groups(columns) * (kGroupColumns / 4 + kFacts); }

inline ByteActivations byte_activations_at(float* workspace, int64_t num_tokens, int64_t columns) {
  const int64_t groups = num_groups(columns);
  float* facts = workspace + num_tokens * groups * kGroupColumns / 4;
  return {reinterpret_cast<int8_t*>(workspace), facts, num_tokens, groups};
}

// One group of a token; returns its scale. NaN and infinity make the scale so, and with it the token's results.
inline float quantize_group(const float* x, int8_t* values, int32_t (&sums)[kGroupStrips]) {
  constexpr int kParts = kGroupColumns / kWidth;
  Words largest = {};
  Floats parts[kParts];
  for (int i = 0; i < kParts; i++) {
    parts[i] = load(x + i * kWidth);
    const Words bits = bit_cast<Words>(parts[i]) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  const float found = bit_cast<float>(largest_of(largest)), limit = found < 1e-30f ? 1e-30f : found;
  const Floats factor = Floats{} + 127.0f / limit;
  for (int s = 0; s < kGroupStrips; s++) sums[s] = 0;
  for (int i = 0; i < kParts; i++) {
    const Ints rounded = bit_cast<Ints>(multiply_add(parts[i], factor, Floats{} + 12582912.0f));  // see exp_negative
    sums[i * kWidth / kStripColumns] += store_low_bytes(values + i * kWidth, rounded);
  }
  return limit / 127.0f;
}

inline void quantize_bytes(const float* x, int64_t columns, int64_t token, const ByteActivations& to) {
  const TilePlace at(token, to.num_tokens);
  for (int64_t g = 0; g < to.groups; g++) {
    int32_t sums[kGroupStrips];
    float rest[kGroupColumns] = {};
    const float* from = x + g * kGroupColumns;
    if ((g + 1) * kGroupColumns > columns)
      from = static_cast<const float*>(std::memcpy(rest, from, (columns - g * kGroupColumns) * sizeof(float)));
    const int64_t group = at.first * to.groups + g * at.stride;
    const float scale = quantize_group(from, to.values + (group + at.place) * kGroupColumns, sums);
    float* facts = to.facts + group * kFacts + at.place;
    int32_t sum = 0;
    for (int s = 0; s < kGroupStrips; s++) {
      facts[(kStripSum + s) * at.stride] = bit_cast<float>(-sums[s]);
      sum += sums[s];
    }
    facts[kScale * at.stride] = scale;
    facts[kScaledSum * at.stride] = scale * static_cast<float>(sum);
    facts[kGroupSum * at.stride] = bit_cast<float>(-sum);
  }
}

// ---- products ----

// Neighbouring panels where they lie.
template <typename Format, int kPanels>
struct PackedPanels {
  using Scales = typename Format::Scales;
  static constexpr int kVectors = kPanels * kPanelVectors, kMaxCode = Format::Strip::kMaxCode;
  static constexpr int kSumColumns = Scales::kSumColumns, offset = Format::kOffset;
  static constexpr bool kHasMinimum = Scales::kHasMinimum;
  const uint8_t *codes, *scales;
  int64_t codes_bytes, scales_bytes, shift;

  PackedPanels(const Matrix& matrix, int64_t panel) : shift(matrix.group_shift) {
    const int64_t groups = num_groups(matrix.columns);
    codes_bytes = groups * kGroupStrips * Format::Strip::kBytes;
    scales_bytes = Scales::panel_bytes(groups * kGroupColumns, shift);
    codes = static_cast<const uint8_t*>(matrix.weight) + panel * codes_bytes;
    scales = static_cast<const uint8_t*>(matrix.scale) + panel * scales_bytes;
  }
  Codes load(int64_t strip, int quad, int v) const {
    const uint8_t* panel = codes + v / kPanelVectors * codes_bytes;
    return Format::Strip::load(panel + strip * Format::Strip::kBytes, quad, v % kPanelVectors);
  }
  Floats scale(int64_t column, int v) const {
    return Scales::scale(scales + v / kPanelVectors * scales_bytes, column, shift, v % kPanelVectors);
  }
  Floats minimum(int64_t column, int v) const {
    return Scales::minimum(scales + v / kPanelVectors * scales_bytes, column, shift, v % kPanelVectors);
  }
};

// The largest of the codes that add up alike, which then share a product.
template <int kMaxCode>
constexpr int kSharedMaxCode =
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(__AVXVNNI__)
    kMaxCode;
#else
    kByteProducts || kMaxCode > 127 ? 255 : 127;
#endif

// Bytes that `kPanels` unpacked panels take at most.
template <int kPanels>
constexpr int64_t unpacked_bytes(int64_t columns) {
  return kPanels * kPanelRows * num_groups(columns) * (kGroupColumns + kGroupStrips * 2 * int64_t{sizeof(float)});
}

// Neighbouring panels, unpacked: codes [columns / 4, kPanels, kQuadBytes], then scales and minima [sums, kPanels,
// kPanelRows]. Formats that differ in nothing else share their product, and so does every offset: a multiplication for
// each group of a token, where a product of its own would take as long to compile as all others.
template <int kMax, int kColumns, bool kMinimum, int kPanels>
struct UnpackedPanels {
  static constexpr int kVectors = kPanels * kPanelVectors, kMaxCode = kMax;
  static constexpr int kSumColumns = kColumns;
  static constexpr bool kHasMinimum = kMinimum;
  const uint8_t* codes;
  const float* scales;
  int offset;

  template <typename Format>
  UnpackedPanels(const PackedPanels<Format, kPanels>& from, int64_t groups, uint8_t* scratch) : offset(from.offset) {
    const int64_t strips = groups * kGroupStrips;
    for (int64_t strip = 0; strip < strips; strip++) {
#pragma GCC unroll 16
      for (int quad = 0; quad < 4; quad++)
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; v++)
          store_codes(scratch + ((strip * 4 + quad) * kVectors + v) * kWidth * 4, from.load(strip, quad, v));
    }
    codes = scratch;
    float* to = reinterpret_cast<float*>(scratch + strips * 4 * kVectors * kWidth * 4);
    scales = to;
    for (int64_t column = 0; column < strips * kStripColumns; column += kSumColumns) {
      for (int v = 0; v < kVectors; v++, to += kWidth) store(to, from.scale(column, v));
      if constexpr (kHasMinimum)
        for (int v = 0; v < kVectors; v++, to += kWidth) store(to, from.minimum(column, v));
    }
  }
  Codes load(int64_t strip, int quad, int v) const {
    return load_codes(codes + ((strip * 4 + quad) * kVectors + v) * kWidth * 4);
  }
  Floats scale(int64_t column, int v) const {
    return llmengine::load(scales + (column / kSumColumns * (kHasMinimum ? 2 : 1) * kVectors + v) * kWidth);
  }
  Floats minimum(int64_t column, int v) const {
    return llmengine::load(scales + ((column / kSumColumns * 2 + 1) * kVectors + v) * kWidth);
  }
};

// totals[i][v] = x[m + i] . w for the `kTokens` tokens of the tile that begins at token `m`.
template <int kTokens, typename Panels>
[[gnu::always_inline]] inline void multiply_codes(const ByteActivations& x, int64_t m, const Panels& w, Prefetch prefetch,
                                                  Floats (&totals)[kTokens][Panels::kVectors]) {
  constexpr int kVectors = Panels::kVectors, kSums = kGroupColumns / Panels::kSumColumns;
  constexpr int kQuads = Panels::kSumColumns / 4;
  static_assert(kSums == 1 || kSums == kGroupStrips);
  const int8_t* values = x.values + m * x.groups * kGroupColumns;
  const float* facts = x.facts + m * x.groups * kFacts;
#pragma GCC unroll 16
  for (int i = 0; i < kTokens; i++)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; v++) totals[i][v] = Floats{};
  for (int64_t g = 0; g < x.groups; g++) {
#pragma GCC unroll 2
    for (int s = 0; s < kSums; s++) {
      const float* sums = facts + (kSums == 1 ? kGroupSum : kStripSum + s) * kTokens;
      CodeSums<Panels::kMaxCode, kQuads> parts[kTokens][kVectors];
#pragma GCC unroll 16
      for (int i = 0; i < kTokens; i++) {
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; v++) {
          parts[i][v].total = Ints{} + bit_cast<int32_t>(sums[i]) * w.offset;
          keep(parts[i][v].total);
        }
      }
#pragma GCC unroll 16
      for (int q = 0; q < kQuads; q++) {
        __builtin_prefetch(prefetch.next);
        prefetch.next += prefetch.step;
        Codes codes[kVectors];
        const int64_t strip = g * kGroupStrips + s + q / 4;
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; v++) codes[v] = w.load(strip, q % 4, v);
#pragma GCC unroll 16
        for (int i = 0; i < kTokens; i++) {
          const Ints quad = repeat_quad(values + s * kStripColumns + i * kGroupColumns + 4 * q);
#pragma GCC unroll 16
          for (int v = 0; v < kVectors; v++) parts[i][v].add(q, codes[v], quad);
        }
      }
      const int64_t column = g * kGroupColumns + s * kStripColumns;
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; v++) {
        const Floats row_scale = w.scale(column, v);
        Floats minimum = Floats{};
        if constexpr (Panels::kHasMinimum) minimum = w.minimum(column, v);
#pragma GCC unroll 16
        for (int i = 0; i < kTokens; i++) {
          const Floats sum = __builtin_convertvector(parts[i][v].total, Floats) * row_scale;
          const float scale = facts[kScale * kTokens + i];
          totals[i][v] = multiply_add(sum, Floats{} + scale, totals[i][v]);
          if constexpr (Panels::kHasMinimum) {
            const float scaled_sum = kSums == 1 ? facts[kScaledSum * kTokens + i]
                                                : -static_cast<float>(bit_cast<int32_t>(sums[i])) * scale;
            totals[i][v] = multiply_add(Floats{} + scaled_sum, minimum, totals[i][v]);
          }
        }
      }
    }
    values += kTokens * kGroupColumns;
    facts += kTokens * kFacts;
  }
}

template <int kTokens, int kPanels, typename Panels>
void multiply_code_tile(const ByteActivations& x, int64_t m, const Matrix& matrix, int64_t panel, const Panels& w,
                        Prefetch prefetch, float* out, bool accumulate) {
  Floats totals[kTokens][Panels::kVectors];
  multiply_codes<kTokens>(x, m, w, prefetch, totals);
#pragma GCC unroll 16
  for (int i = 0; i < kTokens; i++) store_results<kPanels>(totals[i], m + i, matrix, panel, out, accumulate);
}

template <int kTokens, int kPanels, typename... Arguments>
inline void multiply_code_tile_for(int64_t num_tokens, const Arguments&... arguments) {
  if constexpr (kTokens > 1)
    if (num_tokens < kTokens) return multiply_code_tile_for<kTokens - 1, kPanels>(num_tokens, arguments...);
  multiply_code_tile<kTokens, kPanels>(arguments...);
}

// Neighbouring panels from `panel` on for many tokens.
template <typename Format, int kPanels>
void multiply_unpacked(const ByteActivations& x, Range tokens, const Matrix& matrix, int64_t panel, float* out,
                       bool accumulate, uint8_t* scratch) {
  using Scales = typename Format::Scales;
  constexpr int kMax = kSharedMaxCode<Format::Strip::kMaxCode>;
  using Panels = UnpackedPanels<kMax, Scales::kSumColumns, Scales::kHasMinimum, kPanels>;
  const PackedPanels<Format, kPanels> packed(matrix, panel);
  const Panels w(packed, x.groups, scratch);
  const int64_t tiles = (tokens.end - tokens.begin + kTileOfBytes - 1) / kTileOfBytes;
  const int64_t share = kPanels * packed.codes_bytes / tiles, calls = x.groups * kGroupColumns / 4;
  const char* next = reinterpret_cast<const char*>(packed.codes + kPanels * packed.codes_bytes);
  for (int64_t m = tokens.begin; m < tokens.end; m += kTileOfBytes, next += share) {
    const Prefetch ahead{next, (share + calls - 1) / calls};
    multiply_code_tile_for<kTileOfBytes, kPanels>(tokens.end - m, x, m, matrix, panel, w, ahead, out, accumulate);
  }
}

template <typename Format>
void multiply_panels_of(const ByteActivations& x, Range tokens, const Matrix& matrix, Range panels, float* out,
                        bool accumulate, uint8_t* scratch) {
  constexpr int kMost = kFewTokens < kTileOfBytes ? kFewTokens : kTileOfBytes;
  const int64_t num_tokens = tokens.end - tokens.begin;
  int64_t panel = panels.begin;
  for (; num_tokens <= kMost && panel < panels.end; panel++) {
    const PackedPanels<Format, 1> w(matrix, panel);
    const Prefetch ahead{reinterpret_cast<const char*>(w.codes + w.codes_bytes), Format::Strip::kBytes / 4};
    multiply_code_tile_for<kMost, 1>(num_tokens, x, tokens.begin, matrix, panel, w, ahead, out, accumulate);
  }
  for (; panel + kManyPanels <= panels.end; panel += kManyPanels)
    multiply_unpacked<Format, kManyPanels>(x, tokens, matrix, panel, out, accumulate, scratch);
  for (; panel < panels.end; panel++)
    multiply_unpacked<Format, 1>(x, tokens, matrix, panel, out, accumulate, scratch);
}

// `panels` of out (+)= x . w + bias for `tokens`, which begin with a tile and end with one or with all tokens.
// `scratch`: unpacked_bytes<kManyPanels>.
inline void multiply_code_panels(const ByteActivations& x, Range tokens, const Matrix& matrix, Range panels, float* out,
                                 bool accumulate, uint8_t* scratch) {
  with_code_format(matrix.format, [&](auto format) {
    multiply_panels_of<decltype(format)>(x, tokens, matrix, panels, out, accumulate, scratch);
  });
}

// A row of the matrix as fp32, each weight rounded once.
inline void dequantize_row(const Matrix& matrix, int64_t row, float* out) {
  with_code_format(matrix.format, [&](auto format) {
    using Format = decltype(format);
    using Panels = PackedPanels<Format, 1>;
    const Panels w(matrix, row / kPanelRows);
    const int vector = row % kPanelRows / kWidth, lane = row % kWidth;
    float scale = 0.0f, minimum = 0.0f;
    for (int64_t k = 0; k < matrix.columns; k++) {
      if (k % Panels::kSumColumns == 0) {
        scale = w.scale(k, vector)[lane];
        if constexpr (Format::Scales::kHasZeroPoint)
          minimum = Format::Scales::negative_zero_point(w.scales, k, w.shift, vector)[lane];
        else if constexpr (Panels::kHasMinimum)
          minimum = w.minimum(k, vector)[lane];
      }
      const uint8_t code = w.load(k / kStripColumns, k % kStripColumns / 4, vector)[4 * lane + k % 4];
      const bool is_signed = Format::Strip::kMaxCode > 127 && !kByteProducts;
      const int32_t value = is_signed ? int32_t{static_cast<int8_t>(code)} : int32_t{code} - Format::kOffset;
      const float exact = static_cast<float>(value);
      out[k] = Format::Scales::kHasZeroPoint ? (exact + minimum) * scale : multiply_add(exact, scale, minimum);
    }
  });
}

}  // namespace llmengine
