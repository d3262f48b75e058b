// Stands in for CUDA's half: the compiler's own binary16, rounding to nearest even as the device does.
#pragma once

#include "cuda_runtime_api.h"

using __half = _Float16;
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half value) { return static_cast<float>(value); }
inline __half __float2half_rn(float value) { return static_cast<__half>(value); }
inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
inline __half2 __float22half2_rn(float2 pair) { return {__float2half_rn(pair.x), __float2half_rn(pair.y)}; }
