// Token log-probabilities on the CPU. Scored rows are shared out among torch's threads; ignored rows are never read.
#include <cmath>
#include <cstring>
#include <vector>

#include "../checks.h"
#include "dispatch.h"
#include "grain.h"
#include "huge_pages.h"

namespace dil {
namespace {

// Rows (b, t) of logits [B, T, V] with a label, and those without one.
struct Rows {
  struct Row {
    int64_t b, t, label;
  };
  std::vector<Row> scored, ignored;
};

// Label V stands for an entry that another shard of the vocabulary has; only a backward takes it.
Rows list_rows(const Tensor& logits, const Tensor& labels, int64_t ignore_index, bool shift, bool shards = false) {
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
          label >= 0 && label < V + shards, "labels must be in [0, ", V, ") or ignore_index=", ignore_index, ", got ", label,
          " at [", b, ", ", t + shift, "]");
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
  static RowSums sums(const void* x, int64_t V, int64_t label, const Processing& processing, bool statistics) {
    return (row_kernels().*kernel).sums(x, V, label, processing, statistics);
  }
  static void grad(void* dx, const void* x, int64_t V, const RowGradient& row, const Processing& processing, bool streaming) {
    (row_kernels().*kernel).grad(dx, x, V, row, processing, streaming);
  }
};
using F32 = Vectorised<float, &RowKernels::f32>;
using BF16 = Vectorised<torch::headeronly::BFloat16, &RowKernels::bf16>;
using F16 = Vectorised<torch::headeronly::Half, &RowKernels::f16>;

struct F64 {
  using Value = double;
  using Acc = double;
  static double value(double x, const Processing& processing) {
    return processing.inv_cap != 0.0 ? std::tanh(x * processing.inv_cap) : x;
  }
  static RowSums sums(const double* x, int64_t V, int64_t label, const Processing& processing, bool) {
    RowSums r{};
    r.target = value(x[label], processing);
    r.max = -INFINITY;
    for (int64_t v = 0; v < V; ++v) r.max = x[v] > r.max ? x[v] : r.max;
    r.top1_hit = x[label] >= r.max;
    r.max = value(r.max, processing);
    const double reference = r.max == -INFINITY ? 0.0 : r.max;
    for (int64_t v = 0; v < V; ++v) {
      if (v == label) continue;
      const double capped = value(x[v], processing), d = (capped - reference) * processing.multiplier, e = std::exp(d);
      r.rest += e;
      r.weighted += e == 0.0 ? 0.0 : e * d;
      r.total += capped * kTotalScale;
    }
    return r;
  }
  static void grad(double* dx, const double* x, int64_t V, const RowGradient& row, const Processing& processing, bool) {
    const double g = row.g * processing.grad_factor;
    for (int64_t v = 0; v < V; ++v) {
      const double capped = value(x[v], processing), logp = (capped - row.max) * processing.multiplier - row.log_sum;
      const double slope = processing.inv_cap != 0.0 ? tanh_slope(x[v] * processing.inv_cap) : 1.0;
      dx[v] = -g * slope * (v == row.label ? std::expm1(logp) : std::exp(logp));
    }
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

Processing processing_of(double softcapping, double temperature) {
  if (softcapping == 0.0) return {1.0 / temperature, 0.0, 1.0 / temperature};
  return {softcapping / temperature, 1.0 / softcapping, 1.0 / temperature};
}

struct RowResult {
  double logp, log_sum, mean_logit, entropy;
  bool top1_hit;
};

RowResult finish(const RowSums& r, int64_t V, double multiplier) {
  const double d = (r.target - r.max) * multiplier, own = std::exp(d);
  const double log_sum = r.target == r.max ? std::log1p(r.rest) : std::log(r.rest + own);
  // Values first lose the maximum, then the small log-sum: nothing is rounded at the size of the logits.
  const double logp = d - log_sum;
  // Both parts are positive, so that an entropy near 0 is exact too.
  const double entropy = log_sum - (r.weighted + (own == 0.0 ? 0.0 : own * d)) / (r.rest + own);
  const double mean = (r.total + r.target * kTotalScale) / static_cast<double>(V) / kTotalScale;
  return {logp, log_sum, mean * multiplier, entropy, r.top1_hit && logp == logp};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> logps_fwd(
    const Tensor& given_logits, const Tensor& labels, int64_t ignore_index, bool shift, double softcapping, double temperature,
    bool want_statistics) {
  const Rows rows = list_rows(given_logits, labels, ignore_index, shift);
  const Tensor logits = rows_contiguous(given_logits);
  const int64_t B = logits.size(0), V = logits.size(2), T_out = logits.size(1) - shift;
  const auto dtype = logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor logps = torch::stable::new_zeros(logits, {B, T_out}, dtype);
  Tensor row_max = torch::stable::new_zeros(logits, {B, T_out}, dtype);
  Tensor log_sum = torch::stable::new_zeros(logits, {B, T_out}, dtype);
  Tensor statistics =
      want_statistics ? torch::stable::new_zeros(logits, {3, B, T_out}, dtype) : torch::stable::new_zeros(logits, {0}, dtype);
  const Processing processing = processing_of(softcapping, temperature);
  dispatch(logits, [&](auto kind) {
    using K = decltype(kind);
    using Value = typename K::Value;
    using Acc = typename K::Acc;
    const Value* x = static_cast<const Value*>(logits.const_data_ptr());
    const int64_t stride_b = logits.stride(0), stride_t = logits.stride(1), N = B * T_out;
    Acc* logps_out = logps.mutable_data_ptr<Acc>();
    Acc* max_out = row_max.mutable_data_ptr<Acc>();
    Acc* log_sum_out = log_sum.mutable_data_ptr<Acc>();
    Acc* statistics_out = statistics.mutable_data_ptr<Acc>();
    torch::stable::parallel_for(0, static_cast<int64_t>(rows.scored.size()), grain(V), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const auto [b, t, label] = rows.scored[i];
        const int64_t out = b * T_out + t;
        const RowSums sums = K::sums(x + b * stride_b + t * stride_t, V, label, processing, want_statistics);
        const RowResult r = finish(sums, V, processing.multiplier);
        logps_out[out] = static_cast<Acc>(r.logp);
        max_out[out] = static_cast<Acc>(sums.max);
        log_sum_out[out] = static_cast<Acc>(r.log_sum);
        if (want_statistics) {
          statistics_out[out] = static_cast<Acc>(r.mean_logit);
          statistics_out[N + out] = static_cast<Acc>(r.entropy);
          statistics_out[2 * N + out] = r.top1_hit;
        }
      }
    });
  });
  return {logps, row_max, log_sum, statistics};
}

void run_backward(
    const Tensor& grad_logps, const Tensor& logits, const Tensor& labels, const Tensor& row_max, const Tensor& log_sum,
    int64_t ignore_index, bool shift, double softcapping, double temperature, const Tensor& grad_logits, bool streaming) {
  const Rows rows = list_rows(logits, labels, ignore_index, shift, /*shards=*/true);
  const int64_t V = logits.size(2), T_out = logits.size(1) - shift;
  STD_TORCH_CHECK(
      grad_logps.dim() == 2 && grad_logps.size(0) == logits.size(0) && grad_logps.size(1) == T_out &&
          grad_logps.scalar_type() == row_max.scalar_type() && row_max.is_contiguous() &&
          row_max.numel() == logits.size(0) * T_out && log_sum.is_contiguous() && log_sum.numel() == row_max.numel() &&
          log_sum.scalar_type() == row_max.scalar_type(),
      "grad_logps, row_max and log_sum must match the log-probs");
  const Processing processing = processing_of(softcapping, temperature);
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
    torch::stable::parallel_for(0, static_cast<int64_t>(rows.scored.size()), grain(V), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const auto [b, t, label] = rows.scored[i];
        const int64_t saved = b * T_out + t;
        const RowGradient row{label, g_in[b * g_b + t * g_t], max_in[saved], log_sum_in[saved]};
        K::grad(dx + b * dx_b + t * dx_t, x + b * x_b + t * x_t, V, row, processing, streaming);
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

// A gradient of this size outgrows the caches before it is read; writing past them saves reading what is overwritten.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

Tensor logps_bwd(
    const Tensor& grad_logps, const Tensor& given_logits, const Tensor& labels, const Tensor& row_max, const Tensor& log_sum,
    int64_t ignore_index, bool shift, double softcapping, double temperature) {
  const Tensor logits = rows_contiguous(given_logits);
  Tensor grad_logits = torch::stable::new_empty(logits, {logits.size(0), logits.size(1), logits.size(2)});
  const int64_t bytes = grad_logits.numel() * grad_logits.element_size();
  advise_huge_pages(grad_logits.mutable_data_ptr(), bytes);
  run_backward(
      grad_logps, logits, labels, row_max, log_sum, ignore_index, shift, softcapping, temperature, grad_logits,
      bytes >= kStreamBytes);
  return grad_logits;
}

void logps_bwd_(
    const Tensor& grad_logps, const Tensor& logits, const Tensor& labels, const Tensor& row_max, const Tensor& log_sum,
    int64_t ignore_index, bool shift, double softcapping, double temperature) {
  STD_TORCH_CHECK(
      logits.dim() == 3 && (logits.stride(2) == 1 || logits.size(2) == 1) && (logits.stride(0) != 0 || logits.size(0) <= 1) &&
          (logits.stride(1) != 0 || logits.size(1) <= 1),
      "an in-place backward needs logits [B, T, V] with a contiguous vocabulary and no expanded dimension");
  run_backward(grad_logps, logits, labels, row_max, log_sum, ignore_index, shift, softcapping, temperature, logits, false);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dil_kernels, CPU, m) {
  m.impl("logps_fwd", TORCH_BOX(&logps_fwd));
  m.impl("logps_bwd", TORCH_BOX(&logps_bwd));
  m.impl("logps_bwd_", TORCH_BOX(&logps_bwd_));
}

}  // namespace dil
