// The CUDA source of csrc/contrastive on the emulator, called through ctypes by test_contrastive_cuda_source.py.
#include "contrastive/contrastive_cuda.cu"

using namespace megaeva;
using namespace megaeva::contrastive;

// Bytes, to what `bytes` points to.
extern "C" int scratch_for(std::int64_t rows, std::int64_t columns, std::int64_t* bytes) {
  *bytes = static_cast<std::int64_t>(scratch_bytes(rows, columns));
  return 0;
}

extern "C" int infonce_forward(std::int64_t scalar, const void* product, const void* scale, void* max_query,
                               double* sum_query, void* max_key, double* sum_key, void* pair_query, std::int64_t rows,
                               std::int64_t columns, std::int64_t pair, double* scratch) {
  const InfonceForwardParams params{product, scale,      max_query, sum_query, max_key,
                                    sum_key, pair_query, rows,      columns,   pair};
  return infonce_forward_cuda(params, scratch, static_cast<Scalar>(scalar), nullptr);
}

// Without `weight` the weights take the product's place.
extern "C" int infonce_backward(std::int64_t scalar, void* product, void* weight, const void* scale,
                                const void* lse_query, const void* lse_query_rest, const void* lse_key,
                                const void* lse_key_rest, const void* pair_query, const void* pair_key, double* share,
                                std::int64_t rows, std::int64_t columns, std::int64_t pair, double pair_weight,
                                double uniform, double* scratch) {
  const InfonceBackwardParams params{product,        weight == nullptr ? product : weight,
                                     scale,          lse_query,
                                     lse_query_rest, lse_key,
                                     lse_key_rest,   pair_query,
                                     pair_key,       share,
                                     rows,           columns,
                                     pair,           pair_weight,
                                     uniform};
  return infonce_backward_cuda(params, scratch, static_cast<Scalar>(scalar), nullptr);
}

extern "C" int sigmoid_forward(std::int64_t scalar, const void* product, const void* scale, const void* bias,
                               double* total, std::int64_t rows, std::int64_t columns, std::int64_t pair,
                               double* scratch) {
  const SigmoidForwardParams params{product, scale, bias, total, rows, columns, pair};
  return sigmoid_forward_cuda(params, scratch, static_cast<Scalar>(scalar), nullptr);
}

extern "C" int sigmoid_backward(std::int64_t scalar, void* product, void* weight, const void* scale, const void* bias,
                                double* scale_share, double* bias_share, std::int64_t rows, std::int64_t columns,
                                std::int64_t pair, double* scratch) {
  const SigmoidBackwardParams params{product,    weight == nullptr ? product : weight, scale, bias, scale_share,
                                     bias_share, rows, columns, pair};
  return sigmoid_backward_cuda(params, scratch, static_cast<Scalar>(scalar), nullptr);
}
