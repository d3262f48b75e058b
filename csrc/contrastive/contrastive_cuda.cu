// The passes over a tile of the contrastive losses on a GPU. A block takes 128 rows x 256 columns: a warp reads one row of
// it at a time, each lane eight columns, 16 bytes at once where the tile's width allows. Every element is read once.
//
// What a block sums along a row or a column it writes to scratch, and a second kernel adds the blocks in their order to
// the running numbers: no atomics, the same bits in every run. A lane sums its eight columns in the tile's type; what is
// summed over lanes, warps or blocks is double. Reading a tile is meant to take longer than the one or two exponentials of
// an element; on a GPU nothing of this has run.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "common/kernel.h"
#include "contrastive/contrastive_cuda.h"

namespace megaeva::contrastive {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarp * kWarps;
constexpr int kBlockColumns = 256;
constexpr int kBlockRows = 128;
constexpr int kLaneColumns = kBlockColumns / kWarp;
constexpr int kStepRows = 4;  // rows a warp of infonce_forward_kernel holds at once
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }
__device__ inline float log1p_of(float x) { return log1pf(x); }
__device__ inline double log1p_of(double x) { return log1p(x); }
__device__ inline float larger(float x, float y) { return fmaxf(x, y); }  // of a NaN and a number, the number
__device__ inline double larger(double x, double y) { return fmax(x, y); }
__device__ inline float magnitude(float x) { return fabsf(x); }
__device__ inline double magnitude(double x) { return fabs(x); }

// A product that stays rounded, whatever is subtracted from it: in a fused l - lse a logit would have digits that it had
// not in the forward pass, and the largest would not be 0 from the maximum.
__device__ inline float product_of(float x, float y) { return __fmul_rn(x, y); }
__device__ inline double product_of(double x, double y) { return __dmul_rn(x, y); }

// Named conversions: torch's build switches the implicit ones of half and bfloat16 off.
__device__ inline void narrow(float value, float& out) { out = value; }
__device__ inline void narrow(double value, double& out) { out = value; }
__device__ inline void narrow(float value, __nv_bfloat16& out) { out = __float2bfloat16_rn(value); }
__device__ inline void narrow(float value, __half& out) {
  out = __float2half_rn(value * static_cast<float>(kHalfWeightGain));
}

template <typename A>
__device__ inline A minus_infinity() {
  return static_cast<A>(-INFINITY);
}

template <typename T, int kLanes>
struct alignas(sizeof(T) * kLanes) Vector {
  T lane[kLanes];
};

template <typename A>
__device__ inline A warp_sum(A value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

template <typename A>
__device__ inline A warp_max(A value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value = larger(value, __shfl_xor_sync(kAllLanes, value, offset));
  return value;
}

// ------------------------------------------------------------------------------------------- a block's part of the tile

template <typename A>
__device__ inline A number_at(const void* numbers, std::int64_t index) {
  return static_cast<const A*>(numbers)[index];
}

// The column, counted from the block's first, of a lane's value c: neighbouring lanes hold neighbouring vectors.
template <int kLanes>
__device__ inline int column_of(int c) {
  return (c / kLanes * kWarp + static_cast<int>(threadIdx.x) % kWarp) * kLanes + c % kLanes;
}

__device__ inline std::int64_t first_column() { return static_cast<std::int64_t>(blockIdx.x) * kBlockColumns; }
__device__ inline std::int64_t first_row() { return static_cast<std::int64_t>(blockIdx.y) * kBlockRows; }

__device__ inline int num_columns(std::int64_t columns) {
  const std::int64_t left = columns - first_column();
  return left < kBlockColumns ? static_cast<int>(left) : kBlockColumns;
}

__device__ inline std::int64_t end_row(std::int64_t rows) {
  const std::int64_t end = first_row() + kBlockRows;
  return end < rows ? end : rows;
}

// This lane's part of the row that starts at `row`; 0 beyond its end. A vector is in the row whole or not at all.
template <int kLanes, typename A>
__device__ inline void load_row(const A* row, int num_columns, A (&value)[kLaneColumns]) {
  for (int c = 0; c < kLaneColumns; c += kLanes) {
    Vector<A, kLanes> piece{};
    if (column_of<kLanes>(c) < num_columns) {
      piece = *reinterpret_cast<const Vector<A, kLanes>*>(row + column_of<kLanes>(c));
    }
    for (int i = 0; i < kLanes; ++i) value[c + i] = piece.lane[i];
  }
}

template <int kLanes, typename A, typename W>
__device__ inline void store_row(const A (&value)[kLaneColumns], int num_columns, W* row) {
  for (int c = 0; c < kLaneColumns; c += kLanes) {
    if (column_of<kLanes>(c) >= num_columns) continue;
    Vector<W, kLanes> piece;
    for (int i = 0; i < kLanes; ++i) narrow(value[c + i], piece.lane[i]);
    *reinterpret_cast<Vector<W, kLanes>*>(row + column_of<kLanes>(c)) = piece;
  }
}

// ------------------------------------------------------------------------------------------------------ log-sum-exps

// What is subtracted before exp: the maximum, but 0 for an infinite one, as inf - inf is no number.
template <typename A>
__device__ inline A anchor(A max) {
  return max - max == 0 ? max : static_cast<A>(0);
}

// What makes a sum that belongs to the maximum `from` one for the larger maximum `to`.
template <typename A>
__device__ inline A rescale(A from, A to) {
  return from == to ? static_cast<A>(1) : exp_of(from - to);
}

// A sum of exponentials in two numbers: those equal to 1, of the largest logits, apart from the rest. Next to them the
// rest would be rounded away, and where training ends the rest is the loss.
template <typename A>
struct ExpSum {
  A top = 0;
  A rest = 0;

  __device__ void add(A exponential) {
    const A small = exponential < 1 ? exponential : static_cast<A>(0);
    rest += small;
    top += exponential - small;  // 0 or 1, or an infinity or a NaN
  }

  __device__ void rescale_by(A factor) {
    if (factor == 1) return;
    rest = (top + rest) * factor;
    top = 0;
  }

  __device__ double total() const { return static_cast<double>(top) + static_cast<double>(rest); }
};

// Partial sums and maxima: [column blocks, rows] and [row blocks, columns] each.
template <typename A>
struct LogSumScratch {
  double* sum_row;
  double* sum_column;
  A* max_row;
  A* max_column;
};

template <typename A, int kLanes>
__global__ void __launch_bounds__(kThreads) infonce_forward_kernel(InfonceForwardParams p, LogSumScratch<A> out) {
  MEGAEVA_SHARED(A, shared_max, kWarps * kBlockColumns);
  MEGAEVA_SHARED(double, shared_sum, kWarps * kBlockColumns);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, width = num_columns(p.columns);
  const A scale = number_at<A>(p.scale, 0);
  const std::int64_t end = end_row(p.rows);
  A max_column[kLaneColumns];  // over the rows of this warp
  ExpSum<A> sum_column[kLaneColumns];
  for (int c = 0; c < kLaneColumns; ++c) max_column[c] = minus_infinity<A>();

  for (std::int64_t step = first_row() + warp * kStepRows; step < end; step += kWarps * kStepRows) {
    A logit[kStepRows][kLaneColumns];
#pragma unroll
    for (int r = 0; r < kStepRows; ++r) {
      const int inside = step + r < end ? width : 0;
      const A* row = static_cast<const A*>(p.product) + (step + r) * p.columns + first_column();
      load_row<kLanes>(row, inside, logit[r]);
      for (int c = 0; c < kLaneColumns; ++c) {
        logit[r][c] = column_of<kLanes>(c) < inside ? product_of(logit[r][c], scale) : minus_infinity<A>();
      }
      const std::int64_t pair = p.pair + step + r - first_column();
      if (lane == 0 && 0 <= pair && pair < inside) {
        static_cast<A*>(p.pair_query)[step + r] = product_of(row[pair], scale);
      }
    }
#pragma unroll
    for (int r = 0; r < kStepRows; ++r) {
      A max = minus_infinity<A>();
      for (int c = 0; c < kLaneColumns; ++c) max = larger(max, logit[r][c]);
      max = warp_max(max);
      ExpSum<A> lanes_sum;
      for (int c = 0; c < kLaneColumns; ++c) lanes_sum.add(exp_of(logit[r][c] - anchor(max)));
      const double sum = warp_sum(lanes_sum.total());
      if (lane == 0 && step + r < end) {
        out.max_row[blockIdx.x * p.rows + step + r] = max;
        out.sum_row[blockIdx.x * p.rows + step + r] = sum;
      }
    }
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) {
      A max = max_column[c];
      for (int r = 0; r < kStepRows; ++r) max = larger(max, logit[r][c]);
      sum_column[c].rescale_by(rescale(max_column[c], max));
      for (int r = 0; r < kStepRows; ++r) sum_column[c].add(exp_of(logit[r][c] - anchor(max)));
      max_column[c] = max;
    }
  }

  for (int c = 0; c < kLaneColumns; ++c) {
    shared_max[warp * kBlockColumns + column_of<kLanes>(c)] = max_column[c];
    shared_sum[warp * kBlockColumns + column_of<kLanes>(c)] = sum_column[c].total();
  }
  __syncthreads();
  for (int column = threadIdx.x; column < width; column += kThreads) {
    A max = minus_infinity<A>();
    for (int w = 0; w < kWarps; ++w) max = larger(max, shared_max[w * kBlockColumns + column]);
    double sum = 0;
    for (int w = 0; w < kWarps; ++w) {
      const A warps_max = shared_max[w * kBlockColumns + column];
      const double warps_sum = shared_sum[w * kBlockColumns + column];
      sum += warps_sum * static_cast<double>(rescale(warps_max, max));
    }
    out.max_column[blockIdx.y * p.columns + first_column() + column] = max;
    out.sum_column[blockIdx.y * p.columns + first_column() + column] = sum;
  }
}

// Adds partial maxima and sums [num_blocks, count] to the running ones.
template <typename A>
struct LogSumMerge {
  const A* partial_max;
  const double* partial_sum;
  A* max;
  double* sum;
  std::int64_t num_blocks;
  std::int64_t count;
};

template <typename A>
__global__ void __launch_bounds__(kThreads) merge_log_sums_kernel(LogSumMerge<A> of_rows, LogSumMerge<A> of_columns) {
  const LogSumMerge<A>& p = blockIdx.y == 0 ? of_rows : of_columns;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.count) return;
  A max = p.max[i];
  for (std::int64_t b = 0; b < p.num_blocks; ++b) max = larger(max, p.partial_max[b * p.count + i]);
  const double new_max = static_cast<double>(max);
  double sum = p.sum[i] * rescale(static_cast<double>(p.max[i]), new_max);
  for (std::int64_t b = 0; b < p.num_blocks; ++b) {
    sum += p.partial_sum[b * p.count + i] * rescale(static_cast<double>(p.partial_max[b * p.count + i]), new_max);
  }
  p.max[i] = max;
  p.sum[i] = sum;
}

// ------------------------------------------------------------------------------------------------------------- weights

// Sums along a row within a block, [column blocks, rows] in scratch.
__device__ inline void put_row_sum(double lanes_sum, std::int64_t row, std::int64_t rows, double* partial) {
  const double sum = warp_sum(lanes_sum);
  if (threadIdx.x % kWarp == 0) partial[blockIdx.x * rows + row] = sum;
}

template <typename A, typename W, int kLanes>
__global__ void __launch_bounds__(kThreads) infonce_backward_kernel(InfonceBackwardParams p, double* partial_share) {
  const int warp = threadIdx.x / kWarp, width = num_columns(p.columns);
  const A scale = number_at<A>(p.scale, 0);
  const A pair_weight = static_cast<A>(p.pair_weight), uniform = static_cast<A>(p.uniform);
  A lse_key[kLaneColumns], rest_key[kLaneColumns], pair_key[kLaneColumns];
  for (int c = 0; c < kLaneColumns; ++c) {
    const bool inside = column_of<kLanes>(c) < width;
    const std::int64_t column = first_column() + column_of<kLanes>(c);
    lse_key[c] = inside ? number_at<A>(p.lse_key, column) : static_cast<A>(0);
    rest_key[c] = inside ? number_at<A>(p.lse_key_rest, column) : static_cast<A>(0);
    pair_key[c] = inside ? number_at<A>(p.pair_key, column) : static_cast<A>(0);
  }
  for (std::int64_t row = first_row() + warp; row < end_row(p.rows); row += kWarps) {
    const std::int64_t at = row * p.columns + first_column(), pair = p.pair + row - first_column();
    const A lse_query = number_at<A>(p.lse_query, row), rest_query = number_at<A>(p.lse_query_rest, row);
    const A pair_query = number_at<A>(p.pair_query, row);
    A value[kLaneColumns], share = 0;
    load_row<kLanes>(static_cast<const A*>(p.product) + at, width, value);
    for (int c = 0; c < kLaneColumns; ++c) {
      if (column_of<kLanes>(c) >= width) continue;
      const A logit = product_of(value[c], scale);
      const A by_query = exp_of(logit - lse_query - rest_query) - uniform;
      const A by_key = exp_of(logit - lse_key[c] - rest_key[c]);
      share += by_query * (logit - pair_query) + by_key * (logit - pair_key[c]);
      value[c] = by_query + by_key;
      if (column_of<kLanes>(c) == pair) value[c] -= pair_weight;
    }
    store_row<kLanes>(value, width, static_cast<W*>(p.weight) + at);
    put_row_sum(static_cast<double>(share), row, p.rows, partial_share);
  }
}

// 1 / (1 + exp(-x)), with no exponential that overflows.
template <typename A>
__device__ inline A logistic(A x) {
  const A small = exp_of(-magnitude(x));
  return (x >= 0 ? static_cast<A>(1) : small) / (1 + small);
}

template <typename A, int kLanes>
__global__ void __launch_bounds__(kThreads) sigmoid_forward_kernel(SigmoidForwardParams p, double* partial_total) {
  const int warp = threadIdx.x / kWarp, width = num_columns(p.columns);
  const A scale = number_at<A>(p.scale, 0), bias = number_at<A>(p.bias, 0);
  for (std::int64_t row = first_row() + warp; row < end_row(p.rows); row += kWarps) {
    const std::int64_t at = row * p.columns + first_column(), pair = p.pair + row - first_column();
    A value[kLaneColumns], total = 0;
    load_row<kLanes>(static_cast<const A*>(p.product) + at, width, value);
    for (int c = 0; c < kLaneColumns; ++c) {
      if (column_of<kLanes>(c) >= width) continue;
      const A logit = value[c] * scale + bias, wrong = column_of<kLanes>(c) == pair ? -logit : logit;
      total += larger(wrong, static_cast<A>(0)) + log1p_of(exp_of(-magnitude(wrong)));
    }
    put_row_sum(static_cast<double>(total), row, p.rows, partial_total);
  }
}

template <typename A, typename W, int kLanes>
__global__ void __launch_bounds__(kThreads)
    sigmoid_backward_kernel(SigmoidBackwardParams p, double* partial_scale_share, double* partial_bias_share) {
  const int warp = threadIdx.x / kWarp, width = num_columns(p.columns);
  const A scale = number_at<A>(p.scale, 0), bias = number_at<A>(p.bias, 0);
  for (std::int64_t row = first_row() + warp; row < end_row(p.rows); row += kWarps) {
    const std::int64_t at = row * p.columns + first_column(), pair = p.pair + row - first_column();
    A value[kLaneColumns], along = 0, sum = 0, pair_product = 0;
    load_row<kLanes>(static_cast<const A*>(p.product) + at, width, value);
    bool has_pair = false;
    for (int c = 0; c < kLaneColumns; ++c) {
      if (column_of<kLanes>(c) >= width) continue;
      const A product = value[c];
      if (column_of<kLanes>(c) == pair) {
        has_pair = true;
        pair_product = product;
      } else {
        value[c] = logistic(product * scale + bias);
        along += value[c] * product;
        sum += value[c];
      }
    }
    double wide_along = static_cast<double>(along), wide_sum = static_cast<double>(sum);
    if (has_pair) {
      // In double: next to its near 1 the other weights are small, and so is their sum's error.
      const double weight = -1 / (1 + exp(static_cast<double>(pair_product * scale + bias)));
      for (int c = 0; c < kLaneColumns; ++c) {
        if (column_of<kLanes>(c) == pair) value[c] = static_cast<A>(weight);
      }
      wide_along += weight * static_cast<double>(pair_product);
      wide_sum += weight;
    }
    store_row<kLanes>(value, width, static_cast<W*>(p.weight) + at);
    put_row_sum(wide_along * static_cast<double>(scale), row, p.rows, partial_scale_share);
    put_row_sum(wide_sum, row, p.rows, partial_bias_share);
  }
}

// running_i += sum_b partial_bi, for one or two running sums (the second's partials follow the first's).
__global__ void __launch_bounds__(kThreads) add_row_sums_kernel(const double* partial, std::int64_t num_blocks,
                                                                std::int64_t rows, double* first, double* second) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= rows) return;
  double* const running = blockIdx.y == 0 ? first : second;
  double sum = running[i];
  for (std::int64_t b = 0; b < num_blocks; ++b) sum += partial[(blockIdx.y * num_blocks + b) * rows + i];
  running[i] = sum;
}

// -------------------------------------------------------------------------------------------------------------- launch

unsigned blocks_for(std::int64_t count, int per_block) {
  return static_cast<unsigned>((count + per_block - 1) / per_block);
}

template <typename Params>
dim3 grid_of(const Params& p) {
  return dim3(blocks_for(p.columns, kBlockColumns), blocks_for(p.rows, kBlockRows));
}

// Whether every row of the tile starts at a multiple of 16 bytes; weights of two bytes are then stored 8 bytes at once.
template <typename A>
bool wide_loads(const void* product, const void* weight, std::int64_t columns) {
  const auto aligned = [](const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; };
  return columns % (16 / static_cast<std::int64_t>(sizeof(A))) == 0 && aligned(product) && aligned(weight);
}

template <typename A>
int launch_infonce_forward(const InfonceForwardParams& p, double* scratch, void* stream) {
  const dim3 grid = grid_of(p);
  const std::int64_t of_rows = grid.x * p.rows, of_columns = grid.y * p.columns;
  A* const maxima = reinterpret_cast<A*>(scratch + of_rows + of_columns);
  const LogSumScratch<A> out{scratch, scratch + of_rows, maxima, maxima + of_rows};
  const auto kernel = wide_loads<A>(p.product, nullptr, p.columns) ? infonce_forward_kernel<A, 16 / sizeof(A)>
                                                                   : infonce_forward_kernel<A, 1>;
  if (const int error = launch(kernel, grid, kThreads, 0, stream, p, out)) return error;
  const dim3 merge_grid(blocks_for(p.rows > p.columns ? p.rows : p.columns, kThreads), 2);
  return launch(merge_log_sums_kernel<A>, merge_grid, kThreads, 0, stream,
                LogSumMerge<A>{out.max_row, out.sum_row, static_cast<A*>(p.max_query), p.sum_query, grid.x, p.rows},
                LogSumMerge<A>{out.max_column, out.sum_column, static_cast<A*>(p.max_key), p.sum_key, grid.y,
                               p.columns});
}

int launch_add_row_sums(const double* scratch, dim3 grid, std::int64_t rows, double* first, double* second,
                        void* stream) {
  const dim3 add_grid(blocks_for(rows, kThreads), second == nullptr ? 1 : 2);
  return launch(add_row_sums_kernel, add_grid, kThreads, 0, stream, scratch, grid.x, rows, first, second);
}

template <typename A, typename W>
int launch_infonce_backward(const InfonceBackwardParams& p, double* scratch, void* stream) {
  const dim3 grid = grid_of(p);
  const auto kernel = wide_loads<A>(p.product, p.weight, p.columns) ? infonce_backward_kernel<A, W, 16 / sizeof(A)>
                                                                    : infonce_backward_kernel<A, W, 1>;
  if (const int error = launch(kernel, grid, kThreads, 0, stream, p, scratch)) return error;
  return launch_add_row_sums(scratch, grid, p.rows, p.share, nullptr, stream);
}

template <typename A>
int launch_sigmoid_forward(const SigmoidForwardParams& p, double* scratch, void* stream) {
  const dim3 grid = grid_of(p);
  const auto kernel = wide_loads<A>(p.product, nullptr, p.columns) ? sigmoid_forward_kernel<A, 16 / sizeof(A)>
                                                                   : sigmoid_forward_kernel<A, 1>;
  if (const int error = launch(kernel, grid, kThreads, 0, stream, p, scratch)) return error;
  return launch_add_row_sums(scratch, grid, p.rows, p.total, nullptr, stream);
}

template <typename A, typename W>
int launch_sigmoid_backward(const SigmoidBackwardParams& p, double* scratch, void* stream) {
  const dim3 grid = grid_of(p);
  const auto kernel = wide_loads<A>(p.product, p.weight, p.columns) ? sigmoid_backward_kernel<A, W, 16 / sizeof(A)>
                                                                    : sigmoid_backward_kernel<A, W, 1>;
  if (const int error = launch(kernel, grid, kThreads, 0, stream, p, scratch, scratch + grid.x * p.rows)) return error;
  return launch_add_row_sums(scratch, grid, p.rows, p.scale_share, p.bias_share, stream);
}

}  // namespace

std::size_t scratch_bytes(std::int64_t rows, std::int64_t columns) {
  return 2 * sizeof(double) * (blocks_for(columns, kBlockColumns) * static_cast<std::size_t>(rows) +
                               blocks_for(rows, kBlockRows) * static_cast<std::size_t>(columns));
}

int infonce_forward_cuda(const InfonceForwardParams& params, double* scratch, Scalar scalar, void* stream) {
  return scalar == Scalar::kDouble ? launch_infonce_forward<double>(params, scratch, stream)
                                   : launch_infonce_forward<float>(params, scratch, stream);
}

int infonce_backward_cuda(const InfonceBackwardParams& params, double* scratch, Scalar scalar, void* stream) {
  switch (scalar) {
    case Scalar::kFloat: return launch_infonce_backward<float, float>(params, scratch, stream);
    case Scalar::kDouble: return launch_infonce_backward<double, double>(params, scratch, stream);
    case Scalar::kBFloat16: return launch_infonce_backward<float, __nv_bfloat16>(params, scratch, stream);
    case Scalar::kHalf: return launch_infonce_backward<float, __half>(params, scratch, stream);
  }
  return cudaErrorInvalidValue;
}

int sigmoid_forward_cuda(const SigmoidForwardParams& params, double* scratch, Scalar scalar, void* stream) {
  return scalar == Scalar::kDouble ? launch_sigmoid_forward<double>(params, scratch, stream)
                                   : launch_sigmoid_forward<float>(params, scratch, stream);
}

int sigmoid_backward_cuda(const SigmoidBackwardParams& params, double* scratch, Scalar scalar, void* stream) {
  switch (scalar) {
    case Scalar::kFloat: return launch_sigmoid_backward<float, float>(params, scratch, stream);
    case Scalar::kDouble: return launch_sigmoid_backward<double, double>(params, scratch, stream);
    case Scalar::kBFloat16: return launch_sigmoid_backward<float, __nv_bfloat16>(params, scratch, stream);
    case Scalar::kHalf: return launch_sigmoid_backward<float, __half>(params, scratch, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace megaeva::contrastive
