#pragma once

#include "head_kernels.h"
#include "row_kernels.h"

namespace dil {

// The row kernels of the best instruction set that this machine has (see dispatch.cpp).
const RowKernels& row_kernels();
const HeadKernels& head_kernels();
// Whether it multiplies bf16 (see bf16_product.h).
bool has_bf16_product();

}  // namespace dil
