// What the CPU and CUDA implementations of the density-ratio loss share: the layout of sequences, and the arithmetic of one
// item - a pair, or one response of unpaired data - once its tokens are summed.
#pragma once

#include <cstdint>

#include "divergences.h"

namespace dil {

// Sequence s is a row of a padded batch, or the segment [cu_seqlens[s], cu_seqlens[s + 1]) of a packed one. Packed values
// may be one short of the packed labels: with a shift, the last position has nothing to predict.
struct SequenceLayout {
  const int64_t* labels;  // nullptr: every token is scored
  int64_t label_stride_s;
  int64_t label_stride_t;
  const int32_t* cu_seqlens;  // nullptr: padded
  const bool* is_chosen;      // [num_sequences] of unpaired data; nullptr: pairs
  int64_t num_sequences;
  int64_t num_values;  // padded: values per row; packed: values in all
  int64_t ignore_index;
  int64_t shift;

  DIL_HD int64_t begin(int64_t s) const { return cu_seqlens ? cu_seqlens[s] : s * num_values; }
  DIL_HD int64_t end(int64_t s) const {
    if (!cu_seqlens) return (s + 1) * num_values;
    const int64_t end = cu_seqlens[s + 1];
    return end < num_values ? end : num_values;
  }
  DIL_HD bool scored(int64_t s, int64_t i) const {  // i in [begin(s), end(s))
    if (!labels) return true;
    const int64_t t = cu_seqlens ? i : i - s * num_values;
    const int64_t row = cu_seqlens ? 0 : s;
    return labels[row * label_stride_s + (t + shift) * label_stride_t] != ignore_index;
  }
  // Whether reading by these boundaries stays in bounds and covers all tokens once.
  DIL_HD bool valid(int64_t s) const {
    if (!cu_seqlens) return true;
    return cu_seqlens[0] == 0 && cu_seqlens[num_sequences] == num_values + shift && cu_seqlens[s] >= 0 &&
           cu_seqlens[s] <= cu_seqlens[s + 1] && cu_seqlens[s + 1] <= num_values + shift;
  }

  DIL_HD int64_t num_items() const { return is_chosen ? num_sequences : num_sequences / 2; }
  DIL_HD int64_t sequences_per_item() const { return is_chosen ? 1 : 2; }
  // The k-th sequence of an item: of a pair the chosen one first.
  DIL_HD int64_t sequence(int64_t item, int64_t k, bool interleaved) const {
    if (is_chosen) return item;
    return interleaved ? 2 * item + k : k * (num_sequences / 2) + item;
  }
  DIL_HD int64_t item_of(int64_t s, bool interleaved) const {
    if (is_chosen) return s;
    return interleaved ? s / 2 : s % (num_sequences / 2);
  }
  // Which of the two counts an item goes into; pairs use the first.
  DIL_HD int side(int64_t item) const { return is_chosen && !is_chosen[item] ? 1 : 0; }
};

// The sums of one sequence, in fp64.
struct SequenceSums {
  double logps = 0.0;
  double logratio = 0.0;  // of the tokens, when the reference comes token by token
  int64_t length = 0;
};

struct LossOptions {
  Divergence divergence;
  LossParameters parameters;
  bool average;
  bool interleaved;
  bool mean;
};

DIL_HD double log_ratio(const SequenceSums& sums, bool has_ref_logps, double ref_logps, bool average) {
  if (sums.length == 0) return 0.0;
  const double u = has_ref_logps ? sums.logps - ref_logps : sums.logratio;
  return average ? u / static_cast<double>(sums.length) : u;
}

template <class T>
struct ForwardPointers {
  const T* token_logps;      // [S, T_out] or [N_out]
  const T* ref_token_logps;  // likewise, or nullptr
  const double* ref_logps;   // [S] or nullptr
  T* loss;                   // []
  T* losses;                 // [items]
  T* logratios;              // [S]
  T* logps;                  // [S]
  T* coefs;                  // [S]
  int32_t* lengths;          // [S]
  int32_t* counts;           // [2], items that count: pairs twice, or chosen and rejected responses
};

// The loss of an item whose sequences have been summed; everything of it is written. Returns the loss, in fp64, but infinite
// where what is written is: every way to sum the losses then sees the same infinities. An item with a sequence that has no
// scored token does not count: loss 0, no gradient. Invalid boundaries make all of it NaN.
template <class T>
DIL_HD double write_item(
    const SequenceLayout& layout, const LossOptions& o, const ForwardPointers<T>& p, int64_t item, const SequenceSums sums[2],
    bool valid) {
  double u[2] = {0.0, 0.0};
  bool counted = true;
  const auto write_sequence = [&](int64_t k) {
    const int64_t s = layout.sequence(item, k, o.interleaved);
    u[k] = log_ratio(sums[k], p.ref_logps != nullptr, p.ref_logps ? p.ref_logps[s] : 0.0, o.average);
    counted = counted && sums[k].length > 0;
    p.logratios[s] = static_cast<T>(valid ? u[k] : NAN);
    p.logps[s] = static_cast<T>(valid ? sums[k].logps : NAN);
    p.lengths[s] = static_cast<int32_t>(sums[k].length);
  };
  write_sequence(0);
  if (layout.sequences_per_item() > 1) write_sequence(1);
  PairLoss loss{0.0, 0.0, 0.0};
  if (!valid) {
    loss = {NAN, NAN, NAN};
  } else if (counted && layout.is_chosen) {
    const Term term = response_loss(o.divergence, u[0], layout.is_chosen[item], o.parameters);
    loss = {term.loss, term.grad, 0.0};
  } else if (counted) {
    loss = pair_loss(o.divergence, u[0], u[1], o.parameters);
  }
  p.losses[item] = static_cast<T>(loss.loss);
  p.coefs[layout.sequence(item, 0, o.interleaved)] = static_cast<T>(loss.grad_w);
  if (!layout.is_chosen) p.coefs[layout.sequence(item, 1, o.interleaved)] = static_cast<T>(loss.grad_l);
  const double written = p.losses[item];
  return fabs(written) == INFINITY ? written : loss.loss;
}

// The sum of losses; positive ones apart, so that overflow in both directions is +inf instead of NaN.
struct Total {
  double positive = 0.0;
  double rest = 0.0;  // NaN, too
  double count = 0.0;

  DIL_HD void add(double loss, bool counted) {
    (loss > 0.0 ? positive : rest) += loss;
    count += counted ? 1.0 : 0.0;
  }
};

DIL_HD double total_loss(const Total totals[2], bool mean) {
  const double first = mean && totals[0].count > 0.0 ? totals[0].count : 1.0;
  const double second = mean && totals[1].count > 0.0 ? totals[1].count : 1.0;
  const double positive = totals[0].positive / first + totals[1].positive / second;
  const double rest = totals[0].rest / first + totals[1].rest / second;
  return positive == INFINITY && !is_nan(rest) ? positive : positive + rest;
}

// d (what is differentiated) / d (log-prob of a scored token of sequence s).
struct SequenceGrads {
  const void* loss;       // [] or nullptr
  const void* losses;     // [items] or nullptr
  const void* logratios;  // [S] or nullptr
  const void* logps;      // [S] or nullptr
};

template <class T>
DIL_HD double token_grad(
    const SequenceLayout& layout, const LossOptions& o, const SequenceGrads& grads, int64_t s, double coef, int64_t length,
    const int32_t* counts) {
  const int64_t item = layout.item_of(s, o.interleaved);
  const double per_token = o.average && length > 0 ? 1.0 / static_cast<double>(length) : 1.0;
  double g_item = 0.0;
  if (grads.loss) {
    const int32_t count = counts[layout.side(item)];
    const double weight = o.mean && count > 0 ? 1.0 / static_cast<double>(count) : 1.0;
    g_item += weight * static_cast<double>(*static_cast<const T*>(grads.loss));
  }
  if (grads.losses) g_item += static_cast<double>(static_cast<const T*>(grads.losses)[item]);
  // An overflowed coefficient must not turn a gradient that is not asked for into inf * 0; a NaN one marks bad boundaries.
  double g = g_item != 0.0 || is_nan(coef) ? coef * g_item : 0.0;
  if (grads.logratios) g += static_cast<double>(static_cast<const T*>(grads.logratios)[s]);
  g *= per_token;
  if (grads.logps) g += static_cast<double>(static_cast<const T*>(grads.logps)[s]);
  return g;
}

}  // namespace dil
