// Host functions of contrastive_cuda.cu: a pass over one tile in contiguous device memory. No torch or CUDA header.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/scalar.h"
#include "contrastive/params.h"

namespace megaeva::contrastive {

// Weights of half features are half too, because tensor cores multiply only like with like; those of a batch of 100,000
// (1e-5 and less) would be denormal, so they are stored times this. They stay below 16 = 65536 / gain by a wide margin:
// a probability is at most 1, up to the rounding of its logit.
constexpr double kHalfWeightGain = 4096;

// Bytes of scratch that a pass over a tile of this size needs.
std::size_t scratch_bytes(std::int64_t rows, std::int64_t columns);

// They enqueue on `stream` (a cudaStream_t) of the current device and return a cudaError_t; rows and columns are positive.
// `scalar` is the features' type. Weights of bfloat16 and half features have the features' type, the others are of type A
// and may take the product's place. Sums are made in one order, whatever the device does.
int infonce_forward_cuda(const InfonceForwardParams& params, double* scratch, Scalar scalar, void* stream);
int infonce_backward_cuda(const InfonceBackwardParams& params, double* scratch, Scalar scalar, void* stream);
int sigmoid_forward_cuda(const SigmoidForwardParams& params, double* scratch, Scalar scalar, void* stream);
int sigmoid_backward_cuda(const SigmoidBackwardParams& params, double* scratch, Scalar scalar, void* stream);

}  // namespace megaeva::contrastive
