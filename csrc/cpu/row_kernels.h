// One row of logits at a time: the sums behind its log-prob, and its gradient. One table of function pointers per
// instruction set.
#pragma once

#include <cstdint>

namespace dil {

// Sums of logits are kept times this: however large these are, what as many as a vocabulary has add up to is finite.
constexpr double kTotalScale = 0x1p-24;

// What becomes of a logit x: z = multiplier * v with v = x, or v = tanh(inv_cap * x) under softcapping.
struct Processing {
  double multiplier;   // 1 / temperature, or cap / temperature
  double inv_cap;      // 0: no softcapping
  double grad_factor;  // 1 / temperature: dz/dx, apart from tanh' under softcapping
};

// Sums over a row without its label, whose term comes last: where the label dominates, the others keep their precision.
struct RowSums {
  double target;          // v of the label
  double max;             // of v over the whole row
  double rest = 0.0;      // sum of e^d, d = multiplier * (v - max)
  double weighted = 0.0;  // sum of d e^d, where d is finite; only if asked for
  double total = 0.0;     // kTotalScale times the sum of v; only if asked for
  bool top1_hit = false;  // whether no x is larger than the label's: tanh may round different ones to the same v; likewise
};

// What the gradient of a row g d logp / dx is made from.
struct RowGradient {
  int64_t label;  // V if it is none of the row
  double g, max, log_sum;
};

// For one dtype of logits.
struct RowKernel {
  RowSums (*sums)(const void* x, int64_t V, int64_t label, const Processing& processing, bool statistics);
  // dx may be x. `streaming` writes past the caches.
  void (*grad)(void* dx, const void* x, int64_t V, const RowGradient& row, const Processing& processing, bool streaming);
};

struct RowKernels {
  const char* name;
  RowKernel f32, bf16, f16;
};

extern const RowKernels kRowKernelsBaseline;
#if defined(__x86_64__)
extern const RowKernels kRowKernelsAvx2;
extern const RowKernels kRowKernelsAvx512, kRowKernelsAvx512Bf16;
#endif

}  // namespace dil
