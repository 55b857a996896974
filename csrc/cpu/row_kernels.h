// One row of logits at a time: its log-sum-exp, and its gradient. One table of function pointers per instruction set.
#pragma once

#include <cstdint>

namespace dil {

// log sum_v exp(x_v / temperature) as max / temperature + log_sum, kept apart so that nothing is rounded at the size of the
// logits.
struct LogSumExp {
  double max;      // of the logits, unscaled
  double log_sum;  // log sum_v exp((x_v - max) / temperature)
};

// For one dtype of logits.
struct RowKernel {
  LogSumExp (*lse)(const void* x, int64_t V, float inv_temperature);
  // dx = -g softmax(x / temperature); dx may be x.
  void (*grad)(void* dx, const void* x, int64_t V, float g, float max, float log_sum, float inv_temperature);
};

struct RowKernels {
  const char* name;
  RowKernel f32, bf16, f16;
};

extern const RowKernels kRowKernelsBaseline;
#if defined(__x86_64__)
extern const RowKernels kRowKernelsAvx2;
extern const RowKernels kRowKernelsAvx512;
#endif

}  // namespace dil
