// The loops of csrc/cpu on std::thread, for ThreadSanitizer, which cannot see how torch's own threads synchronise. Every op is
// called over several threads and alone: what differs by a bit is an error. With an argument, every loop has a race. Then come
// arguments that make no sense, for UndefinedBehaviorSanitizer: whatever the result, no arithmetic may be undefined.
#include <cstdio>
#include <cstring>
#include <random>

#include "../../csrc/cpu/density_ratio.cpp"
#include "../../csrc/cpu/linear_head.cpp"
#include "../../csrc/cpu/logps.cpp"
#include "../../csrc/cpu/row_kernels_baseline.cpp"
#include "loop_on_threads.h"

namespace dil {
const RowKernels& row_kernels() { return kRowKernelsBaseline; }
const HeadKernels& head_kernels() { return kHeadKernelsBaseline; }
}  // namespace dil

namespace {

int64_t num_threads = 1;
int64_t shared_parts = 0;  // of loops that were shared out
bool planted_race = false;

}  // namespace

// In the place of torch's: a part of [begin, end) for each thread, none below the grain.
extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelFunc f, void* context) {
  const int64_t most = (end - begin + grain - 1) / grain, parts = most < num_threads ? most : num_threads;
  loop_on_threads(parts, begin, end, f, context, planted_race);
  if (parts > 1) shared_parts += parts;
  return 0;
}

namespace dil {
namespace {

std::mt19937 generator(0);

Tensor random_tensor(const std::vector<int64_t>& shape, ScalarType dtype) {
  Tensor out = torch::stable::empty(shape, dtype);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < out.numel(); ++i) {
    const float x = normal(generator);
    if (dtype == ScalarType::Double) {
      static_cast<double*>(out.mutable_data_ptr())[i] = x;
    } else if (dtype == ScalarType::Float) {
      static_cast<float*>(out.mutable_data_ptr())[i] = x;
    } else if (dtype == ScalarType::BFloat16) {
      static_cast<torch::headeronly::BFloat16*>(out.mutable_data_ptr())[i] = x;
    } else {
      static_cast<torch::headeronly::Half*>(out.mutable_data_ptr())[i] = x;
    }
  }
  return out;
}

Tensor labels_below(const std::vector<int64_t>& shape, int64_t V) {  // every third one is -100
  Tensor out = torch::stable::empty(shape, ScalarType::Long);
  int64_t* y = static_cast<int64_t*>(out.mutable_data_ptr());
  for (int64_t i = 0; i < out.numel(); ++i) y[i] = i % 3 == 0 ? -100 : static_cast<int64_t>(generator() % V);
  return out;
}

Tensor copy(const Tensor& x) {
  Tensor out = torch::stable::empty_like(x);
  std::memcpy(out.mutable_data_ptr(), x.const_data_ptr(), x.numel() * x.element_size());
  return out;
}

bool same(const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  bool equal = a.size() == b.size();
  for (size_t i = 0; equal && i < a.size(); ++i) {
    equal = std::memcmp(a[i].const_data_ptr(), b[i].const_data_ptr(), a[i].numel() * a[i].element_size()) == 0;
  }
  return equal;
}

constexpr int64_t kColumns = 40000;  // a row for each thread at least

std::vector<Tensor> log_probs(const Tensor& logits, const Tensor& labels, const Tensor& upstream, double softcapping) {
  auto [logps, row_max, log_sum, statistics] = logps_fwd(logits, labels, -100, true, softcapping, 0.7, true);
  const Tensor grad = logps_bwd(upstream, logits, labels, row_max, log_sum, -100, true, softcapping, 0.7);
  const Tensor inplace = copy(logits);
  logps_bwd_(upstream, inplace, labels, row_max, log_sum, -100, true, softcapping, 0.7);
  return {logps, row_max, log_sum, statistics, grad, inplace};
}

std::vector<Tensor> head(
    const Tensor& given_tile, const Tensor& bias, const Tensor& labels, const Tensor& given_state, const Tensor& given_sums,
    ScalarType grad_dtype) {
  const Tensor tile = copy(given_tile), again = copy(given_tile), state = copy(given_state), sums = copy(given_sums);
  const Tensor grad = torch::stable::new_zeros(tile, {tile.size(0), tile.size(1)}, grad_dtype), regrad = copy(grad);
  head_tile(tile, bias, labels, state, grad, sums, 0, 0.5, 30.0, 1.2, 4.0, true);
  head_tile_grad(again, bias, labels, state, regrad, 0, 0.5, 30.0, 1.2);
  return {tile, state, grad, sums, regrad};
}

std::vector<Tensor> density_ratio(const Tensor& logps, const Tensor& labels, const Tensor& ref, const Tensor& upstream) {
  auto [loss, losses, logratios, sums, lengths, counts, coefs] = density_ratio_fwd(
      logps, labels, std::nullopt, ref, std::nullopt, std::nullopt, "bce", 0.7, 0.0, 0.0, 0.25, 3.0, 1.0, 1.0, 0.1, -0.1, 1.0,
      "imitation", true, false, true, -100, true);
  const Tensor grad = density_ratio_bwd(
      upstream, std::nullopt, std::nullopt, std::nullopt, logps, labels, std::nullopt, std::nullopt, lengths, counts, coefs,
      true, false, true, -100, true);
  return {loss, losses, logratios, sums, lengths, counts, coefs, grad};
}

void call_with_nonsense() {
  const Tensor tile = random_tensor({3, 4}, ScalarType::Float), state = random_tensor({7, 3}, ScalarType::Float);
  const Tensor labels = labels_below({1, 3}, 4), far = labels_below({3}, 4), grad = copy(tile);
  int64_t* y = static_cast<int64_t*>(far.mutable_data_ptr());
  y[0] = INT64_MIN, y[1] = INT64_MAX, y[2] = -1;
  for (const int64_t start : {int64_t{0}, int64_t{5}, INT64_MAX}) {
    head_tile(copy(tile), std::nullopt, far, copy(state), grad, std::nullopt, start, 1.0, 0.0, 1.0, 4.0, true);
    head_tile_grad(copy(tile), std::nullopt, far, state, grad, start, 1.0, 0.0, 1.0);
  }
  const Tensor logits = random_tensor({1, 3, 40}, ScalarType::Float), upstream = random_tensor({1, 3}, ScalarType::Float);
  for (const float lse : {-1e30f, -200.0f, 1e30f, -INFINITY, INFINITY, NAN}) {  // of other logits than these
    const Tensor saved = random_tensor({1, 3}, ScalarType::Float);
    for (int64_t i = 0; i < 3; ++i) static_cast<float*>(saved.mutable_data_ptr())[i] = lse;
    for (const double softcapping : {0.0, 5.0}) {
      logps_bwd(upstream, logits, labels, saved, saved, -100, false, softcapping, 0.01);
    }
  }
}

template <class F>
int check(const char* what, F&& run) {
  num_threads = 1;
  const std::vector<Tensor> alone = run();
  num_threads = 4;
  const int64_t before = shared_parts;
  const std::vector<Tensor> together = run();
  const bool shared = shared_parts > before, equal = same(alone, together);
  std::printf("%s: %s, %s\n", what, shared ? "on several threads" : "NOT SHARED OUT", equal ? "the same" : "DIFFERENT");
  return shared && equal ? 0 : 1;
}

}  // namespace
}  // namespace dil

int main(int argc, char**) {
  using namespace dil;
  planted_race = argc > 1;
  int failures = 0;
  for (const ScalarType dtype : {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double}) {
    const bool wide = dtype == ScalarType::Double;
    const ScalarType acc = wide ? ScalarType::Double : ScalarType::Float;
    const Tensor logits = random_tensor({2, 4, kColumns}, dtype), labels = labels_below({2, 4}, kColumns);
    const Tensor upstream = random_tensor({2, 3}, acc);
    for (const double softcapping : {0.0, 5.0}) {
      failures += check("log-probs", [&] { return log_probs(logits, labels, upstream, softcapping); });
    }
    const Tensor tile = random_tensor({6, kColumns}, acc), bias = random_tensor({kColumns}, acc);
    const Tensor places = labels_below({6}, kColumns), sums = random_tensor({6, 16}, acc);
    const Tensor state = random_tensor({7, 6}, acc);
    failures += check("head", [&] { return head(tile, bias, places, state, sums, dtype); });
    if (acc != dtype) continue;
    const Tensor logps = random_tensor({4, kColumns}, dtype), ref = random_tensor({4, kColumns}, dtype);
    const Tensor targets = labels_below({4, kColumns + 1}, 100), one = random_tensor({1}, dtype);
    failures += check("density ratio", [&] { return density_ratio(logps, targets, ref, one); });
  }
  call_with_nonsense();
  std::printf("nonsense: survived\n");
  return failures;
}
