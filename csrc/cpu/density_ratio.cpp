// Density-ratio loss on the CPU: sequences are summed in parallel, pairs follow.
#include <vector>

#include "../checks.h"
#include "grain.h"

namespace dil {
namespace {

template <class T>
SequenceSums sum_sequence(const SequenceLayout& layout, int64_t s, const T* token_logps, const T* ref_token_logps) {
  SequenceSums sums;
  for (int64_t i = layout.begin(s); i < layout.end(s); ++i) {
    if (!layout.scored(s, i)) continue;
    const double logp = token_logps[i];
    sums.logps += logp;
    if (ref_token_logps) sums.logratio += logp - static_cast<double>(ref_token_logps[i]);
    ++sums.length;
  }
  return sums;
}

int64_t token_logps_per_sequence(const SequenceLayout& layout) {  // on average
  return layout.cu_seqlens ? layout.num_values / layout.num_sequences : layout.num_values;
}

void check_boundaries(const SequenceLayout& layout) {
  for (int64_t s = 0; s < layout.num_sequences; ++s) {
    STD_TORCH_CHECK(
        layout.valid(s), "cu_seqlens must start at 0, not decrease, and end at the number of tokens, ",
        layout.num_values + layout.shift);
  }
}

template <class T>
void forward(
    const SequenceLayout& layout, const LossOptions& options, const T* token_logps, const T* ref_token_logps,
    const double* ref_logps, const DensityRatioOutputs& out) {
  const int64_t S = layout.num_sequences, B = S / 2;
  std::vector<SequenceSums> sums(S);
  torch::stable::parallel_for(0, S, grain(token_logps_per_sequence(layout)), [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) sums[s] = sum_sequence(layout, s, token_logps, ref_token_logps);
  });
  T* losses = out.losses.mutable_data_ptr<T>();
  T* logratios = out.logratios.mutable_data_ptr<T>();
  T* logps = out.logps.mutable_data_ptr<T>();
  T* coefs = out.coefs.mutable_data_ptr<T>();
  int32_t* lengths = out.lengths.mutable_data_ptr<int32_t>();
  double total = 0.0;
  int64_t num_pairs = 0;
  for (int64_t pair = 0; pair < B; ++pair) {
    const int64_t w = layout.chosen(pair, options.interleaved), l = layout.rejected(pair, options.interleaved);
    double u[2];
    int k = 0;
    for (const int64_t s : {w, l}) {
      u[k] = log_ratio(sums[s], ref_logps != nullptr, ref_logps ? ref_logps[s] : 0.0, options.average);
      logratios[s] = static_cast<T>(u[k++]);
      logps[s] = static_cast<T>(sums[s].logps);
      lengths[s] = static_cast<int32_t>(sums[s].length);
    }
    const PairLoss loss = counted_pair_loss(sums[w], sums[l], u[0], u[1], options);
    losses[pair] = static_cast<T>(loss.loss);
    coefs[w] = static_cast<T>(loss.grad_w);
    coefs[l] = static_cast<T>(loss.grad_l);
    total += loss.loss;
    num_pairs += sums[w].length > 0 && sums[l].length > 0;
  }
  *out.loss.mutable_data_ptr<T>() = static_cast<T>(options.mean && num_pairs > 0 ? total / num_pairs : total);
  *out.num_pairs.mutable_data_ptr<int32_t>() = static_cast<int32_t>(num_pairs);
}

DensityRatioOutputs::Tuple density_ratio_fwd(
    const Tensor& token_logps, const std::optional<Tensor>& labels, const std::optional<Tensor>& cu_seqlens,
    const std::optional<Tensor>& ref_token_logps, const std::optional<Tensor>& ref_logps, const std::string& loss_type,
    double beta, double alpha, bool average, bool interleaved, bool mean, int64_t ignore_index, bool shift) {
  const SequenceLayout layout = sequence_layout(token_logps, labels, cu_seqlens, ignore_index, shift);
  check_reference(token_logps, ref_token_logps, ref_logps, layout);
  check_boundaries(layout);
  const LossOptions options{divergence_by_name(loss_type), {beta, alpha}, average, interleaved, mean};
  DensityRatioOutputs out(token_logps, layout.num_sequences);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    forward<T>(
        layout, options, token_logps.const_data_ptr<T>(), ref_token_logps ? ref_token_logps->const_data_ptr<T>() : nullptr,
        ref_logps ? ref_logps->const_data_ptr<double>() : nullptr, out);
  };
  token_logps.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return std::move(out).tuple();
}

template <class T>
void backward(
    const SequenceLayout& layout, const LossOptions& options, const SequenceGrads& grads, const int32_t* lengths,
    int64_t num_pairs, const T* coefs, T* grad_token_logps) {
  const int64_t B = layout.num_sequences / 2;
  torch::stable::parallel_for(0, B, grain(2 * token_logps_per_sequence(layout)), [&](int64_t first, int64_t last) {
    for (int64_t pair = first; pair < last; ++pair) {
      for (const int64_t s : {layout.chosen(pair, options.interleaved), layout.rejected(pair, options.interleaved)}) {
        const T g = static_cast<T>(token_grad<T>(grads, s, pair, coefs[s], lengths[s], num_pairs, options));
        for (int64_t i = layout.begin(s); i < layout.end(s); ++i) grad_token_logps[i] = layout.scored(s, i) ? g : T{0};
      }
    }
  });
}

Tensor density_ratio_bwd(
    const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_losses,
    const std::optional<Tensor>& grad_logratios, const std::optional<Tensor>& grad_logps, const Tensor& token_logps,
    const std::optional<Tensor>& labels, const std::optional<Tensor>& cu_seqlens, const Tensor& lengths,
    const Tensor& num_pairs, const Tensor& coefs, bool average, bool interleaved, bool mean, int64_t ignore_index, bool shift) {
  const SequenceLayout layout = sequence_layout(token_logps, labels, cu_seqlens, ignore_index, shift);
  check_boundaries(layout);
  const int64_t S = layout.num_sequences;
  check_saved(token_logps, lengths, num_pairs, coefs, S);
  const LossOptions options{{}, {}, average, interleaved, mean};
  const SequenceGrads grads = sequence_grads(grad_loss, grad_losses, grad_logratios, grad_logps, token_logps, S);
  Tensor out = torch::stable::empty_like(token_logps);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    backward<T>(
        layout, options, grads, lengths.const_data_ptr<int32_t>(), *num_pairs.const_data_ptr<int32_t>(),
        coefs.const_data_ptr<T>(), out.mutable_data_ptr<T>());
  };
  token_logps.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dil_kernels, CPU, m) {
  m.impl("density_ratio_fwd", TORCH_BOX(&density_ratio_fwd));
  m.impl("density_ratio_bwd", TORCH_BOX(&density_ratio_bwd));
}

}  // namespace dil
