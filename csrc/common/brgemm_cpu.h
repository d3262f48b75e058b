// Whether torch's brgemm (at::native::cpublas, oneDNN's kernels for small blocks) multiplies a type on this machine.
#pragma once

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include <cstdint>
#include <exception>

namespace megaeva {

// Terms of a sum that lie side by side in a packed right factor: as many as fill 32 bits.
template <typename T>
constexpr std::int64_t kGroup = static_cast<std::int64_t>(4 / sizeof(T));

// Asked by torch.backends.mkldnn, and by multiplying: what oneDNN lacks here it says in an exception, which is not
// always torch's (a torch without these kernels, ONEDNN_MAX_CPU_ISA).
template <typename T>
bool has_brgemm() {
  if (!at::globalContext().userEnabledMkldnn()) return false;
  static const bool works = [] {
    try {
      constexpr std::int64_t columns = 64;
      const T left[2] = {T(1), T(2)};
      T right[2 * columns] = {};
      for (std::int64_t row = 0; row < 2; ++row) right[row / kGroup<T> * columns * kGroup<T> + row % kGroup<T>] = T(3);
      float out = 0;
      at::native::cpublas::brgemm(1, 1, 2, 2, columns, 1, false, left, right, &out, kGroup<T> > 1);
      at::native::cpublas::brgemm_release(kGroup<T> > 1);
      return out == 9.0f;
    } catch (const std::exception&) {
      return false;
    }
  }();
  return works;
}

// oneDNN accepts bfloat16 on every AVX-512 machine, but only with instructions for it is it faster than float32.
inline bool has_bfloat16_products() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16") && has_brgemm<c10::BFloat16>();
#else
  return false;
#endif
}

}  // namespace megaeva
