#include "head_kernels.inl"
#include "row_kernels.inl"

namespace dil {
#if defined(__aarch64__)
const RowKernels kRowKernelsBaseline = DIL_ISA::row_kernels("NEON");
#else
const RowKernels kRowKernelsBaseline = DIL_ISA::row_kernels("baseline");
#endif
const HeadKernels kHeadKernelsBaseline = DIL_ISA::head_kernels();
}  // namespace dil
