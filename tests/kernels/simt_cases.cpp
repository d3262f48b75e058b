// Kernels for test_simt.py: some right, some with one mistake each that the emulator must name.
#include "common/kernel.h"

#include <cstdint>

namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kThreads = 96;

// --------------------------------------------------------------------------------------------------------------- right

template <typename T>
__device__ T warp_sum(T value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kAll, value, offset);
  return value;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_rows(const T* __restrict__ x, T* __restrict__ sums, std::int64_t width) {
  MEGAEVA_SHARED(T, parts, kThreads / 32);
  T sum = 0;
  for (std::int64_t e = threadIdx.x; e < width; e += blockDim.x) sum += x[blockIdx.x * width + e];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  T total = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += parts[warp];
  sums[blockIdx.x] = total;
}

__device__ void fill(megaeva::Shared<float> tile, const float* x, std::int64_t rows, std::int64_t columns) {
  const std::int64_t column = blockIdx.x * 32 + threadIdx.x;
  for (int r = threadIdx.y; r < 32; r += blockDim.y) {
    const std::int64_t row = blockIdx.y * 32 + r;
    if (row < rows && column < columns) (tile + r * 33)[threadIdx.x] = x[row * columns + column];
  }
}

__device__ void drain(megaeva::Shared<float> tile, float* y, std::int64_t rows, std::int64_t columns) {
  const std::int64_t row = blockIdx.y * 32 + threadIdx.x;
  for (int c = threadIdx.y; c < 32; c += blockDim.y) {
    const std::int64_t column = blockIdx.x * 32 + c;
    if (row < rows && column < columns) y[column * rows + row] = tile[threadIdx.x * 33 + c];
  }
}

__global__ void transpose(const float* x, float* y, std::int64_t rows, std::int64_t columns) {
  MEGAEVA_SHARED(float, tile, 32 * 33);
  fill(tile, x, rows, columns);
  __syncthreads();
  drain(tile, y, rows, columns);
}

__global__ void reverse(const double* x, double* y) {
  MEGAEVA_DYNAMIC_SHARED(double, all);
  all[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = all[blockDim.x - 1 - threadIdx.x];
}

// One column of `out` for each operation, one row for each lane.
template <typename T>
__global__ void exchange(const T* x, T* out) {
  const int lane = threadIdx.x % 32;
  const T value = x[lane];
  T* row = out + lane * 8;
  row[0] = __shfl_sync(kAll, value, lane * 3);
  row[1] = __shfl_xor_sync(kAll, value, 5);
  row[2] = __shfl_down_sync(kAll, value, 3u);
  row[3] = __shfl_up_sync(kAll, value, 3u);
  row[4] = __shfl_down_sync(kAll, value, 3u, 8);
  row[5] = __shfl_up_sync(kAll, value, 3u, 8);
  row[6] = __shfl_sync(kAll, value, 1, 8);
  row[7] = lane < 8 ? __shfl_xor_sync(0xffu, value, 1) : __shfl_xor_sync(0xffffff00u, value, 2);
}

__global__ void vote(std::int64_t* out) {
  const int lane = threadIdx.x;
  out[lane] = __ballot_sync(kAll, lane % 3 == 0) * 4ll + __any_sync(kAll, lane == 7) * 2 + __all_sync(kAll, lane < 31);
}

// Neighbours of one warp exchange through shared memory; `synced` says whether a barrier of the warp makes that right.
__global__ void neighbours(float* y, bool synced) {
  MEGAEVA_SHARED(float, line, kThreads);
  line[threadIdx.x] = threadIdx.x;
  if (synced) __syncwarp();
  y[threadIdx.x] = line[threadIdx.x ^ 1];
}

// Threads that returned count as arrived.
__global__ void early_return(float* y, unsigned num_live) {
  MEGAEVA_SHARED(float, line, kThreads);
  if (threadIdx.x >= num_live) return;
  line[threadIdx.x] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = line[num_live - 1 - threadIdx.x];
}

// ------------------------------------------------------------------------------------------------------------ mistakes

__global__ void missing_barrier(float* y) {
  MEGAEVA_SHARED(float, line, kThreads);
  line[threadIdx.x] = threadIdx.x;
  y[threadIdx.x] = line[threadIdx.x == 0 ? 0 : threadIdx.x - 1];  // threads in order would hide it
}

// The tile is filled for the second time while slower threads may still read the first.
__global__ void missing_second_barrier(float* y) {
  MEGAEVA_SHARED(float, line, kThreads);
  float sum = 0;
  for (int turn = 0; turn < 2; ++turn) {
    line[threadIdx.x] = turn;
    __syncthreads();
    sum += line[(threadIdx.x + 1) % blockDim.x];
  }
  y[threadIdx.x] = sum;
}

// Threads [first, second] read an element that `second` then writes. The last warp has passed a barrier of its own.
__global__ void write_after_read(float* y, unsigned first, unsigned second) {
  MEGAEVA_SHARED(float, line, 1);
  if (threadIdx.x == 0) line[0] = 1;
  __syncthreads();
  if (threadIdx.x >= 64) __syncwarp();
  if (threadIdx.x == first || threadIdx.x == second) y[threadIdx.x] = line[0];
  if (threadIdx.x == second) line[0] = 2;
}

// Only a schedule can show it: global memory is not tracked.
__global__ void missing_barrier_in_global_memory(float* scratch, float* y) {
  scratch[threadIdx.x] = threadIdx.x;
  y[threadIdx.x] = threadIdx.x == 0 ? 0 : scratch[threadIdx.x - 1];
}

__global__ void two_writers() {
  MEGAEVA_SHARED(int, flag, 1);
  flag[0] = threadIdx.x / 32;
}

__global__ void shared_index(std::int64_t index) {
  MEGAEVA_SHARED(float, line, kThreads);
  line[threadIdx.x + index] = 1;
}

__global__ void unwritten_read(float* y) {
  MEGAEVA_SHARED(float, line, kThreads);
  if (threadIdx.x != 40) line[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = line[threadIdx.x];
}

__global__ void shuffle_with_exited_lane(float* y) {
  if (threadIdx.x == 5) return;
  y[threadIdx.x] = warp_sum(1.0f);
}

__global__ void shuffle_in_a_branch(float* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 1);
  __syncthreads();
}

__global__ void shuffle_from_outside_the_mask(float* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, 20);
}

__global__ void shuffle_without_itself(float* y) { y[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, 2); }

__global__ void barrier_in_a_branch() {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void global_read(const float* x, float* y, std::int64_t index) { y[0] = x[index]; }
__global__ void global_write(float* y, std::int64_t index) { y[index] = 1; }
__global__ void vector_read(const float* x, float* y, std::int64_t index) {
  const float4 four = *reinterpret_cast<const float4*>(x + index);
  y[0] = four.w;
}
__global__ void local_array(float* y, std::int64_t index) {
  float values[4] = {0, 1, 2, 3};
  values[index] = 7;
  y[0] = values[1];
}
__global__ void divide(std::int64_t* y, std::int64_t by) { y[0] = y[0] / by; }
__global__ void deep_stack(float* y) {
  volatile float values[32768];  // 128 KiB
  values[threadIdx.x] = 1;
  y[0] = values[threadIdx.x];
}

}  // namespace

using megaeva::launch;
using std::int64_t;

extern "C" {
int run_sum_float(const float* x, float* sums, int64_t rows, int64_t width) {
  return launch(sum_rows<float>, static_cast<unsigned>(rows), kThreads, 0, nullptr, x, sums, width);
}
int run_sum_double(const double* x, double* sums, int64_t rows, int64_t width) {
  return launch(sum_rows<double>, static_cast<unsigned>(rows), kThreads, 0, nullptr, x, sums, width);
}
int run_transpose(const float* x, float* y, int64_t rows, int64_t columns) {
  const dim3 grid((columns + 31) / 32, (rows + 31) / 32);
  return launch(transpose, grid, dim3(32, 8), 0, nullptr, x, y, rows, columns);
}
int run_reverse(const double* x, double* y, int64_t count, int64_t shared_bytes) {
  return launch(reverse, 1, static_cast<unsigned>(count), static_cast<std::size_t>(shared_bytes), nullptr, x, y);
}
int run_exchange_float(const float* x, float* y) { return launch(exchange<float>, 1, 32, 0, nullptr, x, y); }
int run_exchange_double(const double* x, double* y) { return launch(exchange<double>, 1, 32, 0, nullptr, x, y); }
int run_exchange_int(const int* x, int* y) { return launch(exchange<int>, 1, 32, 0, nullptr, x, y); }
int run_exchange_int64(const long long* x, long long* y) {
  return launch(exchange<long long>, 1, 32, 0, nullptr, x, y);
}
int run_vote(int64_t* y) { return launch(vote, 1, 32, 0, nullptr, y); }
int run_neighbours(float* y, int64_t synced) { return launch(neighbours, 1, kThreads, 0, nullptr, y, synced != 0); }
int run_early_return(float* y, int64_t num_live) {
  return launch(early_return, 1, kThreads, 0, nullptr, y, static_cast<unsigned>(num_live));
}

int run_missing_barrier(float* y) { return launch(missing_barrier, 1, kThreads, 0, nullptr, y); }
int run_missing_second_barrier(float* y) { return launch(missing_second_barrier, 1, kThreads, 0, nullptr, y); }
int run_write_after_read(float* y, int64_t first, int64_t second) {
  return launch(write_after_read, 1, kThreads, 0, nullptr, y, static_cast<unsigned>(first),
                static_cast<unsigned>(second));
}
int run_missing_barrier_in_global_memory(float* scratch, float* y) {
  return launch(missing_barrier_in_global_memory, 1, kThreads, 0, nullptr, scratch, y);
}
int run_two_writers() { return launch(two_writers, 1, kThreads, 0, nullptr); }
int run_shared_index(int64_t index) { return launch(shared_index, 1, kThreads, 0, nullptr, index); }
int run_unwritten_read(float* y) { return launch(unwritten_read, 1, kThreads, 0, nullptr, y); }
int run_shuffle_with_exited_lane(float* y) { return launch(shuffle_with_exited_lane, 1, 32, 0, nullptr, y); }
int run_shuffle_in_a_branch(float* y) { return launch(shuffle_in_a_branch, 1, 32, 0, nullptr, y); }
int run_shuffle_from_outside_the_mask(float* y) { return launch(shuffle_from_outside_the_mask, 1, 32, 0, nullptr, y); }
int run_shuffle_without_itself(float* y) { return launch(shuffle_without_itself, 1, 32, 0, nullptr, y); }
int run_barrier_in_a_branch() { return launch(barrier_in_a_branch, 1, kThreads, 0, nullptr); }
int run_global_read(const float* x, float* y, int64_t index) {
  return launch(global_read, 1, 1, 0, nullptr, x, y, index);
}
int run_global_write(float* y, int64_t index) { return launch(global_write, 1, 1, 0, nullptr, y, index); }
int run_vector_read(const float* x, float* y, int64_t index) {
  return launch(vector_read, 1, 1, 0, nullptr, x, y, index);
}
int run_local_array(float* y, int64_t index) { return launch(local_array, 1, 1, 0, nullptr, y, index); }
int run_divide(int64_t* y, int64_t by) { return launch(divide, 1, 1, 0, nullptr, y, by); }
int run_deep_stack(float* y) { return launch(deep_stack, 1, 32, 0, nullptr, y); }
int run_twice(float* y) {  // the first launch fails: the second must not run, nor hide it
  launch(shared_index, 1, kThreads, 0, nullptr, 1000);
  return launch(global_write, 1, 1, 0, nullptr, y, 0);
}
int run_grid(int64_t blocks, int64_t threads, int64_t shared_bytes) {
  return launch(two_writers, static_cast<unsigned>(blocks), static_cast<unsigned>(threads),
                static_cast<std::size_t>(shared_bytes), nullptr);
}
}
