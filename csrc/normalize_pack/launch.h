// What the CPU and the CUDA launcher of normalise-and-pack share: checks, allocation, filling the params.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>
#include <tuple>

#include "common/dispatch.h"
#include "normalize_pack/params.h"

namespace megaeva::normalize_pack {

inline void check_inputs(const at::Tensor& image, const std::optional<at::Tensor>& text) {
  TORCH_CHECK(image.dim() == 2, "normalize_pack: image_BE ", image.sizes(),
              " must be a matrix; pass [batch, embedding].");
  if (!text) return;
  TORCH_CHECK(image.sizes() == text->sizes(), "normalize_pack: image_BE ", image.sizes(), " and text_BE ",
              text->sizes(), " must be two matrices of one shape; pass [batch, embedding] twice.");
  TORCH_CHECK(image.scalar_type() == text->scalar_type() && image.device() == text->device(),
              "normalize_pack: image_BE is ", image.scalar_type(), " on ", image.device(), ", text_BE ",
              text->scalar_type(), " on ", text->device(), "; they must agree, convert one of them.");
}

inline at::ScalarType inverse_norm_type(const at::Tensor& image) {
  return image.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// run(params, scalar) does the work and is not called for an empty batch. Without text, everything about it is empty.
template <typename Run>
std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& image, const std::optional<at::Tensor>& text,
                                           double epsilon, Run run) {
  check_inputs(image, text);
  const Scalar scalar = scalar_of(image, "normalize_pack");
  const std::int64_t batch = image.size(0), width = image.size(1), num_rows = text ? 2 * batch : batch;
  const at::Tensor image_rows = with_dense_rows(image);
  const at::Tensor text_rows = text ? with_dense_rows(*text) : at::empty({0, width}, image.options());
  at::Tensor packed = at::empty({num_rows, width}, image.options());
  at::Tensor inverse_norm = at::empty({num_rows}, image.options().dtype(inverse_norm_type(image)));
  if (batch > 0) {
    run(ForwardParams{image_rows.const_data_ptr(), text_rows.const_data_ptr(), packed.mutable_data_ptr(),
                      inverse_norm.mutable_data_ptr(), image_rows.stride(0), text_rows.stride(0), batch, num_rows,
                      width, epsilon},
        scalar);
  }
  return {packed, inverse_norm};
}

template <typename Run>
std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad_packed, const at::Tensor& image,
                                            const std::optional<at::Tensor>& text, const at::Tensor& inverse_norm,
                                            double epsilon, Run run) {
  check_inputs(image, text);
  const std::int64_t batch = image.size(0), width = image.size(1), num_rows = text ? 2 * batch : batch;
  TORCH_CHECK(grad_packed.dim() == 2 && grad_packed.size(0) == num_rows && grad_packed.size(1) == width &&
                  grad_packed.scalar_type() == image.scalar_type() && grad_packed.device() == image.device(),
              "normalize_pack_backward: grad_packed ", grad_packed.sizes(), " ", grad_packed.scalar_type(),
              " must be shaped and typed like the packed output of image_BE ", image.sizes(), " ",
              image.scalar_type(), ".");
  TORCH_CHECK(inverse_norm.dim() == 1 && inverse_norm.size(0) == num_rows && inverse_norm.is_contiguous() &&
                  inverse_norm.scalar_type() == inverse_norm_type(image) && inverse_norm.device() == image.device(),
              "normalize_pack_backward: inverse_norm must be the second output of normalize_pack.");
  const Scalar scalar = scalar_of(image, "normalize_pack_backward");
  const at::Tensor grad_rows = with_dense_rows(grad_packed);
  const at::Tensor image_rows = with_dense_rows(image);
  const at::Tensor text_rows = text ? with_dense_rows(*text) : at::empty({0, width}, image.options());
  at::Tensor grad_image = at::empty({batch, width}, image.options());
  at::Tensor grad_text = at::empty({num_rows - batch, width}, image.options());
  if (batch > 0) {
    run(BackwardParams{grad_rows.const_data_ptr(), image_rows.const_data_ptr(), text_rows.const_data_ptr(),
                       inverse_norm.const_data_ptr(), grad_image.mutable_data_ptr(), grad_text.mutable_data_ptr(),
                       grad_rows.stride(0), image_rows.stride(0), text_rows.stride(0), batch, num_rows, width,
                       epsilon},
        scalar);
  }
  return {grad_image, grad_text};
}

}  // namespace megaeva::normalize_pack
