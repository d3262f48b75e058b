// What device code and its launcher use of CUDA, on the emulator of simt.h.
#pragma once

#include <math.h>

#include <bit>
#include <type_traits>

#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static_assert(false, "declare shared memory with MEGAEVA_SHARED, csrc/common/kernel.h");

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;

#define SIMT_VECTOR2(NAME, TYPE)              \
  struct alignas(2 * sizeof(TYPE)) NAME {     \
    TYPE x, y;                                \
  };                                          \
  inline NAME make_##NAME(TYPE x, TYPE y) { return {x, y}; }
#define SIMT_VECTOR4(NAME, TYPE)              \
  struct alignas(16) NAME {                   \
    TYPE x, y, z, w;                          \
  };                                          \
  inline NAME make_##NAME(TYPE x, TYPE y, TYPE z, TYPE w) { return {x, y, z, w}; }
SIMT_VECTOR2(float2, float)
SIMT_VECTOR2(double2, double)
SIMT_VECTOR2(int2, int)
SIMT_VECTOR2(uint2, unsigned)
SIMT_VECTOR4(float4, float)
SIMT_VECTOR4(int4, int)
SIMT_VECTOR4(uint4, unsigned)
#undef SIMT_VECTOR2
#undef SIMT_VECTOR4

inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
template <typename T>
T __ldg(const T* pointer) {
  return *pointer;
}
template <typename T>
  requires std::is_arithmetic_v<T>
T min(T a, std::type_identity_t<T> b) {
  return b < a ? b : a;
}
template <typename T>
  requires std::is_arithmetic_v<T>
T max(T a, std::type_identity_t<T> b) {
  return a < b ? b : a;
}

inline void __syncthreads(simt::Where where = simt::Where::current()) {
  simt::self().wait = {"__syncthreads", 0, where};
  simt::release_block();
  simt::pause();
}

inline void __syncwarp(unsigned mask = 0xffffffffu, simt::Where where = simt::Where::current()) {
  if (mask != 0xffffffffu) simt::fail("calls __syncwarp with a partial mask: the emulator knows only the whole warp");
  simt::meet(simt::kSyncWarp, mask, 0, where);
}

namespace simt {

// The value of lane `source`, which must take part in the operation.
template <typename T>
T shuffle(const char* operation, unsigned mask, T value, int source, Where where) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "shuffles move 32 or 64 bits");
  if (source < 0 || source >= warpSize || (mask >> source & 1) == 0) {
    fail(std::string("calls ") + operation + " for lane " + std::to_string(source) + ", which its mask leaves out");
  }
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const Lanes& lanes = meet(operation, mask, bits, where);
  std::memcpy(&value, &lanes[source], sizeof value);
  return value;
}

inline int lane() { return lane_of(block->running); }
inline int segment(int width) { return lane() / width * width; }

}  // namespace simt

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, simt::Where where = simt::Where::current()) {
  return simt::shuffle("__shfl_sync", mask, value, simt::segment(width) + (source & (width - 1)), where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, simt::Where where = simt::Where::current()) {
  const int source = simt::lane() ^ lane_mask, end = simt::segment(width) + width;
  return simt::shuffle("__shfl_xor_sync", mask, value, source < end ? source : simt::lane(), where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, simt::Where where = simt::Where::current()) {
  const int source = simt::lane() + static_cast<int>(by), end = simt::segment(width) + width;
  return simt::shuffle("__shfl_down_sync", mask, value, source < end ? source : simt::lane(), where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, simt::Where where = simt::Where::current()) {
  const int source = simt::lane() - static_cast<int>(by), begin = simt::segment(width);
  return simt::shuffle("__shfl_up_sync", mask, value, source >= begin ? source : simt::lane(), where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Where where = simt::Where::current()) {
  const simt::Lanes& lanes = simt::meet("__ballot_sync", mask, predicate != 0, where);
  unsigned bits = 0;
  for (int lane = 0; lane < warpSize; ++lane) bits |= static_cast<unsigned>(lanes[lane]) << lane;
  return bits;
}
inline int __any_sync(unsigned mask, int predicate, simt::Where where = simt::Where::current()) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, simt::Where where = simt::Where::current()) {
  return __ballot_sync(mask, predicate, where) == mask;
}
