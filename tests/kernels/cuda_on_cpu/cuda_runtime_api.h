// Enough of CUDA to run a kernel's own source on a CPU: one std::thread for each CUDA thread of a block, blocks one after
// another. Warp shuffles meet at a barrier and exchange through memory. Slow and faithful to the index arithmetic; it
// says nothing about memory coalescing, races between blocks, or speed.
#pragma once

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__

struct EmulatedIndex {
  unsigned x = 0, y = 0, z = 0;
};
inline thread_local EmulatedIndex threadIdx, blockIdx;

struct EmulatedWarp {
  std::barrier<> meet{32};
  double slot[32];
};
inline thread_local EmulatedWarp* emulated_warp = nullptr;

// All 32 lanes must call it, as with a full mask on the device; a warp that diverges here hangs and the test times out.
template <typename A>
A __shfl_xor_sync(unsigned, A value, int lane_mask) {
  const int lane = threadIdx.x % 32;
  emulated_warp->slot[lane] = static_cast<double>(value);  // float and double pass through a double unchanged
  emulated_warp->meet.arrive_and_wait();
  const A other = static_cast<A>(emulated_warp->slot[lane ^ lane_mask]);
  emulated_warp->meet.arrive_and_wait();
  return other;
}

template <typename Kernel, typename Params>
void run_on_cpu(Kernel kernel, unsigned num_blocks, unsigned num_threads, const Params& params) {
  for (unsigned block = 0; block < num_blocks; ++block) {
    std::vector<std::unique_ptr<EmulatedWarp>> warps;
    for (unsigned w = 0; w < num_threads / 32; ++w) warps.push_back(std::make_unique<EmulatedWarp>());
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < num_threads; ++t) {
      threads.emplace_back([&, t] {
        threadIdx.x = t;
        blockIdx.x = block;
        emulated_warp = warps[t / 32].get();
        kernel(params);
      });
    }
    for (auto& thread : threads) thread.join();
  }
}
