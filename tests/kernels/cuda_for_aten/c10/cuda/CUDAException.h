// Stands in for torch's header where a CUDA launcher runs on CPU tensors and the emulator.
#pragma once

#include <c10/util/Exception.h>

#include "cuda_runtime_api.h"

#define C10_CUDA_CHECK(EXPRESSION)                                            \
  do {                                                                        \
    const cudaError_t status = EXPRESSION;                                    \
    TORCH_CHECK(status == cudaSuccess, "the emulator reports ", simt::error); \
  } while (0)
