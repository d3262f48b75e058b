// Hands normalise-and-pack to the kernels in normalize_pack_cuda.cu. Compiled only with MEGAEVA_BUILD=cuda.

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>

#include "normalize_pack/launch.h"

namespace megaeva::normalize_pack {
namespace {

std::tuple<at::Tensor, at::Tensor> forward_gpu(const at::Tensor& image, const std::optional<at::Tensor>& text,
                                               double epsilon) {
  const c10::cuda::CUDAGuard guard(image.device());
  return forward(image, text, epsilon, [](const ForwardParams& params, Scalar scalar) {
    C10_CUDA_CHECK(static_cast<cudaError_t>(
        forward_cuda(params, scalar, c10::cuda::getCurrentCUDAStream().stream())));
  });
}

std::tuple<at::Tensor, at::Tensor> backward_gpu(const at::Tensor& grad_packed, const at::Tensor& image,
                                                const std::optional<at::Tensor>& text,
                                                const at::Tensor& inverse_norm, double epsilon) {
  const c10::cuda::CUDAGuard guard(image.device());
  return backward(grad_packed, image, text, inverse_norm, epsilon, [](const BackwardParams& params, Scalar scalar) {
    C10_CUDA_CHECK(static_cast<cudaError_t>(
        backward_cuda(params, scalar, c10::cuda::getCurrentCUDAStream().stream())));
  });
}

TORCH_LIBRARY_IMPL(megaeva, CUDA, m) {
  m.impl("normalize_pack", &forward_gpu);
  m.impl("normalize_pack_backward", &backward_gpu);
}

}  // namespace
}  // namespace megaeva::normalize_pack
