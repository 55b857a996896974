// One row of a tile of logits from the language-model head: its share of the row's log-sum-exp, and its unscaled gradient.
#pragma once

#include <cstdint>

#include "row_kernels.h"

namespace dil {

// What becomes of the head's product x: z = softcap tanh(logit_scale (x + bias) / softcap), softmax over z / temperature.
struct HeadOptions {
  double logit_scale;
  double softcap;  // 0: none
  double inv_temperature;
  double slack;  // the reference is renewed where another entry than the label exceeds it by more than this
  bool statistics;
};

// One row over the tiles seen so far. Sums are over all entries but the label's, of s = exp((z - reference) / temperature).
struct HeadRow {
  double reference;
  double rest;        // sum of s
  double label;       // z of the label; NaN until its tile is seen
  double others_max;  // of logit_scale (x + bias): tanh may round different ones to the same z
  double dot;         // sum of s (z - reference), for the entropy
  double total;       // kTotalScale times the sum of z
  double uncapped;    // logit_scale (x + bias) of the label
};

struct HeadKernel {
  // Takes the tile [n] into the row. The gradient -s dz/d(logit_scale x), 0 at the label, goes to `grad` unless it is null. The
  // tile is overwritten; it may be `grad`. `label` is outside [0, n) if it is in another tile. Returns what a former s is to be
  // multiplied by.
  double (*forward)(void* tile, const void* bias, int64_t n, int64_t label, const HeadOptions&, HeadRow&, void* grad);
  // The same gradient again, from the finished row, with the label's entry: rest dz/d(logit_scale x).
  void (*gradient)(void* tile, const void* bias, int64_t n, int64_t label, const HeadOptions&, const HeadRow&, void* grad);
};

// By dtype of the gradient; tiles and biases are fp32, for f64 fp64.
struct HeadKernels {
  HeadKernel f32, bf16, f16, f64;
};

extern const HeadKernels kHeadKernelsBaseline;
#if defined(__x86_64__)
extern const HeadKernels kHeadKernelsAvx2;
extern const HeadKernels kHeadKernelsAvx512, kHeadKernelsAvx512Bf16;
#endif

}  // namespace dil
