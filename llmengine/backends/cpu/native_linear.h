// A product of the decoder: matrices one above the other, each in its own format, with the same activations.

#pragma once

#include "native_floats.h"
#include "native_inputs.h"

namespace llmengine {

constexpr int64_t kMaxParts = 3;
constexpr int64_t kMaxFewTokens = 128;  // in steps of more, products and attention work on tiles of tokens

constexpr int64_t kSmallPhase = 16 << 10;  // numbers that one thread computes sooner than several come together
constexpr int64_t kNumbersAtATime = 4 << 10;

// A phase of `count` units with so many numbers each.
inline Phase light_phase(int64_t count, int64_t numbers) {
  return {count, kNumbersAtATime / numbers, count * numbers <= kSmallPhase};
}

struct Linear {
  int64_t num_parts;
  Matrix parts[kMaxParts];

  int64_t columns() const { return parts[0].columns; }
  bool has_plain_inputs() const {
    for (int64_t i = 0; i < num_parts; i++)
      if (!parts[i].inputs.are_plain()) return false;
    return true;
  }
  // The first part with the same inputs.
  int64_t owner_of_inputs(int64_t part) const {
    int64_t owner = 0;
    while (!(parts[owner].inputs == parts[part].inputs)) owner++;
    return owner;
  }
};

struct Activations {
  const float* floats;  // [tokens, columns], as they come
  PartActivations parts[kMaxParts];
};

// Floats that a token's prepared activations take.
inline int64_t input_floats(const Linear& linear) {
  int64_t floats = 0;
  for (int64_t i = 0; i < linear.num_parts; i++)
    if (linear.owner_of_inputs(i) == i) floats += input_floats(linear.parts[i].inputs, linear.columns());
  return floats;
}

inline Activations activations_at(const Linear& linear, const float* x, float* workspace, int64_t num_tokens) {
  Activations to = {x, {}};
  for (int64_t i = 0; i < linear.num_parts; i++) {
    const int64_t owner = linear.owner_of_inputs(i);
    const Inputs& inputs = linear.parts[i].inputs;
    if (owner < i) {
      to.parts[i] = to.parts[owner];
      continue;
    }
    to.parts[i] = part_activations_at(x, workspace, num_tokens, linear.columns(), inputs);
    workspace += num_tokens * input_floats(inputs, linear.columns());
  }
  return to;
}

// Makes of tokens what `linear` multiplies; `scratch`: [columns].
inline void prepare_inputs(const Linear& linear, const Activations& x, Range tokens, float* scratch) {
  const int64_t columns = linear.columns();
  for (int64_t i = 0; i < linear.num_parts; i++) {
    const Inputs& inputs = linear.parts[i].inputs;
    if (inputs.are_plain() || linear.owner_of_inputs(i) < i) continue;
    for (int64_t m = tokens.begin; m < tokens.end; m++)
      prepare_token(inputs, x.floats + m * columns, columns, m, x.parts[i], scratch);
  }
}

// A row of a matrix in panels, not of int8, as fp32.
inline void look_up(const Matrix& matrix, int64_t row, float* out) {
  has_float_panels(matrix) ? widen_row(matrix, row, out) : dequantize_row(matrix, row, out);
}

// How one matrix is cut into units: panels, blocks for MKL, or rows.
struct PartUnits {
  int64_t count, grain;
  PanelUnits panels;
  BlockUnits blocks;
};

inline PartUnits part_units(int64_t num_tokens, const Matrix& matrix, int64_t num_threads) {
  const int64_t groups = num_groups(matrix.columns);
  if (has_codes(matrix) || (matrix.format == kInt8 && kByteProducts)) {
    const bool codes = has_codes(matrix);
    const int64_t panel_bytes = codes ? code_panel_bytes(matrix) : groups * kGroupColumns * kPanelRows;
    const int64_t token_bytes =
        codes ? byte_activations_floats(matrix.columns) * 4 : groups * kGroupColumns * num_digits(matrix.inputs);
    const PanelUnits cut = panel_units(num_tokens, matrix.rows, panel_bytes, token_bytes, kTileOfBytes, num_threads);
    return {cut.count, cut.grain < kManyPanels ? kManyPanels : cut.grain, cut, {}};
  }
  if (has_float_panels(matrix)) {
    const PanelUnits cut = panel_units(num_tokens, matrix.rows, float_panel_bytes(matrix), matrix.columns * 4, kFloatTile,
                                       num_threads);
    const int64_t fair = cut.count / num_threads, least = fair < 1 ? 1 : fair < kFloatPanels ? fair : kFloatPanels;
    return {cut.count, cut.grain < least ? least : cut.grain, cut, {}};
  }
  if (matrix.format == kInt8) {
    const int64_t stride = even(matrix.columns);
    const PanelUnits cut =
        panel_units(num_tokens, matrix.rows, kPanelRows * stride, 2 * stride, kPanelTokens, num_threads);
    return {cut.count, cut.grain, cut, {}};
  }
  if (num_tokens <= kMaxFewTokens) return {matrix.rows, row_grain(num_tokens, matrix), {}, {}};
  const BlockUnits cut = block_units(num_tokens, matrix, num_threads);
  return {cut.count, 1, {}, cut};
}

struct LinearUnits {
  PartUnits parts[kMaxParts];
  int64_t count, grain;
};

inline LinearUnits linear_units(int64_t num_tokens, const Linear& linear, int64_t num_threads) {
  LinearUnits cut = {};
  for (int64_t i = 0; i < linear.num_parts; i++) {
    const PartUnits part = cut.parts[i] = part_units(num_tokens, linear.parts[i], num_threads);
    cut.count += part.count;
    cut.grain = i == 0 || part.grain < cut.grain ? part.grain : cut.grain;
  }
  return cut;
}

// Floats of a thread's scratch.
inline int64_t linear_scratch_floats(int64_t columns, int64_t num_tokens) {
  const int64_t codes = unpacked_bytes<kManyPanels>(columns), floats = float_scratch_bytes(columns);
  const int64_t unpacked = (codes > floats ? codes : floats) / 4 + 16, blocks = kMostBlockRows * columns;
  return num_tokens <= kMaxFewTokens || unpacked > blocks ? unpacked : blocks;
}

// What all products of a phase share.
struct ProductInputs {
  const Blas& blas;
  const Activations& x;
  int64_t num_tokens;
  float* out;
  bool accumulate;
  float* scratch;  // linear_scratch_floats
};

inline void multiply_part(const ProductInputs& in, const PartActivations& x, const Matrix& matrix, const PartUnits& cut,
                          Range units) {
  if (matrix.format == kInt8 && !kByteProducts)
    return multiply_panels(x.shorts, in.num_tokens, matrix, cut.panels, units, in.out, in.accumulate);
  if (matrix.format < kInt8) {
    if (in.num_tokens <= kMaxFewTokens)
      return multiply_rows(x.floats, in.num_tokens, matrix, units, in.out, in.accumulate);
    return multiply_blocks(in.blas, x.floats, in.num_tokens, matrix, cut.blocks, units, in.out, in.accumulate,
                           in.scratch);
  }
  const uintptr_t address = reinterpret_cast<uintptr_t>(in.scratch);
  uint8_t* scratch = reinterpret_cast<uint8_t*>((address + 63) / 64 * 64);
  for (int64_t unit = units.begin, next; unit < units.end; unit = next) {
    // Those with the same tokens.
    const int64_t chunk = unit / cut.panels.panels, first = unit % cut.panels.panels, begin = chunk * cut.panels.chunk;
    const int64_t stop = (chunk + 1) * cut.panels.panels, end = begin + cut.panels.chunk;
    next = stop < units.end ? stop : units.end;
    const Range tokens{begin, end < in.num_tokens ? end : in.num_tokens}, panels{first, first + next - unit};
    if (has_float_panels(matrix))
      multiply_float_panels(x.floats, tokens, matrix, panels, in.out, in.accumulate, scratch);
    else if (has_codes(matrix))
      multiply_code_panels(x.bytes, tokens, matrix, panels, in.out, in.accumulate, scratch);
    else if (x.digits.digits == 1)
      multiply_digit_panels<1>(x.digits, tokens, matrix, panels, in.out, in.accumulate);
    else
      multiply_digit_panels<2>(x.digits, tokens, matrix, panels, in.out, in.accumulate);
  }
}

// Some units of out (+)= x . w + bias.
inline void multiply_linear(const ProductInputs& in, const Linear& linear, const LinearUnits& cut, Range units) {
  int64_t first = 0;
  for (int64_t i = 0; i < linear.num_parts; i++) {
    const int64_t count = cut.parts[i].count;
    const int64_t begin = units.begin > first ? units.begin - first : 0;
    const int64_t end = units.end - first < count ? units.end - first : count;
    if (begin < end) multiply_part(in, in.x.parts[i], linear.parts[i], cut.parts[i], {begin, end});
    first += count;
  }
}

}  // namespace llmengine
