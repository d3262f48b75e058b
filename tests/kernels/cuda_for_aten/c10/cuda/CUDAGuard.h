// See CUDAException.h.
#pragma once

#include <c10/core/Device.h>

namespace c10::cuda {

struct CUDAGuard {
  explicit CUDAGuard(Device) {}
  ~CUDAGuard() {}  // so that it is not an unused variable
};

}  // namespace c10::cuda
