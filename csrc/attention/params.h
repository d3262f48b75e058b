// Arguments of the attention kernels. No torch header.
//
//   q, k     = rotate(qkv[..., 0, :]), rotate(qkv[..., 1, :]);  v = qkv[..., 2, :]          of one sample and head, S x K
//   rotate(x)_2i   = x_2i cos_2i - x_2i+1 sin_2i                 where there are angles, else x
//   rotate(x)_2i+1 = x_2i+1 cos_2i+1 + x_2i sin_2i+1
//   s_ij     = scale <q_i, k_j>                                  j <= i where causal
//   lse_i    = log sum_j exp(s_ij);  p_ij = exp(s_ij - lse_i)
//   out_i    = sum_j p_ij v_j
//   delta_i  = <g_i, out_i>                                      g: gradient of out
//   ds_ij    = p_ij (<g_i, v_j> - delta_i) scale
//   dv_j     = sum_i p_ij g_i;  dk_j = sum_i ds_ij q_i;  dq_i = sum_j ds_ij k_j;  dq and dk are turned back by rotate^T
#pragma once

#include <cstdint>

#include "common/scalar.h"

namespace megaeva::attention {

struct Params {
  const void* qkv;          // [length, batch, heads, 3, width], contiguous
  const float* cos_sin;     // [2, length, batch or 1, width], contiguous; null: no rotation
  void* out;                // [length, batch, heads, width], contiguous; read by the backward pass
  void* log2_sum;           // [batch, heads, length], float (double for kDouble); read by the backward pass
  const void* grad_out;     // as out; backward only, like the next
  void* grad_qkv;           // as qkv
  std::int64_t length;
  std::int64_t batch;
  std::int64_t heads;
  std::int64_t width;       // even
  std::int64_t angle_batch;  // batch or 1
  bool causal;
  double scale;
};

}  // namespace megaeva::attention
