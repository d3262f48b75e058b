// The schemas of every native operator. Kernels register themselves beside their code (TORCH_LIBRARY_IMPL); fake and
// autograd registrations are in megaeva/ops, beside the plain-PyTorch reference.

#include <torch/library.h>

#include <string>

namespace {

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
  m.def("built_for() -> str", &built_for);

  m.def(
      "normalize_pack(Tensor image_BE, Tensor text_BE, float epsilon) -> (Tensor packed_2BE, Tensor inverse_norm_2B)");
  m.def(
      "normalize_pack_backward(Tensor grad_packed_2BE, Tensor image_BE, Tensor text_BE, Tensor inverse_norm_2B, "
      "float epsilon) -> (Tensor grad_image_BE, Tensor grad_text_BE)");
}
