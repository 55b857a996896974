// Argument checks that every implementation of an op shares. The Python layer checks first and names things better; these
// keep memory safe for whoever calls the ops directly.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "density_ratio.h"

namespace dil {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Divergence divergence_by_name(const std::string& name) {
#define DIL_NAME(D) \
  if (name == D::name) return Divergence::D;
  DIL_DIVERGENCES(DIL_NAME)
#undef DIL_NAME
  if (name == "none") return Divergence::None;
  STD_TORCH_CHECK(false, "loss_type ", name, " is not compiled");
}

inline Link link_by_name(const std::string& name) {
  if (name == "imitation") return Link::Imitation;
  if (name == "ratio") return Link::Ratio;
  STD_TORCH_CHECK(name == "f_dpo", "link ", name, " is not known");
  return Link::FDpo;
}

inline void check_same_device(const Tensor& one, const Tensor& other, const char* what) {
  STD_TORCH_CHECK(
      one.is_cuda() == other.is_cuda() && one.get_device_index() == other.get_device_index(), what, " are on another device");
}

inline SequenceLayout sequence_layout(
    const Tensor& token_logps, const std::optional<Tensor>& labels, const std::optional<Tensor>& cu_seqlens,
    const std::optional<Tensor>& is_chosen, int64_t ignore_index, bool shift) {
  const int64_t ndim = cu_seqlens ? 1 : 2;
  STD_TORCH_CHECK(token_logps.dim() == ndim, "token_logps must have ", ndim, " dimension(s), got ", token_logps.dim());
  STD_TORCH_CHECK(token_logps.is_contiguous(), "token_logps must be contiguous");
  const auto dtype = token_logps.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "token_logps must be fp32 or fp64");
  SequenceLayout layout{};
  layout.num_values = token_logps.size(ndim - 1);
  layout.num_sequences = cu_seqlens ? cu_seqlens->numel() - 1 : token_logps.size(0);
  layout.ignore_index = ignore_index;
  layout.shift = labels && shift ? 1 : 0;
  if (labels) {
    check_same_device(token_logps, *labels, "labels");
    STD_TORCH_CHECK(labels->scalar_type() == ScalarType::Long, "labels must be int64");
    STD_TORCH_CHECK(
        labels->dim() == ndim && labels->size(ndim - 1) == layout.num_values + layout.shift &&
            (cu_seqlens || labels->size(0) == layout.num_sequences),
        "labels do not match token_logps");
    layout.labels = labels->const_data_ptr<int64_t>();
    layout.label_stride_s = cu_seqlens ? 0 : labels->stride(0);
    layout.label_stride_t = labels->stride(ndim - 1);
  }
  if (cu_seqlens) {
    check_same_device(token_logps, *cu_seqlens, "cu_seqlens");
    STD_TORCH_CHECK(
        cu_seqlens->scalar_type() == ScalarType::Int && cu_seqlens->dim() == 1 && cu_seqlens->numel() >= 2 &&
            cu_seqlens->is_contiguous(),
        "cu_seqlens must be a contiguous int32 [S + 1]");
    layout.cu_seqlens = cu_seqlens->const_data_ptr<int32_t>();
  }
  if (is_chosen) {
    check_same_device(token_logps, *is_chosen, "is_chosen");
    STD_TORCH_CHECK(
        is_chosen->scalar_type() == ScalarType::Bool && is_chosen->dim() == 1 && is_chosen->size(0) == layout.num_sequences &&
            is_chosen->is_contiguous(),
        "is_chosen must be a contiguous bool [", layout.num_sequences, "]");
    layout.is_chosen = is_chosen->const_data_ptr<bool>();
    return layout;
  }
  STD_TORCH_CHECK(layout.num_sequences % 2 == 0, "pairs need an even number of sequences, got ", layout.num_sequences);
  return layout;
}

inline LossOptions loss_options(
    const std::string& loss_type, const LossParameters& parameters, bool average, bool interleaved, bool mean,
    const SequenceLayout& layout) {
  const Divergence divergence = divergence_by_name(loss_type);
  STD_TORCH_CHECK(!layout.is_chosen || is_separable(divergence), "loss_type ", loss_type, " needs pairs");
  STD_TORCH_CHECK(!layout.is_chosen || parameters.link == Link::Imitation, "only the imitation link does without pairs");
  return {divergence, parameters, average, interleaved, mean};
}

inline void check_reference(
    const Tensor& token_logps, const std::optional<Tensor>& ref_token_logps, const std::optional<Tensor>& ref_logps,
    const SequenceLayout& layout) {
  STD_TORCH_CHECK(ref_token_logps.has_value() != ref_logps.has_value(), "give one of ref_token_logps and ref_logps");
  const Tensor& ref = ref_logps ? *ref_logps : *ref_token_logps;
  const auto dtype = ref_logps ? ScalarType::Double : token_logps.scalar_type();
  const int64_t numel = ref_logps ? layout.num_sequences : token_logps.numel();
  check_same_device(token_logps, ref, "the reference log-probs");
  STD_TORCH_CHECK(
      ref.scalar_type() == dtype && ref.numel() == numel && ref.is_contiguous(),
      "ref_logps must be contiguous fp64 [S]; ref_token_logps contiguous, of the dtype and shape of token_logps");
}

struct DensityRatioOutputs {
  Tensor loss, losses, logratios, logps, lengths, counts, coefs;

  DensityRatioOutputs(const Tensor& like, const SequenceLayout& layout)
      : loss(torch::stable::new_empty(like, {})),
        losses(torch::stable::new_empty(like, {layout.num_items()})),
        logratios(torch::stable::new_empty(like, {layout.num_sequences})),
        logps(torch::stable::new_empty(like, {layout.num_sequences})),
        lengths(torch::stable::new_empty(like, {layout.num_sequences}, ScalarType::Int)),
        counts(torch::stable::new_empty(like, {2}, ScalarType::Int)),
        coefs(torch::stable::new_empty(like, {layout.num_sequences})) {}

  template <class T>
  ForwardPointers<T> pointers(
      const Tensor& token_logps, const std::optional<Tensor>& ref_token_logps, const std::optional<Tensor>& ref_logps) const {
    return {
        token_logps.const_data_ptr<T>(),
        ref_token_logps ? ref_token_logps->const_data_ptr<T>() : nullptr,
        ref_logps ? ref_logps->const_data_ptr<double>() : nullptr,
        loss.mutable_data_ptr<T>(),
        losses.mutable_data_ptr<T>(),
        logratios.mutable_data_ptr<T>(),
        logps.mutable_data_ptr<T>(),
        coefs.mutable_data_ptr<T>(),
        lengths.mutable_data_ptr<int32_t>(),
        counts.mutable_data_ptr<int32_t>()};
  }

  using Tuple = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
  Tuple tuple() && {
    return {std::move(loss),    std::move(losses), std::move(logratios), std::move(logps),
            std::move(lengths), std::move(counts), std::move(coefs)};
  }
};

// What the forward handed to the backward.
inline void check_saved(
    const Tensor& token_logps, const Tensor& lengths, const Tensor& counts, const Tensor& coefs, int64_t S) {
  STD_TORCH_CHECK(
      lengths.scalar_type() == ScalarType::Int && lengths.numel() == S && lengths.is_contiguous() &&
          counts.scalar_type() == ScalarType::Int && counts.numel() == 2 && counts.is_contiguous() &&
          coefs.scalar_type() == token_logps.scalar_type() && coefs.numel() == S && coefs.is_contiguous(),
      "lengths, counts and coefs must be those of the forward");
  for (const Tensor* saved : {&lengths, &counts, &coefs}) check_same_device(token_logps, *saved, "saved tensors");
}

inline const void* grad_ptr(const std::optional<Tensor>& grad, const Tensor& like, int64_t numel) {
  if (!grad) return nullptr;
  check_same_device(like, *grad, "upstream gradients");
  STD_TORCH_CHECK(
      grad->scalar_type() == like.scalar_type() && grad->numel() == numel && grad->is_contiguous(),
      "upstream gradients must be contiguous, of the dtype of token_logps, and match the outputs in shape");
  return grad->const_data_ptr();
}

inline SequenceGrads sequence_grads(
    const std::optional<Tensor>& loss, const std::optional<Tensor>& losses, const std::optional<Tensor>& logratios,
    const std::optional<Tensor>& logps, const Tensor& token_logps, const SequenceLayout& layout) {
  return {
      grad_ptr(loss, token_logps, 1), grad_ptr(losses, token_logps, layout.num_items()),
      grad_ptr(logratios, token_logps, layout.num_sequences), grad_ptr(logps, token_logps, layout.num_sequences)};
}

}  // namespace dil
