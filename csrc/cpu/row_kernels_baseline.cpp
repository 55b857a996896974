#include "head_kernels.inl"
#include "row_kernels.inl"

namespace dil {
const RowKernels kRowKernelsBaseline = DIL_ISA::row_kernels("baseline");
const HeadKernels kHeadKernelsBaseline = DIL_ISA::head_kernels();
}  // namespace dil
