// Arguments of the SwiGLU kernels. No torch header.
//
//   y_f     = silu(x_f) x_(F+f),  silu(g) = g s, s = sigmoid(g)          each row of 2 F elements: gates, then ups
//   dx_f    = dy_f x_(F+f) s (1 + g (1 - s))
//   dx_(F+f) = dy_f silu(g)
#pragma once

#include <cstdint>

namespace megaeva::swiglu {

struct Params {
  const void* x;     // [rows, 2 * width], contiguous
  void* y;           // [rows, width], contiguous; forward only
  const void* grad;  // as y; backward only, like the next
  void* grad_x;      // as x
  std::int64_t rows;
  std::int64_t width;
};

}  // namespace megaeva::swiglu
