// Every value of both 16-bit dtypes through the vectors of csrc/cpu/vec.h, random floats rounded to them, and 2^t.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>

#include "../../csrc/cpu/vec.h"

using namespace dil::DIL_ISA;

namespace {

float widened(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

float widened(Half x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  const double special = mantissa ? NAN : INFINITY;
  const double value = exponent == 31 ? special
                       : exponent     ? std::ldexp(1024 + mantissa, exponent - 25)
                                      : std::ldexp(mantissa, -24);
  return static_cast<float>(x.bits >> 15 ? -value : value);
}

// To nearest, ties to even, by its definition.
template <class T>
T rounded(float x, int kept_bits, double largest) {
  T best{};
  if (x != x) return best;
  const double magnitude = std::fabs(static_cast<double>(x));
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const int lowest = kept_bits == 8 ? -126 : -14;
  const double unit = std::ldexp(1.0, std::max(exponent - 1, lowest) - kept_bits + 1);
  double value = std::nearbyint(magnitude / unit) * unit;
#if defined(__AVX512BF16__)
  if (kept_bits == 8 && magnitude < 0x1p-126) value = 0;
#endif
  if (value > largest) value = INFINITY;
  uint32_t low = 0, high = 0x7fff;  // the patterns of positive numbers are sorted
  while (low < high) {
    const uint32_t middle = (low + high) / 2;
    const float at = widened(T{static_cast<uint16_t>(middle)});
    if (at != at || at >= value) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  best.bits = static_cast<uint16_t>(low | (std::signbit(x) ? 0x8000 : 0));
  return best;
}

bool same(float a, float b) { return a != a ? b != b : bit_cast<uint32_t>(a) == bit_cast<uint32_t>(b); }

template <class T>
long wrong_conversions(int kept_bits, double largest) {
  long wrong = 0;
  T in[2 * kLanes], out[2 * kLanes];
  for (int first = 0; first < 65536; first += 2 * kLanes) {
    for (int i = 0; i < 2 * kLanes; ++i) in[i].bits = static_cast<uint16_t>(first + i);
    const VecF v = load(in);
    for (int i = 0; i < kLanes; ++i) wrong += !same(v[i], widened(in[i]));
    store_pair<false>(out, load_pair(in));
    for (int i = 0; i < 2 * kLanes; ++i) {
      const float expected = widened(in[i]);
      const bool flushed = expected != 0 && std::fabs(expected) < 0x1p-126f && widened(out[i]) == 0;
#if !defined(__AVX512BF16__)
      wrong += flushed;
#endif
      wrong += !flushed && !same(widened(out[i]), expected);
    }
  }
  std::mt19937 generator(0);
  for (int n = 0; n < 20000; ++n) {
    float x[kLanes];
    for (float& value : x) {
      const uint32_t bits = generator();
      // Half of them where the dtype has its values.
      value = n % 2 ? bit_cast<float>(bits)
                    : std::ldexp(static_cast<float>(static_cast<int32_t>(bits)), static_cast<int>(n % 60) - 70);
    }
    store(out, load(x));
    for (int i = 0; i < kLanes; ++i) {
      const float result = widened(out[i]);
      wrong += x[i] != x[i] ? result == result : out[i].bits != rounded<T>(x[i], kept_bits, largest).bits;
    }
  }
  return wrong;
}

double largest_error(VecF (*function)(VecF)) {
  std::mt19937 generator(0);
  std::uniform_real_distribution<float> exponents(-126.0f, 1.0f);
  double worst = std::fabs(function(VecF{})[0] - 1.0);
  for (int n = 0; n < 1000000; ++n) {
    const float t = exponents(generator);
    worst = std::max(worst, std::fabs(function(broadcast(t))[0] / std::exp2(static_cast<double>(t)) - 1.0));
  }
  return worst;
}

long wrong_limits(VecF (*function)(VecF)) {
  long wrong = 0;
  for (const float t : {-151.0f, -1000.0f, -3e38f, -INFINITY})
    wrong += function(broadcast(t))[0] > 0x1p-126f || function(broadcast(t))[0] < 0;
  const float none = function(broadcast(NAN))[0];
  return wrong + (none == none) + (function(VecF{})[0] != 1.0f);
}

}  // namespace

int main() {
  float ascending[kLanes];
  for (int i = 0; i < kLanes; ++i) ascending[i] = static_cast<float>(i);
  const VecF v = load(ascending);
  const float last = kLanes - 1;
  const bool any_right = any(v > last - 0.5f) && any(v < 0.5f) && !any(v > last);
  std::printf(
      "%ld %ld %d %ld %.3e %.3e\n", wrong_conversions<BFloat16>(8, 3.38953139e38), wrong_conversions<Half>(11, 65504.0),
      any_right, wrong_limits(exp2) + wrong_limits(exp2_narrow), largest_error(exp2), largest_error(exp2_narrow));
}
