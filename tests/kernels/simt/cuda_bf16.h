// Stands in for CUDA's bfloat16: the upper half of a float, rounding to nearest even as the device does.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "cuda_runtime_api.h"

struct __nv_bfloat16 {
  std::uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (std::isnan(value)) return {0x7fff};
  const std::uint32_t wide = std::bit_cast<std::uint32_t>(value);
  return {static_cast<std::uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 pair) { return {__bfloat162float(pair.x), __bfloat162float(pair.y)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 pair) {
  return {__float2bfloat16_rn(pair.x), __float2bfloat16_rn(pair.y)};
}
