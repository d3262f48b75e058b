// How a kernel declares shared memory and is launched. One source: nvcc compiles it for a GPU, and tests/kernels/simt
// runs it on a CPU, where a shared element knows its bounds, whether it was written, and who touched it since a barrier.
//
//   MEGAEVA_SHARED(float, tile, 32 * 33);     an array of the block, one-dimensional; the count is a constant
//   MEGAEVA_DYNAMIC_SHARED(float, tile);      all of the launch's shared_bytes (at most 48 KiB) as one array
//   Shared<float>                             what either is to a device function it is passed to; `tile + n` works
//   launch(kernel<T>, grid, block, shared_bytes, stream, arguments...)     a cudaError_t, 0 being success
//
// Read an element into a variable of its type (`const float x = tile[i];`): on a CPU tile[i] is an object that checks,
// so that `auto`, `&tile[i]` and `tile[i].x` do not compile there.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <type_traits>

#ifdef __CUDACC__

#define MEGAEVA_SHARED(type, name, count) __shared__ type name[count]
#define MEGAEVA_DYNAMIC_SHARED(type, name)                      \
  extern __shared__ uint4 megaeva_dynamic_shared[];             \
  type* const name = reinterpret_cast<type*>(megaeva_dynamic_shared)

namespace megaeva {

template <typename T>
using Shared = T*;

template <typename... Parameters>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, void* stream,
           std::type_identity_t<Parameters>... arguments) {
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace megaeva

#else

#define MEGAEVA_SHARED(type, name, count) \
  static char name##_declared;            \
  const ::simt::Shared<type> name = ::simt::declare_shared<type>(&name##_declared, #name, __func__, count)
#define MEGAEVA_DYNAMIC_SHARED(type, name) \
  const ::simt::Shared<type> name = ::simt::declare_dynamic_shared<type>(#name, __func__)

namespace megaeva {

template <typename T>
using Shared = ::simt::Shared<T>;

template <typename... Parameters>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, void*,
           std::type_identity_t<Parameters>... arguments) {
  return ::simt::run_grid([&] { kernel(arguments...); }, grid, block, shared_bytes);
}

}  // namespace megaeva

#endif
