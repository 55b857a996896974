// Token log-probabilities on the CPU. Scored rows are shared out among torch's threads; ignored rows are never read.
#include <cmath>
#include <cstring>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../checks.h"
#include "dispatch.h"
#include "grain.h"

namespace dil {
namespace {

// Rows (b, t) of logits [B, T, V] with a label, and those without one.
struct Rows {
  struct Row {
    int64_t b, t, label;
  };
  std::vector<Row> scored, ignored;
};

Rows list_rows(const Tensor& logits, const Tensor& labels, int64_t ignore_index, bool shift) {
  STD_TORCH_CHECK(logits.dim() == 3, "logits must be [B, T, V], got ", logits.dim(), " dimensions");
  const int64_t B = logits.size(0), T = logits.size(1), V = logits.size(2);
  STD_TORCH_CHECK(
      labels.dim() == 2 && labels.size(0) == B && labels.size(1) == T && labels.scalar_type() == ScalarType::Long,
      "labels must be int64 [", B, ", ", T, "]");
  STD_TORCH_CHECK(V > 0, "logits have an empty vocabulary");
  const int64_t* y = labels.const_data_ptr<int64_t>();
  const int64_t stride_b = labels.stride(0), stride_t = labels.stride(1);
  Rows rows;
  rows.scored.reserve(B * T);
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t t = 0; t < T; ++t) {
      const bool has_label = t + shift < T;
      const int64_t label = has_label ? y[b * stride_b + (t + shift) * stride_t] : ignore_index;
      if (label == ignore_index) {
        rows.ignored.push_back({b, t, label});
        continue;
      }
      STD_TORCH_CHECK(
          label >= 0 && label < V, "labels must be in [0, ", V, ") or ignore_index=", ignore_index, ", got ", label, " at [", b,
          ", ", t + shift, "]");
      rows.scored.push_back({b, t, label});
    }
  }
  return rows;
}

// What differs by dtype of the logits. Acc is the dtype of log-probs, log-sum-exps and upstream gradients.
template <class T, RowKernel RowKernels::* kernel>
struct Vectorised {
  using Value = T;
  using Acc = float;
  static LogSumExp lse(const void* x, int64_t V, float inv_temperature) {
    return (row_kernels().*kernel).lse(x, V, inv_temperature);
  }
  static void grad(void* dx, const void* x, int64_t V, float g, float max, float log_sum, float inv_temperature) {
    (row_kernels().*kernel).grad(dx, x, V, g, max, log_sum, inv_temperature);
  }
};
using F32 = Vectorised<float, &RowKernels::f32>;
using BF16 = Vectorised<torch::headeronly::BFloat16, &RowKernels::bf16>;
using F16 = Vectorised<torch::headeronly::Half, &RowKernels::f16>;

struct F64 {
  using Value = double;
  using Acc = double;
  static LogSumExp lse(const double* x, int64_t V, double inv_temperature) {
    double max = -INFINITY, sum = 0.0;
    for (int64_t v = 0; v < V; ++v) max = x[v] > max ? x[v] : max;
    const double reference = max == -INFINITY ? 0.0 : max;
    for (int64_t v = 0; v < V; ++v) sum += std::exp((x[v] - reference) * inv_temperature);
    return {max, std::log(sum)};
  }
  static void grad(double* dx, const double* x, int64_t V, double g, double max, double log_sum, double inv_temperature) {
    for (int64_t v = 0; v < V; ++v) dx[v] = -g * std::exp((x[v] - max) * inv_temperature - log_sum);
  }
};

template <class F>
void dispatch(const Tensor& logits, F&& run) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return run(F32{});
    case ScalarType::BFloat16:
      return run(BF16{});
    case ScalarType::Half:
      return run(F16{});
    case ScalarType::Double:
      return run(F64{});
    default:
      STD_TORCH_CHECK(false, "logits must be fp32, bf16, fp16 or fp64");
  }
}

Tensor rows_contiguous(const Tensor& logits) {
  return logits.stride(2) == 1 || logits.size(2) == 1 ? logits : torch::stable::contiguous(logits);
}

std::tuple<Tensor, Tensor, Tensor> logps_fwd(
    const Tensor& given_logits, const Tensor& labels, int64_t ignore_index, bool shift, double temperature) {
  const Rows rows = list_rows(given_logits, labels, ignore_index, shift);
  const Tensor logits = rows_contiguous(given_logits);
  const int64_t V = logits.size(2), T_out = logits.size(1) - shift;
  const auto dtype = logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor logps = torch::stable::new_zeros(logits, {logits.size(0), T_out}, dtype);
  Tensor row_max = torch::stable::new_zeros(logits, {logits.size(0), T_out}, dtype);
  Tensor log_sum = torch::stable::new_zeros(logits, {logits.size(0), T_out}, dtype);
  dispatch(logits, [&](auto kind) {
    using K = decltype(kind);
    using Value = typename K::Value;
    using Acc = typename K::Acc;
    const Value* x = static_cast<const Value*>(logits.const_data_ptr());
    const int64_t stride_b = logits.stride(0), stride_t = logits.stride(1);
    Acc* logps_out = logps.mutable_data_ptr<Acc>();
    Acc* max_out = row_max.mutable_data_ptr<Acc>();
    Acc* log_sum_out = log_sum.mutable_data_ptr<Acc>();
    torch::stable::parallel_for(0, static_cast<int64_t>(rows.scored.size()), grain(V), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const auto [b, t, label] = rows.scored[i];
        const Value* row = x + b * stride_b + t * stride_t;
        const LogSumExp r = K::lse(row, V, static_cast<Acc>(1.0 / temperature));
        // Targets first lose the maximum, then the small log-sum: nothing is rounded at the size of the logits.
        const double target = static_cast<double>(static_cast<Acc>(row[label]));
        logps_out[b * T_out + t] = static_cast<Acc>((target - r.max) / temperature - r.log_sum);
        max_out[b * T_out + t] = static_cast<Acc>(r.max);
        log_sum_out[b * T_out + t] = static_cast<Acc>(r.log_sum);
      }
    });
  });
  return {logps, row_max, log_sum};
}

void run_backward(
    const Tensor& grad_logps, const Tensor& logits, const Tensor& labels, const Tensor& row_max, const Tensor& log_sum,
    int64_t ignore_index, bool shift, double temperature, const Tensor& grad_logits) {
  const Rows rows = list_rows(logits, labels, ignore_index, shift);
  const int64_t V = logits.size(2), T_out = logits.size(1) - shift;
  STD_TORCH_CHECK(
      grad_logps.dim() == 2 && grad_logps.size(0) == logits.size(0) && grad_logps.size(1) == T_out &&
          grad_logps.scalar_type() == row_max.scalar_type() && row_max.is_contiguous() &&
          row_max.numel() == logits.size(0) * T_out && log_sum.is_contiguous() && log_sum.numel() == row_max.numel() &&
          log_sum.scalar_type() == row_max.scalar_type(),
      "grad_logps, row_max and log_sum must match the log-probs");
  dispatch(logits, [&](auto kind) {
    using K = decltype(kind);
    using Value = typename K::Value;
    using Acc = typename K::Acc;
    const Value* x = static_cast<const Value*>(logits.const_data_ptr());
    Value* dx = static_cast<Value*>(grad_logits.mutable_data_ptr());
    const Acc* g_in = grad_logps.const_data_ptr<Acc>();
    const Acc* max_in = row_max.const_data_ptr<Acc>();
    const Acc* log_sum_in = log_sum.const_data_ptr<Acc>();
    const int64_t x_b = logits.stride(0), x_t = logits.stride(1);
    const int64_t dx_b = grad_logits.stride(0), dx_t = grad_logits.stride(1);
    const int64_t g_b = grad_logps.stride(0), g_t = grad_logps.stride(1);
    const Acc inv_temperature = static_cast<Acc>(1.0 / temperature);
    torch::stable::parallel_for(0, static_cast<int64_t>(rows.scored.size()), grain(V), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const auto [b, t, label] = rows.scored[i];
        const Value* row = x + b * x_b + t * x_t;
        const Acc g = g_in[b * g_b + t * g_t] * inv_temperature;
        const Acc max = max_in[b * T_out + t], log_sum = log_sum_in[b * T_out + t];
        // 1 - p without cancellation where p is near 1; taken before the row is overwritten.
        const Acc logp = (static_cast<Acc>(row[label]) - max) * inv_temperature - log_sum;
        const Acc label_grad = -g * std::expm1(logp);
        K::grad(dx + b * dx_b + t * dx_t, row, V, g, max, log_sum, inv_temperature);
        dx[b * dx_b + t * dx_t + label] = static_cast<Value>(label_grad);
      }
    });
    torch::stable::parallel_for(0, static_cast<int64_t>(rows.ignored.size()), grain(V), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const auto [b, t, label] = rows.ignored[i];
        std::memset(static_cast<void*>(dx + b * dx_b + t * dx_t), 0, V * sizeof(Value));
      }
    });
  });
}

// A fresh buffer of this size is fresh pages, and faulting them in one small page at a time costs several times the kernel.
void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // only advice: a refusal is fine
#endif
}

Tensor logps_bwd(
    const Tensor& grad_logps, const Tensor& given_logits, const Tensor& labels, const Tensor& row_max, const Tensor& log_sum,
    int64_t ignore_index, bool shift, double temperature) {
  const Tensor logits = rows_contiguous(given_logits);
  Tensor grad_logits = torch::stable::new_empty(logits, {logits.size(0), logits.size(1), logits.size(2)});
  dispatch(logits, [&](auto kind) {
    advise_huge_pages(grad_logits.mutable_data_ptr(), grad_logits.numel() * sizeof(typename decltype(kind)::Value));
  });
  run_backward(grad_logps, logits, labels, row_max, log_sum, ignore_index, shift, temperature, grad_logits);
  return grad_logits;
}

void logps_bwd_(
    const Tensor& grad_logps, const Tensor& logits, const Tensor& labels, const Tensor& row_max, const Tensor& log_sum,
    int64_t ignore_index, bool shift, double temperature) {
  STD_TORCH_CHECK(
      logits.dim() == 3 && (logits.stride(2) == 1 || logits.size(2) == 1) && (logits.stride(0) != 0 || logits.size(0) <= 1) &&
          (logits.stride(1) != 0 || logits.size(1) <= 1),
      "an in-place backward needs logits [B, T, V] with a contiguous vocabulary and no expanded dimension");
  run_backward(grad_logps, logits, labels, row_max, log_sum, ignore_index, shift, temperature, logits);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dil_kernels, CPU, m) {
  m.impl("cpp_logps_fwd", TORCH_BOX(&logps_fwd));
  m.impl("cpp_logps_bwd", TORCH_BOX(&logps_bwd));
  m.impl("cpp_logps_bwd_", TORCH_BOX(&logps_bwd_));
}

}  // namespace dil
