// The matrix products of a tile on a CPU.
//
// float32 and bfloat16 go through oneDNN's small blocks (at::native::cpublas::brgemm): bfloat16 products are summed in
// float32, which at::mm cannot return, and float32 is twice as fast as MKL on an AMD machine. What oneDNN has no blocks
// for (float64, a machine without AVX2, torch.backends.mkldnn switched off) goes through at::mm.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>

#include "common/brgemm_cpu.h"
#include "common/multiversion.h"
#include "contrastive/launch.h"

namespace megaeva::contrastive {

constexpr std::int64_t kTileRows = 2048;    // tall: keys are packed once for all rows of a tile
constexpr std::int64_t kTileColumns = 512;
constexpr std::int64_t kBlock = 64;         // rows and columns of a product that one call to oneDNN computes
constexpr std::int64_t kBlockDepth = 128;  // terms it sums in one go: longer chains would round more than MKL's

constexpr std::int64_t blocks_of(std::int64_t length) { return (length + kBlock - 1) / kBlock; }

// oneDNN wants the right factor in panels of kBlock columns, where the terms of a sum that fill 32 bits are neighbours:
// [panel][depth / kGroup][kBlock][kGroup].
constexpr std::int64_t panel_size(std::int64_t depth) { return (depth + 1) / 2 * 2 * kBlock; }

// One panel of the right factor rows^T: `columns` rows of `words` 32-bit words, transposed.
MEGAEVA_MULTIVERSION static void pack_transposed(const std::uint32_t* rows, std::int64_t stride, std::int64_t columns,
                                                 std::int64_t words, std::uint32_t* panel) {
  // A few rows at a time: rows that lie a power of two apart compete for the same lines of the first-level cache.
  constexpr std::int64_t few = 8;
  for (std::int64_t begin = 0; begin < columns; begin += few) {
    const std::int64_t end = std::min(begin + few, columns);
    for (std::int64_t word = 0; word < words; ++word) {
      for (std::int64_t column = begin; column < end; ++column) {
        panel[word * kBlock + column] = rows[column * stride + word];
      }
    }
  }
}

// One panel of the right factor `matrix`: `depth` rows of `columns` elements.
MEGAEVA_MULTIVERSION static void pack_panel(const float* matrix, std::int64_t stride, std::int64_t depth,
                                            std::int64_t columns, float* panel) {
  for (std::int64_t row = 0; row < depth; ++row) {
    for (std::int64_t column = 0; column < columns; ++column) {
      panel[row * kBlock + column] = matrix[row * stride + column];
    }
  }
}

MEGAEVA_MULTIVERSION static void pack_panel(const c10::BFloat16* matrix, std::int64_t stride, std::int64_t depth,
                                            std::int64_t columns, c10::BFloat16* panel) {
  static const c10::BFloat16 zeros[kBlock] = {};  // the partner of an odd last row
  for (std::int64_t row = 0; row < depth; row += 2) {
    const c10::BFloat16* upper = matrix + row * stride;
    const c10::BFloat16* lower = row + 1 < depth ? upper + stride : zeros;
    c10::BFloat16* out = panel + row * kBlock;
    for (std::int64_t column = 0; column < columns; ++column) {
      out[2 * column].x = upper[column].x;
      out[2 * column + 1].x = lower[column].x;
    }
  }
}

// out[j][i] = matrix[i][j], `columns` of j and `rows` of i.
template <typename T>
void transpose(const T* matrix, std::int64_t stride, std::int64_t rows, std::int64_t columns, T* out,
               std::int64_t out_stride) {
  constexpr std::int64_t strip = 32;
  for (std::int64_t begin = 0; begin < rows; begin += strip) {
    const std::int64_t end = std::min(begin + strip, rows);
    for (std::int64_t j = 0; j < columns; ++j) {
      for (std::int64_t i = begin; i < end; ++i) out[j * out_stride + i] = matrix[i * stride + j];
    }
  }
}

// out (+)= left * panels: left is [rows, depth], the right factor `columns` wide. Every block of out is one thread's,
// and its terms are added in one order, so the number of threads does not change a bit.
template <typename T>
void multiply(const T* left, std::int64_t left_stride, const T* panels, std::int64_t rows, std::int64_t columns,
              std::int64_t depth, bool add, float* out, std::int64_t out_stride) {
  const std::int64_t across = blocks_of(columns);
  at::parallel_for(0, blocks_of(rows) * across, 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t block = first; block < last; ++block) {
      const std::int64_t row = block / across * kBlock, column = block % across * kBlock;
      const T* panel = panels + block % across * panel_size(depth);
      for (std::int64_t begin = 0; begin < depth; begin += kBlockDepth) {
        at::native::cpublas::brgemm(std::min(kBlock, rows - row), std::min(kBlock, columns - column),
                                    std::min(kBlockDepth, depth - begin), left_stride, kBlock, out_stride,
                                    add || begin > 0, left + row * left_stride + begin, panel + begin * kBlock,
                                    out + row * out_stride + column, kGroup<T> > 1);
      }
    }
    at::native::cpublas::brgemm_release(kGroup<T> > 1);
  });
}

class Matmul {
 public:
  Matmul(const at::Tensor& query, const at::Tensor& key, bool with_gradients)
      : rows_(std::clamp<std::int64_t>(query.size(0), 1, kTileRows)),
        columns_(std::clamp<std::int64_t>(key.size(0), 1, kTileColumns)),
        width_(query.size(1)),
        type_(wide_type(query.scalar_type())) {
    const bool in_bfloat16 = query.scalar_type() == at::kBFloat16 && width_ % 2 == 0 && has_bfloat16_products();
    blocked_ = width_ > 0 && (in_bfloat16 || (type_ == at::kFloat && has_brgemm<float>()));
    if (in_bfloat16 && blocked_) type_ = at::kBFloat16;
    product_ = at::empty({rows_ * columns_}, wide_options(query));
    const at::TensorOptions options = query.options().dtype(type_);
    weight_ = type_ == at::kBFloat16 && with_gradients ? at::empty({rows_ * columns_}, options) : product_;
    if (!blocked_) return;
    key_columns_ = at::empty({blocks_of(columns_) * panel_size(width_)}, options);
    if (!with_gradients) return;
    key_panels_ = at::empty({blocks_of(width_) * panel_size(columns_)}, options);
    query_panels_ = at::empty({blocks_of(width_) * panel_size(rows_)}, options);
    transposed_ = at::empty({rows_ * columns_}, options);
  }

  std::int64_t rows() const { return rows_; }
  std::int64_t columns() const { return columns_; }
  at::ScalarType weight_type() const { return weight_.scalar_type(); }
  void* weight() { return weight_.mutable_data_ptr(); }

  void set_query(const at::Tensor& query) {
    query_ = query.to(type_);
    if (query_panels_.defined()) by_type([&](auto zero) { pack<decltype(zero)>(query_, query_panels_); });
  }

  void set_key(const at::Tensor& key) {
    // The rows of an odd stride cannot be read as 32-bit words.
    key_ = key.stride(0) % 2 == 0 ? key.to(type_) : key.to(type_).contiguous();
    if (key_columns_.defined()) by_type([&](auto zero) { pack_columns<decltype(zero)>(); });
    if (key_panels_.defined()) by_type([&](auto zero) { pack<decltype(zero)>(key_, key_panels_); });
  }

  const void* product() {
    if (!blocked_) {
      at::Tensor out = tile(product_);
      at::mm_out(out, query_, key_.t());
      return product_.const_data_ptr();
    }
    by_type([&](auto zero) {
      using T = decltype(zero);
      multiply(query_.const_data_ptr<T>(), query_.stride(0), key_columns_.const_data_ptr<T>(), query_.size(0),
               key_.size(0), width_, /*add=*/false, product_.mutable_data_ptr<float>(), key_.size(0));
    });
    return product_.const_data_ptr();
  }

  void add_query_gradient(const at::Tensor& grad) {
    if (!blocked_) {
      grad.addmm_(tile(weight_), key_);
      return;
    }
    by_type([&](auto zero) {
      using T = decltype(zero);
      multiply(weight_.const_data_ptr<T>(), key_.size(0), key_panels_.const_data_ptr<T>(), query_.size(0), width_,
               key_.size(0), /*add=*/true, grad.mutable_data_ptr<float>(), grad.stride(0));
    });
  }

  // grad is of keys begin, begin + 1, ... of the tile.
  void add_key_gradient(std::int64_t begin, const at::Tensor& grad) {
    if (!blocked_) {
      grad.addmm_(tile(weight_).narrow(1, begin, grad.size(0)).t(), query_);
      return;
    }
    by_type([&](auto zero) {
      using T = decltype(zero);
      const std::int64_t rows = query_.size(0);
      const T* weight = weight_.const_data_ptr<T>() + begin;
      T* transposed = transposed_.mutable_data_ptr<T>();
      at::parallel_for(0, blocks_of(grad.size(0)), 1, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t column = first * kBlock; column < std::min(last * kBlock, grad.size(0)); column += kBlock) {
          transpose(weight + column, key_.size(0), rows, std::min(kBlock, grad.size(0) - column),
                    transposed + column * rows, rows);
        }
      });
      multiply<T>(transposed, rows, query_panels_.const_data_ptr<T>(), grad.size(0), width_, rows, /*add=*/true,
                  grad.mutable_data_ptr<float>(), grad.stride(0));
    });
  }

 private:
  template <typename Function>
  void by_type(Function function) {
    type_ == at::kBFloat16 ? function(c10::BFloat16()) : function(float());
  }

  at::Tensor tile(const at::Tensor& buffer) {
    return buffer.narrow(0, 0, query_.size(0) * key_.size(0)).view({query_.size(0), key_.size(0)});
  }

  template <typename T>
  void pack(const at::Tensor& matrix, const at::Tensor& panels) {
    const T* source = matrix.const_data_ptr<T>();
    T* out = panels.mutable_data_ptr<T>();
    const std::int64_t depth = matrix.size(0);
    at::parallel_for(0, blocks_of(width_), 1, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t panel = first; panel < last; ++panel) {
        pack_panel(source + panel * kBlock, matrix.stride(0), depth, std::min(kBlock, width_ - panel * kBlock),
                   out + panel * panel_size(depth));
      }
    });
  }

  template <typename T>
  void pack_columns() {
    const T* source = key_.const_data_ptr<T>();
    T* out = key_columns_.mutable_data_ptr<T>();
    at::parallel_for(0, blocks_of(key_.size(0)), 1, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t panel = first; panel < last; ++panel) {
        pack_transposed(reinterpret_cast<const std::uint32_t*>(source + panel * kBlock * key_.stride(0)),
                        key_.stride(0) / kGroup<T>, std::min(kBlock, key_.size(0) - panel * kBlock),
                        width_ / kGroup<T>, reinterpret_cast<std::uint32_t*>(out + panel * panel_size(width_)));
      }
    });
  }

  std::int64_t rows_, columns_, width_;
  at::ScalarType type_;  // of the factors of every product
  bool blocked_;
  at::Tensor product_, weight_, transposed_;
  at::Tensor key_columns_, key_panels_, query_panels_;  // right factors: key^T, key, query
  at::Tensor query_, key_;
};

}  // namespace megaeva::contrastive
