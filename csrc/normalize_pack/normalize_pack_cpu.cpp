// Normalise-and-pack on a CPU: a row is summed and scaled while it is in the first-level cache, rows are spread over
// torch's threads, and the inner loops are vectorised by the compiler for each instruction set (multiversion.h).

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <type_traits>

#include "common/elements_cpu.h"
#include "common/multiversion.h"
#include "normalize_pack/launch.h"

namespace megaeva::normalize_pack {
namespace {

// Elements one thread should get at least: below, starting a thread costs more than the work.
constexpr std::int64_t kGrainElements = 32768;

template <typename T>
MEGAEVA_INLINE const T* row_of(const void* image, const void* text, std::int64_t image_stride,
                               std::int64_t text_stride, std::int64_t batch, std::int64_t row) {
  return row < batch ? static_cast<const T*>(image) + row * image_stride
                     : static_cast<const T*>(text) + (row - batch) * text_stride;
}

template <typename T>
MEGAEVA_INLINE void forward_rows(const ForwardParams& p, std::int64_t begin, std::int64_t end) {
  using A = Accumulate<T>;
  const std::int64_t width = p.width;
  for (std::int64_t row = begin; row < end; ++row) {
    const T* x = row_of<T>(p.image, p.text, p.image_stride, p.text_stride, p.batch, row);
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t e = 0; e < width; ++e) {
      const A value = static_cast<A>(x[e]);
      sum += value * value;
    }
    const double norm = std::sqrt(static_cast<double>(sum));
    // Not std::max: a NaN norm must stay NaN, as it does in torch.
    const double divisor = norm < p.epsilon ? p.epsilon : norm;
    static_cast<A*>(p.inverse_norm)[row] = static_cast<A>(1.0 / divisor);
    const A divide_by = static_cast<A>(divisor);  // dividing rounds once, multiplying by 1/norm twice; equally fast
    T* y = static_cast<T*>(p.packed) + row * width;
#pragma omp simd
    for (std::int64_t e = 0; e < width; ++e) y[e] = static_cast<T>(static_cast<A>(x[e]) / divide_by);
  }
}

template <typename T>
MEGAEVA_INLINE void backward_rows(const BackwardParams& p, std::int64_t begin, std::int64_t end) {
  using A = Accumulate<T>;
  const std::int64_t width = p.width;
  const A clamped = static_cast<A>(1.0 / p.epsilon);
  for (std::int64_t row = begin; row < end; ++row) {
    const T* x = row_of<T>(p.image, p.text, p.image_stride, p.text_stride, p.batch, row);
    const T* g = static_cast<const T*>(p.grad_packed) + row * p.grad_stride;
    T* dx = row < p.batch ? static_cast<T*>(p.grad_image) + row * width
                          : static_cast<T*>(p.grad_text) + (row - p.batch) * width;
    const A inverse = static_cast<const A*>(p.inverse_norm)[row];
    A along = 0;  // inverse^2 * <g, x>; stays zero where epsilon won and the norm is a constant
    if (!(inverse >= clamped)) {
#pragma omp simd reduction(+ : along)
      for (std::int64_t e = 0; e < width; ++e) along += static_cast<A>(g[e]) * static_cast<A>(x[e]);
      along *= inverse * inverse;
    }
#pragma omp simd
    for (std::int64_t e = 0; e < width; ++e) {
      dx[e] = static_cast<T>(inverse * (static_cast<A>(g[e]) - static_cast<A>(x[e]) * along));
    }
  }
}

// target_clones needs plain functions, one for each element type.
#define MEGAEVA_ROWS(NAME, TYPE)                                                                                   \
  MEGAEVA_MULTIVERSION void forward_##NAME(const ForwardParams& p, std::int64_t begin, std::int64_t end) {         \
    forward_rows<TYPE>(p, begin, end);                                                                             \
  }                                                                                                                \
  MEGAEVA_MULTIVERSION void backward_##NAME(const BackwardParams& p, std::int64_t begin, std::int64_t end) {       \
    backward_rows<TYPE>(p, begin, end);                                                                            \
  }
MEGAEVA_ROWS(float, float)
MEGAEVA_ROWS(double, double)
MEGAEVA_ROWS(bfloat16, c10::BFloat16)
MEGAEVA_ROWS(half, c10::Half)
#undef MEGAEVA_ROWS

template <typename Params>
void over_rows(const Params& p, void (*rows)(const Params&, std::int64_t, std::int64_t)) {
  const std::int64_t grain = std::max<std::int64_t>(1, kGrainElements / std::max<std::int64_t>(1, p.width));
  at::parallel_for(0, p.num_rows, grain, [&](std::int64_t begin, std::int64_t end) { rows(p, begin, end); });
}

void run_forward(const ForwardParams& p, Scalar scalar) {
  switch (scalar) {
    case Scalar::kFloat: return over_rows(p, forward_float);
    case Scalar::kDouble: return over_rows(p, forward_double);
    case Scalar::kBFloat16: return over_rows(p, forward_bfloat16);
    case Scalar::kHalf: return over_rows(p, forward_half);
  }
}

void run_backward(const BackwardParams& p, Scalar scalar) {
  switch (scalar) {
    case Scalar::kFloat: return over_rows(p, backward_float);
    case Scalar::kDouble: return over_rows(p, backward_double);
    case Scalar::kBFloat16: return over_rows(p, backward_bfloat16);
    case Scalar::kHalf: return over_rows(p, backward_half);
  }
}

std::tuple<at::Tensor, at::Tensor> forward_cpu(const at::Tensor& image, const std::optional<at::Tensor>& text,
                                               double epsilon) {
  return forward(image, text, epsilon, run_forward);
}

std::tuple<at::Tensor, at::Tensor> backward_cpu(const at::Tensor& grad_packed, const at::Tensor& image,
                                                const std::optional<at::Tensor>& text,
                                                const at::Tensor& inverse_norm, double epsilon) {
  return backward(grad_packed, image, text, inverse_norm, epsilon, run_backward);
}

TORCH_LIBRARY_IMPL(megaeva, CPU, m) {
  m.impl("normalize_pack", &forward_cpu);
  m.impl("normalize_pack_backward", &backward_cpu);
}

}  // namespace
}  // namespace megaeva::normalize_pack
