#include "head_kernels.inl"
#include "row_kernels.inl"

namespace dil {
const RowKernels kRowKernelsAvx512Bf16 = DIL_ISA::row_kernels("AVX-512 BF16");
const HeadKernels kHeadKernelsAvx512Bf16 = DIL_ISA::head_kernels();
}  // namespace dil
