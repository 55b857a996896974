#include "dispatch.h"

#include <cstdlib>
#include <cstring>

namespace dil {
namespace {

// DIL_KERNELS_CPU_CAPABILITY=avx2|baseline asks for less than the machine has, to test those kernels; results agree to
// rounding.
const RowKernels& choose() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("DIL_KERNELS_CPU_CAPABILITY");
  const bool baseline = wanted && std::strcmp(wanted, "baseline") == 0;
  const bool avx2 = wanted && std::strcmp(wanted, "avx2") == 0;
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!baseline && !avx2 && has_avx512) return kRowKernelsAvx512;
  if (!baseline && has_avx2) return kRowKernelsAvx2;
#endif
  return kRowKernelsBaseline;
}

}  // namespace

const RowKernels& row_kernels() {
  static const RowKernels& kernels = choose();
  return kernels;
}

const HeadKernels& head_kernels() {
#if defined(__x86_64__)
  if (&row_kernels() == &kRowKernelsAvx512) return kHeadKernelsAvx512;
  if (&row_kernels() == &kRowKernelsAvx2) return kHeadKernelsAvx2;
#endif
  return kHeadKernelsBaseline;
}

}  // namespace dil
