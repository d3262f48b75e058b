// The CUDA kernels of csrc/normalize_pack, compiled as C++ against cuda_on_cpu/ and called through ctypes by test_normalize_pack_cuda_source.py.
// Launch code is left out by the #ifdef __CUDACC__ in the source; what it chooses (grid, block, vector width) is repeated here.
#include "normalize_pack/normalize_pack_cuda.cu"

using namespace megaeva::normalize_pack;

namespace {

template <typename T, typename Params, typename Wide, typename Narrow>
int run(const Params& params, Wide wide, Narrow narrow) {
  const unsigned num_blocks = (2 * params.batch + kWarpsPerBlock - 1) / kWarpsPerBlock;
  const bool is_wide = wide_loads<T>(params);
  if (is_wide) {
    run_on_cpu(wide, num_blocks, kWarp * kWarpsPerBlock, params);
  } else {
    run_on_cpu(narrow, num_blocks, kWarp * kWarpsPerBlock, params);
  }
  return is_wide;
}

}  // namespace

#define EXPORT(NAME, TYPE)                                                                                       \
  extern "C" int forward_##NAME(const void* image, const void* text, void* packed, void* inverse_norm,           \
                                std::int64_t image_stride, std::int64_t text_stride, std::int64_t batch,         \
                                std::int64_t width, double epsilon) {                                            \
    return run<TYPE>(                                                                                            \
        ForwardParams{image, text, packed, inverse_norm, image_stride, text_stride, batch, width, epsilon},      \
        forward_kernel<TYPE, 16 / sizeof(TYPE)>, forward_kernel<TYPE, 1>);                                       \
  }                                                                                                              \
  extern "C" int backward_##NAME(const void* grad_packed, const void* image, const void* text,                   \
                                 const void* inverse_norm, void* grad_image, void* grad_text,                    \
                                 std::int64_t grad_stride, std::int64_t image_stride, std::int64_t text_stride,  \
                                 std::int64_t batch, std::int64_t width, double epsilon) {                       \
    return run<TYPE>(BackwardParams{grad_packed, image, text, inverse_norm, grad_image, grad_text, grad_stride,  \
                                    image_stride, text_stride, batch, width, epsilon},                           \
                     backward_kernel<TYPE, 16 / sizeof(TYPE)>, backward_kernel<TYPE, 1>);                        \
  }

EXPORT(float32, float)
EXPORT(float64, double)
EXPORT(bfloat16, __nv_bfloat16)
EXPORT(float16, __half)
