// What orders the blocks of a GPU among each other: atomic accesses that acquire and release.
//
// A block hands on what it has written by a __syncthreads() and a release of its thread 0; another
// takes it over by an acquire of its own thread 0, that has read what was released, and a
// __syncthreads(). atomicAdd alone orders nothing. tests/cuda brings these functions along with the
// same orders, in C++'s words, so that a race detector may judge the kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#ifdef __CUDACC__

namespace wdk {

__device__ inline int32_t add_acquire_release(int32_t* address, int32_t value) {
  int32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(address)), "r"(value)
               : "memory");
  return before;
}

__device__ inline void store_release(int32_t* address, int32_t value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(__cvta_generic_to_global(address)),
               "r"(value)
               : "memory");
}

__device__ inline int32_t load_acquire(const int32_t* address) {
  int32_t value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(address))
               : "memory");
  return value;
}

__device__ inline int32_t load_relaxed(const int32_t* address) {
  int32_t value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(address))
               : "memory");
  return value;
}

}  // namespace wdk

#endif
