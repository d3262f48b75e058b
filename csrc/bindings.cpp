// The schemas of every native operator. Kernels register themselves beside their code (TORCH_LIBRARY_IMPL); fake and
// autograd registrations are in megaeva/ops, beside the plain-PyTorch reference.

#include <torch/library.h>

#include <cstdint>
#include <string>

namespace {

// Of the schemas below: raised together with VERSION in megaeva/ops/__init__.py when one of them changes, so that a
// library that was built before is refused with a line instead of failing in a call.
constexpr std::int64_t kVersion = 1;

std::int64_t version() { return kVersion; }

// Devices this library was compiled for, comma separated; megaeva.ops asks once.
std::string built_for() {
#ifdef MEGAEVA_WITH_CUDA
  return "cpu,cuda";
#else
  return "cpu";
#endif
}

}  // namespace

TORCH_LIBRARY(megaeva, m) {
  m.def("version() -> int", &version);
  m.def("built_for() -> str", &built_for);

  // Self-attention from the output of the linear of q, k and v, rotary angles included.
  m.def(
      "attention(Tensor qkv_SBX, Tensor? cos_sin, int num_heads, bool causal) -> (Tensor out_SBD, "
      "Tensor log2_sum_BAS)");
  m.def(
      "attention_backward(Tensor grad_out_SBD, Tensor qkv_SBX, Tensor? cos_sin, Tensor out_SBD, Tensor log2_sum_BAS, "
      "int num_heads, bool causal) -> Tensor grad_qkv_SBX");
  m.def("swiglu(Tensor x) -> Tensor");
  m.def("swiglu_backward(Tensor grad, Tensor x) -> Tensor grad_x");
  m.def(
      "layer_norm(Tensor x, Tensor weight, Tensor bias, float epsilon) -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "layer_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor rstd) -> "
      "(Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");

  m.def("normalize_pack(Tensor image_BE, Tensor? text_BE, float epsilon) -> (Tensor packed, Tensor inverse_norm)");
  m.def(
      "normalize_pack_backward(Tensor grad_packed, Tensor image_BE, Tensor? text_BE, Tensor inverse_norm, "
      "float epsilon) -> (Tensor grad_image_BE, Tensor grad_text_BE)");

  m.def(
      "infonce_forward(Tensor query_BE, Tensor key_GE, Tensor scale, int first) -> (Tensor lse_query_B, "
      "Tensor lse_key_G, Tensor pair_query_B)");
  m.def(
      "infonce_backward(Tensor query_BE, Tensor key_GE, Tensor scale, Tensor factor, Tensor lse_query_B, "
      "Tensor lse_key_G, Tensor pair_query_B, Tensor pair_key_G, int first, float pair_weight, float uniform, "
      "int key_begin, int key_end, ScalarType dtype) -> (Tensor grad_query_BE, Tensor grad_key_KE, "
      "Tensor scale_share)");
  m.def("sigmoid_forward(Tensor query_BE, Tensor key_GE, Tensor scale, Tensor bias, int first) -> Tensor total");
  m.def(
      "sigmoid_backward(Tensor query_BE, Tensor key_GE, Tensor scale, Tensor bias, Tensor factor, int first, "
      "int key_begin, int key_end, ScalarType dtype) -> (Tensor grad_query_BE, Tensor grad_key_KE, "
      "Tensor scale_share, Tensor bias_share)");
}
