// Arguments of the normalise-and-pack kernels. No torch or CUDA header: the .cu compiles in seconds.
//
//   norm_i    = sqrt(sum_e x_ie^2)                    x: rows of image, then rows of text where there is text
//   inverse_i = 1 / max(norm_i, epsilon)              as torch.nn.functional.normalize
//   packed_i  = x_i / max(norm_i, epsilon)
//   dx_i      = inverse_i * (g_i - x_i * inverse_i^2 * <g_i, x_i>)      where norm_i > epsilon
//   dx_i      = inverse_i * g_i                                         where epsilon won
#pragma once

#include <cstdint>

#include "common/scalar.h"

namespace megaeva::normalize_pack {

struct ForwardParams {
  const void* image;         // [batch, width], rows image_stride elements apart, elements of a row adjacent
  const void* text;          // [batch, width], or null
  void* packed;              // [num_rows, width], contiguous
  void* inverse_norm;        // [num_rows], float (double for kDouble)
  std::int64_t image_stride;
  std::int64_t text_stride;
  std::int64_t batch;
  std::int64_t num_rows;     // 2 * batch, and batch without text
  std::int64_t width;
  double epsilon;
};

struct BackwardParams {
  const void* grad_packed;   // [num_rows, width], rows grad_stride elements apart
  const void* image;
  const void* text;
  const void* inverse_norm;  // what the forward pass wrote
  void* grad_image;          // [batch, width], contiguous
  void* grad_text;           // the same, or null
  std::int64_t grad_stride;
  std::int64_t image_stride;
  std::int64_t text_stride;
  std::int64_t batch;
  std::int64_t num_rows;
  std::int64_t width;
  double epsilon;
};

// Defined in normalize_pack_cuda.cu. They enqueue on `stream` (a cudaStream_t) of the current device and return a
// cudaError_t. batch must be positive.
int forward_cuda(const ForwardParams& params, Scalar scalar, void* stream);
int backward_cuda(const BackwardParams& params, Scalar scalar, void* stream);

}  // namespace megaeva::normalize_pack
