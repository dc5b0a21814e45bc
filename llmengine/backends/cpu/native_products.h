// Products of activations with a weight matrix: dot products for fp32, bf16 and fp16 weights, panels for int8 with 16-bit
// activations. `native_digits.h` and `native_codes.h` have those that multiply bytes.

#pragma once

#include "native_pool.h"
#include "native_vectors.h"

namespace llmengine {

// `native_packing.py` has the same numbers.
enum Format : int64_t {
  kFp32, kBf16, kFp16, kInt8, kCodes8, kCodes4, kCodes4Minimum, kCodes4Zero, kCodes5, kCodes5Minimum, kCodes4Super,
  kCodes5Super, kCodes6Super, kCodes4Strips, kCodes4ZeroStrips, kCodes4Wide, kCodes4ZeroWide, kCodes8Zero, kCodes8Wide,
  kCodes8ZeroWide, kCodesE2m1, kCodes2, kCodes2Super, kCodes3Super, kCodesNl, kCodesNlSuper,
  kBf16Panels = 32, kFp8, kFp8Blocks
};

// What activations become before a product; likewise.
enum InputKind : int64_t {
  kExact,       // fp32
  kE4m3,        // fp32: e4m3 numbers times a scale for `scale_columns` of them
  kShorts,      // 16 bits, a scale for each token
  kBytes,       // 8 bits, a scale for each token
  kGroupBytes,  // 8 bits, a scale for each kGroupColumns columns
};

// How activations meet a matrix: multiplied, reordered, then rounded.
struct Inputs {
  int64_t kind;
  const float* factors;   // [columns] or null
  const int32_t* order;   // [columns] or null: stored column j meets activation order[j]
  const float* scale;     // kE4m3, kBytes: of all activations; null: found at run time
  int64_t scale_columns;  // kE4m3: activations of a token that share a scale

  bool are_plain() const { return kind == kExact && !factors && !order; }
  bool operator==(const Inputs& other) const {
    return kind == other.kind && factors == other.factors && order == other.order && scale == other.scale &&
           scale_columns == other.scale_columns;
  }
};

// A matrix, or one of several that lie one above the other and give one result.
struct Matrix {
  int64_t format;
  const void* weight;  // [rows, columns], or panels, see `kPanelRows`
  const void* scale;   // int8: fp32 [rows], then zeros to the end of the last panel; see `native_codes.h`, `native_floats.h`
  const float* bias;   // [rows] or null; with panels to the end of the last one
  int64_t rows, columns;
  int64_t group_shift;          // codes and e4m3: scales are for 2^group_shift columns each
  int64_t first_row, out_rows;  // of a token's results: where those of this matrix begin, and how many there are
  Inputs inputs;

  const float* row_scales() const { return static_cast<const float*>(scale); }
};

// Brings weights into the cache before they are needed: `step` bytes more with each vector of the current ones.
struct Prefetch {
  const char* next;
  int64_t step;
};

// sums[m][n] = x[m] . w[n] over `size` columns, `kUnroll` vectors at a time.
template <int kTokens, int kRows, int kUnroll, typename T>
inline void dot_tile(const float* x, const T* w, int64_t size, Prefetch prefetch, float (&sums)[kTokens][kRows]) {
  Floats parts[kUnroll][kTokens][kRows] = {};
  int64_t k = 0;
  for (; k + kUnroll * kWidth <= size; k += kUnroll * kWidth) {
    for (int u = 0; u < kUnroll; u++) {
      __builtin_prefetch(prefetch.next);
      prefetch.next += prefetch.step;
      Floats weights[kRows];
      for (int n = 0; n < kRows; n++) weights[n] = load(w + n * size + k + u * kWidth);
      for (int m = 0; m < kTokens; m++) {
        const Floats activations = load(x + m * size + k + u * kWidth);
        for (int n = 0; n < kRows; n++) parts[u][m][n] = multiply_add(activations, weights[n], parts[u][m][n]);
      }
    }
  }
  for (; k + kWidth <= size; k += kWidth)
    for (int m = 0; m < kTokens; m++)
      for (int n = 0; n < kRows; n++)
        parts[0][m][n] = multiply_add(load(x + m * size + k), load(w + n * size + k), parts[0][m][n]);
  for (int m = 0; m < kTokens; m++) {
    for (int n = 0; n < kRows; n++) {
      for (int u = 1; u < kUnroll; u++) parts[0][m][n] += parts[u][m][n];
      float total = sum(parts[0][m][n]);
      for (int64_t rest = k; rest < size; rest++)
        total = multiply_add(x[m * size + rest], to_float(w[n * size + rest]), total);
      sums[m][n] = total;
    }
  }
}

constexpr int kTileTokens = 4, kTileRows = 3, kUnroll = 3;
constexpr int64_t kPrefetchBytes = 1024;
constexpr int64_t kUnitsPerThread = 4;
constexpr int64_t kMostBlockRows = 192, kMostBlockTokens = 256, kLeastBlockRows = 48;
constexpr int64_t kStreamBytes = 48 << 10;  // of weights that pass once
constexpr int64_t kBlockBytes = 96 << 10;  // of weights that stay in a core's second-level cache while all tokens pass

// One row after another for up to four tokens: memory sets the pace, and likes one stream.
template <int kTokens, typename T, typename Emit>
void multiply_few(const float* x, const T* w, int64_t size, int64_t begin, int64_t end, Emit emit) {
  for (int64_t n = begin; n < end; n++) {
    const T* row = w + n * size;
    float sums[kTokens][1];
    const Prefetch ahead{reinterpret_cast<const char*>(row) + kPrefetchBytes, kWidth * int64_t{sizeof(T)}};
    dot_tile<kTokens, 1, kUnroll>(x, row, size, ahead, sums);
    for (int m = 0; m < kTokens; m++) emit(m, n, sums[m][0]);
  }
}

template <int kTokens, typename T, typename Emit>
void multiply_tiles(const float* x, const T* w, int64_t size, int64_t first_token, int64_t begin, int64_t end,
                    Prefetch ahead, Emit emit) {
  x += first_token * size;
  int64_t n = begin;
  for (; n + kTileRows <= end; n += kTileRows) {
    float sums[kTokens][kTileRows];
    dot_tile<kTokens, kTileRows, 1>(x, w + n * size, size, ahead, sums);
    ahead.next += ahead.step * (size / kWidth);
    for (int m = 0; m < kTokens; m++)
      for (int i = 0; i < kTileRows; i++) emit(first_token + m, n + i, sums[m][i]);
  }
  for (; n < end; n++) {
    float sums[kTokens][1];
    dot_tile<kTokens, 1, 1>(x, w + n * size, size, ahead, sums);
    for (int m = 0; m < kTokens; m++) emit(first_token + m, n, sums[m][0]);
  }
}

// Rows of a matrix that a thread takes at a time.
inline int64_t row_grain(int64_t num_tokens, const Matrix& matrix) {
  const int64_t row_bytes = matrix.columns * (matrix.format == kFp32 ? 4 : 2);
  const int64_t bytes = num_tokens <= kTileTokens ? kStreamBytes : kBlockBytes;
  return (bytes / row_bytes / kTileRows + 1) * kTileRows;
}

// emit(m, n, x[m] . w[n]) for every token m and the rows [begin, end). How rows are cut into ranges changes no result.
template <typename T, typename Emit>
void multiply_range(const float* x, int64_t num_tokens, const Matrix& matrix, int64_t begin, int64_t end, Emit emit) {
  const T* w = static_cast<const T*>(matrix.weight);
  const int64_t size = matrix.columns;
  switch (num_tokens) {
    case 1: return multiply_few<1>(x, w, size, begin, end, emit);
    case 2: return multiply_few<2>(x, w, size, begin, end, emit);
    case 3: return multiply_few<3>(x, w, size, begin, end, emit);
    case 4: return multiply_few<4>(x, w, size, begin, end, emit);
  }
  const int64_t num_tiles = (num_tokens + kTileTokens - 1) / kTileTokens;
  const int64_t row_bytes = size * int64_t{sizeof(T)};
  const int64_t block = (kBlockBytes / row_bytes / kTileRows + 1) * kTileRows;
  for (int64_t n = begin; n < end; n += block) {
    const int64_t stop = n + block < end ? n + block : end;
    // While the tokens pass over this block, each tile of them fetches its share of the next.
    const int64_t step = kTileRows * kWidth * int64_t{sizeof(T)} / num_tiles;
    Prefetch ahead{reinterpret_cast<const char*>(w + stop * size), step};
    for (int64_t m = 0; m < num_tokens; m += kTileTokens) {
      switch (num_tokens - m) {
        case 1: multiply_tiles<1>(x, w, size, m, n, stop, ahead, emit); break;
        case 2: multiply_tiles<2>(x, w, size, m, n, stop, ahead, emit); break;
        case 3: multiply_tiles<3>(x, w, size, m, n, stop, ahead, emit); break;
        default: multiply_tiles<kTileTokens>(x, w, size, m, n, stop, ahead, emit);
      }
      ahead.next += (stop - n) * row_bytes / num_tiles;
    }
  }
}

// Rows [begin, end) of out (+)= x . w + bias.
inline void multiply_rows(const float* x, int64_t num_tokens, const Matrix& matrix, Range rows, float* out,
                          bool accumulate) {
  const float* bias = matrix.bias;
  const int64_t stride = matrix.out_rows;
  out += matrix.first_row;
  const auto emit = [=](int64_t m, int64_t n, float value) {
    if (bias) value += bias[n];
    if (accumulate) value += out[m * stride + n];
    out[m * stride + n] = value;
  };
  switch (matrix.format) {
    case kBf16: return multiply_range<Bf16>(x, num_tokens, matrix, rows.begin, rows.end, emit);
    case kFp16: return multiply_range<Fp16>(x, num_tokens, matrix, rows.begin, rows.end, emit);
    default: multiply_range<float>(x, num_tokens, matrix, rows.begin, rows.end, emit);
  }
}

// MKL's single-precision product, which torch brings along on x86: twice as fast as the tiles above for many tokens.
struct Blas {
  void (*sgemm)(const char*, const char*, const int32_t*, const int32_t*, const int32_t*, const float*, const float*,
                const int32_t*, const float*, const int32_t*, const float*, float*, const int32_t*);
  int (*set_thread_limit)(int);  // of the calling thread; returns what it was
};

// How such a product is cut: its units are all blocks of rows with the first tokens, then with the next.
struct BlockUnits {
  int64_t rows, tokens, row_blocks, count;
};

inline BlockUnits block_units(int64_t num_tokens, const Matrix& matrix, int64_t num_threads) {
  for (int64_t rows = kMostBlockRows, tokens = kMostBlockTokens;; rows = rows / 2, tokens = tokens / 2) {
    const int64_t row_blocks = (matrix.rows + rows - 1) / rows;
    const int64_t count = row_blocks * ((num_tokens + tokens - 1) / tokens);
    if (count >= kUnitsPerThread * num_threads || rows == kLeastBlockRows) return {rows, tokens, row_blocks, count};
  }
}

template <typename T>
const float* widened(const Matrix& matrix, Range rows, float* to) {
  const T* from = static_cast<const T*>(matrix.weight) + rows.begin * matrix.columns;
  const int64_t size = (rows.end - rows.begin) * matrix.columns;
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) store(to + i, load(from + i));
  for (; i < size; i++) to[i] = to_float(from[i]);
  return to;
}

inline const float* float_rows(const Matrix& matrix, Range rows, float* scratch) {
  switch (matrix.format) {
    case kBf16: return widened<Bf16>(matrix, rows, scratch);
    case kFp16: return widened<Fp16>(matrix, rows, scratch);
    default: return static_cast<const float*>(matrix.weight) + rows.begin * matrix.columns;
  }
}

// Some units of out (+)= x . w + bias; `scratch`: [cut.rows, columns].
inline void multiply_blocks(const Blas& blas, const float* x, int64_t num_tokens, const Matrix& matrix,
                            const BlockUnits& cut, Range units, float* out, bool accumulate, float* scratch) {
  const int limit = blas.set_thread_limit(1);
  out += matrix.first_row;
  for (int64_t unit = units.begin; unit < units.end; unit++) {
    const int64_t n = unit % cut.row_blocks * cut.rows, m = unit / cut.row_blocks * cut.tokens;
    const Range rows{n, n + cut.rows < matrix.rows ? n + cut.rows : matrix.rows};
    const int64_t end = m + cut.tokens < num_tokens ? m + cut.tokens : num_tokens;
    const float* weight = float_rows(matrix, rows, scratch);
    const int32_t num_rows = rows.end - rows.begin, tokens = end - m, size = matrix.columns, stride = matrix.out_rows;
    const float one = 1.0f, beta = accumulate ? 1.0f : 0.0f;
    blas.sgemm("T", "N", &num_rows, &tokens, &size, &one, weight, &size, x + m * size, &size, &beta,
               out + m * stride + n, &stride);
    for (int64_t i = m; matrix.bias && i < end; i++)
      for (int64_t j = rows.begin; j < rows.end; j++) out[i * stride + j] += matrix.bias[j];
  }
  blas.set_thread_limit(limit);
}

// Products with int8 weights. Activations are 16-bit integers with one scale for each token, or 8-bit ones in 16 bits: two neighbouring
// columns are multiplied and added in 32 bits by one instruction on every x86, and the result differs from that with
// fp32 activations by far less than the weights' rounding. 8-bit activations are a fifth faster with AVX2 alone and lose ten
// times as much.
constexpr int kPanelRows = 16;  // a panel's weights are [columns / 2, kPanelRows, 2], with a zero after an odd column
constexpr int kPanelVectors = kPanelRows / kWidth;
constexpr int kPanelTokens = 12 / kPanelVectors;  // as many sums as registers hold
constexpr int64_t kChunkBytes = 128 << 10;  // of activations that stay in the second-level cache
constexpr int64_t kMinChunkTokens = 48;
constexpr int64_t kGrainProducts = 512 << 10;
// The largest integer of 16 bits that is 256 * a + b with signed bytes a and b is 32639.
constexpr int64_t kLargestActivation = 32639;

struct Quantized {
  int16_t* values;  // [tokens, stride]
  float* scales;    // [tokens]
  int64_t stride;
  bool are_bytes;  // values are those of kBytes
};

inline int64_t even(int64_t columns) { return (columns + 1) / 2 * 2; }

inline int64_t quantized_floats(int64_t columns) { return 1 + even(columns) / 2; }

inline Quantized quantized_at(float* workspace, int64_t num_tokens, int64_t columns, bool are_bytes) {
  return {reinterpret_cast<int16_t*>(workspace + num_tokens), workspace, even(columns), are_bytes};
}

// The largest magnitude as bits of a float, which order as integers do, NaN last.
inline uint32_t largest_magnitude(const float* x, int64_t columns) {
  uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t k = 0; k < columns; k++) {
    const uint32_t bits = bit_cast<uint32_t>(x[k]) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// How a token's activations become 16-bit integers: value = scale * integer.
struct Rounding {
  float factor, scale;

  int16_t operator()(float value) const {  // the integer in the low bits, see exp_negative
    return static_cast<int16_t>(bit_cast<uint32_t>(multiply_add(value, factor, 12582912.0f)));
  }
};

// NaN and infinity make the scale so, and with it the token's results.
inline Rounding rounding_of(const float* x, int64_t columns) {
  float largest = bit_cast<float>(largest_magnitude(x, columns));
  largest = largest < 1e-30f ? 1e-30f : largest;
  const int64_t safe = INT32_MAX / (128 * columns);  // so that no sum leaves 32 bits
  const float limit = static_cast<float>(safe < kLargestActivation ? safe : kLargestActivation);
  return {limit / largest, largest / limit};
}

constexpr uint32_t kInfinityBits = 0x7f800000, kNanBits = 0x7fc00000;

// How a token's activations become 8-bit integers: value = scale * integer, as `Int8W8A8` defines it.
struct ByteRounding {
  float divisor, scale;

  int16_t operator()(float value) const {
    float quotient = value / divisor;
    quotient = quotient > 127.0f ? 127.0f : quotient;
    quotient = quotient < -127.0f ? -127.0f : quotient;
    return static_cast<int16_t>(bit_cast<uint32_t>(quotient + 12582912.0f));  // see exp_negative
  }
};

// With a scale for all tokens larger values saturate, but not NaN.
inline ByteRounding byte_rounding_of(const float* x, int64_t columns, const float* scale) {
  const uint32_t largest = largest_magnitude(x, columns);
  const float found = scale ? *scale : bit_cast<float>(largest) / 127.0f, least = found < 1e-30f ? 1e-30f : found;
  const bool is_lost = scale ? largest > kInfinityBits : largest >= kInfinityBits;
  return {scale ? *scale : least, is_lost ? bit_cast<float>(kNanBits) : scale ? *scale : least};
}

template <typename TokenRounding>
inline void quantize(const float* x, int64_t columns, const TokenRounding& rounding, int64_t token, const Quantized& to) {
  int16_t* values = to.values + token * to.stride;
#pragma omp simd
  for (int64_t k = 0; k < columns; k++) values[k] = rounding(x[k]);
  if (columns < to.stride) values[columns] = 0;
  to.scales[token] = rounding.scale;
}

// A sum of integers times both scales. kBytes: rounded after each, as torch's operators do.
inline Floats scaled_sum(Ints sum, Floats row_scale, float token_scale, bool are_bytes) {
  const Floats exact = __builtin_convertvector(sum, Floats);
  return are_bytes ? exact * token_scale * row_scale : exact * (row_scale * token_scale);
}

// Stores the results of a token and `kPanels` neighbouring panels.
template <int kPanels>
inline void store_results(const Floats (&results)[kPanels * kPanelVectors], int64_t m, const Matrix& matrix, int64_t panel,
                          float* out, bool accumulate) {
  const int64_t n = panel * kPanelRows, rest = matrix.rows - n;
  float *row = out + m * matrix.out_rows + matrix.first_row + n, edge[kPanels * kPanelRows] = {};
  const bool is_edge = rest < kPanels * kPanelRows;
  float* to = is_edge ? edge : row;
  if (is_edge && accumulate) std::memcpy(edge, row, rest * sizeof(float));
#pragma GCC unroll 16
  for (int v = 0; v < kPanels * kPanelVectors; v++) {
    Floats result = results[v];
    if (matrix.bias) result += load(matrix.bias + n + v * kWidth);
    if (accumulate) result += load(to + v * kWidth);
    store(to + v * kWidth, result);
  }
  if (is_edge) std::memcpy(row, edge, rest * sizeof(float));
}

// out[m] (+)= x[m] . w + bias for `kTokens` tokens and one panel.
template <int kTokens>
void multiply_panel(const Quantized& x, int64_t m, const Matrix& matrix, int64_t panel, Prefetch prefetch, float* out,
                    bool accumulate) {
  const int16_t* values = x.values + m * x.stride;
  const int8_t* weights = static_cast<const int8_t*>(matrix.weight) + panel * kPanelRows * x.stride;
  Ints sums[kTokens][kPanelVectors] = {};
  for (int64_t k = 0; k < x.stride; k += 2) {
    __builtin_prefetch(prefetch.next);
    prefetch.next += prefetch.step;
    Shorts w[kPanelVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kPanelVectors; v++) w[v] = load_widened(weights + k * kPanelRows + 2 * v * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kTokens; i++) {
      const Shorts pair = repeat_pair(values + i * x.stride + k);
#pragma GCC unroll 16
      for (int v = 0; v < kPanelVectors; v++) add_products<(kTokens > 4)>(sums[i][v], pair, w[v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTokens; i++) {
    Floats results[kPanelVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kPanelVectors; v++) {
      const Floats row_scale = load(matrix.row_scales() + panel * kPanelRows + v * kWidth);
      results[v] = scaled_sum(sums[i][v], row_scale, x.scales[m + i], x.are_bytes);
    }
    store_results<1>(results, m + i, matrix, panel, out, accumulate);
  }
}

template <int kTokens, typename... Arguments>
inline void multiply_panel_for(int64_t num_tokens, const Arguments&... arguments) {
  if constexpr (kTokens > 1)
    if (num_tokens < kTokens) return multiply_panel_for<kTokens - 1>(num_tokens, arguments...);
  multiply_panel<kTokens>(arguments...);
}

// How the product is cut: its units are all panels with the first tokens, then all panels with the next.
struct PanelUnits {
  int64_t panels, chunk, count, grain;
};

// `tile_tokens`: tokens multiplied at a time, of which chunks are made; bytes are those of a panel and of a token.
inline PanelUnits panel_units(int64_t num_tokens, int64_t rows, int64_t panel_bytes, int64_t token_bytes,
                              int64_t tile_tokens, int64_t num_threads) {
  const int64_t panels = (rows + kPanelRows - 1) / kPanelRows;
  int64_t chunk = kChunkBytes / token_bytes, chunks;
  chunk = chunk < kMinChunkTokens ? kMinChunkTokens : chunk;
  for (chunk = chunk < num_tokens ? chunk : num_tokens;; chunk /= 2) {
    chunk = (chunk + tile_tokens - 1) / tile_tokens * tile_tokens;
    chunks = (num_tokens + chunk - 1) / chunk;
    if (chunk == tile_tokens || chunks * panels >= kUnitsPerThread * num_threads) break;
  }
  const int64_t tokens = chunk < num_tokens ? chunk : num_tokens;
  const int64_t by_bytes = kStreamBytes / panel_bytes, by_work = kGrainProducts / (panel_bytes * tokens);
  return {panels, chunk, chunks * panels, by_bytes < by_work ? by_bytes : by_work};
}

// Some units of out (+)= x . w + bias.
inline void multiply_panels(const Quantized& x, int64_t num_tokens, const Matrix& matrix, const PanelUnits& cut,
                            Range units, float* out, bool accumulate) {
  const int64_t panel_bytes = kPanelRows * x.stride;
  for (int64_t unit = units.begin; unit < units.end; unit++) {
    const int64_t panel = unit % cut.panels, begin = unit / cut.panels * cut.chunk;
    const int64_t end = begin + cut.chunk < num_tokens ? begin + cut.chunk : num_tokens;
    const int64_t tiles = (end - begin + kPanelTokens - 1) / kPanelTokens;
    // While the tokens pass over this panel, each tile of them fetches its share of the next.
    const char* next = static_cast<const char*>(matrix.weight) + (panel + 1) * panel_bytes;
    for (int64_t m = begin; m < end; m += kPanelTokens) {
      const Prefetch ahead{next, (2 * kPanelRows + tiles - 1) / tiles};
      multiply_panel_for<kPanelTokens>(end - m, x, m, matrix, panel, ahead, out, accumulate);
      next += panel_bytes / tiles;
    }
  }
}

}  // namespace llmengine
