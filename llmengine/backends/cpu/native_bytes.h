// Vectors of bytes: codes of weights, and products of unsigned codes with signed bytes.

#pragma once

#include <array>

#include "native_vectors.h"

namespace llmengine {

typedef uint8_t Codes __attribute__((vector_size(kWidth * 4)));  // [kWidth rows, 4 columns]

inline Codes load_codes(const uint8_t* from) {
  Codes to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

inline void store_codes(uint8_t* to, Codes from) { std::memcpy(to, &from, sizeof(from)); }

// Bits that leave a byte enter its neighbour.
template <int kCount>
inline Codes shifted_right(Codes codes) {
  return bit_cast<Codes>(bit_cast<Words>(codes) >> kCount);
}

template <int kCount>
inline Codes shifted_left(Codes codes) {
  return bit_cast<Codes>(bit_cast<Words>(codes) << kCount);
}

// `codes`, with `kValue` more where the bit of the same number is set.
template <int kValue>
inline Codes with_bits(Codes codes, const uint8_t* bits) {
#if defined(__AVX512BW__)
  uint64_t mask;
  std::memcpy(&mask, bits, sizeof(mask));
  const __m512i wide = bit_cast<__m512i>(codes);
  return bit_cast<Codes>(_mm512_mask_add_epi8(wide, mask, wide, _mm512_set1_epi8(kValue)));
#elif defined(__AVX2__)
  uint32_t mask;
  std::memcpy(&mask, bits, sizeof(mask));
  const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(mask)),
      _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201ull));
  const __m256i is_set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
  return bit_cast<Codes>(_mm256_or_si256(bit_cast<__m256i>(codes), _mm256_and_si256(is_set, _mm256_set1_epi8(kValue))));
#elif defined(__SSE2__)
  // Eight times the first byte of bits, eight times the second.
  const __m128i spread = _mm_set_epi64x(0x0101010101010101 * bits[1], 0x0101010101010101 * bits[0]);
  const __m128i bit = _mm_set1_epi64x(static_cast<int64_t>(0x8040201008040201ull));
  const __m128i is_set = _mm_cmpeq_epi8(_mm_and_si128(spread, bit), bit);
  return bit_cast<Codes>(_mm_or_si128(bit_cast<__m128i>(codes), _mm_and_si128(is_set, _mm_set1_epi8(kValue))));
#else
  for (int i = 0; i < kWidth * 4; i++) codes[i] += (bits[i / 8] >> i % 8 & 1) * kValue;
  return codes;
#endif
}

// Numbers of a table by codes below 16.
inline Codes looked_up(Codes codes, const uint8_t (&table)[16]) {
#if defined(__AVX512BW__)
  const __m512i numbers = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  return bit_cast<Codes>(_mm512_shuffle_epi8(numbers, bit_cast<__m512i>(codes)));
#elif defined(__AVX2__)
  const __m256i numbers = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  return bit_cast<Codes>(_mm256_shuffle_epi8(numbers, bit_cast<__m256i>(codes)));
#else
#pragma GCC unroll 1
  for (int i = 0; i < kWidth * 4; i++) codes[i] = table[codes[i]];
  return codes;
#endif
}

inline uint32_t largest_of(Words words) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epu32(bit_cast<__m512i>(words));
#else
  uint32_t largest = 0;
  for (int i = 0; i < kWidth; i++) largest = words[i] > largest ? words[i] : largest;
  return largest;
#endif
}

// Stores the low byte of each word, and returns the sum of these as signed bytes.
inline int32_t store_low_bytes(int8_t* to, Ints words) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm512_cvtepi32_epi8(bit_cast<__m512i>(words));
  std::memcpy(to, &bytes, sizeof(bytes));
  return _mm512_reduce_add_epi32(_mm512_cvtepi8_epi32(bytes));
#else
  int32_t sum = 0;
  for (int i = 0; i < kWidth; i++) sum += to[i] = static_cast<int8_t>(words[i]);
  return sum;
#endif
}

// The four bytes at `from` in every lane.
inline Ints repeat_quad(const void* from) {
  int32_t quad;
  std::memcpy(&quad, from, sizeof(quad));
  return Ints{} + quad;
}

// A scale of MXFP4 for weights that are twice as large: 2^(bits - 128); 255 is NaN.
struct E8m0 {
  uint8_t bits;
};

inline Floats floats_of_bytes(const uint8_t* from);

inline Floats load(const E8m0* from) {
  const Words bits = __builtin_convertvector(floats_of_bytes(&from->bits), Words);
  const Words subnormal = bits == 0 ? Words{} + 0x400000u : bits << 23, power = bits == 255 ? Words{} + 0x7fc00000u : subnormal;
  return bit_cast<Floats>(power) * 0.5f;
}

inline Floats floats_of_bytes(const uint8_t* from) {
#if defined(__AVX512F__)
  __m128i bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  Floats to;
  for (int i = 0; i < kWidth; i++) to[i] = from[i];
  return to;
#endif
}

// Whether the processor adds four products of unsigned and signed bytes to 32 bits, without saturation.
#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && !defined(__AVX512F__))
constexpr bool kByteProducts = true;
#else
constexpr bool kByteProducts = false;
#endif

// What 8-bit codes have on top of their values; without byte products they are two's complement.
constexpr int kByteOffset = kByteProducts ? 128 : 0;

#if defined(__SSE2__)
// In each lane the sum of four products of bytes; with bytes of `a` that are signed, or not.
template <bool kIsSigned>
inline __m128i quad_products(__m128i a, __m128i b) {
  const __m128i zero = _mm_setzero_si128(), b_signs = _mm_cmpgt_epi8(zero, b);
  const __m128i a_signs = kIsSigned ? _mm_cmpgt_epi8(zero, a) : zero;
  const auto pairs = [](__m128i wide_a, __m128i wide_b) { return _mm_castsi128_ps(_mm_madd_epi16(wide_a, wide_b)); };
  const __m128 low = pairs(_mm_unpacklo_epi8(a, a_signs), _mm_unpacklo_epi8(b, b_signs));
  const __m128 high = pairs(_mm_unpackhi_epi8(a, a_signs), _mm_unpackhi_epi8(b, b_signs));
  const __m128i first = _mm_castps_si128(_mm_shuffle_ps(low, high, _MM_SHUFFLE(2, 0, 2, 0)));
  return _mm_add_epi32(first, _mm_castps_si128(_mm_shuffle_ps(low, high, _MM_SHUFFLE(3, 1, 3, 1))));
}
#endif

// Sums over `kQuads` times four columns of codes up to kMaxCode times activations in [-127, 127], for each of kWidth rows.
template <int kMaxCode, int kQuads>
struct CodeSums {
  Ints total;
#if defined(__AVX512VNNI__)
  void add(int, Codes codes, Ints x) {
    total = bit_cast<Ints>(_mm512_dpbusd_epi32(bit_cast<__m512i>(total), bit_cast<__m512i>(codes), bit_cast<__m512i>(x)));
    keep(total);
  }
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
  void add(int, Codes codes, Ints x) {
    total = bit_cast<Ints>(_mm256_dpbusd_avx_epi32(bit_cast<__m256i>(total), bit_cast<__m256i>(codes), bit_cast<__m256i>(x)));
    keep(total);
  }
#elif defined(__AVX2__) && !defined(__AVX512F__)
  // So many products of pairs fit into 16 bits.
  static constexpr int kFitting = 32767 / (2 * 127 * kMaxCode);
  static constexpr int kRun = kFitting >= kQuads ? kQuads : kFitting >= 4 ? 4 : kFitting >= 2 ? 2 : 1;
  __m256i part = _mm256_setzero_si256();
  void add(int index, Codes codes, Ints x) {
    const __m256i c = bit_cast<__m256i>(codes), a = bit_cast<__m256i>(x);
    if constexpr (kMaxCode > 127) {  // two's complement
      const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(c), _mm256_sign_epi8(a, c));
      total += bit_cast<Ints>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
      keep(total);
    } else {
      static_assert(kQuads % kRun == 0);
      const __m256i pairs = _mm256_maddubs_epi16(c, a);
      part = index % kRun == 0 ? pairs : _mm256_add_epi16(part, pairs);
      if (index % kRun == kRun - 1) total += bit_cast<Ints>(_mm256_madd_epi16(part, _mm256_set1_epi16(1)));
    }
  }
#elif defined(__AVX512BW__)
  void add(int, Codes codes, Ints x) {
    const __m512i c = bit_cast<__m512i>(codes), a = bit_cast<__m512i>(x), one = _mm512_set1_epi16(1);
    if constexpr (kMaxCode > 127) {  // two's complement
      const __m512i negated = _mm512_mask_sub_epi8(a, _mm512_movepi8_mask(c), _mm512_setzero_si512(), a);
      total += bit_cast<Ints>(_mm512_madd_epi16(_mm512_maddubs_epi16(_mm512_abs_epi8(c), negated), one));
    } else {
      total += bit_cast<Ints>(_mm512_madd_epi16(_mm512_maddubs_epi16(c, a), one));
    }
    keep(total);
  }
#elif defined(__SSE2__)
  void add(int, Codes codes, Ints x) {
    total += bit_cast<Ints>(quad_products<(kMaxCode > 127)>(bit_cast<__m128i>(codes), bit_cast<__m128i>(x)));
    keep(total);
  }
#else
  void add(int, Codes codes, Ints x) {
    const auto bytes = bit_cast<std::array<int8_t, kWidth * 4>>(x);
    for (int i = 0; i < kWidth * 4; i++)
      total[i / 4] += int32_t{bytes[i]} * (kMaxCode > 127 ? int32_t{static_cast<int8_t>(codes[i])} : int32_t{codes[i]});
  }
#endif
};

}  // namespace llmengine
