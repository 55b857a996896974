// Tiles of the language-model head on the CPU: what happens between its matrix products (see dil_kernels/ops/linear_head.py).
#include "../checks.h"
#include "dispatch.h"
#include "grain.h"
#include "huge_pages.h"

namespace dil {
namespace {

struct Tile {
  char* data;
  int64_t rows, columns, row_bytes;
  ScalarType dtype;
};

Tile tile_of(const Tensor& tensor, int64_t rows, int64_t columns, const char* what) {
  STD_TORCH_CHECK(
      tensor.is_cpu() && tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns &&
          (tensor.stride(1) == 1 || columns == 1),
      what, " must be a CPU tensor [", rows, ", ", columns, "] with contiguous rows");
  const auto dtype = tensor.scalar_type();
  const int64_t size = tensor.element_size();
  return {static_cast<char*>(tensor.mutable_data_ptr()), rows, columns, tensor.stride(0) * size, dtype};
}

const HeadKernel& kernel_for(ScalarType tile, ScalarType grad) {
  STD_TORCH_CHECK(
      tile == ScalarType::Double ? grad == ScalarType::Double
                                 : grad == ScalarType::Float || grad == ScalarType::BFloat16 || grad == ScalarType::Half,
      "grad must be fp32, bf16 or fp16 for an fp32 tile, and fp64 for an fp64 one");
  const HeadKernels& kernels = head_kernels();
  return grad == ScalarType::Double     ? kernels.f64
         : grad == ScalarType::BFloat16 ? kernels.bf16
         : grad == ScalarType::Half     ? kernels.f16
                                        : kernels.f32;
}

// Rows of `state`, each [rows] and of the dtype of the tile: the members of HeadRow.
constexpr int64_t kStates = 7;

template <class T>
HeadRow load_row(const T* state, int64_t rows, int64_t r) {
  const auto of = [&](int64_t k) -> double { return state[k * rows + r]; };
  return {of(0), of(1), of(2), of(3), of(4), of(5), of(6)};
}

template <class T>
void store_row(T* state, int64_t rows, int64_t r, const HeadRow& row) {
  const double values[kStates] = {row.reference, row.rest, row.label, row.others_max, row.dot, row.total, row.uncapped};
  for (int64_t k = 0; k < kStates; ++k) state[k * rows + r] = static_cast<T>(values[k]);
}

struct Inputs {
  Tile tile;
  const void* bias;
  const int64_t* labels;
  HeadOptions options;
};

Inputs check(
    const Tensor& tile, const std::optional<Tensor>& bias, const Tensor& labels, const Tensor& state, int64_t start,
    double logit_scale, double softcap, double inv_temperature, double slack, bool statistics) {
  STD_TORCH_CHECK(start >= 0, "start must be >= 0, got ", start);
  STD_TORCH_CHECK(
      tile.dim() == 2 && (tile.scalar_type() == ScalarType::Float || tile.scalar_type() == ScalarType::Double),
      "tile must be fp32 or fp64 [rows, columns]");
  const int64_t rows = tile.size(0), columns = tile.size(1);
  STD_TORCH_CHECK(
      labels.is_cpu() && labels.scalar_type() == ScalarType::Long && labels.numel() == rows && labels.is_contiguous(),
      "labels must be contiguous int64 [rows]");
  STD_TORCH_CHECK(
      state.is_cpu() && state.scalar_type() == tile.scalar_type() && state.numel() == kStates * rows && state.is_contiguous(),
      "state must be contiguous [", kStates, ", rows], of the dtype of the tile");
  if (bias) {
    STD_TORCH_CHECK(
        bias->is_cpu() && bias->scalar_type() == tile.scalar_type() && bias->numel() == columns && bias->is_contiguous(),
        "bias must be contiguous [columns], of the dtype of the tile");
  }
  return {
      tile_of(tile, rows, columns, "tile"),
      bias ? bias->const_data_ptr() : nullptr,
      labels.const_data_ptr<int64_t>(),
      {logit_scale, softcap, inv_temperature, slack, statistics}};
}

// Where in the tile the label is; out of it if it is in another one, or none.
int64_t place_of(int64_t label, int64_t start) { return label >= start ? label - start : -1; }

template <class T>
void rescale_row(const std::optional<Tile>& sums, int64_t r, double factor) {
  T* row = reinterpret_cast<T*>(sums->data + r * sums->row_bytes);
  for (int64_t d = 0; d < sums->columns; ++d) row[d] *= static_cast<T>(factor);
}

void head_tile(
    const Tensor& tile, const std::optional<Tensor>& bias, const Tensor& labels, const Tensor& state,
    const std::optional<Tensor>& grad, const std::optional<Tensor>& sums, int64_t start, double logit_scale, double softcap,
    double inv_temperature, double slack, bool statistics) {
  const Inputs in = check(tile, bias, labels, state, start, logit_scale, softcap, inv_temperature, slack, statistics);
  const Tile& x = in.tile;
  std::optional<Tile> g, acc;
  if (grad) g = tile_of(*grad, x.rows, x.columns, "grad");
  if (sums) {
    acc = tile_of(*sums, x.rows, sums->dim() == 2 ? sums->size(1) : 0, "sums");
    STD_TORCH_CHECK(acc->dtype == x.dtype, "sums must have the dtype of the tile");
  }
  const HeadKernel& kernel = kernel_for(x.dtype, g ? g->dtype : x.dtype);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    T* states = state.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, x.rows, grain(x.columns), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        HeadRow row = load_row(states, x.rows, r);
        const double rescale = kernel.forward(
            x.data + r * x.row_bytes, in.bias, x.columns, place_of(in.labels[r], start), in.options, row,
            g ? g->data + r * g->row_bytes : nullptr);
        if (acc && rescale != 1.0) rescale_row<T>(acc, r, rescale);
        store_row(states, x.rows, r, row);
      }
    });
  };
  x.dtype == ScalarType::Double ? run(double{}) : run(float{});
}

void head_tile_grad(
    const Tensor& tile, const std::optional<Tensor>& bias, const Tensor& labels, const Tensor& state, const Tensor& grad,
    int64_t start, double logit_scale, double softcap, double inv_temperature) {
  const Inputs in = check(tile, bias, labels, state, start, logit_scale, softcap, inv_temperature, 0.0, false);
  const Tile& x = in.tile;
  const Tile g = tile_of(grad, x.rows, x.columns, "grad");
  const HeadKernel& kernel = kernel_for(x.dtype, g.dtype);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const T* states = state.const_data_ptr<T>();
    torch::stable::parallel_for(0, x.rows, grain(x.columns), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        kernel.gradient(
            x.data + r * x.row_bytes, in.bias, x.columns, place_of(in.labels[r], start), in.options,
            load_row(states, x.rows, r), g.data + r * g.row_bytes);
      }
    });
  };
  x.dtype == ScalarType::Double ? run(double{}) : run(float{});
}

void head_memory(const Tensor& fresh) {
  STD_TORCH_CHECK(fresh.is_cpu(), "fresh must be a CPU tensor");
  advise_huge_pages(fresh.mutable_data_ptr(), fresh.numel() * fresh.element_size());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dil_kernels, CPU, m) {
  m.impl("head_tile", TORCH_BOX(&head_tile));
  m.impl("head_tile_grad", TORCH_BOX(&head_tile_grad));
  m.impl("head_memory", TORCH_BOX(&head_memory));
}

}  // namespace dil
