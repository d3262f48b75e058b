// The contrastive losses on a CPU: matrix products of tiles (matmul_cpu.h), and one pass over each tile while it is in
// the cache. Rows are spread over torch's threads in fixed chunks, so the number of threads does not change a bit of a
// pass; inner loops are vectorised by the compiler for each instruction set (multiversion.h).

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <bit>
#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>

#include "common/elements_cpu.h"
#include "common/multiversion.h"
#include "contrastive/launch.h"
#include "contrastive/matmul_cpu.h"

namespace megaeva::contrastive {
namespace {

constexpr std::int64_t kChunkRows = 64;  // rows of a tile that one thread takes at a time; with its columns, in L2

// ------------------------------------------------------------------------- functions the compiler can vectorise

MEGAEVA_INLINE double exponential(double x) { return std::exp(x); }

// Within 2 units in the last place of e^x; 0 below the normal numbers. Cephes' polynomial on [-ln 2 / 2, ln 2 / 2].
MEGAEVA_INLINE float exponential(float x) {
  constexpr float rounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const float shifted = x * 1.44269504f + rounder;
  const float n = shifted - rounder;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float series = 1.9875691500e-4f;
  series = series * r + 1.3981999507e-3f;
  series = series * r + 8.3334519073e-3f;
  series = series * r + 4.1665795894e-2f;
  series = series * r + 1.6666665459e-1f;
  series = series * r + 5.0000001201e-1f;
  series = series * (r * r) + r + 1.0f;
  // 2^(n - 1), doubled afterwards: 2^128 is no float, though e^88.7 is one.
  const auto exponent = (std::bit_cast<std::uint32_t>(shifted) - std::bit_cast<std::uint32_t>(rounder) + 126u) << 23;
  const float value = series * std::bit_cast<float>(exponent) * 2.0f;
  const float bounded = x < -86.6f ? 0.0f : value;
  return x > 88.7228394f ? std::numeric_limits<float>::infinity() : bounded;  // NaN passes both, and stays
}

MEGAEVA_INLINE double log1p_below_one(double x) { return std::log1p(x); }

// log(1 + x) for x in [0, 1], to a few units in the last place of small results too: 2 atanh(x / (2 + x)).
MEGAEVA_INLINE float log1p_below_one(float x) {
  const float s = x / (2.0f + x), square = s * s;
  float series = 1.0f / 15;
  series = series * square + 1.0f / 13;
  series = series * square + 1.0f / 11;
  series = series * square + 1.0f / 9;
  series = series * square + 1.0f / 7;
  series = series * square + 1.0f / 5;
  series = series * square + 1.0f / 3;
  return 2.0f * (s + s * square * series);
}

// What exponents are taken relative to: the maximum, or 0 where that is infinite (as torch.logsumexp).
template <typename A>
MEGAEVA_INLINE A finite_or_zero(A maximum) {
  return maximum - maximum == A(0) ? maximum : A(0);
}

// exp(from - to) for from <= to, 1 for equal infinities.
template <typename A>
MEGAEVA_INLINE A rescale(A from, A to) {
  return from == to ? A(1) : exponential(from - to);
}

template <typename A>
MEGAEVA_INLINE void store_row(const A* row, std::int64_t columns, A* out) {
  std::copy(row, row + columns, out);
}

MEGAEVA_INLINE void store_row(const float* row, std::int64_t columns, c10::BFloat16* out) {
#pragma omp simd
  for (std::int64_t j = 0; j < columns; ++j) out[j] = narrow<c10::BFloat16>(row[j]);
}

// Logits of one row. A loop of its own: fused with a later subtraction the compiler would keep digits that the logit
// in the forward pass did not have.
template <typename A>
MEGAEVA_INLINE void logits_of(const A* product, A scale, A bias, std::int64_t columns, A* logit) {
#pragma omp simd
  for (std::int64_t j = 0; j < columns; ++j) logit[j] = product[j] * scale + bias;
}

// ---------------------------------------------------------------------------------------------------- the passes

// Rows [begin, end) of a tile, at most kChunkRows. column_max, column_top and column_rest are this chunk's alone. The
// exponentials of the largest logits, 1 each, are counted apart from the rest: next to them the rest would be rounded
// away, and where training ends the rest is the loss.
template <typename A>
MEGAEVA_INLINE void infonce_forward_rows(const InfonceForwardParams& p, std::int64_t begin, std::int64_t end,
                                         A* column_max, A* column_top, A* column_rest, A* logit) {
  const A scale = *static_cast<const A*>(p.scale);
  const A lowest = -std::numeric_limits<A>::infinity();
  const std::int64_t columns = p.columns;
  for (std::int64_t j = 0; j < columns; ++j) column_max[j] = lowest, column_top[j] = 0, column_rest[j] = 0;
  A row_max[kChunkRows];
  for (std::int64_t i = begin; i < end; ++i) {
    const A* product = static_cast<const A*>(p.product) + i * columns;
    A maximum = lowest;
#pragma omp simd reduction(max : maximum)
    for (std::int64_t j = 0; j < columns; ++j) {
      const A value = product[j] * scale;
      maximum = value > maximum ? value : maximum;  // a NaN loses here, and shows in the sums
      column_max[j] = value > column_max[j] ? value : column_max[j];
    }
    row_max[i - begin] = maximum;
  }
  for (std::int64_t i = begin; i < end; ++i) {
    logits_of(static_cast<const A*>(p.product) + i * columns, scale, A(0), columns, logit);
    const A reference = finite_or_zero(row_max[i - begin]);
    A top = 0;
    double rest = 0;  // in float the many small ones of a long row would be lost beside the first
#pragma omp simd reduction(+ : top, rest)
    for (std::int64_t j = 0; j < columns; ++j) {
      const A by_row = exponential(logit[j] - reference);
      const A rest_of_row = by_row < A(1) ? by_row : A(0);
      rest += rest_of_row;
      top += by_row - rest_of_row;  // 0 or 1, or an infinity or a NaN
      const A by_column = exponential(logit[j] - finite_or_zero(column_max[j]));
      const A rest_of_column = by_column < A(1) ? by_column : A(0);
      column_rest[j] += rest_of_column;
      column_top[j] += by_column - rest_of_column;
    }
    const std::int64_t pair = p.pair + i;
    if (0 <= pair && pair < columns) static_cast<A*>(p.pair_query)[i] = logit[pair];
    A& running = static_cast<A*>(p.max_query)[i];
    const A maximum = std::max(running, row_max[i - begin]);
    p.sum_query[i] = p.sum_query[i] * rescale<double>(running, maximum) +
                     (double(top) + rest) * rescale<double>(row_max[i - begin], maximum);
    running = maximum;
  }
}

// Joins the chunks' columns [begin, end) to the running ones, in the order of the chunks.
template <typename A>
MEGAEVA_INLINE void infonce_forward_columns(const InfonceForwardParams& p, std::int64_t begin, std::int64_t end,
                                            const A* column_max, const A* column_top, const A* column_rest,
                                            std::int64_t num_chunks) {
  A* running = static_cast<A*>(p.max_key);
  for (std::int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    const A* chunk_max = column_max + chunk * p.columns;
    const A* chunk_top = column_top + chunk * p.columns;
    const A* chunk_rest = column_rest + chunk * p.columns;
#pragma omp simd
    for (std::int64_t j = begin; j < end; ++j) {
      const A maximum = chunk_max[j] > running[j] ? chunk_max[j] : running[j];
      p.sum_key[j] = p.sum_key[j] * rescale(running[j], maximum) +
                     (double(chunk_top[j]) + double(chunk_rest[j])) * rescale(chunk_max[j], maximum);
      running[j] = maximum;
    }
  }
}

// The weights of a row take the place of its logits in `row`, a scratch in the first-level cache.
template <typename A, typename W>
MEGAEVA_INLINE void infonce_backward_rows(const InfonceBackwardParams& p, std::int64_t begin, std::int64_t end,
                                          A* row) {
  const A scale = *static_cast<const A*>(p.scale);
  const A* lse_key = static_cast<const A*>(p.lse_key);
  const A* rest_key = static_cast<const A*>(p.lse_key_rest);
  const A* pair_key = static_cast<const A*>(p.pair_key);
  const A uniform = static_cast<A>(p.uniform);
  const std::int64_t columns = p.columns;
  for (std::int64_t i = begin; i < end; ++i) {
    logits_of(static_cast<const A*>(p.product) + i * columns, scale, A(0), columns, row);
    const A lse_query = static_cast<const A*>(p.lse_query)[i];
    const A rest_query = static_cast<const A*>(p.lse_query_rest)[i];
    const A pair_query = static_cast<const A*>(p.pair_query)[i];
    double share = 0;
#pragma omp simd reduction(+ : share)
    for (std::int64_t j = 0; j < columns; ++j) {
      const A logit = row[j];
      const A by_query = exponential((logit - lse_query) - rest_query) - uniform;
      const A by_key = exponential((logit - lse_key[j]) - rest_key[j]);
      share += by_query * (logit - pair_query) + by_key * (logit - pair_key[j]);
      row[j] = by_query + by_key;
    }
    p.share[i] += share;
    const std::int64_t pair = p.pair + i;
    if (0 <= pair && pair < columns) row[pair] -= static_cast<A>(p.pair_weight);
    store_row(row, columns, static_cast<W*>(p.weight) + i * columns);
  }
}

template <typename A>
MEGAEVA_INLINE A softplus(A x) {
  const A magnitude = x < A(0) ? -x : x;
  return (x > A(0) ? x : A(0)) + (x == x ? log1p_below_one(exponential(-magnitude)) : x);
}

template <typename A>
MEGAEVA_INLINE void sigmoid_forward_rows(const SigmoidForwardParams& p, std::int64_t begin, std::int64_t end, A* row) {
  const A scale = *static_cast<const A*>(p.scale), bias = *static_cast<const A*>(p.bias);
  const std::int64_t columns = p.columns;
  for (std::int64_t i = begin; i < end; ++i) {
    logits_of(static_cast<const A*>(p.product) + i * columns, scale, bias, columns, row);
    const std::int64_t pair = p.pair + i;
    if (0 <= pair && pair < columns) row[pair] = -row[pair];
#pragma omp simd
    for (std::int64_t j = 0; j < columns; ++j) row[j] = softplus(row[j]);
    double total = 0;
#pragma omp simd reduction(+ : total)
    for (std::int64_t j = 0; j < columns; ++j) total += row[j];
    p.total[i] += total;
  }
}

template <typename A, typename W>
MEGAEVA_INLINE void sigmoid_backward_rows(const SigmoidBackwardParams& p, std::int64_t begin, std::int64_t end,
                                          A* row) {
  const A scale = *static_cast<const A*>(p.scale), bias = *static_cast<const A*>(p.bias);
  const std::int64_t columns = p.columns;
  for (std::int64_t i = begin; i < end; ++i) {
    const A* product = static_cast<const A*>(p.product) + i * columns;
    logits_of(product, scale, bias, columns, row);
    const std::int64_t pair = p.pair + i;
    const bool has_pair = 0 <= pair && pair < columns;
    // In double: next to its near 1 the other weights are small, and so is their sum's error.
    const double pair_weight = has_pair ? -1.0 / (1.0 + std::exp(static_cast<double>(row[pair]))) : 0.0;
#pragma omp simd
    for (std::int64_t j = 0; j < columns; ++j) row[j] = A(1) / (A(1) + exponential(-row[j]));
    double along = 0, sum = 0;
    if (has_pair) {
      row[pair] = 0;
      along = pair_weight * double(product[pair]);
      sum = pair_weight;
    }
#pragma omp simd reduction(+ : along, sum)
    for (std::int64_t j = 0; j < columns; ++j) {
      along += double(row[j]) * double(product[j]);
      sum += row[j];
    }
    p.scale_share[i] += double(scale) * along;
    p.bias_share[i] += sum;
    if (has_pair) row[pair] = static_cast<A>(pair_weight);
    store_row(row, columns, static_cast<W*>(p.weight) + i * columns);
  }
}

// target_clones needs plain functions, one for each pair of accumulation and weight type.
#define MEGAEVA_FORWARD(NAME, A)                                                                                     \
  MEGAEVA_MULTIVERSION void infonce_forward_rows_##NAME(const InfonceForwardParams& p, std::int64_t begin,          \
                                                        std::int64_t end, A* column_max, A* column_top,             \
                                                        A* column_rest, A* logit) {                                 \
    infonce_forward_rows<A>(p, begin, end, column_max, column_top, column_rest, logit);                             \
  }                                                                                                                 \
  MEGAEVA_MULTIVERSION void infonce_forward_columns_##NAME(const InfonceForwardParams& p, std::int64_t begin,       \
                                                           std::int64_t end, const A* column_max,                   \
                                                           const A* column_top, const A* column_rest,               \
                                                           std::int64_t num_chunks) {                               \
    infonce_forward_columns<A>(p, begin, end, column_max, column_top, column_rest, num_chunks);                     \
  }                                                                                                                 \
  MEGAEVA_MULTIVERSION void sigmoid_forward_rows_##NAME(const SigmoidForwardParams& p, std::int64_t begin,          \
                                                        std::int64_t end, A* logit) {                               \
    sigmoid_forward_rows<A>(p, begin, end, logit);                                                                  \
  }
#define MEGAEVA_BACKWARD(NAME, A, W)                                                                                \
  MEGAEVA_MULTIVERSION void infonce_backward_rows_##NAME(const InfonceBackwardParams& p, std::int64_t begin,        \
                                                         std::int64_t end, A* logit) {                              \
    infonce_backward_rows<A, W>(p, begin, end, logit);                                                              \
  }                                                                                                                 \
  MEGAEVA_MULTIVERSION void sigmoid_backward_rows_##NAME(const SigmoidBackwardParams& p, std::int64_t begin,        \
                                                         std::int64_t end, A* logit) {                              \
    sigmoid_backward_rows<A, W>(p, begin, end, logit);                                                              \
  }
MEGAEVA_FORWARD(float, float)
MEGAEVA_FORWARD(double, double)
MEGAEVA_BACKWARD(float, float, float)
MEGAEVA_BACKWARD(double, double, double)
MEGAEVA_BACKWARD(bfloat16, float, c10::BFloat16)
#undef MEGAEVA_FORWARD
#undef MEGAEVA_BACKWARD

// ---------------------------------------------------------------------------------------------------- the engine

std::int64_t chunks_of(std::int64_t rows) { return (rows + kChunkRows - 1) / kChunkRows; }

// rows(begin, end, chunk) for each chunk of a tile's rows.
template <typename Rows>
void over_chunks(std::int64_t num_rows, Rows rows) {
  at::parallel_for(0, chunks_of(num_rows), 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t chunk = first; chunk < last; ++chunk) {
      rows(chunk * kChunkRows, std::min((chunk + 1) * kChunkRows, num_rows), chunk);
    }
  });
}

class CpuEngine {
 public:
  CpuEngine(const at::Tensor& query, const at::Tensor& key, bool with_gradients)
      : wide_(wide_type(query.scalar_type())),
        matmul_(query, key, with_gradients),
        scratch_(at::empty({4, chunks_of(matmul_.rows()), matmul_.columns()}, wide_options(query))) {}

  std::int64_t rows() const { return matmul_.rows(); }
  std::int64_t columns() const { return matmul_.columns(); }
  void set_query(const at::Tensor& query) { matmul_.set_query(query); }
  void set_key(const at::Tensor& key) { matmul_.set_key(key); }
  const void* product() { return matmul_.product(); }
  void* weight() { return matmul_.weight(); }
  void add_query_gradient(const at::Tensor& grad) { matmul_.add_query_gradient(grad); }
  void add_key_gradient(std::int64_t begin, const at::Tensor& grad) { matmul_.add_key_gradient(begin, grad); }

  void pass(const InfonceForwardParams& p) {
    wide_ == at::kDouble ? forward<double>(p, infonce_forward_rows_double, infonce_forward_columns_double)
                         : forward<float>(p, infonce_forward_rows_float, infonce_forward_columns_float);
  }

  void pass(const InfonceBackwardParams& p) {
    backward(p, infonce_backward_rows_double, infonce_backward_rows_float, infonce_backward_rows_bfloat16);
  }

  void pass(const SigmoidForwardParams& p) {
    wide_ == at::kDouble ? by_rows<double>(p, sigmoid_forward_rows_double)
                         : by_rows<float>(p, sigmoid_forward_rows_float);
  }

  void pass(const SigmoidBackwardParams& p) {
    backward(p, sigmoid_backward_rows_double, sigmoid_backward_rows_float, sigmoid_backward_rows_bfloat16);
  }

 private:
  // Part 0 to 3 of the scratch. One row of `columns` numbers in it is a chunk's own.
  template <typename A>
  A* scratch(std::int64_t part) {
    return scratch_.mutable_data_ptr<A>() + part * scratch_.stride(0);
  }

  template <typename A, typename Params>
  void by_rows(const Params& p, void (*pass_rows)(const Params&, std::int64_t, std::int64_t, A*)) {
    over_chunks(p.rows, [&](std::int64_t begin, std::int64_t end, std::int64_t chunk) {
      pass_rows(p, begin, end, scratch<A>(0) + chunk * p.columns);
    });
  }

  template <typename Params, typename Double, typename Float, typename BFloat16>
  void backward(const Params& p, Double in_double, Float in_float, BFloat16 to_bfloat16) {
    if (wide_ == at::kDouble) return by_rows<double>(p, in_double);
    by_rows<float>(p, matmul_.weight_type() == at::kBFloat16 ? to_bfloat16 : in_float);
  }

  template <typename A, typename PassRows, typename PassColumns>
  void forward(const InfonceForwardParams& p, PassRows pass_rows, PassColumns pass_columns) {
    over_chunks(p.rows, [&](std::int64_t begin, std::int64_t end, std::int64_t chunk) {
      const std::int64_t own = chunk * p.columns;
      pass_rows(p, begin, end, scratch<A>(1) + own, scratch<A>(2) + own, scratch<A>(3) + own, scratch<A>(0) + own);
    });
    at::parallel_for(0, p.columns, 128, [&](std::int64_t begin, std::int64_t end) {
      pass_columns(p, begin, end, scratch<A>(1), scratch<A>(2), scratch<A>(3), chunks_of(p.rows));
    });
  }

  // Operators are not differentiable, but may be called with features that require a gradient.
  at::AutoDispatchBelowADInplaceOrView below_autograd_;
  at::ScalarType wide_;
  Matmul matmul_;
  at::Tensor scratch_;  // logits of a row; maximum, top and rest of each column
};

TORCH_LIBRARY_IMPL(megaeva, CPU, m) {
  m.impl("infonce_forward", &infonce_forward<CpuEngine>);
  m.impl("infonce_backward", &infonce_backward<CpuEngine>);
  m.impl("sigmoid_forward", &sigmoid_forward<CpuEngine>);
  m.impl("sigmoid_backward", &sigmoid_backward<CpuEngine>);
}

}  // namespace
}  // namespace megaeva::contrastive
