// A matrix product of bf16 factors summed in fp32, which PyTorch has on GPUs only (torch.mm with out_dtype).
#pragma once

#include <cstdint>

namespace dil {

// A factor as seen along K: element (i, k) is data[i * stride + k * k_stride], one of the strides 1.
struct Bf16Factor {
  const uint16_t* data;
  int64_t stride, k_stride;
};

// out [M, N] in fp32, rows of `stride` elements; `add` adds the product to what is there.
struct ProductOutput {
  float* data;
  int64_t stride;
  bool add;
};

// Granularity of work: a share of rows or columns that is not a multiple of these wastes the rest.
constexpr int64_t kProductRows = 6, kProductColumns = 64;

// out [M, N] = a b^T for a [M, K] and b [N, K], in one thread, on a CPU with AVX512_BF16. Subnormal numbers count as 0.
#if defined(__x86_64__)
void bf16_product_avx512(ProductOutput out, Bf16Factor a, Bf16Factor b, int64_t M, int64_t N, int64_t K);
#endif

}  // namespace dil
