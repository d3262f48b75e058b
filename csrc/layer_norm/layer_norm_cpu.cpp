// LayerNorm on a CPU: a row is turned into float once and stays in the first-level cache for its sums. The backward pass
// reads everything once; rows are cut into parts whose number does not depend on the threads, and so neither do sums.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "common/elements_cpu.h"
#include "common/multiversion.h"
#include "layer_norm/params.h"

namespace megaeva::layer_norm {
namespace {

using c10::BFloat16;
using c10::Half;
using std::int64_t;

constexpr int64_t kGrainElements = 16384;  // one thread should get at least, forward
constexpr int64_t kMaxParts = 64;          // of the rows, backward: threads that can share the work
constexpr int64_t kMinPartRows = 32;

template <typename T>
MEGAEVA_INLINE void forward_rows(const Params& p, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const int64_t width = p.width;
  std::vector<A> buffer(3 * width);
  A *wide = buffer.data(), *weight = wide + width, *bias = weight + width;
  for (int64_t d = 0; d < width; ++d) {
    weight[d] = widen(static_cast<const T*>(p.weight)[d]);
    bias[d] = widen(static_cast<const T*>(p.bias)[d]);
  }
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * width;
    T* y = static_cast<T*>(p.y) + row * width;
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < width; ++d) {
      wide[d] = widen(x[d]);
      sum += wide[d];
    }
    const A first = sum / width;
    A rest = 0, squares = 0;
#pragma omp simd reduction(+ : rest, squares)
    for (int64_t d = 0; d < width; ++d) {
      const A centred = wide[d] - first;
      rest += centred;
      squares += centred * centred;
    }
    rest /= width;  // what rounding left out of the sum, where the mean is far from zero
    const A mean = first + rest;
    const A rstd = 1 / std::sqrt(std::max(squares / width - rest * rest, A(0)) + static_cast<A>(p.epsilon));
#pragma omp simd
    for (int64_t d = 0; d < width; ++d) y[d] = narrow<T>((wide[d] - mean) * rstd * weight[d] + bias[d]);
    static_cast<A*>(p.mean)[row] = mean;
    static_cast<A*>(p.rstd)[row] = rstd;
  }
}

template <typename T>
MEGAEVA_INLINE void backward_parts(const Params& p, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const int64_t width = p.width;
  std::vector<A> buffer(3 * width);
  A *normed = buffer.data(), *weighted = normed + width, *weight = weighted + width;
  for (int64_t d = 0; d < width; ++d) weight[d] = widen(static_cast<const T*>(p.weight)[d]);
  for (int64_t part = begin; part < end; ++part) {
    A* grad_weight = static_cast<A*>(p.partial) + part * 2 * width;
    A* grad_bias = grad_weight + width;
    std::fill_n(grad_weight, 2 * width, A(0));
    for (int64_t row = p.rows * part / p.parts; row < p.rows * (part + 1) / p.parts; ++row) {
      const T* x = static_cast<const T*>(p.x) + row * width;
      const T* grad = static_cast<const T*>(p.grad) + row * width;
      T* grad_x = static_cast<T*>(p.grad_x) + row * width;
      const A mean = static_cast<const A*>(p.mean)[row], rstd = static_cast<const A*>(p.rstd)[row];
      A sum = 0, along = 0;
#pragma omp simd reduction(+ : sum, along)
      for (int64_t d = 0; d < width; ++d) {
        const A z = (static_cast<A>(widen(x[d])) - mean) * rstd, g = widen(grad[d]), gw = g * weight[d];
        normed[d] = z;
        weighted[d] = gw;
        sum += gw;
        along += gw * z;
        grad_weight[d] += g * z;
        grad_bias[d] += g;
      }
      sum /= width;
      along /= width;
#pragma omp simd
      for (int64_t d = 0; d < width; ++d) grad_x[d] = narrow<T>(rstd * (weighted[d] - sum - normed[d] * along));
    }
  }
}

// target_clones needs plain functions, one for each element type.
#define MEGAEVA_ROWS(NAME, TYPE)                                                              \
  MEGAEVA_MULTIVERSION void forward_##NAME(const Params& p, int64_t begin, int64_t end) {     \
    forward_rows<TYPE>(p, begin, end);                                                        \
  }                                                                                           \
  MEGAEVA_MULTIVERSION void backward_##NAME(const Params& p, int64_t begin, int64_t end) {    \
    backward_parts<TYPE>(p, begin, end);                                                      \
  }
MEGAEVA_ROWS(float, float)
MEGAEVA_ROWS(double, double)
MEGAEVA_ROWS(bfloat16, BFloat16)
MEGAEVA_ROWS(half, Half)
#undef MEGAEVA_ROWS

void check(const at::Tensor& x, const at::Tensor& weight, const char* name) {
  TORCH_CHECK(x.dim() >= 1 && weight.dim() == 1 && weight.size(0) == x.size(-1) && weight.is_contiguous() &&
                  weight.scalar_type() == x.scalar_type(),
              name, ": weight ", weight.sizes(), " ", weight.scalar_type(), " must be typed like x ", x.sizes(), " ",
              x.scalar_type(), " and as long as its last dim.");
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward_cpu(const at::Tensor& x, const at::Tensor& weight,
                                                           const at::Tensor& bias, double epsilon) {
  check(x, weight, "layer_norm");
  check(x, bias, "layer_norm");
  const Scalar scalar = scalar_of(x, "layer_norm");
  const at::ScalarType wide = scalar == Scalar::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor dense = x.contiguous();
  const int64_t width = x.size(-1), rows = width == 0 ? 0 : x.numel() / width;
  at::Tensor y = at::empty(x.sizes(), x.options());
  at::Tensor mean = at::empty({rows}, x.options().dtype(wide)), rstd = at::empty({rows}, mean.options());
  Params p{};
  p.x = dense.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.bias = bias.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.mean = mean.mutable_data_ptr();
  p.rstd = rstd.mutable_data_ptr();
  p.rows = rows;
  p.width = width;
  p.epsilon = epsilon;
  const auto over_rows = [&](void (*run)(const Params&, int64_t, int64_t)) {
    const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, width));
    at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { run(p, begin, end); });
  };
  switch (scalar) {
    case Scalar::kFloat: over_rows(forward_float); break;
    case Scalar::kDouble: over_rows(forward_double); break;
    case Scalar::kBFloat16: over_rows(forward_bfloat16); break;
    case Scalar::kHalf: over_rows(forward_half); break;
  }
  return {y, mean, rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_cpu(const at::Tensor& grad, const at::Tensor& x,
                                                            const at::Tensor& weight, const at::Tensor& mean,
                                                            const at::Tensor& rstd) {
  check(x, weight, "layer_norm_backward");
  const Scalar scalar = scalar_of(x, "layer_norm_backward");
  const at::ScalarType wide = scalar == Scalar::kDouble ? at::kDouble : at::kFloat;
  const int64_t width = x.size(-1), rows = width == 0 ? 0 : x.numel() / width;
  TORCH_CHECK(grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type(), "layer_norm_backward: grad ",
              grad.sizes(), " ", grad.scalar_type(), " must be shaped and typed like x ", x.sizes(), " ",
              x.scalar_type(), ".");
  TORCH_CHECK(mean.is_contiguous() && mean.sizes() == at::IntArrayRef({rows}) && mean.scalar_type() == wide &&
                  rstd.is_contiguous() && rstd.sizes() == mean.sizes() && rstd.scalar_type() == wide,
              "layer_norm_backward: mean and rstd must be the outputs of layer_norm for this x.");
  const at::Tensor dense = x.contiguous(), dense_grad = grad.contiguous();
  at::Tensor grad_x = at::empty(x.sizes(), x.options());
  Params p{};
  p.parts = std::clamp<int64_t>(rows / kMinPartRows, 1, kMaxParts);
  at::Tensor partial = at::empty({p.parts, 2, width}, x.options().dtype(wide));
  p.x = dense.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.mean = const_cast<void*>(mean.const_data_ptr());
  p.rstd = const_cast<void*>(rstd.const_data_ptr());
  p.grad = dense_grad.const_data_ptr();
  p.grad_x = grad_x.mutable_data_ptr();
  p.partial = partial.mutable_data_ptr();
  p.rows = rows;
  p.width = width;
  const auto over_parts = [&](void (*run)(const Params&, int64_t, int64_t)) {
    at::parallel_for(0, p.parts, 1, [&](int64_t begin, int64_t end) { run(p, begin, end); });
  };
  switch (scalar) {
    case Scalar::kFloat: over_parts(backward_float); break;
    case Scalar::kDouble: over_parts(backward_double); break;
    case Scalar::kBFloat16: over_parts(backward_bfloat16); break;
    case Scalar::kHalf: over_parts(backward_half); break;
  }
  const at::Tensor sums = partial.sum(0).to(x.scalar_type());
  return {grad_x, sums.select(0, 0).clone(), sums.select(0, 1).clone()};
}

TORCH_LIBRARY_IMPL(megaeva, CPU, m) {
  m.impl("layer_norm", &forward_cpu);
  m.impl("layer_norm_backward", &backward_cpu);
}

}  // namespace
}  // namespace megaeva::layer_norm
