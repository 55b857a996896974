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

  // x to z, in place.
  static void post_process(Scalar* x, const Scalar* bias, int64_t n, const HeadOptions& o) {
    const Scalar scale = static_cast<Scalar>(o.logit_scale), cap = static_cast<Scalar>(o.softcap);
    if (!bias && scale == 1 && cap == 0) return;
    over_vectors(n, [&](int64_t i, int64_t count) {
      Vec z = load(x + i, count, 0);
      if (bias) z += load(bias + i, count, 0);
      z *= scale;
      if (cap != 0) z = L::tanh(z / cap) * cap;
      store_some(x + i, z, count);
    });
  }

  // d z / d (logit_scale x), from z.
  static Vec slope(Vec z, Scalar cap) {
    const Vec t = z / cap;
    return (broadcast(1) - t) * (broadcast(1) + t);
  }

  static double maximum(const Scalar* z, int64_t n) {
    Vec m = broadcast(kLowest);
    over_vectors(n, [&](int64_t i, int64_t count) {
      const Vec v = load(z + i, count, kLowest);
      m = v > m ? v : m;
    });
    return L::max(m);
  }

  static double total(const Scalar* z, int64_t n) {
    double sum = 0.0;
    over_vectors(n, [&](int64_t i, int64_t count) { sum += L::sum(load(z + i, count, 0)); });
    return sum;
  }

  struct Sums {
    double s, dot;
  };

  // s of every z; its gradient to `grad` unless that is null.
  template <class T, bool softcap, bool statistics>
  static Sums weigh(const Scalar* z, int64_t n, double reference, const HeadOptions& o, T* grad) {
    constexpr double kLog2e = 1.4426950408889634;
    const Scalar scale = static_cast<Scalar>(kLog2e * o.inv_temperature), cap = static_cast<Scalar>(o.softcap);
    const Scalar origin = static_cast<Scalar>(reference);
    Vec sum{}, dot{};
    over_vectors(n, [&](int64_t i, int64_t count) {
      const Vec v = load(z + i, count, kLowest);
      const Vec d = v - origin;
      const Vec s = L::exp2(d * scale);
      sum += s;
      if constexpr (statistics) dot += s == 0 ? Vec{} : s * d;  // not 0 * inf
      if (grad) {
        Vec g = -s;
        if constexpr (softcap) g *= slope(v, cap);
        store_some(grad + i, g, count);
      }
    });
    return {L::sum(sum), L::sum(dot)};
  }

  template <class T>
  static Sums weigh(const Scalar* z, int64_t n, double reference, const HeadOptions& o, T* grad) {
    if (o.softcap != 0.0) {
      return o.statistics ? weigh<T, true, true>(z, n, reference, o, grad) : weigh<T, true, false>(z, n, reference, o, grad);
    }
    return o.statistics ? weigh<T, false, true>(z, n, reference, o, grad) : weigh<T, false, false>(z, n, reference, o, grad);
  }

  template <class T>
  static double forward(
      void* tile, const void* bias, int64_t n, int64_t label, const HeadOptions& o, HeadRow& row, void* grad_row) {
    Scalar* z = static_cast<Scalar*>(tile);
    T* grad = static_cast<T*>(grad_row);
    post_process(z, static_cast<const Scalar*>(bias), n, o);
    if (o.statistics) row.total += total(z, n);
    const bool has_label = label >= 0 && label < n;
    if (has_label) {
      row.label = z[label];
      z[label] = kLowest;  // s becomes 0
    }
    const double others_max = maximum(z, n);
    row.others_max = others_max > row.others_max ? others_max : row.others_max;
    double rescale = 1.0;
    if (others_max > row.reference + o.slack) {
      const bool first = row.reference == kLowest;
      rescale = first ? 0.0 : std::exp((row.reference - others_max) * o.inv_temperature);
      row.dot = first ? 0.0 : rescale * (row.dot + (row.reference - others_max) * row.rest);
      row.rest = first ? row.rest : rescale * row.rest;  // a NaN stays
      row.reference = others_max;
    }
    // While all is -inf, differences from any finite number are as good.
    const Sums sums = weigh(z, n, row.reference == kLowest ? 0.0 : row.reference, o, grad);
    row.rest += sums.s;
    row.dot += sums.dot;
    if (has_label && grad) store_some(grad + label, Vec{}, 1);
    return rescale;
  }

  template <class T>
  static void gradient(
      void* tile, const void* bias, int64_t n, int64_t label, const HeadOptions& o, const HeadRow& row, void* grad_row) {
    Scalar* z = static_cast<Scalar*>(tile);
    T* grad = static_cast<T*>(grad_row);
    post_process(z, static_cast<const Scalar*>(bias), n, o);
    const bool has_label = label >= 0 && label < n;
    const Scalar label_z = has_label ? z[label] : 0;  // before `grad`, which may be the tile, is written
    weigh(z, n, row.reference == kLowest ? 0.0 : row.reference, o, grad);
    if (!has_label) return;
    Vec g = broadcast(static_cast<Scalar>(row.rest));
    if (o.softcap != 0.0) g *= slope(broadcast(label_z), static_cast<Scalar>(o.softcap));
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
