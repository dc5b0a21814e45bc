// Activations as a matrix wants them: multiplied by factors, reordered and rounded, see `Inputs`.

#pragma once

#include "native_codes.h"

namespace llmengine {

// Those of one matrix. Only what its `InputKind` needs is there.
struct PartActivations {
  const float* floats;  // [tokens, columns]
  float* prepared;      // the same, where they are not the product's own
  Quantized shorts;
  DigitActivations digits;
  ByteActivations bytes;
};

inline int64_t num_digits(const Inputs& inputs) { return inputs.kind == kBytes ? 1 : 2; }

// Floats that a token takes.
inline int64_t input_floats(const Inputs& inputs, int64_t columns) {
  switch (inputs.kind) {
    case kExact: case kE4m3: return inputs.are_plain() ? 0 : columns;
    case kGroupBytes: return byte_activations_floats(columns);
    default: return kByteProducts ? digit_activations_floats(columns, num_digits(inputs)) : quantized_floats(columns);
  }
}

inline PartActivations part_activations_at(const float* x, float* workspace, int64_t num_tokens, int64_t columns,
                                           const Inputs& inputs) {
  PartActivations to = {x, workspace, {}, {}, {}};
  switch (inputs.kind) {
    case kExact: case kE4m3: to.floats = inputs.are_plain() ? x : workspace; break;
    case kGroupBytes: to.bytes = byte_activations_at(workspace, num_tokens, columns); break;
    default:
      if (kByteProducts)
        to.digits = digit_activations_at(workspace, num_tokens, columns, num_digits(inputs));
      else
        to.shorts = quantized_at(workspace, num_tokens, columns, inputs.kind == kBytes);
  }
  return to;
}

inline void arrange(const Inputs& inputs, const float* x, int64_t columns, float* to) {
  for (int64_t j = 0; j < columns; j++) {
    const int64_t i = inputs.order ? inputs.order[j] : j;
    to[j] = inputs.factors ? x[i] * inputs.factors[i] : x[i];
  }
}

// The nearest e4m3 number, ties to even; larger magnitudes than 448 become 448, NaN stays.
inline float nearest_e4m3(float x) {
  x = x > 448.0f ? 448.0f : x;
  x = x < -448.0f ? -448.0f : x;
  // Adding 1.5 * 2^23 times the distance of two numbers rounds to a multiple of it.
  constexpr uint32_t kLeastExponent = 121u << 23, kDistance = 20u << 23, kHalf = 1u << 22;
  uint32_t exponent = bit_cast<uint32_t>(x) & kInfinityBits;
  exponent = exponent < kLeastExponent ? kLeastExponent : exponent;
  const float magic = bit_cast<float>((exponent + kDistance) | kHalf);
  return (x + magic) - magic;
}

// Rounds as `Fp8.rounded_activations` does; `to` may be `x`.
inline void round_to_e4m3(const Inputs& inputs, const float* x, int64_t columns, float* to) {
  for (int64_t begin = 0; begin < columns; begin += inputs.scale_columns) {
    const int64_t end = begin + inputs.scale_columns < columns ? begin + inputs.scale_columns : columns;
    float scale = inputs.scale ? *inputs.scale : bit_cast<float>(largest_magnitude(x + begin, end - begin)) / 448.0f;
    scale = !inputs.scale && scale < 1e-30f ? 1e-30f : scale;
#pragma omp simd
    for (int64_t k = begin; k < end; k++) to[k] = nearest_e4m3(x[k] / scale) * scale;
  }
}

// Prepares token `m`; `scratch`: [columns].
inline void prepare_token(const Inputs& inputs, const float* x, int64_t columns, int64_t m, const PartActivations& to,
                          float* scratch) {
  const bool is_float = inputs.kind == kExact || inputs.kind == kE4m3;
  if (is_float) scratch = to.prepared + m * columns;
  if (inputs.factors || inputs.order) {
    arrange(inputs, x, columns, scratch);
    x = scratch;
  }
  switch (inputs.kind) {
    case kExact: break;
    case kE4m3: round_to_e4m3(inputs, x, columns, scratch); break;
    case kGroupBytes: quantize_bytes(x, columns, m, to.bytes); break;
    case kBytes: {
      const ByteRounding rounding = byte_rounding_of(x, columns, inputs.scale);
      if (kByteProducts)
        quantize_digits<1>(x, columns, rounding, m, to.digits);
      else
        quantize(x, columns, rounding, m, to.shorts);
      break;
    }
    default: {
      const Rounding rounding = rounding_of(x, columns);
      if (kByteProducts)
        quantize_digits<2>(x, columns, rounding, m, to.digits);
      else
        quantize(x, columns, rounding, m, to.shorts);
    }
  }
}

}  // namespace llmengine
