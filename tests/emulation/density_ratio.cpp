// csrc/cuda/density_ratio.cu itself, over the stand-in for CUDA beside this file, as ops on CPU tensors.
#include "../../csrc/checks.h"

namespace torch::stable::accelerator {
struct NoDeviceGuard {
  explicit NoDeviceGuard(int32_t) {}
};
}  // namespace torch::stable::accelerator

#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(call) static_cast<void>(call)
#define DeviceGuard NoDeviceGuard
#define aoti_torch_get_current_cuda_stream(device, stream) (*(stream) = nullptr, 0)

#include "../../csrc/cuda/density_ratio.cu"

namespace dil {
STABLE_TORCH_LIBRARY_IMPL(dil_kernels_emulated, CPU, m) {
  m.impl("density_ratio_fwd", TORCH_BOX(&density_ratio_fwd));
  m.impl("density_ratio_bwd", TORCH_BOX(&density_ratio_bwd));
}
}  // namespace dil
