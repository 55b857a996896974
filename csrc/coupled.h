// Losses that couple the two responses of a pair; part of divergences.h.
#pragma once

#include "parameters.h"

namespace dil {

// A loss D::of(w, l) of both bounded log ratios of a pair.
template <class D>
struct Coupled {
  static constexpr bool separable = false;
  static DIL_HD PairLoss pair(double u_w, double u_l, const LossParameters& o) {
    const double M = o.max_log_ratio;
    const PairLoss out = D::of(soft_bound(u_w, M), soft_bound(u_l, M), o);
    return {out.loss, scaled(out.grad_w, soft_bound_slope(u_w, M)), scaled(out.grad_l, soft_bound_slope(u_l, M))};
  }
  // A sequence alone has no loss; the callers refuse to ask for one.
  static DIL_HD Term chosen(double, const LossParameters&) { return {NAN, NAN}; }
  static DIL_HD Term rejected(double, const LossParameters&) { return {NAN, NAN}; }
};

// One of x = beta (w - l) alone, from D::of_difference(x).
template <class D>
struct CoupledByDifference : Coupled<D> {
  static DIL_HD PairLoss of(double w, double l, const LossParameters& o) {
    const Term t = D::of_difference(o.beta * (w - l), o);
    return {t.loss, o.beta * t.grad, -o.beta * t.grad};
  }
};

// DIL eq. 27; with label_smoothing e conservative: a label is wrong with probability e
struct Dpo : CoupledByDifference<Dpo> {
  static constexpr const char* name = "dpo";
  static DIL_HD Term of_difference(double x, const LossParameters& o) {
    const double e = o.label_smoothing;
    return {(1.0 - e) * softplus(-x) + product(e, softplus(x)), e * sigmoid(x) - (1.0 - e) * sigmoid(-x)};
  }
};

// Unbiased where a label is wrong with probability label_smoothing; robust DPO
struct Robust : CoupledByDifference<Robust> {
  static constexpr const char* name = "robust";
  static DIL_HD Term of_difference(double x, const LossParameters& o) {
    const double e = o.label_smoothing, rest = 1.0 - 2.0 * e;
    return {((1.0 - e) * softplus(-x) - product(e, softplus(x))) / rest, -((1.0 - e) * sigmoid(-x) + e * sigmoid(x)) / rest};
  }
};

// SLiC-HF, RSO
struct Hinge : CoupledByDifference<Hinge> {
  static constexpr const char* name = "hinge";
  static DIL_HD Term of_difference(double x, const LossParameters&) { return x >= 1.0 ? Term{0.0, 0.0} : Term{1.0 - x, -1.0}; }
};

// (w - l - 1 / (2 beta))^2; IPO eq. 17
struct Ipo : CoupledByDifference<Ipo> {
  static constexpr const char* name = "ipo";
  static DIL_HD Term of_difference(double x, const LossParameters& o) {
    const double error = (x - 0.5) / o.beta;
    return {error * error, 2.0 * error / o.beta};
  }
};

// KL(q || p) of q = sigmoid(+-x) and p = (1 - e, e); EXO eq. 16
struct ExoPair : CoupledByDifference<ExoPair> {
  static constexpr const char* name = "exo_pair";
  static DIL_HD Term of_difference(double x, const LossParameters& o) {
    const double log_p_w = log1p(-o.label_smoothing), log_p_l = log(o.label_smoothing);
    const double q_w = sigmoid(x), q_l = sigmoid(-x);
    return {
        product(q_w, -softplus(-x) - log_p_w) + product(q_l, -softplus(x) - log_p_l),
        product(q_w * q_l, x - (log_p_w - log_p_l))};
  }
};

// sigmoid(beta w) + sigmoid(-beta (w - l)); APO eq. 8
struct ApoDown : Coupled<ApoDown> {
  static constexpr const char* name = "apo_down";
  static DIL_HD PairLoss of(double w, double l, const LossParameters& o) {
    const double v = o.beta * w, x = o.beta * (w - l), push = o.beta * sigmoid(x) * sigmoid(-x);
    return {sigmoid(v) + sigmoid(-x), o.beta * sigmoid(v) * sigmoid(-v) - push, push};
  }
};

// softplus(l - w) + (w - 1 / (2 beta))^2 + (l + 1 / (2 beta))^2; Cal-DPO
struct CalDpo : Coupled<CalDpo> {
  static constexpr const char* name = "cal_dpo";
  static DIL_HD PairLoss of(double w, double l, const LossParameters& o) {
    const double error_w = w - 0.5 / o.beta, error_l = l + 0.5 / o.beta, push = sigmoid(l - w);
    return {softplus(l - w) + error_w * error_w + error_l * error_l, 2.0 * error_w - push, 2.0 * error_l + push};
  }
};

}  // namespace dil
