// The CUDA source of csrc/normalize_pack on the emulator, called through ctypes by test_normalize_pack_cuda_source.py.
#include "normalize_pack/normalize_pack_cuda.cu"

using namespace megaeva;
using namespace megaeva::normalize_pack;

namespace {

template <typename Params>
bool takes_wide_loads(const Params& params, Scalar scalar) {
  switch (scalar) {
    case Scalar::kFloat: return wide_loads<float>(params);
    case Scalar::kDouble: return wide_loads<double>(params);
    case Scalar::kBFloat16: return wide_loads<__nv_bfloat16>(params);
    case Scalar::kHalf: return wide_loads<__half>(params);
  }
  return false;
}

}  // namespace

extern "C" int forward(std::int64_t scalar, std::int64_t* was_wide, const void* image, const void* text, void* packed,
                       void* inverse_norm, std::int64_t image_stride, std::int64_t text_stride, std::int64_t batch,
                       std::int64_t num_rows, std::int64_t width, double epsilon) {
  const ForwardParams params{image,       text,  packed,   inverse_norm, image_stride,
                             text_stride, batch, num_rows, width,        epsilon};
  *was_wide = takes_wide_loads(params, static_cast<Scalar>(scalar));
  return forward_cuda(params, static_cast<Scalar>(scalar), nullptr);
}

extern "C" int backward(std::int64_t scalar, std::int64_t* was_wide, const void* grad_packed, const void* image,
                        const void* text, const void* inverse_norm, void* grad_image, void* grad_text,
                        std::int64_t grad_stride, std::int64_t image_stride, std::int64_t text_stride,
                        std::int64_t batch, std::int64_t num_rows, std::int64_t width, double epsilon) {
  const BackwardParams params{grad_packed, image,        text,        inverse_norm, grad_image, grad_text,
                              grad_stride, image_stride, text_stride, batch,        num_rows,   width,     epsilon};
  *was_wide = takes_wide_loads(params, static_cast<Scalar>(scalar));
  return backward_cuda(params, static_cast<Scalar>(scalar), nullptr);
}
