// One call runs a step of few tokens through the whole decoder on the CPU: torch's operators spend as long on being
// called as on computing there. `native.py` describes the model once and passes each step's arrays.
//
// Plain C++17 with GCC's or Clang's vector extensions, compiled once for each vector width; `setup.py` has the flags.
// Weights are fp32, bf16 or fp16, row-major [out, in], or int8 in panels; everything else is fp32. The threads are those
// of torch's own OpenMP pool, entered through functions that the caller found in it: a second pool would fight the first
// for the cores.
// Nothing is allocated here; the structures belong to the caller and mirror those of `native.py`.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

enum Format : int64_t { kFp32, kBf16, kFp16, kInt8 };

struct Matrix {
  int64_t format;
  const void* weight;  // [rows, columns]; int8: panels, see `kPanelRows`
  const float* scale;  // int8 only: [rows], then zeros to the end of the last panel
  const float* bias;   // [rows] or null; int8: as long as `scale`
  int64_t rows, columns;
};

struct Layer {
  const float *input_norm, *post_attention_norm;
  Matrix qkv, o, gate_up, down;
  float* keys;    // [blocks, kv_heads, head_dim, block_size]
  float* values;  // [blocks, block_size, kv_heads, head_dim]
};

struct Pool {
  int64_t num_threads;
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  void (*barrier)();
  int (*thread_index)();
  int (*team_size)();
};

struct Model {
  Pool pool;
  int64_t num_layers, num_heads, num_kv_heads, head_dim, block_size;
  int64_t max_context;  // tokens, a multiple of block_size
  const Layer* layers;
  Matrix embedding, lm_head;
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
  float* logits;  // [num_logits, vocab]
};

// An int8 matrix alone, for steps of many tokens.
struct Product {
  Matrix matrix;
  int64_t num_tokens, accumulate;
  const float* x;  // [num_tokens, columns]
  float* out;      // [num_tokens, rows]
  float* workspace;
};

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Floats __attribute__((vector_size(kWidth * 4)));
typedef uint32_t Words __attribute__((vector_size(kWidth * 4)));
typedef uint16_t Halves __attribute__((vector_size(kWidth * 2)));
typedef int32_t Ints __attribute__((vector_size(kWidth * 4)));
typedef int16_t Shorts __attribute__((vector_size(kWidth * 4)));
typedef int8_t Bytes __attribute__((vector_size(kWidth * 2)));

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline Floats load(const float* from) {
  Floats to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

inline Halves load_halves(const void* from) {
  Halves to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

inline void store(float* to, Floats from) { std::memcpy(to, &from, sizeof(from)); }

inline Floats load(const Bf16* from) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  // GCC makes four instructions of this conversion.
  const Words words = bit_cast<Words>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(load_halves(from))));
#else
  const Words words = __builtin_convertvector(load_halves(from), Words);
#endif
  return bit_cast<Floats>(words << 16);
}

inline float to_float(float value) { return value; }

inline float to_float(Bf16 value) { return bit_cast<float>(uint32_t{value.bits} << 16); }

inline float to_float(Fp16 value) {
  // The exponent is moved by a product, which is right for subnormal numbers as well.
  const uint32_t bits = value.bits, sign = (bits & 0x8000) << 16, rest = (bits & 0x7fff) << 13;
  const float scaled = bit_cast<float>(rest) * 0x1p112f;
  const uint32_t infinite = rest >= 0x0f800000 ? 0x7f800000 : 0;
  return bit_cast<float>(bit_cast<uint32_t>(scaled) | infinite | sign);
}

inline Floats load(const Fp16* from) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(bit_cast<__m256i>(load_halves(from)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(bit_cast<__m128i>(load_halves(from)));
#else
  Floats to;
  for (int i = 0; i < kWidth; i++) to[i] = to_float(from[i]);
  return to;
#endif
}

inline float sum(Floats values) {
#if defined(__AVX__) && !defined(__AVX512F__)
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
  float part[kWidth];
  store(part, values);
  for (int width = kWidth / 2; width; width /= 2)
    for (int i = 0; i < width; i++) part[i] += part[i + width];
  return part[0];
#endif
}

// Says that a sum changes here, and so belongs into a register: GCC else leaves some of a tile's on the stack.
inline void keep(Ints& value) {
#if defined(__SSE2__)
  asm("" : "+v"(value));
#else
  (void)value;
#endif
}

// sums[i] += x[2 * i] * w[2 * i] + x[2 * i + 1] * w[2 * i + 1]
template <bool kManySums>
inline void add_products(Ints& sums, Shorts x, Shorts w) {
#if defined(__AVX512BW__)
  const __m512i a = bit_cast<__m512i>(x), b = bit_cast<__m512i>(w);
#if defined(__AVX512VNNI__)
  // One instruction for both, but the next one for the same sum waits five cycles for it.
  sums = kManySums ? bit_cast<Ints>(_mm512_dpwssd_epi32(bit_cast<__m512i>(sums), a, b))
                   : sums + bit_cast<Ints>(_mm512_madd_epi16(a, b));
#else
  sums += bit_cast<Ints>(_mm512_madd_epi16(a, b));
#endif
#elif defined(__AVX2__)
  sums += bit_cast<Ints>(_mm256_madd_epi16(bit_cast<__m256i>(x), bit_cast<__m256i>(w)));
#elif defined(__SSE2__)
  sums += bit_cast<Ints>(_mm_madd_epi16(bit_cast<__m128i>(x), bit_cast<__m128i>(w)));
#else
  for (int i = 0; i < kWidth; i++) sums[i] += int32_t{x[2 * i]} * w[2 * i] + int32_t{x[2 * i + 1]} * w[2 * i + 1];
#endif
  keep(sums);
}

inline Shorts load_widened(const int8_t* from) {
#if defined(__AVX512BW__)
  return bit_cast<Shorts>(_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__AVX2__)
  return bit_cast<Shorts>(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  Bytes bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
  return __builtin_convertvector(bytes, Shorts);
#endif
}

inline Shorts repeat_pair(const int16_t* from) {
  int32_t pair;
  std::memcpy(&pair, from, sizeof(pair));
  return bit_cast<Shorts>(Ints{} + pair);
}

// e^x within 2 ulp for x <= 0 (Cephes' polynomial); NaN stays NaN.
inline float exp_negative(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23 leaves the rounded integer in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * bit_cast<float>((bit_cast<uint32_t>(shifted) + 127) << 23);
}

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
        for (int n = 0; n < kRows; n++) parts[u][m][n] += activations * weights[n];
      }
    }
  }
  for (; k + kWidth <= size; k += kWidth)
    for (int m = 0; m < kTokens; m++)
      for (int n = 0; n < kRows; n++) parts[0][m][n] += load(x + m * size + k) * load(w + n * size + k);
  for (int m = 0; m < kTokens; m++) {
    for (int n = 0; n < kRows; n++) {
      for (int u = 1; u < kUnroll; u++) parts[0][m][n] += parts[u][m][n];
      float total = sum(parts[0][m][n]);
      for (int64_t rest = k; rest < size; rest++) total += x[m * size + rest] * to_float(w[n * size + rest]);
      sums[m][n] = total;
    }
  }
}

constexpr int kTileTokens = 4, kTileRows = 3, kUnroll = 3;
constexpr int64_t kPrefetchBytes = 1024;
constexpr int64_t kBlockBytes = 96 << 10;  // of weights that stay in a core's second-level cache while all tokens pass

// One row after another for up to four tokens: memory sets the pace, and likes one stream.
template <int kTokens, typename T, typename Emit>
void multiply_rows(const float* x, const T* w, int64_t size, int64_t begin, int64_t end, Emit emit) {
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

// emit(m, n, x[m] . w[n]) for every token m and the rows [begin, end).
template <typename T, typename Emit>
void multiply(const float* x, int64_t num_tokens, const Matrix& matrix, int64_t begin, int64_t end, Emit emit) {
  const T* w = static_cast<const T*>(matrix.weight);
  const int64_t size = matrix.columns;
  switch (num_tokens) {
    case 1: return multiply_rows<1>(x, w, size, begin, end, emit);
    case 2: return multiply_rows<2>(x, w, size, begin, end, emit);
    case 3: return multiply_rows<3>(x, w, size, begin, end, emit);
    case 4: return multiply_rows<4>(x, w, size, begin, end, emit);
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

struct Range {
  int64_t begin, end;
};

// What falls to one thread of a team.
struct Share {
  int64_t thread, team;

  Range of(int64_t count) const { return {count * thread / team, count * (thread + 1) / team}; }
};

// Products with int8 weights. Activations become 16-bit integers with one scale for each token: two neighbouring columns
// are multiplied and added in 32 bits by one instruction on every x86, and the result differs from that with fp32
// activations by far less than the weights' rounding. 8-bit activations are a fifth faster with AVX2 alone and lose ten
// times as much.
constexpr int kPanelRows = 16;  // a panel's weights are [columns / 2, kPanelRows, 2], with a zero after an odd column
constexpr int kPanelVectors = kPanelRows / kWidth;
constexpr int kPanelTokens = 12 / kPanelVectors;  // as many sums as registers hold
constexpr int64_t kChunkBytes = 128 << 10;  // of activations that stay in the second-level cache
constexpr int64_t kMinChunkTokens = 48;
constexpr int64_t kUnitsPerThread = 4;

struct Quantized {
  int16_t* values;  // [tokens, stride]
  float* scales;    // [tokens]
  int64_t stride;
};

inline int64_t even(int64_t columns) { return (columns + 1) / 2 * 2; }

inline Quantized quantized_at(float* workspace, int64_t num_tokens, int64_t columns) {
  return {reinterpret_cast<int16_t*>(workspace + num_tokens), workspace, even(columns)};
}

// NaN and infinity make the scale so, and with it the token's results.
void quantize(const float* x, int64_t columns, int64_t token, const Quantized& to) {
  uint32_t largest_bits = 0;  // floats without a sign order as integers, NaN last
#pragma omp simd reduction(max : largest_bits)
  for (int64_t k = 0; k < columns; k++) {
    const uint32_t bits = bit_cast<uint32_t>(x[k]) & 0x7fffffff;
    largest_bits = bits > largest_bits ? bits : largest_bits;
  }
  float largest = bit_cast<float>(largest_bits);
  largest = largest < 1e-30f ? 1e-30f : largest;
  const int64_t safe = INT32_MAX / (128 * columns);  // so that no sum leaves 32 bits
  const float limit = static_cast<float>(safe < INT16_MAX ? safe : INT16_MAX), factor = limit / largest;
  int16_t* values = to.values + token * to.stride;
#pragma omp simd
  for (int64_t k = 0; k < columns; k++)
    values[k] = static_cast<int16_t>(bit_cast<uint32_t>(x[k] * factor + 12582912.0f));  // rounded, see exp_negative
  if (columns < to.stride) values[columns] = 0;
  to.scales[token] = largest / limit;
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
  const int64_t n = panel * kPanelRows, rest = matrix.rows - n;
#pragma GCC unroll 16
  for (int i = 0; i < kTokens; i++) {
    float *row = out + (m + i) * matrix.rows + n, edge[kPanelRows] = {};
    float* to = rest < kPanelRows ? edge : row;
    if (rest < kPanelRows && accumulate) std::memcpy(edge, row, rest * sizeof(float));
#pragma GCC unroll 16
    for (int v = 0; v < kPanelVectors; v++) {
      Floats result = __builtin_convertvector(sums[i][v], Floats) * (load(matrix.scale + n + v * kWidth) * x.scales[m + i]);
      if (matrix.bias) result += load(matrix.bias + n + v * kWidth);
      if (accumulate) result += load(to + v * kWidth);
      store(to + v * kWidth, result);
    }
    if (rest < kPanelRows) std::memcpy(row, edge, rest * sizeof(float));
  }
}

template <int kTokens, typename... Arguments>
inline void multiply_panel_for(int64_t num_tokens, const Arguments&... arguments) {
  if constexpr (kTokens > 1)
    if (num_tokens < kTokens) return multiply_panel_for<kTokens - 1>(num_tokens, arguments...);
  multiply_panel<kTokens>(arguments...);
}

// One thread's share of out (+)= x . w + bias: some panels for some chunks of tokens.
void multiply_panels(const Quantized& x, int64_t num_tokens, const Matrix& matrix, Share share, float* out,
                     bool accumulate) {
  const int64_t panels = (matrix.rows + kPanelRows - 1) / kPanelRows, panel_bytes = kPanelRows * x.stride;
  int64_t chunk = kChunkBytes / (2 * x.stride), chunks;
  chunk = chunk < kMinChunkTokens ? kMinChunkTokens : chunk;
  for (chunk = chunk < num_tokens ? chunk : num_tokens;; chunk /= 2) {
    chunk = (chunk + kPanelTokens - 1) / kPanelTokens * kPanelTokens;
    chunks = (num_tokens + chunk - 1) / chunk;
    if (chunk == kPanelTokens || chunks * panels >= kUnitsPerThread * share.team) break;
  }
  const Range units = share.of(chunks * panels);
  for (int64_t unit = units.begin; unit < units.end; unit++) {
    const int64_t panel = unit % panels, begin = unit / panels * chunk;
    const int64_t end = begin + chunk < num_tokens ? begin + chunk : num_tokens;
    const int64_t tiles = (end - begin + kPanelTokens - 1) / kPanelTokens;
    // While the tokens pass over this panel, each tile of them fetches its share of the next.
    const char* next = static_cast<const char*>(matrix.weight) + (panel + 1) * panel_bytes;
    for (int64_t m = begin; m < end; m += kPanelTokens) {
      multiply_panel_for<kPanelTokens>(end - m, x, m, matrix, panel, Prefetch{next, (2 * kPanelRows + tiles - 1) / tiles}, out, accumulate);
      next += panel_bytes / tiles;
    }
  }
}

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
      for (int h = 0; h < kHeads; h++) parts[h][v] += block.factors[h * block.factor_stride + i] * row;
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
  for (; j + kWidth <= block.size; j += kWidth) weighted_columns<kHeads, 1>(block, j, accumulate);
  for (; j < block.size; j++) {
    for (int h = 0; h < kHeads; h++) {
      float& out = block.out[h * block.out_stride + j];
      float part = accumulate ? out : 0.0f;
      for (int64_t i = 0; i < block.count; i++)
        part += block.factors[h * block.factor_stride + i] * block.rows[i * block.row_stride + j];
      out = part;
    }
  }
}

constexpr int64_t kMaxSharedHeads = 3;  // as many as leave registers for the rows

// Shares of the work that threads take one at a time.
class Counter {
 public:
  int64_t next() { return value_.fetch_add(1, std::memory_order_relaxed); }
  void reset() { value_.store(0, std::memory_order_relaxed); }

 private:
  std::atomic<int64_t> value_{0};
};

// One step, shared by the threads of a team; each runs `run` and meets the others at barriers.
class Runner {
 public:
  Runner(const Model& model, const Step& step) : model_(model), step_(step) {
    hidden_ = model.embedding.columns;
    query_size_ = model.num_heads * model.head_dim;
    kv_size_ = model.num_kv_heads * model.head_dim;
    qkv_size_ = query_size_ + 2 * kv_size_;
    inner_ = model.layers[0].down.columns;
    const int64_t widest = inner_ > query_size_ ? inner_ : query_size_;
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
    quantized_ = take(1 + even(widest) / 2);
    scores_ = next;
  }

  // What one thread of the team does.
  void run(Share share) {
    float* scores = scores_ + share.thread * kMaxSharedHeads * model_.max_context;
    int64_t num_tokens = step_.num_tokens;
    embed(share.of(num_tokens));
    for (int64_t index = 0; index < model_.num_layers; index++) {
      const Layer& layer = model_.layers[index];
      norm(layer.input_norm, share.of(num_tokens));
      project(layer.qkv, normed_, num_tokens, share, qkv_, false);
      if (share.thread == 0) units_.reset();
      model_.pool.barrier();
      rotate_and_write(layer, share.of(num_tokens * (model_.num_heads + 2 * model_.num_kv_heads)));
      model_.pool.barrier();
      attend_all(layer, num_tokens, share.team, scores);
      model_.pool.barrier();
      if (index + 1 == model_.num_layers && step_.num_logits < num_tokens) {
        num_tokens = step_.num_logits;
        if (num_tokens == 0) return;
        if (share.thread == 0) keep_logit_tokens();
        model_.pool.barrier();
      }
      project(layer.o, attended_, num_tokens, share, x_, true);
      model_.pool.barrier();
      norm(layer.post_attention_norm, share.of(num_tokens));
      project(layer.gate_up, normed_, num_tokens, share, gate_up_, false);
      model_.pool.barrier();
      gate(share.of(num_tokens));
      project(layer.down, gated_, num_tokens, share, x_, true);
      model_.pool.barrier();
    }
    norm(model_.final_norm, share.of(num_tokens));
    project(model_.lm_head, normed_, num_tokens, share, step_.logits, false);
  }

 private:
  void embed(Range tokens) {
    switch (model_.embedding.format) {
      case kBf16: return embed_as<Bf16>(tokens);
      case kFp16: return embed_as<Fp16>(tokens);
      default: embed_as<float>(tokens);
    }
  }

  template <typename T>
  void embed_as(Range tokens) {
    for (int64_t m = tokens.begin; m < tokens.end; m++) {
      const T* row = static_cast<const T*>(model_.embedding.weight) + step_.token_ids[m] * hidden_;
      for (int64_t k = 0; k < hidden_; k++) x_[m * hidden_ + k] = to_float(row[k]);
    }
  }

  void norm(const float* weight, Range tokens) {
    for (int64_t m = tokens.begin; m < tokens.end; m++) {
      const float* x = x_ + m * hidden_;
      float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
      for (int64_t k = 0; k < hidden_; k++) squares += x[k] * x[k];
      const float factor = 1.0f / std::sqrt(squares / static_cast<float>(hidden_) + model_.norm_eps);
#pragma omp simd
      for (int64_t k = 0; k < hidden_; k++) normed_[m * hidden_ + k] = x[k] * weight[k] * factor;
    }
  }

  // Begins with a barrier: a thread may have written its share of the tokens in `x` just before.
  void project(const Matrix& matrix, const float* x, int64_t num_tokens, Share share, float* out, bool accumulate) {
    if (matrix.format == kInt8) {
      const Quantized quantized = quantized_at(quantized_, num_tokens, matrix.columns);
      const Range tokens = share.of(num_tokens);
      for (int64_t m = tokens.begin; m < tokens.end; m++) quantize(x + m * matrix.columns, matrix.columns, m, quantized);
      model_.pool.barrier();
      return multiply_panels(quantized, num_tokens, matrix, share, out, accumulate);
    }
    model_.pool.barrier();
    const float* bias = matrix.bias;
    const int64_t stride = matrix.rows;
    const Range rows = share.of(stride);
    const auto emit = [=](int64_t m, int64_t n, float value) {
      if (bias) value += bias[n];
      if (accumulate) value += out[m * stride + n];
      out[m * stride + n] = value;
    };
    switch (matrix.format) {
      case kBf16: return multiply<Bf16>(x, num_tokens, matrix, rows.begin, rows.end, emit);
      case kFp16: return multiply<Fp16>(x, num_tokens, matrix, rows.begin, rows.end, emit);
      default: multiply<float>(x, num_tokens, matrix, rows.begin, rows.end, emit);
    }
  }

  void gate(Range tokens) {
    for (int64_t m = tokens.begin; m < tokens.end; m++) {
      const float *gate = gate_up_ + m * 2 * inner_, *up = gate + inner_;
      float* out = gated_ + m * inner_;
#pragma omp simd
      for (int64_t k = 0; k < inner_; k++) {
        const float e = exp_negative(gate[k] < 0.0f ? gate[k] : -gate[k]);
        out[k] = gate[k] * (gate[k] < 0.0f ? e : 1.0f) / (1.0f + e) * up[k];
      }
    }
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
        std::memcpy(layer.values + ((block * size + offset) * num_kv + kv_head) * dim, values, dim * sizeof(float));
        continue;
      }
      const float *cos = model_.rope + position * dim, *sin = cos + half;
      const float scale = head < model_.num_heads ? query_scale : 1.0f;
#pragma omp simd
      for (int64_t k = 0; k < half; k++) {
        const float low = values[k], high = values[k + half];
        values[k] = (low * cos[k] - high * sin[k]) * scale;
        values[k + half] = (high * cos[k] + low * sin[k]) * scale;
      }
      if (head < model_.num_heads) continue;
      float* keys = layer.keys + (block * num_kv + kv_head) * dim * size + offset;
      for (int64_t k = 0; k < dim; k++) keys[k * size] = values[k];
    }
  }

  // Shares are one token's head, or up to kMaxSharedHeads of those with the same keys where there is work for everyone.
  void attend_all(const Layer& layer, int64_t num_tokens, int64_t team, float* scores) {
    const int64_t num_kv = model_.num_kv_heads, per_kv = model_.num_heads / num_kv;
    int64_t shared = per_kv < kMaxSharedHeads ? per_kv : kMaxSharedHeads;
    if (num_tokens * num_kv < 2 * team) shared = 1;
    const int64_t per_group = (per_kv + shared - 1) / shared, num_units = num_tokens * num_kv * per_group;
    for (int64_t unit = units_.next(); unit < num_units; unit = units_.next()) {
      const int64_t m = unit / (num_kv * per_group), kv_head = unit / per_group % num_kv;
      const int64_t first = unit % per_group * shared, count = per_kv - first < shared ? per_kv - first : shared;
      const int64_t head = kv_head * per_kv + first;
      switch (count) {
        case 1: attend<1>(layer, m, kv_head, head, scores); break;
        case 2: attend<2>(layer, m, kv_head, head, scores); break;
        default: attend<kMaxSharedHeads>(layer, m, kv_head, head, scores);
      }
    }
  }

  // One token's heads [head, head + kHeads) over the token's whole context.
  template <int kHeads>
  void attend(const Layer& layer, int64_t m, int64_t kv_head, int64_t head, float* scores) {
    const int64_t dim = model_.head_dim, size = model_.block_size, num_kv = model_.num_kv_heads;
    const int64_t context = step_.positions[m] + 1, stride = model_.max_context;
    const float* query = qkv_ + m * qkv_size_ + head * dim;
    float* out = attended_ + m * query_size_ + head * dim;
    const int32_t* blocks = block_table(m);
    // Scores beyond the context come from rows that may hold anything, and are never used.
    for (int64_t begin = 0; begin < context; begin += size) {
      const float* keys = layer.keys + (blocks[begin / size] * num_kv + kv_head) * dim * size;
      weighted_sums<kHeads>({query, dim, dim, keys, size, size, scores + begin, stride}, false);
    }
    float totals[kHeads];
    for (int h = 0; h < kHeads; h++) totals[h] = exponentials(scores + h * stride, context);
    for (int64_t begin = 0; begin < context; begin += size) {
      const float* values = layer.values + (blocks[begin / size] * size * num_kv + kv_head) * dim;
      const int64_t count = context - begin < size ? context - begin : size;
      weighted_sums<kHeads>({scores + begin, stride, count, values, kv_size_, dim, out, dim}, begin > 0);
    }
    for (int h = 0; h < kHeads; h++)
      for (int64_t k = 0; k < dim; k++) out[h * dim + k] /= totals[h];
  }

  // Replaces scores by the exponentials of their distances to the largest; returns the sum.
  static float exponentials(float* scores, int64_t count) {
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

  void keep_logit_tokens() {
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
  int64_t hidden_, query_size_, kv_size_, qkv_size_, inner_;
  float *x_, *normed_, *qkv_, *attended_, *gate_up_, *gated_, *quantized_, *scores_;
  Counter units_;
};

// Calls `work` with its share on each thread of the pool.
template <typename Work>
void run_team(const Pool& pool, const Work& work) {
  struct Call {
    const Pool& pool;
    const Work& work;
  } call{pool, work};
  const auto enter = [](void* argument) {
    const Call& called = *static_cast<Call*>(argument);
    called.work(Share{called.pool.thread_index(), called.pool.team_size()});
  };
  pool.parallel(enter, &call, static_cast<unsigned>(pool.num_threads), 0);
}

}  // namespace

extern "C" {

// Changes with the structures; `native.py` refuses a library with another number.
int llmengine_native_version() { return 3; }

void llmengine_forward(const Model* model, const Step* step) {
  Runner runner(*model, *step);
  run_team(model->pool, [&](Share share) { runner.run(share); });
}

void llmengine_multiply_int8(const Pool* pool, const Product* product) {
  const Matrix& matrix = product->matrix;
  const int64_t num_tokens = product->num_tokens, columns = matrix.columns;
  const Quantized quantized = quantized_at(product->workspace, num_tokens, columns);
  run_team(*pool, [&](Share share) {
    const Range tokens = share.of(num_tokens);
    for (int64_t m = tokens.begin; m < tokens.end; m++) quantize(product->x + m * columns, columns, m, quantized);
    pool->barrier();
    multiply_panels(quantized, num_tokens, matrix, share, product->out, product->accumulate != 0);
  });
}
}
