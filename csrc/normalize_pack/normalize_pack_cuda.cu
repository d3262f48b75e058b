// Normalise-and-pack on a GPU: one warp for each row, 16-byte loads where width and alignment allow. Memory bound: the
// second read of a row hits the cache, so a row costs one read and one write of global memory.
//
// No torch header here (see csrc/README.md). test_normalize_pack_cuda_source.py runs this source on a CPU; on a GPU it
// has not run.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "common/kernel.h"
#include "normalize_pack/params.h"

namespace megaeva::normalize_pack {
namespace {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 4;

template <typename T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <typename T>
using Accumulate = typename AccumulateOf<T>::type;

// Named conversions: torch's build switches the implicit ones of half and bfloat16 off.
__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float widen(__half value) { return __half2float(value); }
__device__ inline void narrow(float value, float& out) { out = value; }
__device__ inline void narrow(double value, double& out) { out = value; }
__device__ inline void narrow(float value, __nv_bfloat16& out) { out = __float2bfloat16_rn(value); }
__device__ inline void narrow(float value, __half& out) { out = __float2half_rn(value); }

template <typename T, int kLanes>
struct alignas(sizeof(T) * kLanes) Vector {
  T lane[kLanes];
};

__device__ inline double divisor_of(double sum, double epsilon) {
  const double norm = sqrt(sum);
  return norm < epsilon ? epsilon : norm;  // not fmax: a NaN norm must stay NaN, as it does in torch
}

template <typename A>
__device__ inline A warp_sum(A value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

template <typename T>
__device__ inline const T* row_of(const void* image, const void* text, std::int64_t image_stride,
                                  std::int64_t text_stride, std::int64_t batch, std::int64_t row) {
  return row < batch ? static_cast<const T*>(image) + row * image_stride
                     : static_cast<const T*>(text) + (row - batch) * text_stride;
}

template <typename T, int kLanes>
__global__ void forward_kernel(ForwardParams p) {
  using A = Accumulate<T>;
  using V = Vector<T, kLanes>;
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (row >= p.num_rows) return;  // whole warps leave, so the shuffles below see all 32 lanes
  const int lane = threadIdx.x % kWarp;
  const std::int64_t num_vectors = p.width / kLanes;
  const V* x = reinterpret_cast<const V*>(row_of<T>(p.image, p.text, p.image_stride, p.text_stride, p.batch, row));
  A sum = 0;
  for (std::int64_t v = lane; v < num_vectors; v += kWarp) {
    const V piece = x[v];
    for (int i = 0; i < kLanes; ++i) {
      const A value = widen(piece.lane[i]);
      sum += value * value;
    }
  }
  const double divisor = divisor_of(static_cast<double>(warp_sum(sum)), p.epsilon);
  if (lane == 0) static_cast<A*>(p.inverse_norm)[row] = static_cast<A>(1.0 / divisor);
  const A divide_by = static_cast<A>(divisor);
  V* y = reinterpret_cast<V*>(static_cast<T*>(p.packed) + row * p.width);
  for (std::int64_t v = lane; v < num_vectors; v += kWarp) {
    V piece = x[v];
    for (int i = 0; i < kLanes; ++i) narrow(widen(piece.lane[i]) / divide_by, piece.lane[i]);
    y[v] = piece;
  }
}

template <typename T, int kLanes>
__global__ void backward_kernel(BackwardParams p) {
  using A = Accumulate<T>;
  using V = Vector<T, kLanes>;
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (row >= p.num_rows) return;
  const int lane = threadIdx.x % kWarp;
  const std::int64_t num_vectors = p.width / kLanes;
  const V* x = reinterpret_cast<const V*>(row_of<T>(p.image, p.text, p.image_stride, p.text_stride, p.batch, row));
  const V* g = reinterpret_cast<const V*>(static_cast<const T*>(p.grad_packed) + row * p.grad_stride);
  V* dx = reinterpret_cast<V*>(row < p.batch ? static_cast<T*>(p.grad_image) + row * p.width
                                             : static_cast<T*>(p.grad_text) + (row - p.batch) * p.width);
  const A inverse = static_cast<const A*>(p.inverse_norm)[row];
  A along = 0;  // inverse^2 * <g, x>; stays zero where epsilon won and the norm is a constant
  if (!(inverse >= static_cast<A>(1.0 / p.epsilon))) {
    for (std::int64_t v = lane; v < num_vectors; v += kWarp) {
      const V x_piece = x[v], g_piece = g[v];
      for (int i = 0; i < kLanes; ++i) along += widen(g_piece.lane[i]) * widen(x_piece.lane[i]);
    }
    along = warp_sum(along) * inverse * inverse;
  }
  for (std::int64_t v = lane; v < num_vectors; v += kWarp) {
    const V x_piece = x[v], g_piece = g[v];
    V out;
    for (int i = 0; i < kLanes; ++i) {
      narrow(inverse * (widen(g_piece.lane[i]) - widen(x_piece.lane[i]) * along), out.lane[i]);
    }
    dx[v] = out;
  }
}

bool aligned(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; }

// Whether every row of these matrices starts at a multiple of 16 bytes.
template <typename T>
bool wide_loads(const ForwardParams& p) {
  constexpr std::int64_t lanes = 16 / sizeof(T);
  return p.width % lanes == 0 && p.image_stride % lanes == 0 && p.text_stride % lanes == 0 && aligned(p.image) &&
         aligned(p.text) && aligned(p.packed);
}

template <typename T>
bool wide_loads(const BackwardParams& p) {
  constexpr std::int64_t lanes = 16 / sizeof(T);
  return p.width % lanes == 0 && p.image_stride % lanes == 0 && p.text_stride % lanes == 0 &&
         p.grad_stride % lanes == 0 && aligned(p.image) && aligned(p.text) && aligned(p.grad_packed) &&
         aligned(p.grad_image) && aligned(p.grad_text);
}

template <typename Params>
unsigned num_blocks(const Params& p) {
  return static_cast<unsigned>((p.num_rows + kWarpsPerBlock - 1) / kWarpsPerBlock);
}

template <typename T>
int launch_typed(const ForwardParams& p, void* stream) {
  const auto kernel = wide_loads<T>(p) ? forward_kernel<T, 16 / sizeof(T)> : forward_kernel<T, 1>;
  return launch(kernel, num_blocks(p), kWarp * kWarpsPerBlock, 0, stream, p);
}

template <typename T>
int launch_typed(const BackwardParams& p, void* stream) {
  const auto kernel = wide_loads<T>(p) ? backward_kernel<T, 16 / sizeof(T)> : backward_kernel<T, 1>;
  return launch(kernel, num_blocks(p), kWarp * kWarpsPerBlock, 0, stream, p);
}

template <typename Params>
int launch_scalar(const Params& p, Scalar scalar, void* stream) {
  switch (scalar) {
    case Scalar::kFloat: return launch_typed<float>(p, stream);
    case Scalar::kDouble: return launch_typed<double>(p, stream);
    case Scalar::kBFloat16: return launch_typed<__nv_bfloat16>(p, stream);
    case Scalar::kHalf: return launch_typed<__half>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int forward_cuda(const ForwardParams& params, Scalar scalar, void* stream) {
  return launch_scalar(params, scalar, stream);
}

int backward_cuda(const BackwardParams& params, Scalar scalar, void* stream) {
  return launch_scalar(params, scalar, stream);
}

}  // namespace megaeva::normalize_pack
