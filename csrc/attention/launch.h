// Checks and allocation of attention, apart from the kernels.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "attention/params.h"
#include "common/dispatch.h"

namespace megaeva::attention {

inline Params make_params(const at::Tensor& qkv, const std::optional<at::Tensor>& cos_sin, std::int64_t num_heads,
                          bool causal, const char* name) {
  TORCH_CHECK(qkv.dim() == 3 && num_heads > 0 && qkv.size(2) % (6 * num_heads) == 0, name, ": qkv_SBX ", qkv.sizes(),
              " must be [length, batch, ", num_heads, " heads * 3 * an even head width]; pass the linear's output.");
  Params p{};
  p.length = qkv.size(0);
  p.batch = qkv.size(1);
  p.heads = num_heads;
  p.width = qkv.size(2) / (3 * num_heads);
  p.angle_batch = 1;
  p.causal = causal;
  p.scale = 1.0 / std::sqrt(static_cast<double>(p.width));
  if (cos_sin.has_value()) {
    const at::Tensor& angles = *cos_sin;
    TORCH_CHECK(angles.scalar_type() == at::kFloat && angles.is_contiguous() && angles.device() == qkv.device() &&
                    angles.dim() == 4 && angles.size(0) == 2 && angles.size(1) == p.length &&
                    (angles.size(2) == 1 || angles.size(2) == p.batch) && angles.size(3) == p.width,
                name, ": cos_sin ", angles.sizes(), " ", angles.scalar_type(), " must be contiguous float32 [2, ",
                p.length, ", 1 or ", p.batch, ", ", p.width, "] on ", qkv.device(), ".");
    p.cos_sin = angles.const_data_ptr<float>();
    p.angle_batch = angles.size(2);
  }
  return p;
}

// run(params, scalar) does the work and is not called where there is none.
template <typename Run>
std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& qkv, const std::optional<at::Tensor>& cos_sin,
                                           std::int64_t num_heads, bool causal, Run run) {
  Params p = make_params(qkv, cos_sin, num_heads, causal, "attention");
  const Scalar scalar = scalar_of(qkv, "attention");
  const at::Tensor dense = qkv.contiguous();
  at::Tensor out = at::empty({p.length, p.batch, p.heads * p.width}, qkv.options());
  const at::ScalarType wide = scalar == Scalar::kDouble ? at::kDouble : at::kFloat;
  at::Tensor log2_sum = at::empty({p.batch, p.heads, p.length}, qkv.options().dtype(wide));
  p.qkv = dense.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.log2_sum = log2_sum.mutable_data_ptr();
  if (out.numel() > 0) run(p, scalar);
  return {out, log2_sum};
}

template <typename Run>
at::Tensor backward(const at::Tensor& grad_out, const at::Tensor& qkv, const std::optional<at::Tensor>& cos_sin,
                    const at::Tensor& out, const at::Tensor& log2_sum, std::int64_t num_heads, bool causal, Run run) {
  Params p = make_params(qkv, cos_sin, num_heads, causal, "attention_backward");
  const Scalar scalar = scalar_of(qkv, "attention_backward");
  const at::ScalarType wide = scalar == Scalar::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK(out.is_contiguous() && out.sizes() == at::IntArrayRef({p.length, p.batch, p.heads * p.width}) &&
                  out.scalar_type() == qkv.scalar_type() && log2_sum.is_contiguous() && log2_sum.scalar_type() == wide &&
                  log2_sum.sizes() == at::IntArrayRef({p.batch, p.heads, p.length}),
              "attention_backward: out_SBD and log2_sum_BAS must be the outputs of attention for this qkv_SBX.");
  TORCH_CHECK(grad_out.sizes() == out.sizes() && grad_out.scalar_type() == out.scalar_type(),
              "attention_backward: grad_out_SBD ", grad_out.sizes(), " ", grad_out.scalar_type(),
              " must be shaped and typed like out_SBD ", out.sizes(), " ", out.scalar_type(), ".");
  const at::Tensor dense = qkv.contiguous(), dense_grad = grad_out.contiguous();
  at::Tensor grad_qkv = at::empty(qkv.sizes(), qkv.options());
  p.qkv = dense.const_data_ptr();
  p.out = const_cast<void*>(out.const_data_ptr());
  p.log2_sum = const_cast<void*>(log2_sum.const_data_ptr());
  p.grad_out = dense_grad.const_data_ptr();
  p.grad_qkv = grad_qkv.mutable_data_ptr();
  if (out.numel() > 0) run(p, scalar);
  return grad_qkv;
}

}  // namespace megaeva::attention
