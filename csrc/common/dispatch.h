// From a tensor's dtype to Scalar, for host launchers.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include "common/scalar.h"

namespace megaeva {

// The kernel type of `tensor`; an error naming the operator for a dtype no kernel exists for.
inline Scalar scalar_of(const at::Tensor& tensor, const char* operator_name) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Scalar::kFloat;
    case at::kDouble: return Scalar::kDouble;
    case at::kBFloat16: return Scalar::kBFloat16;
    case at::kHalf: return Scalar::kHalf;
    default:
      TORCH_CHECK(false, operator_name, ": dtype ", tensor.scalar_type(),
                  " must be float32, float64, bfloat16 or float16; convert the tensor first.");
  }
}

// `tensor` with unit stride along its last dimension, so that a row is contiguous; copied only when it is not.
inline at::Tensor with_dense_rows(const at::Tensor& tensor) {
  return tensor.size(-1) <= 1 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

}  // namespace megaeva
