// Scalar math of every density-ratio loss, for host and device, in fp64. No torch, no allocation.
//
// u is the log ratio log pi_theta/pi_ref. A separable loss is A(u) = h'(e^u) and P(u) = e^u h'(e^u) - h(e^u) of a convex
// generator h, with P'(u) = e^u A'(u), or any A and P; a coupled one is a pair loss. DIL_DIVERGENCES is the one list;
// dil_kernels/losses/built_in.py is its twin in torch, and the tests compare the two.
//
// What overflows is an infinity of the right sign, never a NaN: of two terms that overflow against each other, that of an
// infinite log ratio counts beside that of a finite one, and else their logarithms are compared.
#pragma once

#include "coupled.h"
#include "parameters.h"

namespace dil {

// With v = beta bound(u) + offset, L = chosen_weight [-A(v_w) + alpha P(v_w)] + rejected_weight (1 - alpha) P(v_l). A term
// of weight 0 is left out.
template <class D>
struct Separable {
  static constexpr bool separable = true;

  // What A and P take beside v, and the factor of u: the loss's own parameter, and beta where it is not that.
  static DIL_HD double own(const LossParameters& o) { return o.power; }
  static DIL_HD double factor(const LossParameters& o) { return o.beta; }
  static DIL_HD View view_of(double u, double offset, const LossParameters& o) {
    return view(u, D::factor(o), offset, o.max_log_ratio);
  }

  // log A, log P and log P' where these may overflow.
  static DIL_HD double log_A(double, double) { return -INFINITY; }
  static DIL_HD double log_P(double, double) { return INFINITY; }
  static DIL_HD double log_dP(double, double) { return INFINITY; }

  // weight P(v) and weight P'(v), finite also where only P is not.
  static DIL_HD double weighted_P(double v, double p, double weight) {
    const double P = D::P(v, p);
    return P == INFINITY ? exp(log_weighted(weight, D::log_P(v, p))) : weight * P;
  }
  static DIL_HD double weighted_dP(double v, double p, double weight) {
    const double dP = D::dP(v, p);
    return dP == INFINITY ? exp(log_weighted(weight, D::log_dP(v, p))) : weight * dP;
  }

  static DIL_HD Term chosen(double u, const LossParameters& o) {
    const double p = D::own(o);
    const auto [v, slope] = view_of(u, o.chosen_offset, o);
    Term out{-D::A(v, p), -D::dA(v, p)};
    if (o.alpha != 0.0) {
      out.loss += weighted_P(v, p, o.alpha);
      out.grad += weighted_dP(v, p, o.alpha);
      if (is_nan(out.loss) && !is_nan(u)) out.loss = overflowed(log_weighted(o.alpha, D::log_P(v, p)), D::log_A(v, p));
      if (is_nan(out.grad) && !is_nan(u)) out.grad = overflowed(log_weighted(o.alpha, v), 0.0);  // A'(u) (alpha e^u - 1)
    }
    return {scaled(out.loss, o.chosen_weight), scaled(scaled(out.grad, slope), o.chosen_weight)};
  }

  static DIL_HD Term rejected(double u, const LossParameters& o) {
    const double weight = o.rejected_weight * (1.0 - o.alpha);
    if (weight == 0.0) return {0.0, 0.0};
    const double p = D::own(o);
    const auto [v, slope] = view_of(u, o.rejected_offset, o);
    return {weighted_P(v, p, weight), scaled(weighted_dP(v, p, weight), slope)};
  }

  static DIL_HD PairLoss imitation(double u_w, double u_l, const LossParameters& o) {
    const Term w = chosen(u_w, o), l = rejected(u_l, o);
    double loss = w.loss + l.loss;
    if (is_nan(loss) && !is_nan(u_w) && !is_nan(u_l)) {
      const double p = D::own(o), v_w = view_of(u_w, o.chosen_offset, o).v, v_l = view_of(u_l, o.rejected_offset, o).v;
      const bool w_infinite = fabs(v_w) == INFINITY, l_infinite = fabs(v_l) == INFINITY;
      const double positive = log_add(
          log_weighted(o.chosen_weight * o.alpha, D::log_P(v_w, p)),
          log_weighted(o.rejected_weight * (1.0 - o.alpha), D::log_P(v_l, p)));
      const double negative = log_weighted(o.chosen_weight, D::log_A(v_w, p));
      loss = w_infinite == l_infinite ? overflowed(positive, negative) : w_infinite ? w.loss : l.loss;
    }
    return {loss, w.grad, l.grad};
  }

  // The loss of two responses whose log ratios are beta d and -beta d: P(-beta d) - A(beta d), d = u_w - u_l.
  static DIL_HD PairLoss ratio(double u_w, double u_l, const LossParameters& o) {
    const double x = o.beta * (soft_bound(u_w, o.max_log_ratio) - soft_bound(u_l, o.max_log_ratio));
    const LossParameters plain{1.0, o.power, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, Link::Imitation};
    const PairLoss out = imitation(x, -x, plain);
    const double push = o.beta * (out.grad_l - out.grad_w) / o.scale;
    return {
        out.loss / o.scale, scaled(-push, soft_bound_slope(u_w, o.max_log_ratio)),
        scaled(push, soft_bound_slope(u_l, o.max_log_ratio))};
  }

  // softplus(-beta (A(u_w) - A(u_l))). A increases: where it overflows for both, the larger log ratio has the larger one.
  static DIL_HD PairLoss contrast(double u_w, double u_l, const LossParameters& o) {
    const double p = D::own(o), v_w = soft_bound(u_w, o.max_log_ratio), v_l = soft_bound(u_l, o.max_log_ratio);
    const double A_w = D::A(v_w, p), A_l = D::A(v_l, p);
    double margin = o.beta * (A_w - A_l);
    if (fabs(A_w) == INFINITY && A_w == A_l && !(v_w == v_l && fabs(v_w) == INFINITY)) {
      margin = v_w == v_l ? 0.0 : v_w > v_l ? INFINITY : -INFINITY;
    }
    const double push = o.beta * sigmoid(-margin);
    return {
        softplus(-margin), scaled(scaled(-D::dA(v_w, p), push), soft_bound_slope(u_w, o.max_log_ratio)),
        scaled(scaled(D::dA(v_l, p), push), soft_bound_slope(u_l, o.max_log_ratio))};
  }

  static DIL_HD PairLoss pair(double u_w, double u_l, const LossParameters& o) {
    return o.link == Link::Imitation ? imitation(u_w, u_l, o)
           : o.link == Link::Ratio   ? ratio(u_w, u_l, o)
                                     : contrast(u_w, u_l, o);
  }
};

// h(r) = (r - 1)^2 / 2; DIL eq. 24
struct Lsif : Separable<Lsif> {
  static constexpr const char* name = "lsif";
  static DIL_HD double A(double u, double) { return exp(u); }
  static DIL_HD double P(double u, double) { return 0.5 * exp(2.0 * u); }
  static DIL_HD double dA(double u, double) { return exp(u); }
  static DIL_HD double dP(double u, double) { return exp(2.0 * u); }
  static DIL_HD double log_A(double u, double) { return u; }
  static DIL_HD double log_P(double u, double) { return 2.0 * u - log(2.0); }
  static DIL_HD double log_dP(double u, double) { return 2.0 * u; }
};

// h(r) = r log r - r; DIL table 1
struct Ukl : Separable<Ukl> {
  static constexpr const char* name = "ukl";
  static DIL_HD double A(double u, double) { return u; }
  static DIL_HD double P(double u, double) { return exp(u); }
  static DIL_HD double dA(double, double) { return 1.0; }
  static DIL_HD double dP(double u, double) { return exp(u); }
  static DIL_HD double log_P(double u, double) { return u; }
  static DIL_HD double log_dP(double u, double) { return u; }
};

// h(r) = r log r - (1 + r) log(1 + r); DIL table 1
struct Bce : Separable<Bce> {
  static constexpr const char* name = "bce";
  static DIL_HD double A(double u, double) { return -softplus(-u); }
  static DIL_HD double P(double u, double) { return softplus(u); }
  static DIL_HD double dA(double u, double) { return sigmoid(-u); }
  static DIL_HD double dP(double u, double) { return sigmoid(u); }
};

// h(r) = (r^{1+k} - r) / (k (1+k)), k >= -1; Basu et al. 1998. The constant of P makes the loss continuous in k: ukl at 0.
struct Power : Separable<Power> {
  static constexpr const char* name = "power";
  static DIL_HD double A(double u, double k) { return expm1_over(k, u); }
  static DIL_HD double P(double u, double k) {
    return k >= 0.0 ? exp((1.0 + k) * u) / (1.0 + k) : expm1_over(1.0 + k, u) + (1.0 + k);
  }
  static DIL_HD double dA(double u, double k) { return exp(product(k, u)); }
  static DIL_HD double dP(double u, double k) { return exp(product(1.0 + k, u)); }
  static DIL_HD double log_A(double u, double k) { return k > 0.0 ? k * u - log(k) : -INFINITY; }
  static DIL_HD double log_P(double u, double k) { return k > -1.0 ? (1.0 + k) * u - log1p(k) : INFINITY; }
  static DIL_HD double log_dP(double u, double k) { return product(1.0 + k, u); }
};

// h(r) = -log r; Itakura-Saito
struct Is : Separable<Is> {
  static constexpr const char* name = "is";
  static DIL_HD double A(double u, double) { return -exp(-u); }
  static DIL_HD double P(double u, double) { return u; }
  static DIL_HD double dA(double u, double) { return exp(-u); }
  static DIL_HD double dP(double, double) { return 1.0; }
};

// h(r) = 1 / (1 + r); the Brier score of the classifier r / (1 + r)
struct Brier : Separable<Brier> {
  static constexpr const char* name = "brier";
  static DIL_HD double A(double u, double) { return -sigmoid(-u) * sigmoid(-u); }
  static DIL_HD double P(double u, double) { return sigmoid(u) * sigmoid(u); }
  static DIL_HD double dA(double u, double) { return 2.0 * sigmoid(u) * sigmoid(-u) * sigmoid(-u); }
  static DIL_HD double dP(double u, double) { return 2.0 * sigmoid(u) * sigmoid(u) * sigmoid(-u); }
};

// No Bregman divergence: (v - 1 / (2 beta))^2 of the chosen, (v + 1 / (2 beta))^2 of the rejected; SPPO eq. 4.7
struct SppoHard : Separable<SppoHard> {
  static constexpr const char* name = "sppo_hard";
  static DIL_HD double own(const LossParameters& o) { return o.beta; }
  static DIL_HD double factor(const LossParameters&) { return 1.0; }
  static DIL_HD double A(double u, double beta) { return -(u - 0.5 / beta) * (u - 0.5 / beta); }
  static DIL_HD double P(double u, double beta) { return (u + 0.5 / beta) * (u + 0.5 / beta); }
  static DIL_HD double dA(double u, double beta) { return -2.0 * (u - 0.5 / beta); }
  static DIL_HD double dP(double u, double beta) { return 2.0 * (u + 0.5 / beta); }
};

// No Bregman divergence; APO eq. 7
struct ApoZero : Separable<ApoZero> {
  static constexpr const char* name = "apo_zero";
  static DIL_HD double own(const LossParameters& o) { return o.beta; }
  static DIL_HD double factor(const LossParameters&) { return 1.0; }
  static DIL_HD double A(double u, double beta) { return -sigmoid(-beta * u); }
  static DIL_HD double P(double u, double beta) { return sigmoid(beta * u); }
  static DIL_HD double dA(double u, double beta) { return beta * sigmoid(beta * u) * sigmoid(-beta * u); }
  static DIL_HD double dP(double u, double beta) { return beta * sigmoid(beta * u) * sigmoid(-beta * u); }
};

#define DIL_DIVERGENCES(X) \
  X(Lsif)                  \
  X(Ukl) X(Bce) X(Power) X(Is) X(Brier) X(SppoHard) X(ApoZero) X(Dpo) X(Robust) X(Hinge) X(Ipo) X(ExoPair) X(ApoDown) X(CalDpo)

enum class Divergence : int {
#define DIL_ENUM(D) D,
  DIL_DIVERGENCES(DIL_ENUM)
#undef DIL_ENUM
      None  // log ratios only: every loss is 0
};

inline bool is_separable(Divergence divergence) {
  switch (divergence) {
#define DIL_CASE(D)   \
  case Divergence::D: \
    return D::separable;
    DIL_DIVERGENCES(DIL_CASE)
#undef DIL_CASE
    case Divergence::None:
      return true;
  }
  return false;
}

DIL_HD PairLoss pair_loss(Divergence divergence, double u_w, double u_l, const LossParameters& o) {
  switch (divergence) {
#define DIL_CASE(D)   \
  case Divergence::D: \
    return D::pair(u_w, u_l, o);
    DIL_DIVERGENCES(DIL_CASE)
#undef DIL_CASE
    case Divergence::None:
      return {0.0, 0.0, 0.0};
  }
  return {NAN, NAN, NAN};
}

// The term of one response of unpaired data.
DIL_HD Term response_loss(Divergence divergence, double u, bool is_chosen, const LossParameters& o) {
  switch (divergence) {
#define DIL_CASE(D)   \
  case Divergence::D: \
    return is_chosen ? D::chosen(u, o) : D::rejected(u, o);
    DIL_DIVERGENCES(DIL_CASE)
#undef DIL_CASE
    case Divergence::None:
      return {0.0, 0.0};
  }
  return {NAN, NAN};
}

}  // namespace dil
