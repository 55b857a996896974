// What the CPU and CUDA implementations of the density-ratio loss share: the layout of sequences, and the arithmetic of one
// pair once its tokens are summed.
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
  DIL_HD int64_t chosen(int64_t pair, bool interleaved) const { return interleaved ? 2 * pair : pair; }
  DIL_HD int64_t rejected(int64_t pair, bool interleaved) const {
    return interleaved ? 2 * pair + 1 : num_sequences / 2 + pair;
  }
};

// The sums of one sequence, in fp64.
struct SequenceSums {
  double logps = 0.0;
  double logratio = 0.0;  // of the tokens, when the reference comes token by token
  int64_t length = 0;
};

struct LossOptions {
  Divergence divergence;
  PairOptions pair;
  bool average;
  bool interleaved;
  bool mean;
};

DIL_HD double log_ratio(const SequenceSums& sums, bool has_ref_logps, double ref_logps, bool average) {
  if (sums.length == 0) return 0.0;
  const double u = has_ref_logps ? sums.logps - ref_logps : sums.logratio;
  return average ? u / static_cast<double>(sums.length) : u;
}

// A pair with a response that has no scored token is not counted: loss 0, no gradient.
DIL_HD PairLoss counted_pair_loss(const SequenceSums& w, const SequenceSums& l, double u_w, double u_l, const LossOptions& o) {
  if (w.length == 0 || l.length == 0) return {0.0, 0.0, 0.0};
  return pair_loss(o.divergence, u_w, u_l, o.pair);
}

// d (what is differentiated) / d (log-prob of a scored token of sequence s).
struct SequenceGrads {
  const void* loss;       // [] or nullptr
  const void* losses;     // [B] or nullptr
  const void* logratios;  // [S] or nullptr
  const void* logps;      // [S] or nullptr
};

template <class T>
DIL_HD double token_grad(
    const SequenceGrads& grads, int64_t s, int64_t pair, double coef, int64_t length, int64_t num_pairs, const LossOptions& o) {
  const double per_token = o.average && length > 0 ? 1.0 / static_cast<double>(length) : 1.0;
  double g_pair = 0.0;
  if (grads.loss) {
    const double weight = o.mean ? 1.0 / static_cast<double>(num_pairs > 0 ? num_pairs : 1) : 1.0;
    g_pair += weight * static_cast<double>(*static_cast<const T*>(grads.loss));
  }
  if (grads.losses) g_pair += static_cast<double>(static_cast<const T*>(grads.losses)[pair]);
  // An overflowed coefficient must not turn a gradient that is not asked for into inf * 0; a NaN one marks bad boundaries.
  double g = grads.loss || grads.losses || coef != coef ? coef * g_pair : 0.0;
  if (grads.logratios) g += static_cast<double>(static_cast<const T*>(grads.logratios)[s]);
  g *= per_token;
  if (grads.logps) g += static_cast<double>(static_cast<const T*>(grads.logps)[s]);
  return g;
}

}  // namespace dil
