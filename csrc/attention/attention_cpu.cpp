// Attention on a CPU: one head of one sample at a time, in the second-level cache. Each head is copied out of the
// linear's output (turned by its angles on the way), a block of rows of scores is multiplied, exponentiated and used
// while it is there, and gradients are turned back and written where the linear wants them: nothing of the size of the
// scores, and no copy of q, k or v, ever exists in memory.
//
// The products are torch's brgemm, a kernel for small matrices in float accumulation. It wants the right-hand side of a
// bf16 product with neighbouring rows interleaved; `Pairs<G>` is 2 there and 1 otherwise.

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "attention/launch.h"
#include "common/brgemm_cpu.h"
#include "common/elements_cpu.h"
#include "common/multiversion.h"

namespace megaeva::attention {
namespace {

using c10::BFloat16;
using c10::Half;
using std::int64_t;

template <typename G>
constexpr int64_t Pairs = std::is_same_v<G, BFloat16> ? 2 : 1;

constexpr int64_t kLanes = 16;       // lengths are padded to it, so that no loop has a tail
constexpr int64_t kBlockRows = 64;   // of scores at a time: 64 x 208 floats are 53 KB

int64_t padded(int64_t length) { return (length + kLanes - 1) / kLanes * kLanes; }

// ---------------------------------------------------------------------------------------------------------- products

// c (rows x columns) = a (rows x inner) b + (add ? c : 0); b is packed in Pairs<G> rows, ldb counts its columns.
MEGAEVA_INLINE void multiply(int64_t rows, int64_t columns, int64_t inner, const BFloat16* a, int64_t lda,
                             const BFloat16* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  at::native::cpublas::brgemm(rows, columns, inner, lda, ldb, ldc, add, a, b, c, true);
}
MEGAEVA_INLINE void multiply(int64_t rows, int64_t columns, int64_t inner, const float* a, int64_t lda, const float* b,
                             int64_t ldb, float* c, int64_t ldc, bool add) {
  at::native::cpublas::brgemm(rows, columns, inner, lda, ldb, ldc, add, a, b, c, false);
}
MEGAEVA_INLINE void multiply(int64_t rows, int64_t columns, int64_t inner, const double* a, int64_t lda,
                             const double* b, int64_t ldb, double* c, int64_t ldc, bool add) {
  for (int64_t i = 0; i < rows; ++i) {
    if (!add) std::fill_n(c + i * ldc, columns, 0.0);
    for (int64_t k = 0; k < inner; ++k) {
      for (int64_t j = 0; j < columns; ++j) c[i * ldc + j] += a[i * lda + k] * b[k * ldb + j];
    }
  }
}

// ----------------------------------------------------------------------------------------------------- packing a head

// Where one head of one sample lies.
struct Head {
  int64_t sample;
  int64_t number;
  int64_t token_stride;  // of qkv; of out a third

  Head(const Params& p, int64_t index)
      : sample(index / p.heads), number(index % p.heads), token_stride(p.batch * p.heads * 3 * p.width) {}
  int64_t qkv(const Params& p, int64_t token, int64_t which) const {
    return token * token_stride + ((sample * p.heads + number) * 3 + which) * p.width;
  }
  int64_t out(const Params& p, int64_t token) const {
    return token * (token_stride / 3) + (sample * p.heads + number) * p.width;
  }
  const float* cos(const Params& p, int64_t token) const {
    return p.cos_sin + (token * p.angle_batch + (p.angle_batch == 1 ? 0 : sample)) * p.width;
  }
  const float* sin(const Params& p, int64_t token) const {
    return cos(p, token) + p.length * p.angle_batch * p.width;
  }
};

// y = x turned, or turned back for the gradient.
template <bool kBack, typename T, typename From>
MEGAEVA_INLINE void turn(const From* x, const float* cos, const float* sin, T* y, int64_t width) {
  using A = Accumulate<From>;
#pragma omp simd
  for (int64_t k = 0; k < width; k += 2) {
    const A even = widen(x[k]), odd = widen(x[k + 1]);
    if constexpr (kBack) {
      y[k] = narrow<T>(even * cos[k] + odd * sin[k + 1]);
      y[k + 1] = narrow<T>(odd * cos[k + 1] - even * sin[k]);
    } else {
      y[k] = narrow<T>(even * cos[k] - odd * sin[k]);
      y[k + 1] = narrow<T>(odd * cos[k + 1] + even * sin[k + 1]);
    }
  }
}

template <typename T, typename From>
MEGAEVA_INLINE void convert(const From* x, T* y, int64_t width) {
  if constexpr (std::is_same_v<T, From>) {
    std::copy_n(x, width, y);
  } else {
#pragma omp simd
    for (int64_t k = 0; k < width; ++k) y[k] = narrow<T>(widen(x[k]));
  }
}

// Query (0), key (1) or value (2) of a head as rows [padded length, width], turned where it is to be; padding is zero.
template <typename T, typename G>
MEGAEVA_INLINE void gather(const Params& p, const Head& head, int64_t which, G* rows) {
  const T* qkv = static_cast<const T*>(p.qkv);
  for (int64_t s = 0; s < p.length; ++s) {
    const T* x = qkv + head.qkv(p, s, which);
    if (p.cos_sin != nullptr && which < 2) {
      turn<false>(x, head.cos(p, s), head.sin(p, s), rows + s * p.width, p.width);
    } else {
      convert(x, rows + s * p.width, p.width);
    }
  }
  std::fill_n(rows + p.length * p.width, (padded(p.length) - p.length) * p.width, G(0));
}

template <typename T, typename G>
MEGAEVA_INLINE void gather_out(const Params& p, const Head& head, const void* source, G* rows) {
  for (int64_t s = 0; s < p.length; ++s) {
    convert(static_cast<const T*>(source) + head.out(p, s), rows + s * p.width, p.width);
  }
  std::fill_n(rows + p.length * p.width, (padded(p.length) - p.length) * p.width, G(0));
}

// Rows [length, width] as the right-hand side of a product over `length`.
template <typename G>
MEGAEVA_INLINE void pack_rows(const G* rows, int64_t length, int64_t width, G* packed) {
  if constexpr (Pairs<G> == 1) {
    std::copy_n(rows, length * width, packed);
  } else {
    for (int64_t s = 0; s < length; s += 2) {
      const std::uint16_t* first = reinterpret_cast<const std::uint16_t*>(rows + s * width);
      const std::uint16_t* second = first + width;
      std::uint32_t* both = reinterpret_cast<std::uint32_t*>(packed + s * width);
#pragma omp simd
      for (int64_t k = 0; k < width; ++k) both[k] = first[k] | (static_cast<std::uint32_t>(second[k]) << 16);
    }
  }
}

// Rows [length, width], transposed, as the right-hand side of a product over `width`.
template <typename G>
MEGAEVA_INLINE void pack_columns(const G* rows, int64_t length, int64_t width, G* packed) {
  for (int64_t block = 0; block < length; block += kLanes) {
    for (int64_t k = 0; k < width; k += Pairs<G>) {
      if constexpr (Pairs<G> == 1) {
        for (int64_t s = 0; s < kLanes; ++s) packed[k * length + block + s] = rows[(block + s) * width + k];
      } else {
        std::uint32_t* both = reinterpret_cast<std::uint32_t*>(packed + k * length) + block;
        for (int64_t s = 0; s < kLanes; ++s) {
          const G* x = rows + (block + s) * width + k;
          both[s] = x[0].x | (static_cast<std::uint32_t>(x[1].x) << 16);
        }
      }
    }
  }
}

// Rows [length, width] as the left-hand side [width, length].
template <typename G>
MEGAEVA_INLINE void transpose(const G* rows, int64_t length, int64_t width, G* columns) {
  for (int64_t block = 0; block < length; block += kLanes) {
    for (int64_t k = 0; k < width; ++k) {
      for (int64_t s = 0; s < kLanes; ++s) columns[k * length + block + s] = rows[(block + s) * width + k];
    }
  }
}

// Scratch memory of a thread, handed out piece by piece.
class Arena {
 public:
  template <typename X>
  X* take(int64_t count) {
    const int64_t begin = used_;
    used_ += (count * static_cast<int64_t>(sizeof(X)) + 63) / 64 * 64;
    return data_.empty() ? nullptr : reinterpret_cast<X*>(data_.data() + begin);
  }
  // Call with the pieces taken once; take them again after.
  void allocate() {
    data_.resize(used_ + 64);
    used_ = static_cast<int64_t>(-reinterpret_cast<std::uintptr_t>(data_.data()) & 63);
  }

 private:
  std::vector<char> data_;
  int64_t used_ = 0;
};

// --------------------------------------------------------------------------------------------------------- the passes

template <typename G>
struct ForwardScratch {
  using A = Accumulate<G>;
  G *query, *rows, *key_columns, *value_rows, *weights;
  A *scores, *out;

  ForwardScratch(Arena& arena, int64_t length, int64_t width)
      : query(arena.take<G>(length * width)),
        rows(arena.take<G>(length * width)),
        key_columns(arena.take<G>(length * width)),
        value_rows(arena.take<G>(length * width)),
        weights(arena.take<G>(kBlockRows * length)),
        scores(arena.take<A>(kBlockRows * length)),
        out(arena.take<A>(kBlockRows * width)) {}
};

template <typename T, typename G>
MEGAEVA_INLINE void forward_head(const Params& p, const Head& head, const ForwardScratch<G>& scratch) {
  using A = Accumulate<G>;
  const int64_t length = padded(p.length), width = p.width;
  const A factor = static_cast<A>(p.scale * 1.4426950408889634);  // scores are exponents of two
  gather<T>(p, head, 0, scratch.query);
  gather<T>(p, head, 1, scratch.rows);
  pack_columns(scratch.rows, length, width, scratch.key_columns);
  gather<T>(p, head, 2, scratch.rows);
  pack_rows(scratch.rows, length, width, scratch.value_rows);
  A* log2_sum = static_cast<A*>(p.log2_sum) + (head.sample * p.heads + head.number) * p.length;
  for (int64_t begin = 0; begin < p.length; begin += kBlockRows) {
    const int64_t end = std::min(begin + kBlockRows, p.length), rows = end - begin;
    const int64_t seen = p.causal ? padded(end) : length;
    multiply(rows, seen, width, scratch.query + begin * width, width, scratch.key_columns, length, scratch.scores, seen,
             false);
    A sums[kBlockRows];
    for (int64_t i = 0; i < rows; ++i) {
      const A* s = scratch.scores + i * seen;
      G* w = scratch.weights + i * seen;
      const int64_t valid = p.causal ? begin + i + 1 : p.length;
      A top = -std::numeric_limits<A>::infinity();
#pragma omp simd reduction(max : top)
      for (int64_t j = 0; j < valid; ++j) top = top < s[j] ? s[j] : top;
      const A shift = top * factor;
      A sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < valid; ++j) {
        const A e = exp2_below(s[j] * factor - shift);
        sum += e;
        w[j] = narrow<G>(e);
      }
      std::fill(w + valid, w + seen, G(0));
      sums[i] = sum;
      log2_sum[begin + i] = shift + std::log2(sum);
    }
    multiply(rows, width, seen, scratch.weights, seen, scratch.value_rows, width, scratch.out, width, false);
    for (int64_t i = 0; i < rows; ++i) {
      const A inverse = 1 / sums[i];
      T* y = static_cast<T*>(p.out) + head.out(p, begin + i);
      const A* x = scratch.out + i * width;
#pragma omp simd
      for (int64_t k = 0; k < width; ++k) y[k] = narrow<T>(x[k] * inverse);
    }
  }
}

template <typename G>
struct BackwardScratch {
  using A = Accumulate<G>;
  G *rows, *key, *key_columns, *value, *query_columns, *query_rows, *grad_columns, *grad_rows;
  G *weights, *slopes, *slope_rows;
  A *exponent, *delta, *scores, *products, *grad_query, *grad_block;

  BackwardScratch(Arena& arena, int64_t length, int64_t width)
      : rows(arena.take<G>(length * width)),
        key(arena.take<G>(length * width)),
        key_columns(arena.take<G>(length * width)),
        value(arena.take<G>(length * width)),
        query_columns(arena.take<G>(length * width)),
        query_rows(arena.take<G>(length * width)),
        grad_columns(arena.take<G>(length * width)),
        grad_rows(arena.take<G>(length * width)),
        weights(arena.take<G>(kBlockRows * length)),
        slopes(arena.take<G>(kBlockRows * length)),
        slope_rows(arena.take<G>(kBlockRows * length)),
        exponent(arena.take<A>(length)),
        delta(arena.take<A>(length)),
        scores(arena.take<A>(kBlockRows * length)),
        products(arena.take<A>(kBlockRows * length)),
        grad_query(arena.take<A>(length * width)),
        grad_block(arena.take<A>(kBlockRows * width)) {}
};

template <typename T, typename G>
MEGAEVA_INLINE void scatter(const Params& p, const Head& head, int64_t which, int64_t token,
                            const Accumulate<G>* grad) {
  T* to = static_cast<T*>(p.grad_qkv) + head.qkv(p, token, which);
  if (p.cos_sin != nullptr && which < 2) {
    turn<true>(grad, head.cos(p, token), head.sin(p, token), to, p.width);
  } else {
#pragma omp simd
    for (int64_t k = 0; k < p.width; ++k) to[k] = narrow<T>(grad[k]);
  }
}

// A block of keys at a time, all queries beside it: p and ds come out transposed, as dv and dk want them.
template <typename T, typename G>
MEGAEVA_INLINE void backward_head(const Params& p, const Head& head, const BackwardScratch<G>& scratch) {
  using A = Accumulate<G>;
  const int64_t length = padded(p.length), width = p.width;
  const A factor = static_cast<A>(p.scale * 1.4426950408889634), scale = static_cast<A>(p.scale);
  gather<T>(p, head, 1, scratch.key);
  transpose(scratch.key, length, width, scratch.key_columns);
  gather<T>(p, head, 2, scratch.value);
  gather<T>(p, head, 0, scratch.rows);
  pack_columns(scratch.rows, length, width, scratch.query_columns);
  pack_rows(scratch.rows, length, width, scratch.query_rows);
  gather_out<T>(p, head, p.grad_out, scratch.rows);
  pack_columns(scratch.rows, length, width, scratch.grad_columns);
  pack_rows(scratch.rows, length, width, scratch.grad_rows);
  const A* log2_sum = static_cast<const A*>(p.log2_sum) + (head.sample * p.heads + head.number) * p.length;
  for (int64_t s = 0; s < length; ++s) {
    A sum = 0;
    if (s < p.length) {
      const T* out = static_cast<const T*>(p.out) + head.out(p, s);
      const T* grad = static_cast<const T*>(p.grad_out) + head.out(p, s);
#pragma omp simd reduction(+ : sum)
      for (int64_t k = 0; k < width; ++k) sum += static_cast<A>(widen(out[k])) * static_cast<A>(widen(grad[k]));
    }
    scratch.delta[s] = sum;
    // A padding query gives every key the weight 2^-inf.
    scratch.exponent[s] = s < p.length ? log2_sum[s] : std::numeric_limits<A>::infinity();
  }
  for (int64_t begin = 0; begin < p.length; begin += kBlockRows) {
    const int64_t end = std::min(begin + kBlockRows, p.length), rows = end - begin;
    const int64_t even_rows = (rows + Pairs<G> - 1) / Pairs<G> * Pairs<G>;
    const int64_t first = p.causal ? begin / kLanes * kLanes : 0;  // the first query that sees one of these keys
    const int64_t seeing = length - first;
    multiply(rows, seeing, width, scratch.key + begin * width, width, scratch.query_columns + first * Pairs<G>, length,
             scratch.scores, seeing, false);
    multiply(rows, seeing, width, scratch.value + begin * width, width, scratch.grad_columns + first * Pairs<G>, length,
             scratch.products, seeing, false);
    const A* exponent = scratch.exponent + first;
    const A* delta = scratch.delta + first;
    for (int64_t j = 0; j < rows; ++j) {
      const A* s = scratch.scores + j * seeing;
      const A* d = scratch.products + j * seeing;
      G* w = scratch.weights + j * seeing;
      G* slope = scratch.slopes + j * seeing;
#pragma omp simd
      for (int64_t i = 0; i < seeing; ++i) {
        // The recomputed score may exceed what the forward pass rounded by a little: not more than 2^0 all the same.
        const A x = s[i] * factor - exponent[i];
        const A e = exp2_below(x > 0 ? A(0) : x);
        w[i] = narrow<G>(e);
        slope[i] = narrow<G>(e * (d[i] - delta[i]) * scale);
      }
      if (p.causal) {
        const int64_t blind = begin + j - first;  // queries before this key
        std::fill_n(w, blind, G(0));
        std::fill_n(slope, blind, G(0));
      }
    }
    if (even_rows > rows) std::fill_n(scratch.slopes + rows * seeing, seeing, G(0));
    const int64_t grad_offset = first * width;
    multiply(rows, width, seeing, scratch.weights, seeing, scratch.grad_rows + grad_offset, width, scratch.grad_block,
             width, false);
    for (int64_t j = 0; j < rows; ++j) scatter<T, G>(p, head, 2, begin + j, scratch.grad_block + j * width);
    multiply(rows, width, seeing, scratch.slopes, seeing, scratch.query_rows + grad_offset, width, scratch.grad_block,
             width, false);
    for (int64_t j = 0; j < rows; ++j) scatter<T, G>(p, head, 1, begin + j, scratch.grad_block + j * width);
    pack_rows(scratch.slopes, even_rows, seeing, scratch.slope_rows);
    multiply(width, seeing, even_rows, scratch.key_columns + begin, length, scratch.slope_rows, seeing,
             scratch.grad_query + first, length, begin > 0);
  }
  // [width, length] back to rows.
  A* row = scratch.grad_block;
  for (int64_t s = 0; s < p.length; ++s) {
    for (int64_t k = 0; k < width; ++k) row[k] = scratch.grad_query[k * length + s];
    scatter<T, G>(p, head, 0, s, row);
  }
}

template <typename T, typename G>
MEGAEVA_INLINE void forward_heads(const Params& p, int64_t begin, int64_t end) {
  Arena arena;
  ForwardScratch<G>(arena, padded(p.length), p.width);
  arena.allocate();
  const ForwardScratch<G> scratch(arena, padded(p.length), p.width);
  for (int64_t head = begin; head < end; ++head) forward_head<T, G>(p, Head(p, head), scratch);
  if constexpr (Pairs<G> == 2) at::native::cpublas::brgemm_release(true);
}

template <typename T, typename G>
MEGAEVA_INLINE void backward_heads(const Params& p, int64_t begin, int64_t end) {
  Arena arena;
  BackwardScratch<G>(arena, padded(p.length), p.width);
  arena.allocate();
  const BackwardScratch<G> scratch(arena, padded(p.length), p.width);
  for (int64_t head = begin; head < end; ++head) backward_head<T, G>(p, Head(p, head), scratch);
  if constexpr (Pairs<G> == 2) at::native::cpublas::brgemm_release(true);
}

// target_clones needs plain functions, one for each pair of element types: as stored, as multiplied.
#define MEGAEVA_HEADS(NAME, STORED, MULTIPLIED)                                                       \
  MEGAEVA_MULTIVERSION void forward_##NAME(const Params& p, int64_t begin, int64_t end) {             \
    forward_heads<STORED, MULTIPLIED>(p, begin, end);                                                 \
  }                                                                                                   \
  MEGAEVA_MULTIVERSION void backward_##NAME(const Params& p, int64_t begin, int64_t end) {            \
    backward_heads<STORED, MULTIPLIED>(p, begin, end);                                                \
  }
MEGAEVA_HEADS(float, float, float)
MEGAEVA_HEADS(double, double, double)
MEGAEVA_HEADS(half, Half, float)
MEGAEVA_HEADS(bfloat16, BFloat16, BFloat16)
MEGAEVA_HEADS(bfloat16_as_float, BFloat16, float)
#undef MEGAEVA_HEADS

void over_heads(const Params& p, void (*heads)(const Params&, int64_t, int64_t)) {
  at::parallel_for(0, p.batch * p.heads, 1, [&](int64_t begin, int64_t end) { heads(p, begin, end); });
}

void run_forward(const Params& p, Scalar scalar) {
  switch (scalar) {
    case Scalar::kFloat: return over_heads(p, forward_float);
    case Scalar::kDouble: return over_heads(p, forward_double);
    case Scalar::kHalf: return over_heads(p, forward_half);
    case Scalar::kBFloat16: return over_heads(p, has_bfloat16_products() ? forward_bfloat16 : forward_bfloat16_as_float);
  }
}

void run_backward(const Params& p, Scalar scalar) {
  switch (scalar) {
    case Scalar::kFloat: return over_heads(p, backward_float);
    case Scalar::kDouble: return over_heads(p, backward_double);
    case Scalar::kHalf: return over_heads(p, backward_half);
    case Scalar::kBFloat16:
      return over_heads(p, has_bfloat16_products() ? backward_bfloat16 : backward_bfloat16_as_float);
  }
}

std::tuple<at::Tensor, at::Tensor> forward_cpu(const at::Tensor& qkv, const std::optional<at::Tensor>& cos_sin,
                                               int64_t num_heads, bool causal) {
  return forward(qkv, cos_sin, num_heads, causal, run_forward);
}

at::Tensor backward_cpu(const at::Tensor& grad_out, const at::Tensor& qkv, const std::optional<at::Tensor>& cos_sin,
                        const at::Tensor& out, const at::Tensor& lse, int64_t num_heads, bool causal) {
  return backward(grad_out, qkv, cos_sin, out, lse, num_heads, causal, run_backward);
}

TORCH_LIBRARY_IMPL(megaeva, CPU, m) {
  m.impl("attention", &forward_cpu);
  m.impl("attention_backward", &backward_cpu);
}

}  // namespace
}  // namespace megaeva::attention
