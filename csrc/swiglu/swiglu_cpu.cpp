// SwiGLU on a CPU: one pass over memory each way, where plain PyTorch makes two forward and six backward.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "common/dispatch.h"
#include "common/elements_cpu.h"
#include "common/multiversion.h"
#include "swiglu/params.h"

namespace megaeva::swiglu {
namespace {

using c10::BFloat16;
using c10::Half;
using std::int64_t;

// Elements one thread should get at least: below, starting a thread costs more than the work.
constexpr int64_t kGrainElements = 16384;

template <typename T>
MEGAEVA_INLINE void forward_rows(const Params& p, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(p.x) + row * 2 * p.width;
    const T* up = gate + p.width;
    T* y = static_cast<T*>(p.y) + row * p.width;
#pragma omp simd
    for (int64_t f = 0; f < p.width; ++f) {
      const A g = widen(gate[f]);
      y[f] = narrow<T>(g * sigmoid(g) * static_cast<A>(widen(up[f])));
    }
  }
}

template <typename T>
MEGAEVA_INLINE void backward_rows(const Params& p, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(p.x) + row * 2 * p.width;
    const T* up = gate + p.width;
    const T* grad = static_cast<const T*>(p.grad) + row * p.width;
    T* grad_gate = static_cast<T*>(p.grad_x) + row * 2 * p.width;
    T* grad_up = grad_gate + p.width;
#pragma omp simd
    for (int64_t f = 0; f < p.width; ++f) {
      const A g = widen(gate[f]), d = widen(grad[f]), s = sigmoid(g);
      grad_gate[f] = narrow<T>(d * static_cast<A>(widen(up[f])) * s * (1 + g * (1 - s)));
      grad_up[f] = narrow<T>(d * g * s);
    }
  }
}

// target_clones needs plain functions, one for each element type.
#define MEGAEVA_ROWS(NAME, TYPE)                                                              \
  MEGAEVA_MULTIVERSION void forward_##NAME(const Params& p, int64_t begin, int64_t end) {     \
    forward_rows<TYPE>(p, begin, end);                                                        \
  }                                                                                           \
  MEGAEVA_MULTIVERSION void backward_##NAME(const Params& p, int64_t begin, int64_t end) {    \
    backward_rows<TYPE>(p, begin, end);                                                       \
  }
MEGAEVA_ROWS(float, float)
MEGAEVA_ROWS(double, double)
MEGAEVA_ROWS(bfloat16, BFloat16)
MEGAEVA_ROWS(half, Half)
#undef MEGAEVA_ROWS

void over_rows(const Params& p, void (*rows)(const Params&, int64_t, int64_t)) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, p.width));
  at::parallel_for(0, p.rows, grain, [&](int64_t begin, int64_t end) { rows(p, begin, end); });
}

Params make_params(const at::Tensor& x, const char* name) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) % 2 == 0, name, ": x ", x.sizes(),
              " must have an even last size: the gates, then as many ups.");
  Params p{};
  p.width = x.size(-1) / 2;
  p.rows = p.width == 0 ? 0 : x.numel() / (2 * p.width);
  return p;
}

std::vector<int64_t> halved(const at::Tensor& x) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() /= 2;
  return sizes;
}

at::Tensor forward_cpu(const at::Tensor& x) {
  Params p = make_params(x, "swiglu");
  const Scalar scalar = scalar_of(x, "swiglu");
  const at::Tensor dense = x.contiguous();
  at::Tensor y = at::empty(halved(x), x.options());
  p.x = dense.const_data_ptr();
  p.y = y.mutable_data_ptr();
  switch (scalar) {
    case Scalar::kFloat: over_rows(p, forward_float); break;
    case Scalar::kDouble: over_rows(p, forward_double); break;
    case Scalar::kBFloat16: over_rows(p, forward_bfloat16); break;
    case Scalar::kHalf: over_rows(p, forward_half); break;
  }
  return y;
}

at::Tensor backward_cpu(const at::Tensor& grad, const at::Tensor& x) {
  Params p = make_params(x, "swiglu_backward");
  const Scalar scalar = scalar_of(x, "swiglu_backward");
  TORCH_CHECK(grad.sizes() == at::IntArrayRef(halved(x)) && grad.scalar_type() == x.scalar_type(),
              "swiglu_backward: grad ", grad.sizes(), " ", grad.scalar_type(), " must be typed like x ", x.sizes(), " ",
              x.scalar_type(), " and have half its last size.");
  const at::Tensor dense = x.contiguous(), dense_grad = grad.contiguous();
  at::Tensor grad_x = at::empty(x.sizes(), x.options());
  p.x = dense.const_data_ptr();
  p.grad = dense_grad.const_data_ptr();
  p.grad_x = grad_x.mutable_data_ptr();
  switch (scalar) {
    case Scalar::kFloat: over_rows(p, backward_float); break;
    case Scalar::kDouble: over_rows(p, backward_double); break;
    case Scalar::kBFloat16: over_rows(p, backward_bfloat16); break;
    case Scalar::kHalf: over_rows(p, backward_half); break;
  }
  return grad_x;
}

TORCH_LIBRARY_IMPL(megaeva, CPU, m) {
  m.impl("swiglu", &forward_cpu);
  m.impl("swiglu_backward", &backward_cpu);
}

}  // namespace
}  // namespace megaeva::swiglu
