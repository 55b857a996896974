// bf16_mm: a matrix product of bf16 factors with fp32 sums, shared out among torch's threads.
#include "../checks.h"
#include "bf16_product.h"
#include "dispatch.h"
#include "grain.h"

namespace dil {
namespace {

#if defined(__x86_64__)
Bf16Factor factor_of(const Tensor& x, int64_t k_dim, const char* what) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2 && x.scalar_type() == ScalarType::BFloat16, what, " must be a bf16 CPU matrix");
  int64_t stride = x.stride(1 - k_dim), k_stride = x.stride(k_dim);
  if (x.size(k_dim) == 1) k_stride = 1;  // strides of what is there once mean nothing
  if (x.size(1 - k_dim) == 1 && k_stride != 1) stride = 1;
  STD_TORCH_CHECK(stride == 1 || k_stride == 1, what, " must have contiguous rows or columns");
  return {static_cast<const uint16_t*>(x.const_data_ptr()), stride, k_stride};
}
#endif

void bf16_mm(const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  STD_TORCH_CHECK(has_bf16_product(), "bf16_mm needs a CPU with AVX512_BF16");
#if defined(__x86_64__)
  const Bf16Factor x = factor_of(a, 1, "a"), y = factor_of(b, 0, "b");
  const int64_t M = a.size(0), K = a.size(1), N = b.size(1);
  STD_TORCH_CHECK(b.size(0) == K, "a [", M, ", ", K, "] and b [", b.size(0), ", ", N, "] do not multiply");
  STD_TORCH_CHECK(
      out.is_cpu() && out.dim() == 2 && out.scalar_type() == ScalarType::Float && out.size(0) == M && out.size(1) == N &&
          (out.stride(1) == 1 || N == 1) && (out.stride(0) >= N || M == 1),
      "out must be an fp32 CPU tensor [", M, ", ", N, "] with contiguous rows that do not overlap");
  float* data = out.mutable_data_ptr<float>();
  const int64_t stride = out.stride(0), threads = torch::stable::get_num_threads();
  const auto pieces = [](int64_t size, int64_t piece) { return (size + piece - 1) / piece; };
  const int64_t columns = pieces(N, kProductColumns), rows = pieces(M, kProductRows);
  // Each thread packs what it needs of b, which takes as long as some rows of the product.
  constexpr int64_t kPacking = 6;
  const int64_t by_columns = pieces(columns, threads) * (M + kPacking);
  const int64_t by_rows = columns * (pieces(rows, threads) * kProductRows + kPacking);
  if (by_columns <= by_rows) {
    torch::stable::parallel_for(0, columns, grain(M * K), [&](int64_t first, int64_t last) {
      const int64_t n = first * kProductColumns, end = last * kProductColumns < N ? last * kProductColumns : N;
      bf16_product_avx512({data + n, stride, add}, x, {y.data + n * y.stride, y.stride, y.k_stride}, M, end - n, K);
    });
  } else {
    torch::stable::parallel_for(0, rows, grain(N * K), [&](int64_t first, int64_t last) {
      const int64_t m = first * kProductRows, end = last * kProductRows < M ? last * kProductRows : M;
      bf16_product_avx512({data + m * stride, stride, add}, {x.data + m * x.stride, x.stride, x.k_stride}, y, end - m, N, K);
    });
  }
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dil_kernels, CPU, m) { m.impl("bf16_mm", TORCH_BOX(&bf16_mm)); }

}  // namespace dil
