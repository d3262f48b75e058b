// The contrastive losses on a GPU: matrix products by ATen (cuBLAS, on tensor cores), passes by contrastive_cuda.cu.
// Compiled only with MEGAEVA_BUILD=cuda.
//
// Nothing waits for the device: scale, bias and factor stay there. Products of bfloat16 and half features are float, never
// rounded to the features' type, and so are the sums of their gradients. Products of float features follow torch's own
// setting (torch.backends.cuda.matmul.allow_tf32, off unless switched on): with TF32 a logit of 100 is off by up to 0.1.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "contrastive/contrastive_cuda.h"
#include "contrastive/launch.h"

namespace megaeva::contrastive {
namespace {

// 128 MiB of float products, and half as much for weights of bfloat16 or half. Smaller tiles leave too few blocks for the
// gradients of an E of 1024: 4096 x 1024 of them are 128 blocks of 128 x 256, about one for each processor of an H100.
constexpr std::int64_t kTileRows = 4096;
constexpr std::int64_t kTileColumns = 8192;

class CudaEngine {
 public:
  CudaEngine(const at::Tensor& query, const at::Tensor& key, bool with_gradients)
      : guard_(query.device()),
        scalar_(scalar_of(query, "contrastive")),
        wide_(wide_type(query.scalar_type())),
        rows_(std::min(kTileRows, query.size(0))),
        columns_(std::min(kTileColumns, key.size(0))),
        products_(at::empty({rows_ * columns_}, wide_options(query))),
        weights_(with_gradients && query.scalar_type() != wide_ ? at::empty({rows_ * columns_}, query.options())
                                                                : products_),
        scratch_(at::empty({static_cast<std::int64_t>(scratch_bytes(rows_, columns_) / sizeof(double))},
                           query.options().dtype(at::kDouble))) {}

  std::int64_t rows() const { return std::max<std::int64_t>(rows_, 1); }
  std::int64_t columns() const { return std::max<std::int64_t>(columns_, 1); }

  void set_query(const at::Tensor& query) { query_ = query; }
  void set_key(const at::Tensor& key) { key_ = key; }

  const void* product() {
    at::Tensor product = tile_of(products_);
    if (query_.scalar_type() == wide_) {
      at::mm_out(product, query_, key_.t());
    } else {
      at::mm_out(product, query_, key_.t(), wide_);
    }
    return product.const_data_ptr();
  }

  void* weight() { return weights_.mutable_data_ptr(); }

  void pass(const InfonceForwardParams& params) { check(infonce_forward_cuda(params, scratch(), scalar_, stream())); }
  void pass(const InfonceBackwardParams& params) { check(infonce_backward_cuda(params, scratch(), scalar_, stream())); }
  void pass(const SigmoidForwardParams& params) { check(sigmoid_forward_cuda(params, scratch(), scalar_, stream())); }
  void pass(const SigmoidBackwardParams& params) { check(sigmoid_backward_cuda(params, scratch(), scalar_, stream())); }

  void add_query_gradient(at::Tensor grad) { add_product(grad, tile_of(weights_), key_); }

  void add_key_gradient(std::int64_t begin, at::Tensor grad) {
    add_product(grad, tile_of(weights_).narrow(1, begin, grad.size(0)).t(), query_);
  }

 private:
  at::Tensor tile_of(const at::Tensor& buffer) const {
    const std::int64_t rows = query_.size(0), columns = key_.size(0);
    return buffer.narrow(0, 0, rows * columns).view({rows, columns});
  }

  void add_product(at::Tensor& grad, const at::Tensor& weight, const at::Tensor& features) const {
    if (features.scalar_type() == wide_) {
      at::addmm_out(grad, grad, weight, features);
    } else {
      const double gain = scalar_ == Scalar::kHalf ? kHalfWeightGain : 1.0;
      at::addmm_out(grad, grad, weight, features, wide_, /*beta=*/1, /*alpha=*/1 / gain);
    }
  }

  double* scratch() { return scratch_.mutable_data_ptr<double>(); }
  static void* stream() { return c10::cuda::getCurrentCUDAStream().stream(); }
  static void check(int error) { C10_CUDA_CHECK(static_cast<cudaError_t>(error)); }

  const c10::cuda::CUDAGuard guard_;
  const at::AutoDispatchBelowADInplaceOrView without_autograd_;  // it refuses products into a buffer
  const Scalar scalar_;
  const at::ScalarType wide_;
  const std::int64_t rows_;
  const std::int64_t columns_;
  const at::Tensor products_;
  const at::Tensor weights_;  // products_ itself where the weights have its type
  const at::Tensor scratch_;
  at::Tensor query_;
  at::Tensor key_;
};

TORCH_LIBRARY_IMPL(megaeva, CUDA, m) {
  m.impl("infonce_forward", &infonce_forward<CudaEngine>);
  m.impl("infonce_backward", &infonce_backward<CudaEngine>);
  m.impl("sigmoid_forward", &sigmoid_forward<CudaEngine>);
  m.impl("sigmoid_backward", &sigmoid_backward<CudaEngine>);
}

}  // namespace
}  // namespace megaeva::contrastive
