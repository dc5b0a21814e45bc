// One call runs a step through the whole decoder on the CPU: with few tokens, torch's operators spend as long on being
// called as on computing. `native.py` describes the model once and passes each step's arrays.
//
// Plain C++17 with GCC's or Clang's vector extensions, compiled once for each vector width; `setup.py` has the flags.
// Weights are fp32, bf16 or fp16, row-major [out, in], or bf16, e4m3 or integers in panels; KV is fp32 or 8 bits; everything else is fp32.
// Nothing is allocated during a step; the structures belong to the caller and mirror those of `native.py`.

#include "native_byte_attention.h"
#include "native_float_attention.h"
#include "native_linear.h"
#include "native_pool.h"
#include "native_product.h"
#include "native_vectors.h"

namespace llmengine {
namespace {

struct Layer {
  const float *input_norm, *post_attention_norm;
  Linear qkv, o, gate_up, down;
  float* keys;    // [blocks, kv_heads, head_dim, block_size]
  float* values;  // [blocks, block_size, kv_heads, head_dim]
  float *key_scales, *value_scales;  // null, or keys and values are those of a ByteKv
};

struct Model {
  Pool* pool;
  Blas blas;  // null without MKL; steps of more than kMaxFewTokens tokens then need weights in panels
  int64_t num_layers, num_heads, num_kv_heads, head_dim, block_size;
  int64_t max_context;  // tokens, a multiple of block_size
  const Layer* layers;
  Matrix embedding;
  Linear lm_head;
  const float* final_norm;
  float norm_eps;
  const float* rope;  // [positions, head_dim], cos then sin
};

struct Step {
  int64_t num_tokens, num_logits, table_stride;
  const int64_t *token_ids, *positions, *token_slots;  // [num_tokens]
  const int64_t* logit_tokens;                         // [num_logits], rising
  const int32_t* block_tables;                         // [slots, table_stride]
  float* workspace;
  float* logits;       // [num_logits, vocab]
  int64_t* likeliest;  // [num_logits], see `first_largest`
};

constexpr int64_t kMostTileRows = 48, kTileScores = 256 << 10;
constexpr int64_t kByteTileTokens = 8, kByteTilesPerThread = 2;

// Attention of a tile: up to `tokens` neighbouring tokens of one request, with `heads` heads that share their keys.
struct TileShape {
  int64_t heads, tokens, head_groups;
};

inline TileShape tile_shape(const Model& model) {
  const int64_t per_kv = model.num_heads / model.num_kv_heads;
  int64_t rows = kTileScores / model.max_context;
  rows = rows < kTileSums ? kTileSums : rows < kMostTileRows ? rows : kMostTileRows;
  const int64_t heads = per_kv < rows ? per_kv : rows;
  return {heads, rows / heads, (per_kv + heads - 1) / heads};
}

// Tokens and heads of a tile over 8-bit keys. Small enough that every thread gets some.
inline TileShape byte_tile_shape(const Model& model, int64_t num_tokens) {
  const int64_t per_kv = model.num_heads / model.num_kv_heads, wanted = kByteTilesPerThread * model.pool->size();
  TileShape tile{per_kv, kByteTileTokens, 1};
  const auto count = [&] { return (num_tokens + tile.tokens - 1) / tile.tokens * model.num_kv_heads * tile.head_groups; };
  while (tile.tokens > 1 && count() < wanted) tile.tokens /= 2;
  while (tile.heads > 1 && count() < wanted) {
    tile.heads = (tile.heads + 1) / 2;
    tile.head_groups = (per_kv + tile.heads - 1) / tile.heads;
  }
  return tile;
}

// Floats that a step needs: for each token, and for each thread.
inline int64_t widest_input(const Model& model) {
  const int64_t query_size = model.num_heads * model.head_dim, inner = model.layers[0].down.columns();
  const int64_t hidden = model.embedding.columns, wider = inner > query_size ? inner : query_size;
  return wider > hidden ? wider : hidden;
}

inline int64_t attention_floats(const Model& model, int64_t num_tokens) {
  if (model.layers[0].key_scales) return byte_attention_floats(model.max_context);
  if (num_tokens <= kMaxFewTokens) return kMaxSharedHeads * model.max_context;
  const TileShape tile = tile_shape(model);
  return tile.heads * tile.tokens * (model.max_context + 2 * model.head_dim);
}

inline int64_t thread_floats(const Model& model, int64_t num_tokens) {
  const int64_t attention = attention_floats(model, num_tokens);
  const int64_t product = linear_scratch_floats(widest_input(model), num_tokens);
  return attention > product ? attention : product;
}

// Of a token's activations as a product wants them.
inline int64_t most_input_floats(const Model& model) {
  int64_t most = input_floats(model.lm_head);
  for (int64_t i = 0; i < model.num_layers; i++) {
    const Layer& layer = model.layers[i];
    for (const Linear* linear : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) {
      const int64_t floats = input_floats(*linear);
      most = floats > most ? floats : most;
    }
  }
  return most;
}

inline int64_t token_floats(const Model& model) {
  const int64_t query_size = model.num_heads * model.head_dim, kv_size = model.num_kv_heads * model.head_dim;
  const int64_t inputs = most_input_floats(model);
  return 2 * model.embedding.columns + 2 * query_size + 2 * kv_size + 3 * model.layers[0].down.columns() + inputs;
}

// One step.
class Runner final : public Job {
 public:
  Runner(const Model& model, const Step& step) : model_(model), step_(step), num_tokens_(step.num_tokens) {
    hidden_ = model.embedding.columns;
    query_size_ = model.num_heads * model.head_dim;
    kv_size_ = model.num_kv_heads * model.head_dim;
    qkv_size_ = query_size_ + 2 * kv_size_;
    inner_ = model.layers[0].down.columns();
    float* next = step.workspace;
    const auto take = [&](int64_t columns) {
      float* taken = next;
      next += step.num_tokens * columns;
      return taken;
    };
    x_ = take(hidden_);
    normed_ = take(hidden_);
    qkv_ = take(qkv_size_);
    attended_ = take(query_size_);
    gate_up_ = take(2 * inner_);
    gated_ = take(inner_);
    inputs_ = take(most_input_floats(model));
    scratch_ = next;
    thread_floats_ = thread_floats(model, step.num_tokens);
  }

  bool begin_phase(int64_t index, Phase* phase) override {
    if (index > 0 && index <= kPhasesPerLayer * model_.num_layers) return begin_layer_phase(index, phase);
    if (index == 0)
      *phase = light_phase(num_tokens_, 2 * hidden_);
    else if (index == logits_phase())
      *phase = product_phase(model_.lm_head);
    else if (index == logits_phase() + 1)
      *phase = light_phase(num_tokens_, model_.embedding.rows);
    else
      return false;
    return true;
  }

  void run(int64_t index, Range units, int64_t thread) override {
    const int64_t layer_index = (index - 1) / kPhasesPerLayer;
    float* scratch = scratch_ + thread * thread_floats_;
    if (index == 0) return embed(units, scratch);
    if (index == logits_phase()) return multiply(model_.lm_head, normed_, units, step_.logits, false, scratch);
    if (index > logits_phase()) return find_likeliest(units);
    const Layer& layer = model_.layers[layer_index];
    switch ((index - 1) % kPhasesPerLayer) {
      case kQkv: return multiply(layer.qkv, normed_, units, qkv_, false, scratch);
      case kRotate: return rotate_and_write(layer, units);
      case kAttend: return has_tiles() ? attend_tiles(layer, units, scratch) : attend_units(layer, units, scratch);
      case kPrepareAttended: return prepare(layer.o, attended_, units, scratch);
      case kO: return multiply(layer.o, attended_, units, x_, true, scratch);
      case kPostAttentionNorm: return norm(layer.post_attention_norm, layer.gate_up, units, scratch);
      case kGateUp: return multiply(layer.gate_up, normed_, units, gate_up_, false, scratch);
      case kGate: return gate(layer.down, units, scratch);
      case kDown: return multiply(layer.down, gated_, units, x_, true, scratch);
      case kNextNorm:
        return layer_index + 1 < model_.num_layers ? norm((&layer)[1].input_norm, (&layer)[1].qkv, units, scratch)
                                                   : norm(model_.final_norm, model_.lm_head, units, scratch);
    }
  }

 private:
  enum LayerPhase {
    kQkv, kRotate, kAttend, kPrepareAttended, kO, kPostAttentionNorm, kGateUp, kGate, kDown, kNextNorm, kPhasesPerLayer
  };

  int64_t logits_phase() const { return kPhasesPerLayer * model_.num_layers + 1; }

  bool begin_layer_phase(int64_t index, Phase* phase) {
    const int64_t layer_index = (index - 1) / kPhasesPerLayer;
    const Layer& layer = model_.layers[layer_index];
    const int64_t num_heads = model_.num_heads + 2 * model_.num_kv_heads;
    switch ((index - 1) % kPhasesPerLayer) {
      case kQkv: *phase = product_phase(layer.qkv); break;
      case kRotate: *phase = light_phase(num_tokens_ * num_heads, model_.head_dim); break;
      case kAttend:
        if (layer_index + 1 == model_.num_layers && step_.num_logits == 0) return false;
        *phase = attention_phase();
        break;
      case kPrepareAttended:
        if (layer_index + 1 == model_.num_layers && step_.num_logits < num_tokens_) keep_logit_tokens();
        *phase = layer.o.has_plain_inputs() ? Phase{0, 1} : light_phase(num_tokens_, query_size_);
        break;
      case kO: *phase = product_phase(layer.o); break;
      case kPostAttentionNorm: case kNextNorm: *phase = light_phase(num_tokens_, hidden_); break;
      case kGateUp: *phase = product_phase(layer.gate_up); break;
      case kGate: *phase = light_phase(num_tokens_, 4 * inner_); break;
      case kDown: *phase = product_phase(layer.down); break;
    }
    return true;
  }

  Phase product_phase(const Linear& linear) {
    linear_units_ = linear_units(num_tokens_, linear, model_.pool->size());
    return {linear_units_.count, linear_units_.grain};
  }

  Activations activations(const Linear& linear, const float* x) const {
    return activations_at(linear, x, inputs_, num_tokens_);
  }

  void multiply(const Linear& linear, const float* x, Range units, float* out, bool accumulate, float* scratch) {
    const Activations inputs = activations(linear, x);
    multiply_linear({model_.blas, inputs, num_tokens_, out, accumulate, scratch}, linear, linear_units_, units);
  }

  void prepare(const Linear& linear, const float* x, Range tokens, float* scratch) {
    prepare_inputs(linear, activations(linear, x), tokens, scratch);
  }

  void embed(Range tokens, float* scratch) {
    switch (model_.embedding.format) {
      case kBf16: embed_as<Bf16>(tokens); break;
      case kFp16: embed_as<Fp16>(tokens); break;
      case kFp32: embed_as<float>(tokens); break;
      default:
        for (int64_t m = tokens.begin; m < tokens.end; m++)
          look_up(model_.embedding, step_.token_ids[m], x_ + m * hidden_);
    }
    norm(model_.layers[0].input_norm, model_.layers[0].qkv, tokens, scratch);
  }

  template <typename T>
  void embed_as(Range tokens) {
    for (int64_t m = tokens.begin; m < tokens.end; m++) {
      const T* row = static_cast<const T*>(model_.embedding.weight) + step_.token_ids[m] * hidden_;
      for (int64_t k = 0; k < hidden_; k++) x_[m * hidden_ + k] = to_float(row[k]);
    }
  }

  // Prepares the product with `matrix`.
  void norm(const float* weight, const Linear& linear, Range tokens, float* scratch) {
    for (int64_t m = tokens.begin; m < tokens.end; m++) {
      const float* x = x_ + m * hidden_;
      float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
      for (int64_t k = 0; k < hidden_; k++) squares = multiply_add(x[k], x[k], squares);
      const float factor = 1.0f / std::sqrt(squares / static_cast<float>(hidden_) + model_.norm_eps);
#pragma omp simd
      for (int64_t k = 0; k < hidden_; k++) normed_[m * hidden_ + k] = x[k] * weight[k] * factor;
    }
    prepare(linear, normed_, tokens, scratch);
  }

  // Likewise.
  void gate(const Linear& linear, Range tokens, float* scratch) {
    for (int64_t m = tokens.begin; m < tokens.end; m++) {
      const float *gate = gate_up_ + m * 2 * inner_, *up = gate + inner_;
      float* out = gated_ + m * inner_;
#pragma omp simd
      for (int64_t k = 0; k < inner_; k++) {
        const float e = exp_negative(gate[k] < 0.0f ? gate[k] : -gate[k]);
        out[k] = gate[k] * (gate[k] < 0.0f ? e : 1.0f) / (1.0f + e) * up[k];
      }
    }
    prepare(linear, gated_, tokens, scratch);
  }

  void rotate_and_write(const Layer& layer, Range units) {
    const int64_t dim = model_.head_dim, half = dim / 2, size = model_.block_size, num_kv = model_.num_kv_heads;
    const int64_t per_token = model_.num_heads + 2 * num_kv;
    const float query_scale = 1.0f / std::sqrt(static_cast<float>(dim));
    for (int64_t unit = units.begin; unit < units.end; unit++) {
      const int64_t m = unit / per_token, head = unit % per_token, position = step_.positions[m];
      const int64_t kv_head = (head - model_.num_heads) % num_kv;
      const int64_t block = block_table(m)[position / size], offset = position % size;
      float* values = qkv_ + m * qkv_size_ + head * dim;
      if (head >= model_.num_heads + num_kv) {
        if (layer.key_scales)
          write_byte_value(byte_kv(layer), block, offset, kv_head, values);
        else
          std::memcpy(layer.values + ((block * size + offset) * num_kv + kv_head) * dim, values, dim * sizeof(float));
        continue;
      }
      const float *cos = model_.rope + position * dim, *sin = cos + half;
      const float scale = head < model_.num_heads ? query_scale : 1.0f;
#pragma omp simd
      for (int64_t k = 0; k < half; k++) {
        const float low = values[k], high = values[k + half];
        values[k] = multiply_add(low, cos[k], -high * sin[k]) * scale;
        values[k + half] = multiply_add(high, cos[k], low * sin[k]) * scale;
      }
      if (head < model_.num_heads) continue;
      if (layer.key_scales) {
        write_byte_key(byte_kv(layer), block, offset, kv_head, values);
        continue;
      }
      float* keys = layer.keys + (block * num_kv + kv_head) * dim * size + offset;
      for (int64_t k = 0; k < dim; k++) keys[k * size] = values[k];
    }
  }

  bool has_byte_kv() const { return model_.layers[0].key_scales; }

  bool has_tiles() const { return has_byte_kv() || step_.num_tokens > kMaxFewTokens; }

  ByteKv byte_kv(const Layer& layer) const {
    return {reinterpret_cast<uint8_t*>(layer.keys), reinterpret_cast<int8_t*>(layer.values), layer.key_scales,
            layer.value_scales, model_.num_kv_heads, model_.head_dim, model_.block_size};
  }

  FloatKv float_kv(const Layer& layer) const {
    return {layer.keys, layer.values, model_.num_kv_heads, model_.head_dim, model_.block_size};
  }

  // Units are tiles, or one token's head, or up to kMaxSharedHeads of those with the same keys where there is work for everyone.
  Phase attention_phase() {
    const int64_t num_kv = model_.num_kv_heads, per_kv = model_.num_heads / num_kv;
    if (has_tiles()) {
      tile_ = has_byte_kv() ? byte_tile_shape(model_, num_tokens_) : tile_shape(model_);
      return {(num_tokens_ + tile_.tokens - 1) / tile_.tokens * num_kv * tile_.head_groups, 1};
    }
    shared_heads_ = per_kv < kMaxSharedHeads ? per_kv : kMaxSharedHeads;
    if (num_tokens_ * num_kv < 2 * model_.pool->size()) shared_heads_ = 1;
    return {num_tokens_ * num_kv * ((per_kv + shared_heads_ - 1) / shared_heads_), 1};
  }

  void attend_units(const Layer& layer, Range units, float* scores) {
    const FloatKv kv = float_kv(layer);
    const int64_t num_kv = kv.num_kv_heads, per_kv = model_.num_heads / num_kv, shared = shared_heads_, dim = kv.dim;
    const int64_t per_group = (per_kv + shared - 1) / shared;
    for (int64_t unit = units.begin; unit < units.end; unit++) {
      const int64_t m = unit / (num_kv * per_group), kv_head = unit / per_group % num_kv;
      const int64_t first = unit % per_group * shared, count = per_kv - first < shared ? per_kv - first : shared;
      const int64_t head = kv_head * per_kv + first;
      const float* queries = qkv_ + m * qkv_size_ + head * dim;
      float* out = attended_ + m * query_size_ + head * dim;
      const int64_t context = step_.positions[m] + 1, stride = model_.max_context;
      switch (count) {
        case 1: attend_heads<1>(kv, block_table(m), kv_head, queries, context, out, scores, stride); break;
        case 2: attend_heads<2>(kv, block_table(m), kv_head, queries, context, out, scores, stride); break;
        default: attend_heads<kMaxSharedHeads>(kv, block_table(m), kv_head, queries, context, out, scores, stride);
      }
    }
  }

  void attend_tiles(const Layer& layer, Range units, float* scratch) {
    const TileShape tile = tile_;
    const int64_t num_kv = model_.num_kv_heads, per_kv = model_.num_heads / num_kv;
    for (int64_t unit = units.begin; unit < units.end; unit++) {
      const int64_t first = unit / (num_kv * tile.head_groups) * tile.tokens;
      const int64_t kv_head = unit / tile.head_groups % num_kv;
      const int64_t group = unit % tile.head_groups * tile.heads, left = per_kv - group;
      const Range heads{kv_head * per_kv + group, kv_head * per_kv + group + (left < tile.heads ? left : tile.heads)};
      const int64_t last = first + tile.tokens < num_tokens_ ? first + tile.tokens : num_tokens_;
      for (int64_t begin = first, end; begin < last; begin = end) {
        for (end = begin + 1; end < last && follows(end); end++) {}
        if (layer.key_scales)
          attend_byte_tile(layer, {begin, end}, kv_head, heads, scratch);
        else
          attend_float_tile(layer, {begin, end}, kv_head, heads, scratch);
      }
    }
  }

  // Whether token m continues the request of the token before it.
  bool follows(int64_t m) const {
    return step_.token_slots[m] == step_.token_slots[m - 1] && step_.positions[m] == step_.positions[m - 1] + 1;
  }

  void attend_float_tile(const Layer& layer, Range tokens, int64_t kv_head, Range heads, float* scratch) {
    const int64_t at = heads.begin * model_.head_dim;
    const FloatTile tile{qkv_ + tokens.begin * qkv_size_ + at, qkv_size_, attended_ + tokens.begin * query_size_ + at,
                         query_size_, tokens.end - tokens.begin, heads.end - heads.begin,
                         step_.positions[tokens.begin] + 1};
    attend_tile(float_kv(layer), block_table(tokens.begin), kv_head, tile, scratch, model_.max_context);
  }

  void attend_byte_tile(const Layer& layer, Range tokens, int64_t kv_head, Range heads, float* scratch) {
    const int32_t* blocks = block_table(tokens.begin);
    const ByteKv kv = byte_kv(layer);
    ByteRow rows[kMostByteRows];
    int64_t count = 0;
    for (int64_t m = tokens.begin; m < tokens.end; m++)
      for (int64_t head = heads.begin; head < heads.end; head++) {
        const int64_t at = head * model_.head_dim;
        rows[count++] = {qkv_ + m * qkv_size_ + at, step_.positions[m] + 1, attended_ + m * query_size_ + at};
        if (count < kMostByteRows) continue;
        attend_bytes(kv, blocks, kv_head, rows, count, scratch);
        count = 0;
      }
    if (count) attend_bytes(kv, blocks, kv_head, rows, count, scratch);
  }

  void find_likeliest(Range rows) {
    const int64_t vocab = model_.embedding.rows;
    for (int64_t i = rows.begin; i < rows.end; i++) step_.likeliest[i] = first_largest(step_.logits + i * vocab, vocab);
  }

  // Goes on with the tokens that want logits.
  void keep_logit_tokens() {
    num_tokens_ = step_.num_logits;
    for (int64_t i = 0; i < step_.num_logits; i++) {
      const int64_t from = step_.logit_tokens[i];  // never before i: the tokens rise
      std::memmove(x_ + i * hidden_, x_ + from * hidden_, hidden_ * sizeof(float));
      std::memmove(attended_ + i * query_size_, attended_ + from * query_size_, query_size_ * sizeof(float));
    }
  }

  const int32_t* block_table(int64_t m) const {
    return step_.block_tables + step_.token_slots[m] * step_.table_stride;
  }

  const Model& model_;
  const Step& step_;
  int64_t num_tokens_;  // those of the step, and after the last attention those that want logits
  int64_t hidden_, query_size_, kv_size_, qkv_size_, inner_;
  float *x_, *normed_, *qkv_, *attended_, *gate_up_, *gated_, *inputs_;
  float* scratch_;  // each thread's, one after the other
  int64_t thread_floats_;
  LinearUnits linear_units_;  // of the phase that runs
  int64_t shared_heads_;      // likewise
  TileShape tile_;            // likewise
};

}  // namespace
}  // namespace llmengine

extern "C" {

// Changes with the structures; `native.py` refuses a library with another number.
int llmengine_native_version() { return 9; }

// Whether int8 weights are in quads of columns, and what 8-bit codes have on top of their values.
int llmengine_byte_offset() { return llmengine::kByteOffset; }

llmengine::Pool* llmengine_start_pool(int64_t num_threads, llmengine::Parallel parallel) {
  return new llmengine::Pool(num_threads, parallel);
}

int64_t llmengine_pool_size(const llmengine::Pool* pool) { return pool->size(); }

// Nobody may be using it.
void llmengine_stop_pool(llmengine::Pool* pool) { delete pool; }

// Floats of the workspace for steps of up to so many tokens.
int64_t llmengine_workspace_size(const llmengine::Model* model, int64_t num_tokens) {
  return num_tokens * llmengine::token_floats(*model) +
         model->pool->max_threads() * llmengine::thread_floats(*model, num_tokens);
}

void llmengine_forward(const llmengine::Model* model, const llmengine::Step* step) {
  llmengine::Runner runner(*model, *step);
  model->pool->run(&runner);
}

// Floats of the workspace of a product alone.
int64_t llmengine_product_workspace_size(const llmengine::Pool* pool, const llmengine::Linear* linear,
                                         int64_t num_tokens) {
  return num_tokens * llmengine::input_floats(*linear) +
         pool->max_threads() * llmengine::linear_scratch_floats(linear->columns(), llmengine::kMaxFewTokens);
}

void llmengine_multiply(llmengine::Pool* pool, const llmengine::Product* product) {
  llmengine::ProductRunner runner(*product, pool->size());
  pool->run(&runner);
}

// Rows of a matrix in panels, fp32 [count, columns]. Not of int8.
void llmengine_dequantize_rows(const llmengine::Matrix* matrix, int64_t count, const int64_t* rows, float* out) {
  for (int64_t i = 0; i < count; i++) llmengine::look_up(*matrix, rows[i], out + i * matrix->columns);
}
}
