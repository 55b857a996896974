#include "head_kernels.inl"
#include "row_kernels.inl"

namespace dil {
const RowKernels kRowKernelsAvx2 = DIL_ISA::row_kernels("AVX2");
const HeadKernels kHeadKernelsAvx2 = DIL_ISA::head_kernels();
}  // namespace dil
