// A vector of floats as wide as the instruction set that the file is compiled for, from the compiler's vector extensions: the
// same source becomes AVX-512, AVX2, SSE2 or NEON. Everything is in a namespace per instruction set, so that no two object
// files share an inline function that only one of their machines can run.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__)
#define DIL_ISA avx512_bf16
#define DIL_VEC_BYTES 64
#include <immintrin.h>
#elif defined(__AVX512F__) && defined(__AVX512BW__)
#define DIL_ISA avx512
#define DIL_VEC_BYTES 64
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define DIL_ISA avx2
#define DIL_VEC_BYTES 32
#include <immintrin.h>
#elif defined(__aarch64__)
#define DIL_ISA neon
#define DIL_VEC_BYTES 16
#include <arm_neon.h>
#else
#define DIL_ISA baseline
#define DIL_VEC_BYTES 16
#endif

namespace dil::DIL_ISA {

constexpr int kLanes = DIL_VEC_BYTES / 4;

typedef float VecF __attribute__((vector_size(DIL_VEC_BYTES)));
typedef int32_t VecI __attribute__((vector_size(DIL_VEC_BYTES)));
typedef uint32_t VecU __attribute__((vector_size(DIL_VEC_BYTES)));
typedef uint16_t VecH __attribute__((vector_size(DIL_VEC_BYTES / 2)));

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline VecF broadcast(float x) { return x - VecF{}; }

inline VecF load(const float* x) {
  VecF v;
  std::memcpy(&v, x, sizeof(v));
  return v;
}

inline void store(float* x, VecF v) { std::memcpy(x, &v, sizeof(v)); }

// GCC 12 takes five instructions for these conversions of vectors, and each machine has one.
inline VecU widen(const uint16_t* x) {
#if DIL_VEC_BYTES == 64
  return (VecU)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
#elif DIL_VEC_BYTES == 32
  return (VecU)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
#elif defined(__aarch64__)
  return (VecU)vmovl_u16(vld1_u16(x));
#else
  VecH h;
  std::memcpy(&h, x, sizeof(h));
  return __builtin_convertvector(h, VecU);
#endif
}

inline VecH narrow(VecU x) {
#if DIL_VEC_BYTES == 64
  return (VecH)_mm512_cvtepi32_epi16((__m512i)x);
#elif defined(__aarch64__)
  return (VecH)vmovn_u32((uint32x4_t)x);
#else
  return __builtin_convertvector(x, VecH);
#endif
}

inline VecF load(const BFloat16* x) { return bit_cast<VecF>(widen(&x->bits) << 16); }

#if defined(__AVX512BF16__)
inline void store(BFloat16* x, VecF v) {  // to nearest, ties to even; subnormal numbers become 0
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(x, &h, sizeof(h));
}
#else
inline void store(BFloat16* x, VecF v) {  // to nearest, ties to even
  const VecU bits = bit_cast<VecU>(v);
  const VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VecU nan = (bits >> 16) | 0x40u;
  const VecH h = narrow(v == v ? rounded : nan);
  std::memcpy(x, &h, sizeof(h));
}
#endif

#if DIL_VEC_BYTES == 64
inline VecF load(const Half* x) { return (VecF)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))); }
inline void store(Half* x, VecF v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif DIL_VEC_BYTES == 32
inline VecF load(const Half* x) { return (VecF)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))); }
inline void store(Half* x, VecF v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__aarch64__)
inline VecF load(const Half* x) { return (VecF)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&x->bits))); }
inline void store(Half* x, VecF v) { vst1_u16(&x->bits, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v))); }
#else
inline VecF load(const Half* x) {
  const VecU bits = widen(&x->bits);
  const VecU sign = (bits & 0x8000u) << 16;
  // Half's exponent and mantissa in float's place, times 2^112; exact for subnormals too. Inf and NaN get float's exponent.
  const VecU magnitude = bit_cast<VecU>(bit_cast<VecF>((bits & 0x7fffu) << 13) * 0x1p112f);
  const VecU special = (bits & 0x7fffu) >= 0x7c00u ? VecU{} + 0x7f800000u : VecU{};
  return bit_cast<VecF>(sign | magnitude | special);
}
inline void store(Half* x, VecF v) {  // to nearest, ties to even
  const VecU bits = bit_cast<VecU>(v);
  const VecU sign = (bits >> 16) & 0x8000u;
  const VecU magnitude = bits & 0x7fffffffu;
  const VecU normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 shifts a subnormal half's mantissa to the bottom bits, rounded by the addition itself.
  const VecU subnormal = bit_cast<VecU>(bit_cast<VecF>(magnitude) + 0.5f) - 0x3f000000u;
  VecU half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? VecU{} + 0x7c00u : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? VecU{} + 0x7e00u : half;   // NaN
  const VecH h = narrow(sign | half);
  std::memcpy(x, &h, sizeof(h));
}
#endif

inline VecF max(VecF a, VecF b) { return a > b ? a : b; }

// All lanes hold the first element.
template <class T>
inline VecF broadcast_element(const T* x) {
  T same[kLanes];
  for (T& element : same) element = *x;
  return load(same);
}

// Whether any lane of a comparison holds.
inline bool any(VecI mask) {
#if DIL_VEC_BYTES == 64
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif DIL_VEC_BYTES == 32
  return _mm256_movemask_ps((__m256)mask) != 0;
#elif defined(__aarch64__)
  return vmaxvq_u32((uint32x4_t)mask) != 0;
#else
  return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
}

// Stores past the caches, to an address aligned to the vector, where the instruction set can.
inline void stream(float* x, VecF v) {
#if DIL_VEC_BYTES == 64
  _mm512_stream_ps(x, (__m512)v);
#elif DIL_VEC_BYTES == 32
  _mm256_stream_ps(x, (__m256)v);
#else
  store(x, v);
#endif
}

template <class T>
inline void stream(T* x, VecF v) {  // 16-bit elements
#if DIL_VEC_BYTES == 64
  alignas(32) T packed[kLanes];
  store(packed, v);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(x), _mm256_load_si256(reinterpret_cast<const __m256i*>(packed)));
#elif DIL_VEC_BYTES == 32
  alignas(16) T packed[kLanes];
  store(packed, v);
  _mm_stream_si128(reinterpret_cast<__m128i*>(x), _mm_load_si128(reinterpret_cast<const __m128i*>(packed)));
#else
  store(x, v);
#endif
}

// Two neighbouring vectors, in whatever order suits the dtype; `store` puts every element back in its place.
struct Pair {
  VecF first, second;
};

template <class T>
inline Pair load_pair(const T* x) {
  return {load(x), load(x + kLanes)};
}

template <bool streaming, class T>
inline void store_pair(T* x, Pair v) {
  if constexpr (streaming) {
    stream(x, v.first);
    stream(x + kLanes, v.second);
  } else {
    store(x, v.first);
    store(x + kLanes, v.second);
  }
}

#if defined(__AVX512BF16__)
inline Pair load_pair(const BFloat16* x) {  // even and odd elements
  const VecU both = (VecU)_mm512_loadu_si512(x);
  return {bit_cast<VecF>(both << 16), bit_cast<VecF>(both & 0xffff0000u)};
}

template <bool streaming>
inline void store_pair(BFloat16* x, Pair v) {
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)v.second, (__m512)v.first);
  const __m512i both = _mm512_permutexvar_epi16(
      _mm512_set_epi16(
          31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0),
      halves);
  streaming ? _mm512_stream_si512(reinterpret_cast<__m512i*>(x), both) : _mm512_storeu_si512(x, both);
}
#endif

// Orders streamed stores before what follows.
inline void stream_fence() {
#if DIL_VEC_BYTES >= 32
  _mm_sfence();
#endif
}

inline float horizontal_max(VecF v) {
  float out = v[0];
  for (int i = 1; i < kLanes; ++i) out = v[i] > out ? v[i] : out;
  return out;
}

inline double horizontal_sum(VecF v) {
  double out = 0.0;
  for (int i = 0; i < kLanes; ++i) out += v[i];
  return out;
}

// 2^t for t <= 127: 0 (or subnormal) below 2^-126, NaN for NaN, relative error below 1.7e-7 (SSE2: 1.9e-7) otherwise. The
// polynomials are minimax in relative error, with p(0) = 1.
#if DIL_VEC_BYTES == 64
// In [0, 1]; 0 for -inf, of which `scale` makes 0.
inline VecF fraction(VecF t) { return (VecF)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }

// p times 2 to the floor of t.
inline VecF scale(VecF p, VecF t) { return (VecF)_mm512_scalef_ps((__m512)p, (__m512)t); }

inline VecF exp2(VecF t) {
  const VecF f = fraction(t);
  VecF p = f * 0x1.e974fap-10f + 0x1.277856p-7f;
  p = p * f + 0x1.c91ce6p-5f;
  p = p * f + 0x1.ebdb56p-3f;
  p = p * f + 0x1.62e4bap-1f;
  p = p * f + 1.0f;
  return scale(p, t);
}

// To 3e-6, for a result that is rounded to 16 bits.
inline VecF exp2_narrow(VecF t) {
  const VecF f = fraction(t);
  VecF p = f * 0x1.b7f730p-7f + 0x1.abf868p-5f;
  p = p * f + 0x1.ee2450p-3f;
  p = p * f + 0x1.62d6c6p-1f;
  p = p * f + 1.0f;
  return scale(p, t);
}
#else
inline VecF exp2(VecF t) {
  t = t < -127.0f ? broadcast(-127.0f) : t;  // written so that NaN stays
  constexpr float kRound = 0x1.8p23f;        // adding it leaves the nearest integer in the low bits
  const VecF shifted = t + kRound;
  const VecF f = t - (shifted - kRound);  // in [-0.5, 0.5]
  VecF p = f * 0x1.5bba14p-10f + 0x1.3cea88p-7f;
  p = p * f + 0x1.c6b752p-5f;
  p = p * f + 0x1.ebf9bcp-3f;
  p = p * f + 0x1.62e42ap-1f;
  p = p * f + 1.0f;
  const VecU exponent = (bit_cast<VecU>(shifted) << 23) + 0x3f800000u;
  return p * bit_cast<VecF>(exponent);
}

inline VecF exp2_narrow(VecF t) { return exp2(t); }
#endif

// tanh to 2 units in the last place: a polynomial (minimax, in relative error) below 5/8, 1 - 2 e / (1 + e) above.
inline VecF tanh(VecF y) {
  const VecF magnitude = y < 0.0f ? -y : y;
  const VecF w = y * y;
  VecF p = w * 0x1.21dddep-9f - 0x1.0e8b9cp-7f;
  p = p * w + 0x1.64196ap-6f;
  p = p * w - 0x1.b9fc64p-5f;
  p = p * w + 0x1.1110b2p-3f;
  p = p * w - 0x1.555554p-2f;
  const VecF near = y + y * (w * p);
  const VecF e = exp2(magnitude * -0x1.715476p+1f);  // e^(-2 |y|)
  const VecF far = 1.0f - (e + e) / (1.0f + e);
  return magnitude < 0.625f ? near : (y < 0.0f ? -far : far);
}

// tanh'(u) = 4 e / (1 + e)^2, e = exp(-2 |u|), exact in relative terms where 1 - tanh^2 is not.
inline VecF tanh_slope(VecF u) {
  const VecF magnitude = max(-u, u);
  const VecF e = exp2(magnitude * -0x1.715476p+1f);
  return 4.0f * e / ((1.0f + e) * (1.0f + e));
}

}  // namespace dil::DIL_ISA
