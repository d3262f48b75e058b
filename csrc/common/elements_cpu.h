// Elements of rows on a CPU: to float and back, and powers of two, all without a branch, so that loops vectorise.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/multiversion.h"

namespace megaeva {

// What sums over T are kept in.
template <typename T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

MEGAEVA_INLINE float widen(float x) { return x; }
MEGAEVA_INLINE double widen(double x) { return x; }
MEGAEVA_INLINE float widen(c10::Half x) { return static_cast<float>(x); }
MEGAEVA_INLINE float widen(c10::BFloat16 x) { return std::bit_cast<float>(static_cast<std::uint32_t>(x.x) << 16); }

// The upper half of the nearest bf16, ties to even; a NaN stays one.
MEGAEVA_INLINE std::uint32_t bfloat16_bits(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return x == x ? rounded : 0x7FC0u;
}

template <typename T, typename A>
MEGAEVA_INLINE T narrow(A x) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    return c10::BFloat16(static_cast<unsigned short>(bfloat16_bits(x)), c10::BFloat16::from_bits());
  } else {
    return static_cast<T>(x);
  }
}

// 2^x for -126 <= x <= 126. Relative error 1e-7; NaN stays NaN.
MEGAEVA_INLINE float exp2_within(float x) {
  const float shifted = x + 12582912.0f;  // 1.5 * 2^23: the integer nearest x is left in the low bits
  const float f = x - (shifted - 12582912.0f);
  float y = 0.00015469731999f;
  y = y * f + 0.00134004321653f;
  y = y * f + 0.00961802560290f;
  y = y * f + 0.05550327214209f;
  y = y * f + 0.24022651213596f;
  y = y * f + 0.69314720670662f;
  y = y * f + 1.0f;
  return y * std::bit_cast<float>((std::bit_cast<std::int32_t>(shifted) << 23) + 0x3F800000);
}

// 2^x for x <= 0 (NaN stays NaN), 0 below the smallest normal number.
MEGAEVA_INLINE float exp2_below(float x) {
  const float power = exp2_within(x < -126.0f ? -126.0f : x);
  return x < -126.0f ? 0.0f : power;
}
MEGAEVA_INLINE double exp2_below(double x) { return std::exp2(x); }

// 1 / (1 + exp(-x)); beyond +-87 what it is there.
MEGAEVA_INLINE float sigmoid(float x) {
  float exponent = x * -1.44269504f;
  exponent = exponent < -126.0f ? -126.0f : exponent;
  exponent = exponent > 126.0f ? 126.0f : exponent;
  return 1.0f / (1.0f + exp2_within(exponent));
}
MEGAEVA_INLINE double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

}  // namespace megaeva
