// The head kernels, for whichever instruction set the including file is compiled for.
#include <cmath>
#include <limits>
#include <type_traits>

#include "head_kernels.h"
#include "vec.h"

namespace dil::DIL_ISA {

// What a row is made of: vectors of floats, or single doubles.
struct FloatLanes {
  using Scalar = float;
  using Vec = VecF;
  static constexpr int64_t lanes = kLanes;
  static Vec load(const float* x) { return DIL_ISA::load(x); }
  static Vec exp2(Vec x) { return DIL_ISA::exp2(x); }
  static Vec tanh(Vec x) { return DIL_ISA::tanh(x); }
  static Vec tanh_slope(Vec x) { return DIL_ISA::tanh_slope(x); }
  static double sum(Vec x) { return horizontal_sum(x); }
  static double max(Vec x) { return horizontal_max(x); }
};

struct DoubleLanes {
  using Scalar = double;
  using Vec = double;
  static constexpr int64_t lanes = 1;
  static Vec load(const double* x) { return *x; }
  static Vec exp2(Vec x) { return std::exp2(x); }
  static Vec tanh(Vec x) { return std::tanh(x); }
  static Vec tanh_slope(Vec x) {
    const double e = std::exp(-2.0 * std::fabs(x));
    return 4.0 * e / ((1.0 + e) * (1.0 + e));
  }
  static double sum(Vec x) { return x; }
  static double max(Vec x) { return x; }
};

inline void store(double* x, double v) { *x = v; }

template <class L>
struct HeadRowKernel {
  using Scalar = typename L::Scalar;
  using Vec = typename L::Vec;
  static constexpr Scalar kLowest = -std::numeric_limits<Scalar>::infinity();

  static Vec broadcast(Scalar x) { return x - Vec{}; }

  // f(first, count) over whole vectors, then once over what is left.
  template <class F>
  static void over_vectors(int64_t n, F&& f) {
    int64_t i = 0;
    for (; i + L::lanes <= n; i += L::lanes) f(i, L::lanes);
    if (i < n) f(i, n - i);
  }

  static Vec load(const Scalar* x, int64_t count, Scalar padding) {
    if (count == L::lanes) return L::load(x);
    Scalar values[L::lanes];
    for (int64_t i = 0; i < L::lanes; ++i) values[i] = i < count ? x[i] : padding;
    return L::load(values);
  }

  template <class T>
  static void store_some(T* x, Vec v, int64_t count) {
    if (count == L::lanes) return store(x, v);
    T values[L::lanes];
    store(values, v);
    for (int64_t i = 0; i < count; ++i) x[i] = values[i];
  }

  // x to y = logit_scale (x + bias), in place. Softcapping takes -inf as the lowest number, so that -inf marks what is left
  // out.
  static void post_process(Scalar* x, const Scalar* bias, int64_t n, const HeadOptions& o) {
    const Scalar scale = static_cast<Scalar>(o.logit_scale), cap = static_cast<Scalar>(o.softcap);
    if (!bias && scale == 1 && cap == 0) return;
    over_vectors(n, [&](int64_t i, int64_t count) {
      Vec y = load(x + i, count, 0);
      if (bias) y += load(bias + i, count, 0);
      y *= scale;
      if (cap != 0) y = y == kLowest ? broadcast(std::numeric_limits<Scalar>::lowest()) : y;
      store_some(x + i, y, count);
    });
  }

  // y to z.
  static Vec capped(Vec y, Scalar cap) { return cap == 0 ? y : y == kLowest ? y : L::tanh(y / cap) * cap; }

  static Scalar capped_one(Scalar y, Scalar cap) { return static_cast<Scalar>(L::max(capped(broadcast(y), cap))); }

  static double maximum(const Scalar* y, int64_t n) {
    Vec m = broadcast(kLowest);
    over_vectors(n, [&](int64_t i, int64_t count) {
      const Vec v = load(y + i, count, kLowest);
      m = v > m ? v : m;
    });
    return L::max(m);
  }

  static double total(const Scalar* y, int64_t n, Scalar cap) {
    double sum = 0.0;
    over_vectors(n, [&](int64_t i, int64_t count) {
      sum += L::sum(capped(load(y + i, count, 0), cap) * static_cast<Scalar>(kTotalScale));
    });
    return sum;
  }

  struct Sums {
    double s, dot;
  };

  // s of every y; its gradient to `grad` unless that is null.
  template <class T, bool softcap, bool statistics>
  static Sums weigh(const Scalar* y, int64_t n, double reference, const HeadOptions& o, T* grad) {
    constexpr double kLog2e = 1.4426950408889634;
    const Scalar scale = static_cast<Scalar>(kLog2e * o.inv_temperature), cap = static_cast<Scalar>(o.softcap);
    const Scalar origin = static_cast<Scalar>(reference);
    Vec sum{}, dot{};
    over_vectors(n, [&](int64_t i, int64_t count) {
      const Vec v = load(y + i, count, kLowest);
      const Vec d = (softcap ? capped(v, cap) : v) - origin;
      const Vec s = L::exp2(d * scale);
      sum += s;
      if constexpr (statistics) dot += s == 0 ? Vec{} : s * d;  // not 0 * inf
      if (grad) {
        Vec g = -s;
        if constexpr (softcap) g *= L::tanh_slope(v / cap);
        store_some(grad + i, g, count);
      }
    });
    return {L::sum(sum), L::sum(dot)};
  }

  template <class T>
  static Sums weigh(const Scalar* y, int64_t n, double reference, const HeadOptions& o, T* grad) {
    if (o.softcap != 0.0) {
      return o.statistics ? weigh<T, true, true>(y, n, reference, o, grad) : weigh<T, true, false>(y, n, reference, o, grad);
    }
    return o.statistics ? weigh<T, false, true>(y, n, reference, o, grad) : weigh<T, false, false>(y, n, reference, o, grad);
  }

  template <class T>
  static double forward(
      void* tile, const void* bias, int64_t n, int64_t label, const HeadOptions& o, HeadRow& row, void* grad_row) {
    Scalar* y = static_cast<Scalar*>(tile);
    T* grad = static_cast<T*>(grad_row);
    post_process(y, static_cast<const Scalar*>(bias), n, o);
    const Scalar cap = static_cast<Scalar>(o.softcap);
    if (o.statistics) row.total += total(y, n, cap);
    const bool has_label = label >= 0 && label < n;
    if (has_label) {
      row.uncapped = y[label];
      row.label = capped_one(y[label], cap);
      y[label] = kLowest;  // s becomes 0
    }
    const double highest = maximum(y, n), others_max = capped_one(static_cast<Scalar>(highest), cap);
    row.others_max = highest > row.others_max ? highest : row.others_max;
    double rescale = 1.0;
    if (others_max > row.reference + o.slack) {
      const bool first = row.reference == kLowest;
      rescale = first ? 0.0 : std::exp((row.reference - others_max) * o.inv_temperature);
      row.dot = first ? 0.0 : rescale * (row.dot + (row.reference - others_max) * row.rest);
      row.rest = first ? row.rest : rescale * row.rest;  // a NaN stays
      row.reference = others_max;
    }
    // While all is -inf, differences from any finite number are as good.
    const Sums sums = weigh(y, n, row.reference == kLowest ? 0.0 : row.reference, o, grad);
    row.rest += sums.s;
    row.dot += sums.dot;
    if (has_label && grad) store_some(grad + label, Vec{}, 1);
    return rescale;
  }

  template <class T>
  static void gradient(
      void* tile, const void* bias, int64_t n, int64_t label, const HeadOptions& o, const HeadRow& row, void* grad_row) {
    Scalar* y = static_cast<Scalar*>(tile);
    T* grad = static_cast<T*>(grad_row);
    post_process(y, static_cast<const Scalar*>(bias), n, o);
    const bool has_label = label >= 0 && label < n;
    const Scalar label_y = has_label ? y[label] : 0;  // before `grad`, which may be the tile, is written
    weigh(y, n, row.reference == kLowest ? 0.0 : row.reference, o, grad);
    if (!has_label) return;
    Vec g = broadcast(static_cast<Scalar>(row.rest));
    if (o.softcap != 0.0) g *= L::tanh_slope(broadcast(label_y) / static_cast<Scalar>(o.softcap));
    store_some(grad + label, g, 1);
  }

  template <class T>
  static constexpr HeadKernel kernel() {
    return {forward<T>, gradient<T>};
  }
};

constexpr HeadKernels head_kernels() {
  using Float = HeadRowKernel<FloatLanes>;
  return {
      Float::kernel<float>(), Float::kernel<BFloat16>(), Float::kernel<Half>(), HeadRowKernel<DoubleLanes>::kernel<double>()};
}

}  // namespace dil::DIL_ISA
