// Stands in for CUDA's half on a CPU: the compiler's own binary16, rounding to nearest even as the device does.
#pragma once

using __half = _Float16;

inline float __half2float(__half value) { return static_cast<float>(value); }
inline __half __float2half_rn(float value) { return static_cast<__half>(value); }
