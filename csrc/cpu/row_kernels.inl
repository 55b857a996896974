// The row kernels, for whichever instruction set the including file is compiled for.
#include <cmath>

#include "row_kernels.h"
#include "vec.h"

namespace dil::DIL_ISA {

constexpr double kLog2e = 1.4426950408889634;
// Elements that one pass for the maximum and one for the sum work on while they lie in the first-level cache.
constexpr int64_t kBlock = 2048;
constexpr int kUnroll = 4;
constexpr int64_t kStep = kUnroll * kLanes;

// The last, partial vector of a row, padded with what leaves a maximum and a sum as they are.
template <class T>
inline VecF load_tail(const T* x, int64_t n) {
  T padded[kLanes] = {};
  std::memcpy(padded, x, n * sizeof(T));
  const VecF v = load(padded);
  VecI lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(n) ? v : broadcast(-INFINITY);
}

template <class T>
inline float block_max(const T* x, int64_t n) {
  VecF m[kUnroll];
  for (VecF& v : m) v = broadcast(-INFINITY);
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    for (int k = 0; k < kUnroll; ++k) m[k] = max(m[k], load(x + i + k * kLanes));
  }
  for (; i + kLanes <= n; i += kLanes) m[0] = max(m[0], load(x + i));
  if (i < n) m[0] = max(m[0], load_tail(x + i, n - i));
  return horizontal_max(max(max(m[0], m[1]), max(m[2], m[3])));
}

template <class T>
inline double block_sum_exp2(const T* x, int64_t n, float max, float scale) {
  VecF s[kUnroll] = {};
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    for (int k = 0; k < kUnroll; ++k) s[k] += exp2((load(x + i + k * kLanes) - max) * scale);
  }
  for (; i + kLanes <= n; i += kLanes) s[0] += exp2((load(x + i) - max) * scale);
  if (i < n) s[0] += exp2((load_tail(x + i, n - i) - max) * scale);
  return horizontal_sum((s[0] + s[1]) + (s[2] + s[3]));
}

// Online over blocks: the sum is rescaled when a block raises the maximum. A NaN is dropped by the maximum and kept by the sum.
template <class T>
LogSumExp lse(const void* row, int64_t V, float inv_temperature) {
  const T* x = static_cast<const T*>(row);
  const float scale = static_cast<float>(kLog2e * inv_temperature);
  float max = -INFINITY;
  double sum = 0.0;
  for (int64_t start = 0; start < V; start += kBlock) {
    const int64_t n = V - start < kBlock ? V - start : kBlock;
    const float m = block_max(x + start, n);
    if (m > max) {
      sum *= std::exp2((static_cast<double>(max) - m) * scale);
      max = m;
    }
    // While all is -inf, differences from any finite number are as good, and they keep a NaN.
    sum += block_sum_exp2(x + start, n, max == -INFINITY ? 0.0f : max, scale);
  }
  return {max, std::log(sum)};
}

template <class T>
void grad(void* grad_row, const void* row, int64_t V, float g, float max, float log_sum, float inv_temperature) {
  const T* x = static_cast<const T*>(row);
  T* dx = static_cast<T*>(grad_row);
  const float scale = static_cast<float>(kLog2e * inv_temperature);
  const float offset = static_cast<float>(kLog2e * log_sum);
  const auto softmax_grad = [=](VecF v) { return exp2((v - max) * scale - offset) * -g; };
  int64_t i = 0;
  for (; i + kStep <= V; i += kStep) {
    for (int k = 0; k < kUnroll; ++k) store(dx + i + k * kLanes, softmax_grad(load(x + i + k * kLanes)));
  }
  for (; i + kLanes <= V; i += kLanes) store(dx + i, softmax_grad(load(x + i)));
  if (i < V) {
    T tail[kLanes];
    store(tail, softmax_grad(load_tail(x + i, V - i)));
    std::memcpy(dx + i, tail, (V - i) * sizeof(T));
  }
}

constexpr RowKernels row_kernels(const char* name) {
  return {name, {lse<float>, grad<float>}, {lse<BFloat16>, grad<BFloat16>}, {lse<Half>, grad<Half>}};
}

}  // namespace dil::DIL_ISA
