// The matrix products of a tile on a CPU.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <cstdint>

#include "contrastive/launch.h"

namespace megaeva::contrastive {

class Matmul {
 public:
  Matmul(const at::Tensor& query, const at::Tensor& key, bool)
      : rows_(std::min<std::int64_t>(1024, query.size(0))),
        columns_(std::min<std::int64_t>(1024, key.size(0))),
        tile_(at::empty({rows_ * columns_}, wide_options(query))) {}

  std::int64_t rows() const { return std::max<std::int64_t>(rows_, 1); }
  std::int64_t columns() const { return std::max<std::int64_t>(columns_, 1); }
  at::ScalarType weight_type() const { return tile_.scalar_type(); }
  void* weight() { return tile_.mutable_data_ptr(); }

  void set_query(const at::Tensor& query) { query_ = query.to(tile_.scalar_type()); }
  void set_key(const at::Tensor& key) { key_ = key.to(tile_.scalar_type()); }

  const void* product() {
    at::Tensor out = tile();
    at::mm_out(out, query_, key_.t());
    return tile_.const_data_ptr();
  }
  void add_query_gradient(const at::Tensor& grad) { grad.addmm_(tile(), key_); }
  void add_key_gradient(std::int64_t begin, const at::Tensor& grad) {
    grad.addmm_(tile().narrow(1, begin, grad.size(0)).t(), query_);
  }

 private:
  at::Tensor tile() { return tile_.narrow(0, 0, query_.size(0) * key_.size(0)).view({query_.size(0), key_.size(0)}); }

  std::int64_t rows_, columns_;
  at::Tensor tile_, query_, key_;
};

}  // namespace megaeva::contrastive
