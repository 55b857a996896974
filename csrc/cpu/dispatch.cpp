#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <torch/headeronly/util/Exception.h>

namespace dil {
namespace {

struct Level {
  const RowKernels& rows;
  const HeadKernels& head;
  bool bf16_product;
};

#if defined(__x86_64__)
bool has_f16c() {  // `__builtin_cpu_supports` of GCC 10 does not know it
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

// DIL_KERNELS_CPU_CAPABILITY=avx512_bf16|avx512|avx2|baseline asks for no more than that, to test those kernels; results agree
// to rounding.
Level choose() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("DIL_KERNELS_CPU_CAPABILITY");
  const auto at_most = [=](const char* name) { return wanted && std::strcmp(wanted, name) == 0; };
  STD_TORCH_CHECK(
      !wanted || at_most("avx512_bf16") || at_most("avx512") || at_most("avx2") || at_most("baseline"),
      "DIL_KERNELS_CPU_CAPABILITY must be avx512_bf16, avx512, avx2 or baseline, got ", wanted);
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (at_most("baseline") || !avx2) return {kRowKernelsBaseline, kHeadKernelsBaseline, false};
  if (at_most("avx2") || !avx512) return {kRowKernelsAvx2, kHeadKernelsAvx2, false};
  if (at_most("avx512") || !avx512_bf16) return {kRowKernelsAvx512, kHeadKernelsAvx512, false};
  return {kRowKernelsAvx512Bf16, kHeadKernelsAvx512Bf16, true};
#else
  return {kRowKernelsBaseline, kHeadKernelsBaseline, false};
#endif
}

const Level& level() {
  static const Level chosen = choose();
  return chosen;
}

}  // namespace

const RowKernels& row_kernels() { return level().rows; }
const HeadKernels& head_kernels() { return level().head; }
bool has_bf16_product() { return level().bf16_product; }

}  // namespace dil
