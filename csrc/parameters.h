// What every loss is made of: its options, sigmoids and bounds that neither cancel nor overflow; part of divergences.h.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define DIL_HD __host__ __device__ __forceinline__
#else
#define DIL_HD inline
#endif

namespace dil {

// How a separable loss is put to work on a pair of log ratios.
enum class Link : int { Imitation, Ratio, FDpo };

struct LossParameters {
  double beta;             // the loss's own, or the factor of u, of the difference of two, or of that of A
  double power;            // the loss's own; 0 where it has none
  double label_smoothing;  // likewise
  double alpha;            // share of the chosen responses in the reference expectation
  double max_log_ratio;    // soft bound on u; 0 for none
  double chosen_weight;    // of the chosen term of a separable loss
  double rejected_weight;  // likewise
  double chosen_offset;    // added to beta u
  double rejected_offset;  // likewise
  double scale;            // what a loss under the ratio link is divided by
  Link link;
};

struct Term {
  double loss;
  double grad;  // d loss / d u
};

struct PairLoss {
  double loss;
  double grad_w;  // d loss / d u_w
  double grad_l;  // d loss / d u_l
};

DIL_HD bool is_nan(double x) { return x != x; }

// k u, where 0 times an infinity is 0.
DIL_HD double product(double k, double u) { return k == 0.0 && !is_nan(u) ? 0.0 : k * u; }

// log(weight e^term).
DIL_HD double log_weighted(double weight, double term) { return weight == 0.0 ? -INFINITY : log(weight) + term; }

DIL_HD double softplus(double x) { return (x > 0.0 ? x : 0.0) + log1p(exp(-fabs(x))); }

DIL_HD double sigmoid(double x) {
  const double e = exp(-fabs(x));
  return (x >= 0.0 ? 1.0 : e) / (1.0 + e);
}

// (e^{k u} - 1) / k, which is u where k is 0.
DIL_HD double expm1_over(double k, double u) {
  const double x = product(k, u);
  if (fabs(x) >= 1.0) return expm1(x) / k;
  return x == 0.0 ? u : u * (expm1(x) / x);
}

DIL_HD double log_add(double a, double b) {  // log(e^a + e^b)
  const double high = a > b ? a : b, low = a > b ? b : a;
  return low == -INFINITY ? high : high + log1p(exp(low - high));
}

// e^positive - e^negative where both overflow.
DIL_HD double overflowed(double positive, double negative) { return positive < negative ? -INFINITY : INFINITY; }

// u bounded to (-M, M) as M tanh(u / M), and its slope 1 / cosh(u / M)^2.
DIL_HD double soft_bound(double u, double M) { return M == 0.0 ? u : M * tanh(u / M); }
DIL_HD double tanh_slope(double x) {  // 1 - tanh^2, which cancels
  const double e = exp(-2.0 * fabs(x));
  return 4.0 * e / ((1.0 + e) * (1.0 + e));
}
DIL_HD double soft_bound_slope(double u, double M) { return M == 0.0 ? 1.0 : tanh_slope(u / M); }

// What a separable loss sees of a log ratio, and its slope.
struct View {
  double v, slope;
};
DIL_HD View view(double u, double beta, double offset, double M) {
  return {beta * soft_bound(u, M) + offset, beta * soft_bound_slope(u, M)};
}

// A gradient through a bound or a weight; 0 where that is 0, however large the gradient.
DIL_HD double scaled(double grad, double by) { return by == 0.0 ? 0.0 : grad * by; }

}  // namespace dil
