// The Python face of the extension: build information and the scalar divergences. The ops that it implements are declared in
// dil_kernels/ops.
#include <map>
#include <string>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "checks.h"
#include "cpu/dispatch.h"

namespace py = pybind11;
using namespace dil;

namespace {

std::map<std::string, std::string> build_info() {
  return {
      {"compiler", __VERSION__},
      {"torch_headers", TORCH_VERSION},
      {"torch_target",
       std::to_string((TORCH_TARGET_VERSION >> 56) & 0xff) + "." + std::to_string((TORCH_TARGET_VERSION >> 48) & 0xff)},
      {"cpu_capability", row_kernels().name},
  };
}

std::vector<std::string> divergence_names() {
#define DIL_NAME(D) D::name,
  return {DIL_DIVERGENCES(DIL_NAME)};
#undef DIL_NAME
}

template <class D>
py::object scalar_functions() {
  if constexpr (!D::separable) {
    return py::none();
  } else {
    py::dict out;
    out["A"] = py::cpp_function(py::vectorize(&D::A));
    out["P"] = py::cpp_function(py::vectorize(&D::P));
    out["dA"] = py::cpp_function(py::vectorize(&D::dA));
    out["dP"] = py::cpp_function(py::vectorize(&D::dP));
    return std::move(out);
  }
}

py::object divergence_scalars(const std::string& name) {
#define DIL_SCALARS(D) \
  if (name == D::name) return scalar_functions<D>();
  DIL_DIVERGENCES(DIL_SCALARS)
#undef DIL_SCALARS
  throw py::value_error("unknown divergence " + name);
}

using Array = py::array_t<double>;

// From a LossParameters of dil_kernels/losses/options.py.
LossParameters parameters_of(const py::object& p) {
  const auto number = [&](const char* name) { return p.attr(name).cast<double>(); };
  return {
      number("beta"),
      number("power"),
      number("label_smoothing"),
      number("alpha"),
      number("max_log_ratio"),
      number("chosen_weight"),
      number("rejected_weight"),
      number("chosen_offset"),
      number("rejected_offset"),
      number("scale"),
      link_by_name(p.attr("link").cast<std::string>())};
}

py::tuple divergence_pair(const py::object& p, const Array& u_w, const Array& u_l) {
  const Divergence divergence = divergence_by_name(p.attr("loss_type").cast<std::string>());
  const LossParameters parameters = parameters_of(p);
  const auto part = [&](auto member) {
    return py::vectorize([=](double w, double l) { return pair_loss(divergence, w, l, parameters).*member; })(u_w, u_l);
  };
  return py::make_tuple(part(&PairLoss::loss), part(&PairLoss::grad_w), part(&PairLoss::grad_l));
}

py::tuple divergence_response(const py::object& p, const Array& u, bool is_chosen) {
  const Divergence divergence = divergence_by_name(p.attr("loss_type").cast<std::string>());
  const LossParameters parameters = parameters_of(p);
  const auto part = [&](auto member) {
    return py::vectorize([=](double v) { return response_loss(divergence, v, is_chosen, parameters).*member; })(u);
  };
  return py::make_tuple(part(&Term::loss), part(&Term::grad));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled half of dil_kernels: implements torch ops when imported.";
  m.def("build_info", &build_info, "What the extension was built with, and the instruction set in use.");
  m.def("has_bf16_product", &has_bf16_product, "Whether the op bf16_mm runs on this CPU.");
  m.def("divergence_names", &divergence_names, "Every compiled loss.");
  m.def(
      "divergence_scalars", &divergence_scalars, py::arg("name"),
      "A, P and their derivatives dA, dP of a separable loss as fp64 functions over arrays of log ratios and of the loss's "
      "own parameter (anything where it has none); None if coupled.");
  m.def(
      "divergence_pair", &divergence_pair, py::arg("parameters"), py::arg("u_w"), py::arg("u_l"),
      "Loss, d loss/d u_w and d loss/d u_l of pairs, in fp64 over arrays of log ratios; parameters are a LossParameters.");
  m.def(
      "divergence_response", &divergence_response, py::arg("parameters"), py::arg("u"), py::arg("is_chosen"),
      "Loss and d loss/d u of single responses, in fp64 over an array of log ratios; parameters are a LossParameters.");
}
