#include "head_kernels.inl"
#include "row_kernels.inl"

namespace dil {
const RowKernels kRowKernelsAvx512 = DIL_ISA::row_kernels("AVX-512");
const HeadKernels kHeadKernelsAvx512 = DIL_ISA::head_kernels();
}  // namespace dil
