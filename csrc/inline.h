// Functions that every loop, on whichever device, takes into itself.
#pragma once

#if defined(__CUDACC__)
#define WDK_INLINE __host__ __device__ __forceinline__
#else
// always_inline also keeps each instruction set's copy inside its own translation unit: a merged
// out-of-line copy could run AVX-512 code on a machine without it.
#define WDK_INLINE inline __attribute__((always_inline))
#endif
