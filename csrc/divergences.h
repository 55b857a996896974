// Scalar math of every density-ratio loss, for host and device, in fp64. No torch, no allocation.
//
// u is the log ratio log pi_theta/pi_ref. A separable loss is A(u) = h'(e^u) and P(u) = e^u h'(e^u) - h(e^u) of a convex
// generator h, with P'(u) = e^u A'(u); a coupled one is a pair loss. DIL_DIVERGENCES is the one list;
// dil_kernels/divergences.py is its twin in torch, and the tests compare the two.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define DIL_HD __host__ __device__ __forceinline__
#else
#define DIL_HD inline
#endif

namespace dil {

struct PairOptions {
  double beta;   // of dpo
  double alpha;  // share of the chosen responses in the reference expectation
};

struct PairLoss {
  double loss;
  double grad_w;  // d loss / d u_w
  double grad_l;  // d loss / d u_l
};

DIL_HD double softplus(double x) { return (x > 0.0 ? x : 0.0) + log1p(exp(-fabs(x))); }

DIL_HD double sigmoid(double x) {
  const double e = exp(-fabs(x));
  return (x >= 0.0 ? 1.0 : e) / (1.0 + e);
}

// L = -A(u_w) + alpha P(u_w) + (1 - alpha) P(u_l). A term with weight 0 is left out, so that 0 * inf cannot arise.
template <class D>
struct Separable {
  static constexpr bool separable = true;
  static DIL_HD PairLoss pair(double u_w, double u_l, PairOptions options) {
    PairLoss out{-D::A(u_w), -D::dA(u_w), 0.0};
    if (options.alpha != 0.0) {
      out.loss += options.alpha * D::P(u_w);
      out.grad_w += options.alpha * D::dP(u_w);
    }
    if (options.alpha != 1.0) {
      out.loss += (1.0 - options.alpha) * D::P(u_l);
      out.grad_l = (1.0 - options.alpha) * D::dP(u_l);
    }
    return out;
  }
};

// h(r) = (r - 1)^2 / 2; DIL eq. 24
struct Lsif : Separable<Lsif> {
  static constexpr const char* name = "lsif";
  static DIL_HD double A(double u) { return exp(u); }
  static DIL_HD double P(double u) { return 0.5 * exp(2.0 * u); }
  static DIL_HD double dA(double u) { return exp(u); }
  static DIL_HD double dP(double u) { return exp(2.0 * u); }
};

// h(r) = r log r - r; DIL table 1
struct Ukl : Separable<Ukl> {
  static constexpr const char* name = "ukl";
  static DIL_HD double A(double u) { return u; }
  static DIL_HD double P(double u) { return exp(u); }
  static DIL_HD double dA(double) { return 1.0; }
  static DIL_HD double dP(double u) { return exp(u); }
};

// h(r) = r log r - (1 + r) log(1 + r); DIL table 1
struct Bce : Separable<Bce> {
  static constexpr const char* name = "bce";
  static DIL_HD double A(double u) { return -softplus(-u); }
  static DIL_HD double P(double u) { return softplus(u); }
  static DIL_HD double dA(double u) { return sigmoid(-u); }
  static DIL_HD double dP(double u) { return sigmoid(u); }
};

// Not separable; DIL eq. 27
struct Dpo {
  static constexpr const char* name = "dpo";
  static constexpr bool separable = false;
  static DIL_HD PairLoss pair(double u_w, double u_l, PairOptions options) {
    const double margin = options.beta * (u_w - u_l);
    const double g = options.beta * sigmoid(-margin);
    return {softplus(-margin), -g, g};
  }
};

#define DIL_DIVERGENCES(X) X(Lsif) X(Ukl) X(Bce) X(Dpo)

enum class Divergence : int {
#define DIL_ENUM(D) D,
  DIL_DIVERGENCES(DIL_ENUM)
#undef DIL_ENUM
};

DIL_HD PairLoss pair_loss(Divergence divergence, double u_w, double u_l, PairOptions options) {
  switch (divergence) {
#define DIL_CASE(D)   \
  case Divergence::D: \
    return D::pair(u_w, u_l, options);
    DIL_DIVERGENCES(DIL_CASE)
#undef DIL_CASE
  }
  return {NAN, NAN, NAN};
}

}  // namespace dil
