#include "row_kernels.inl"

namespace dil {
const RowKernels kRowKernelsBaseline = DIL_ISA::row_kernels("baseline");
}
