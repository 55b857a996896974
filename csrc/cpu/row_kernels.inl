// The row kernels, for whichever instruction set the including file is compiled for.
#include <cmath>

#include "row_kernels.h"
#include "vec.h"

namespace dil::DIL_ISA {

constexpr double kLog2e = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
// Elements that are summed in fp32 before they go to fp64.
constexpr int64_t kBlock = 2048;
constexpr int kUnroll = 4;
constexpr int64_t kStep = kUnroll * kLanes;

template <bool kCapped>
inline VecF value(VecF x, float inv_cap) {
  if constexpr (kCapped) return tanh(x * inv_cap);
  return x;
}

// The last, partial vector of a row; `keep` marks its lanes.
template <class T>
inline VecF load_tail(const T* x, int64_t n, VecI& keep) {
  T padded[kLanes] = {};
  std::memcpy(padded, x, n * sizeof(T));
  VecI lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  keep = lane < static_cast<int32_t>(n);
  return load(padded);
}

// Online: a vector that exceeds the maximum raises it and rescales the sums, which happens a few times a row.
template <class T, bool kCapped, bool kStatistics>
class Sums {
 public:
  Sums(VecF label, const Processing& processing)
      : scale_(static_cast<float>(kLog2e * processing.multiplier)), inv_cap_(static_cast<float>(processing.inv_cap)) {
    const float target = value<kCapped>(label, inv_cap_)[0];
    out_.target = target;
    max_ = target == target ? target : -INFINITY;
    label_ = label[0];
  }

  void add(const T* x, int64_t n) {
    for (int64_t start = 0; start < n; start += kBlock) {
      add_block(x + start, n - start < kBlock ? n - start : kBlock);
      flush();
    }
  }

  RowSums result() {
    out_.max = max_;
    out_.weighted *= kLn2;
    out_.top1_hit = label_ >= (kCapped ? horizontal_max(top_) : max_);
    return out_;
  }

 private:
  void add_block(const T* x, int64_t n) {
    int64_t i = 0;
    for (; i + kStep <= n; i += kStep) {
      VecF v[kUnroll];
      for (int k = 0; k < kUnroll; k += 2) {
        const Pair loaded = load_pair(x + i + k * kLanes);
        v[k] = taken(loaded.first);
        v[k + 1] = taken(loaded.second);
      }
      raise(max(max(v[0], v[1]), max(v[2], v[3])));
      for (int k = 0; k < kUnroll; ++k) add_vector(k, v[k], v[k]);
    }
    for (; i + kLanes <= n; i += kLanes) {
      const VecF v = taken(load(x + i));
      raise(v);
      add_vector(0, v, v);
    }
    if (i < n) {
      VecI keep;
      const VecF loaded = load_tail(x + i, n - i, keep);
      const VecF v = taken(keep ? loaded : broadcast(-INFINITY)), padded = keep ? v : broadcast(-INFINITY);
      raise(padded);
      add_vector(0, padded, keep ? v : VecF{});
    }
  }

  VecF taken(VecF x) {
    if constexpr (kCapped && kStatistics) top_ = max(top_, x);
    return value<kCapped>(x, inv_cap_);
  }

  void add_vector(int k, VecF v, VecF summand) {
    const VecF t = (v - reference()) * scale_;
    const VecF e = exp2(t);
    rest_[k] += e;
    if constexpr (kStatistics) {
      weighted_[k] += e * max(broadcast(kTinyExponent), t);
      total_[k] += summand * static_cast<float>(kTotalScale);
    }
  }

  // While all is -inf, differences from any finite number are as good, and they keep a NaN.
  float reference() const { return max_ == -INFINITY ? 0.0f : max_; }

  void raise(VecF v) {
    if (!any(v > max_)) return;
    flush();
    const float raised = horizontal_max(v);
    const double step = (static_cast<double>(max_) - raised) * scale_;
    const double shrink = std::exp2(step);
    if constexpr (kStatistics) out_.weighted = shrink == 0.0 ? 0.0 : shrink * (out_.weighted + out_.rest * step);
    out_.rest *= shrink;
    max_ = raised;
  }

  void flush() {
    out_.rest += horizontal_sum((rest_[0] + rest_[1]) + (rest_[2] + rest_[3]));
    for (VecF& v : rest_) v = VecF{};
    if constexpr (kStatistics) {
      out_.weighted += horizontal_sum((weighted_[0] + weighted_[1]) + (weighted_[2] + weighted_[3]));
      out_.total += horizontal_sum((total_[0] + total_[1]) + (total_[2] + total_[3]));
      for (VecF& v : weighted_) v = VecF{};
      for (VecF& v : total_) v = VecF{};
    }
  }

  static constexpr float kTinyExponent = -150.0f;  // 2^ it is 0, and 0 times it is 0: what takes the place of t = -inf

  float scale_, inv_cap_, max_, label_;
  VecF top_ = broadcast(-INFINITY);
  VecF rest_[kUnroll] = {}, weighted_[kUnroll] = {}, total_[kUnroll] = {};
  RowSums out_{};
};

template <class T, bool kCapped, bool kStatistics>
RowSums sums_as(const T* x, int64_t V, int64_t label, const Processing& processing) {
  Sums<T, kCapped, kStatistics> sums(broadcast_element(x + label), processing);
  sums.add(x, label);
  sums.add(x + label + 1, V - label - 1);
  return sums.result();
}

template <class T>
RowSums sums(const void* row, int64_t V, int64_t label, const Processing& processing, bool statistics) {
  const T* x = static_cast<const T*>(row);
  if (processing.inv_cap != 0.0) {
    return statistics ? sums_as<T, true, true>(x, V, label, processing) : sums_as<T, true, false>(x, V, label, processing);
  }
  return statistics ? sums_as<T, false, true>(x, V, label, processing) : sums_as<T, false, false>(x, V, label, processing);
}

template <class T, bool kCapped, bool kStreaming>
void grad_as(T* dx, const T* x, int64_t V, const RowGradient& row, const Processing& processing) {
  const float scale = static_cast<float>(kLog2e * processing.multiplier);
  const float offset = static_cast<float>(kLog2e * row.log_sum);
  const float inv_cap = static_cast<float>(processing.inv_cap), max = static_cast<float>(row.max);
  const float g = static_cast<float>(row.g * processing.grad_factor);
  const auto through_tanh = [=](VecF d, VecF loaded) {
    if constexpr (kCapped) return d * tanh_slope(loaded * inv_cap);
    return d;
  };
  const auto softmax_grad = [=](VecF loaded) {
    const VecF t = (value<kCapped>(loaded, inv_cap) - max) * scale - offset;
    return through_tanh((sizeof(T) == 2 ? exp2_narrow(t) : exp2(t)) * -g, loaded);
  };
  // 1 - p without cancellation where p is near 1; taken before the row is overwritten.
  const bool has_label = row.label < V;
  const VecF target = broadcast_element(x + (has_label ? row.label : 0));
  const double distance = static_cast<double>(value<kCapped>(target, inv_cap)[0]) - row.max;
  const double logp = distance * processing.multiplier - row.log_sum;
  const double label_grad = -row.g * processing.grad_factor * std::expm1(logp);
  T label_entry[kLanes];
  store(label_entry, through_tanh(broadcast(static_cast<float>(label_grad)), target));

  const auto partial = [&](int64_t i, int64_t n) {
    VecI keep;
    T some[kLanes];
    store(some, softmax_grad(load_tail(x + i, n, keep)));
    std::memcpy(dx + i, some, n * sizeof(T));
  };
  int64_t i = 0;
  if constexpr (kStreaming) {
    constexpr uintptr_t kAlign = 2 * kLanes * sizeof(T);
    const int64_t head = static_cast<int64_t>((kAlign - reinterpret_cast<uintptr_t>(dx) % kAlign) % kAlign / sizeof(T));
    i = head < V ? head : V;
    for (int64_t done = 0; done < i; done += kLanes) partial(done, i - done < kLanes ? i - done : kLanes);
  }
  for (; i + kStep <= V; i += kStep) {
    for (int k = 0; k < kUnroll; k += 2) {
      const Pair loaded = load_pair(x + i + k * kLanes);
      store_pair<kStreaming>(dx + i + k * kLanes, Pair{softmax_grad(loaded.first), softmax_grad(loaded.second)});
    }
  }
  for (; i + kLanes <= V; i += kLanes) store(dx + i, softmax_grad(load(x + i)));
  if (i < V) partial(i, V - i);
  if constexpr (kStreaming) stream_fence();
  if (has_label) dx[row.label] = label_entry[0];
}

template <class T>
void grad(void* dx_row, const void* x_row, int64_t V, const RowGradient& row, const Processing& processing, bool streaming) {
  const T* x = static_cast<const T*>(x_row);
  T* dx = static_cast<T*>(dx_row);
  if (processing.inv_cap != 0.0) {
    return streaming ? grad_as<T, true, true>(dx, x, V, row, processing) : grad_as<T, true, false>(dx, x, V, row, processing);
  }
  return streaming ? grad_as<T, false, true>(dx, x, V, row, processing) : grad_as<T, false, false>(dx, x, V, row, processing);
}

constexpr RowKernels row_kernels(const char* name) {
  return {name, {sums<float>, grad<float>}, {sums<BFloat16>, grad<BFloat16>}, {sums<Half>, grad<Half>}};
}

}  // namespace dil::DIL_ISA
