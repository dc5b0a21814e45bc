// Vectors of the width that this file is compiled for: loads, sums, conversions, the exponential.
//
// C++17 with GCC's or Clang's vector extensions.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace llmengine {

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

// a * b + c, rounded once wherever the processor can. The library is compiled with -ffp-contract=off, because compilers
// choose anew in each loop where they round twice, and a number would then depend on the loop that it comes from.
inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

inline Floats repeat(float value) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(value);
#elif defined(__AVX2__)
  return _mm256_set1_ps(value);
#else
  return Floats{value, value, value, value};
#endif
}

inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__) && defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_FEATURE_FMA)
  for (int i = 0; i < kWidth; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
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

// Of the bits of fp16 numbers.
inline Floats floats_of_fp16(Halves bits) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(bit_cast<__m256i>(bits));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(bit_cast<__m128i>(bits));
#else
  Floats to;
  for (int i = 0; i < kWidth; i++) to[i] = to_float(Fp16{bits[i]});
  return to;
#endif
}

inline Floats load(const Fp16* from) { return floats_of_fp16(load_halves(from)); }

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

// Index of the first of the largest numbers; -1 if that is infinite, or if any of them is NaN.
inline int64_t first_largest(const float* values, int64_t count) {
  constexpr int kParts = 4;
  const auto larger_of = [](auto a, auto b) { return a > b ? a : b; };
  Floats most[kParts];
  Ints unordered{};
  for (Floats& part : most) part = Floats{} - INFINITY;
  float largest = -INFINITY;
  int64_t k = 0;
  for (; k + kParts * kWidth <= count; k += kParts * kWidth) {
    for (int i = 0; i < kParts; i++) {
      const Floats part = load(values + k + i * kWidth);
      unordered |= part != part;
      most[i] = larger_of(part, most[i]);
    }
  }
  bool is_ordered = true;
  for (; k < count; k++) {
    is_ordered = is_ordered && values[k] == values[k];
    largest = larger_of(values[k], largest);
  }
  for (int i = 0; i < kWidth; i++) {
    is_ordered = is_ordered && !unordered[i];
    for (const Floats& part : most) largest = larger_of(part[i], largest);
  }
  if (!is_ordered || std::isinf(largest)) return -1;
  for (k = 0; k + kWidth <= count; k += kWidth) {
    const Ints found = load(values + k) == largest;
    int32_t any = 0;
    for (int i = 0; i < kWidth; i++) any |= found[i];
    if (any) break;
  }
  while (values[k] != largest) k++;
  return k;
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
  const float shifted = multiply_add(x, 1.44269504f, 12582912.0f);  // 1.5 * 2^23 leaves the rounded integer in the low bits
  const float n = shifted - 12582912.0f;
  const float r = multiply_add(n, 2.12194440e-4f, multiply_add(n, -0.693359375f, x));
  float p = 1.9875691500e-4f;
  p = multiply_add(p, r, 1.3981999507e-3f);
  p = multiply_add(p, r, 8.3334519073e-3f);
  p = multiply_add(p, r, 4.1665795894e-2f);
  p = multiply_add(p, r, 1.6666665459e-1f);
  p = multiply_add(p, r, 5.0000001201e-1f);
  p = multiply_add(p, r * r, r) + 1.0f;
  return p * bit_cast<float>((bit_cast<uint32_t>(shifted) + 127) << 23);
}

}  // namespace llmengine
