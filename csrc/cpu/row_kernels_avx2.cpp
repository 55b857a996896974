#include "row_kernels.inl"

namespace dil {
const RowKernels kRowKernelsAvx2 = DIL_ISA::row_kernels("AVX2");
}
