// Arguments of the LayerNorm kernels. No torch header.
//
//   z_d  = (x_d - mean) rstd,  rstd = 1 / sqrt(mean of (x - mean)^2 + epsilon)       over the W elements of a row
//   y_d  = z_d weight_d + bias_d
//   dx_d = rstd (g_d weight_d - mean(g weight) - z_d mean(g weight z))
//   dweight_d = sum over rows of g_d z_d;  dbias_d = sum over rows of g_d
#pragma once

#include <cstdint>

namespace megaeva::layer_norm {

struct Params {
  const void* x;       // [rows, width], contiguous
  const void* weight;  // [width]
  const void* bias;    // [width]; forward only
  void* y;             // [rows, width]; forward only
  void* mean;          // [rows], float (double for double); read by the backward pass, like the next
  void* rstd;          // [rows]
  const void* grad;    // [rows, width]; backward only, like the rest
  void* grad_x;        // [rows, width]
  void* partial;       // [parts, 2, width], accumulation type: each part's share of dweight and dbias
  std::int64_t rows;
  std::int64_t width;
  std::int64_t parts;
  double epsilon;
};

}  // namespace megaeva::layer_norm
