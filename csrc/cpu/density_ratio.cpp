// Density-ratio loss on the CPU: sequences are summed in parallel, their losses follow.
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
void forward(const SequenceLayout& layout, const LossOptions& options, const ForwardPointers<T>& p) {
  std::vector<SequenceSums> sums(layout.num_sequences);
  torch::stable::parallel_for(
      0, layout.num_sequences, grain(token_logps_per_sequence(layout)), [&](int64_t first, int64_t last) {
        for (int64_t s = first; s < last; ++s) sums[s] = sum_sequence(layout, s, p.token_logps, p.ref_token_logps);
      });
  Total totals[2];
  for (int64_t item = 0; item < layout.num_items(); ++item) {
    SequenceSums of_item[2];
    bool counted = true;
    for (int64_t k = 0; k < layout.sequences_per_item(); ++k) {
      of_item[k] = sums[layout.sequence(item, k, options.interleaved)];
      counted = counted && of_item[k].length > 0;
    }
    totals[layout.side(item)].add(write_item(layout, options, p, item, of_item, true), counted);
  }
  *p.loss = static_cast<T>(total_loss(totals, options.mean));
  p.counts[0] = static_cast<int32_t>(totals[0].count);
  p.counts[1] = static_cast<int32_t>(totals[layout.is_chosen ? 1 : 0].count);
}

DensityRatioOutputs::Tuple density_ratio_fwd(
    const Tensor& token_logps, const std::optional<Tensor>& labels, const std::optional<Tensor>& cu_seqlens,
    const std::optional<Tensor>& ref_token_logps, const std::optional<Tensor>& ref_logps,
    const std::optional<Tensor>& is_chosen, const std::string& loss_type, double beta, double power, double label_smoothing,
    double alpha, double max_log_ratio, double chosen_weight, double rejected_weight, double chosen_offset,
    double rejected_offset, double scale, const std::string& link, bool average, bool interleaved, bool mean,
    int64_t ignore_index, bool shift) {
  const SequenceLayout layout = sequence_layout(token_logps, labels, cu_seqlens, is_chosen, ignore_index, shift);
  check_reference(token_logps, ref_token_logps, ref_logps, layout);
  check_boundaries(layout);
  const LossOptions options = loss_options(
      loss_type,
      {beta, power, label_smoothing, alpha, max_log_ratio, chosen_weight, rejected_weight, chosen_offset, rejected_offset,
       scale, link_by_name(link)},
      average, interleaved, mean, layout);
  DensityRatioOutputs out(token_logps, layout);
  const auto run = [&](auto zero) {
    forward(layout, options, out.pointers<decltype(zero)>(token_logps, ref_token_logps, ref_logps));
  };
  token_logps.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return std::move(out).tuple();
}

template <class T>
void backward(
    const SequenceLayout& layout, const LossOptions& options, const SequenceGrads& grads, const int32_t* lengths,
    const int32_t* counts, const T* coefs, T* grad_token_logps) {
  torch::stable::parallel_for(
      0, layout.num_sequences, grain(token_logps_per_sequence(layout)), [&](int64_t first, int64_t last) {
        for (int64_t s = first; s < last; ++s) {
          const T g = static_cast<T>(token_grad<T>(layout, options, grads, s, coefs[s], lengths[s], counts));
          for (int64_t i = layout.begin(s); i < layout.end(s); ++i) grad_token_logps[i] = layout.scored(s, i) ? g : T{0};
        }
      });
}

Tensor density_ratio_bwd(
    const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_losses,
    const std::optional<Tensor>& grad_logratios, const std::optional<Tensor>& grad_logps, const Tensor& token_logps,
    const std::optional<Tensor>& labels, const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& is_chosen,
    const Tensor& lengths, const Tensor& counts, const Tensor& coefs, bool average, bool interleaved, bool mean,
    int64_t ignore_index, bool shift) {
  const SequenceLayout layout = sequence_layout(token_logps, labels, cu_seqlens, is_chosen, ignore_index, shift);
  check_boundaries(layout);
  check_saved(token_logps, lengths, counts, coefs, layout.num_sequences);
  const LossOptions options{Divergence::None, {}, average, interleaved, mean};
  const SequenceGrads grads = sequence_grads(grad_loss, grad_losses, grad_logratios, grad_logps, token_logps, layout);
  Tensor out = torch::stable::empty_like(token_logps);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    backward<T>(
        layout, options, grads, lengths.const_data_ptr<int32_t>(), counts.const_data_ptr<int32_t>(), coefs.const_data_ptr<T>(),
        out.mutable_data_ptr<T>());
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
