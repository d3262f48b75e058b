// Element types a kernel may be asked for, without torch or CUDA headers: host launchers and device code share this file.
#pragma once

namespace megaeva {

// Sums are accumulated in float, and in double for kDouble.
enum class Scalar { kFloat, kDouble, kBFloat16, kHalf };

}  // namespace megaeva
