#include "row_kernels.inl"

namespace dil {
const RowKernels kRowKernelsAvx512 = DIL_ISA::row_kernels("AVX-512");
}
