// A matrix in panels alone, between torch's operators.

#pragma once

#include "native_linear.h"

namespace llmengine {

struct Product {
  Linear linear;
  int64_t num_tokens, accumulate;
  const float* x;  // [num_tokens, columns]
  float* out;      // [num_tokens, rows]
  float* workspace;
};

// Prepares the activations, then multiplies.
class ProductRunner final : public Job {
 public:
  ProductRunner(const Product& product, int64_t num_threads)
      : product_(product), columns_(product.linear.columns()),
        activations_(activations_at(product.linear, product.x, product.workspace, product.num_tokens)),
        units_(linear_units(product.num_tokens, product.linear, num_threads)) {}

  bool begin_phase(int64_t index, Phase* phase) override {
    if (index == 0) *phase = light_phase(product_.num_tokens, columns_);
    if (index == 1) *phase = {units_.count, units_.grain};
    return index < 2;
  }

  void run(int64_t index, Range units, int64_t thread) override {
    const int64_t num_tokens = product_.num_tokens;
    float* scratch = product_.workspace + num_tokens * input_floats(product_.linear);
    scratch += thread * linear_scratch_floats(columns_, kMaxFewTokens);
    if (index == 0) return prepare_inputs(product_.linear, activations_, units, scratch);
    multiply_linear({{}, activations_, num_tokens, product_.out, product_.accumulate != 0, scratch}, product_.linear,
                    units_, units);
  }

 private:
  const Product& product_;
  const int64_t columns_;
  const Activations activations_;
  const LinearUnits units_;
};

}  // namespace llmengine
