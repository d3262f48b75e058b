// The CUDA launcher of csrc/contrastive on CPU tensors, its kernels on the emulator: operators of the namespace
// megaeva_launch, for test_contrastive_cuda_launch.py. The launcher's own registration is left out.
#include <torch/library.h>

#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(NAMESPACE, KEY, LIBRARY) [[maybe_unused]] void register_nothing(torch::Library& LIBRARY)

#include "contrastive/contrastive_cuda_launch.cpp"
// after ATen, which the names of the emulated CUDA runtime would confuse
#include "contrastive/contrastive_cuda.cu"

TORCH_LIBRARY(megaeva_launch, m) {
  using namespace megaeva::contrastive;
  m.def("infonce_forward", &infonce_forward<CudaEngine>);
  m.def("infonce_backward", &infonce_backward<CudaEngine>);
  m.def("sigmoid_forward", &sigmoid_forward<CudaEngine>);
  m.def("sigmoid_backward", &sigmoid_backward<CudaEngine>);
}
