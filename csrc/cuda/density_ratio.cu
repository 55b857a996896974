// Density-ratio loss on CUDA: one launch forward, one backward, no host sync, no float atomics, capturable in a CUDA graph.
#include <cuda_runtime.h>

#include "../checks.h"
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>

namespace dil {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Sum over the block in a fixed order; the result is in every thread.
__device__ double block_sum(double x) {
  __shared__ double partial[kWarps];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  __syncthreads();  // whoever read the last sum is done
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0.0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += partial[w];
  return sum;
}

// Boundaries cannot be checked on the host without a sync; here, bad ones make every output NaN.
__device__ bool boundaries_valid(const SequenceLayout& layout) {
  if (!layout.cu_seqlens) return true;
  bool valid = true;
  for (int64_t s = threadIdx.x; s < layout.num_sequences; s += kThreads) valid &= layout.valid(s);
  return __syncthreads_and(valid);
}

template <class T>
__device__ SequenceSums sum_sequence(const SequenceLayout& layout, int64_t s, const T* token_logps, const T* ref_token_logps) {
  double logps = 0.0, logratio = 0.0, length = 0.0;
  const int64_t end = layout.end(s);
  for (int64_t i = layout.begin(s) + threadIdx.x; i < end; i += kThreads) {
    if (!layout.scored(s, i)) continue;
    const double logp = token_logps[i];
    logps += logp;
    if (ref_token_logps) logratio += logp - static_cast<double>(ref_token_logps[i]);
    length += 1.0;
  }
  SequenceSums sums;
  sums.logps = block_sum(logps);
  sums.logratio = ref_token_logps ? block_sum(logratio) : 0.0;
  sums.length = static_cast<int64_t>(block_sum(length));
  return sums;
}

// One block an item. The block that finishes last reduces the losses, in a fixed order. counts[0] is 0 at launch: it counts
// finished blocks until the result is written there.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    density_ratio_fwd_kernel(const SequenceLayout layout, const LossOptions options, const ForwardPointers<T> p) {
  const int64_t items = layout.num_items(), item = blockIdx.x;
  const bool valid = boundaries_valid(layout);
  // Arrays are indexed by constants only, here and below: they stay in registers. Writing takes thread 0 a frame of 48 bytes.
  const auto sum = [&](int64_t k) {
    if (!valid || k >= layout.sequences_per_item()) return SequenceSums{};
    return sum_sequence(layout, layout.sequence(item, k, options.interleaved), p.token_logps, p.ref_token_logps);
  };
  const SequenceSums sums[2] = {sum(0), sum(1)};
  __shared__ bool last;
  if (threadIdx.x == 0) {
    write_item(layout, options, p, item, sums, valid);
    __threadfence();
    last = atomicAdd(reinterpret_cast<unsigned*>(p.counts), 1u) == items - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  Total totals[2];
  for (int64_t i = threadIdx.x; i < items; i += kThreads) {
    bool counted = true;
    for (int64_t k = 0; k < layout.sequences_per_item(); ++k) {
      counted = counted && __ldcg(p.lengths + layout.sequence(i, k, options.interleaved)) > 0;
    }
    const double loss = static_cast<double>(__ldcg(p.losses + i));
#pragma unroll
    for (int64_t side = 0; side < 2; ++side) {
      if (layout.side(i) == side) totals[side].add(loss, counted);
    }
  }
#pragma unroll
  for (int64_t side = 0; side < 2; ++side) {
    totals[side].positive = block_sum(totals[side].positive);
    totals[side].rest = block_sum(totals[side].rest);
    totals[side].count = block_sum(totals[side].count);
  }
  if (threadIdx.x == 0) {
    *p.loss = static_cast<T>(total_loss(totals, options.mean));
    p.counts[0] = static_cast<int32_t>(totals[0].count);
    p.counts[1] = static_cast<int32_t>(layout.is_chosen ? totals[1].count : totals[0].count);
  }
}

// Last s with cu_seqlens[s] <= i; the caller's values are NaN where the boundaries are invalid, so any s in range will do then.
__device__ int64_t segment_of(const SequenceLayout& layout, int64_t i) {
  int64_t low = 0, high = layout.num_sequences;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (layout.cu_seqlens[middle] <= i ? low : high) = middle;
  }
  return low;
}

template <class T>
__global__ void __launch_bounds__(kThreads) density_ratio_bwd_kernel(
    const SequenceLayout layout, const LossOptions options, const SequenceGrads grads, const int32_t* lengths,
    const int32_t* counts, const T* coefs, T* grad_token_logps, int64_t numel) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= numel) return;
  const int64_t s = layout.cu_seqlens ? segment_of(layout, i) : i / layout.num_values;
  const T g = static_cast<T>(token_grad<T>(layout, options, grads, s, coefs[s], lengths[s], counts));
  grad_token_logps[i] = layout.scored(s, i) ? g : T{0};
}

template <class... P, class... A>
void launch(void (*kernel)(P...), int64_t blocks, cudaStream_t stream, A... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...));
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

template <class T>
void launch_fwd(
    const SequenceLayout& layout, const LossOptions& options, const Tensor& token_logps,
    const std::optional<Tensor>& ref_token_logps, const std::optional<Tensor>& ref_logps, const DensityRatioOutputs& out) {
  const ForwardPointers<T> pointers = out.pointers<T>(token_logps, ref_token_logps, ref_logps);
  const cudaStream_t stream = current_stream(token_logps);
  STD_CUDA_CHECK(cudaMemsetAsync(pointers.counts, 0, 2 * sizeof(int32_t), stream));
  if (layout.num_items() == 0) {
    STD_CUDA_CHECK(cudaMemsetAsync(pointers.loss, 0, sizeof(T), stream));
    return;
  }
  launch(density_ratio_fwd_kernel<T>, layout.num_items(), stream, layout, options, pointers);
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
  const LossOptions options = loss_options(
      loss_type,
      {beta, power, label_smoothing, alpha, max_log_ratio, chosen_weight, rejected_weight, chosen_offset, rejected_offset,
       scale, link_by_name(link)},
      average, interleaved, mean, layout);
  const torch::stable::accelerator::DeviceGuard guard(token_logps.get_device_index());
  DensityRatioOutputs out(token_logps, layout);
  const auto run = token_logps.scalar_type() == ScalarType::Double ? launch_fwd<double> : launch_fwd<float>;
  run(layout, options, token_logps, ref_token_logps, ref_logps, out);
  return std::move(out).tuple();
}

template <class T>
void launch_bwd(
    const SequenceLayout& layout, const LossOptions& options, const SequenceGrads& grads, const Tensor& lengths,
    const Tensor& counts, const Tensor& coefs, const Tensor& out) {
  const int64_t numel = out.numel();
  if (numel == 0) return;
  launch(
      density_ratio_bwd_kernel<T>, (numel + kThreads - 1) / kThreads, current_stream(out), layout, options, grads,
      lengths.const_data_ptr<int32_t>(), counts.const_data_ptr<int32_t>(), coefs.const_data_ptr<T>(), out.mutable_data_ptr<T>(),
      numel);
}

Tensor density_ratio_bwd(
    const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_losses,
    const std::optional<Tensor>& grad_logratios, const std::optional<Tensor>& grad_logps, const Tensor& token_logps,
    const std::optional<Tensor>& labels, const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& is_chosen,
    const Tensor& lengths, const Tensor& counts, const Tensor& coefs, bool average, bool interleaved, bool mean,
    int64_t ignore_index, bool shift) {
  const SequenceLayout layout = sequence_layout(token_logps, labels, cu_seqlens, is_chosen, ignore_index, shift);
  check_saved(token_logps, lengths, counts, coefs, layout.num_sequences);
  const LossOptions options{Divergence::None, {}, average, interleaved, mean};
  const SequenceGrads grads = sequence_grads(grad_loss, grad_losses, grad_logratios, grad_logps, token_logps, layout);
  const torch::stable::accelerator::DeviceGuard guard(token_logps.get_device_index());
  Tensor out = torch::stable::empty_like(token_logps);
  const auto run = token_logps.scalar_type() == ScalarType::Double ? launch_bwd<double> : launch_bwd<float>;
  run(layout, options, grads, lengths, counts, coefs, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dil_kernels, CUDA, m) {
  m.impl("density_ratio_fwd", TORCH_BOX(&density_ratio_fwd));
  m.impl("density_ratio_bwd", TORCH_BOX(&density_ratio_bwd));
}

}  // namespace dil
