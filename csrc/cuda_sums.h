// Sums over threads and blocks of a GPU, always in the same order: no float is added atomically.
#pragma once

#include "cuda_order.h"
#include "cuda_streams.h"

namespace wdk {

constexpr int kWarp = 32;

// A set of columns of a row of sums (sums.h), known when a kernel is compiled.
constexpr unsigned columns(int first, int last) { return (1u << last) - (1u << first); }
constexpr unsigned kProjectedColumns = columns(kFirstProjected, kLastProjected);
constexpr unsigned kSquares = columns(kGradient2, kGradient2 + 1);
constexpr unsigned kMeasuredColumns = columns(kFirstMeasured, kLastMeasured);
constexpr unsigned kToldColumns = kSquares | kMeasuredColumns;  // all that telemetry is told

template <unsigned set, class Body>
__device__ void for_each_column(const Body& body) {
#pragma unroll
  for (int k = 0; k < kSums; ++k)
    if (set >> k & 1) body(k);
}

// The sums over all threads, in thread 0.
template <unsigned set, int n>
__device__ void sum_over_block(double (&x)[n]) {
  __shared__ double warps[n][kThreads / kWarp];
  __syncthreads();  // the sums before these have been read
  for_each_column<set>([&](int k) {
    for (int delta = kWarp / 2; delta > 0; delta /= 2)
      x[k] += __shfl_down_sync(0xffffffff, x[k], delta);
    if (threadIdx.x % kWarp == 0) warps[k][threadIdx.x / kWarp] = x[k];
  });
  __syncthreads();
  if (threadIdx.x != 0) return;
  for_each_column<set>([&](int k) {
    x[k] = 0;
    for (int warp = 0; warp < kThreads / kWarp; ++warp) x[k] += warps[k][warp];
  });
}

__device__ inline double sum_over_block(double x) {
  double sum[1] = {x};
  sum_over_block<1u>(sum);
  return sum[0];
}

// The sums over so many rows, in thread 0, which other blocks have written.
template <unsigned set>
__device__ void sum_over_rows(double (&x)[kSums], const double (*rows)[kSums], int count) {
  for_each_column<set>([&](int k) { x[k] = 0; });
#pragma unroll 1
  for (int row = threadIdx.x; row < count; row += kThreads)
    for_each_column<set>([&](int k) { x[k] += rows[row][k]; });
  sum_over_block<set>(x);
}

// One column of them.
__device__ inline double sum_over_rows(const double (*rows)[kSums], int column, int count) {
  double sum = 0;
#pragma unroll 1
  for (int row = threadIdx.x; row < count; row += kThreads) sum += rows[row][column];
  return sum_over_block(sum);
}

// A row of sums, by one thread, into memory.
template <unsigned set>
__device__ void leave(double* row, const double (&sums)[kSums]) {
  for_each_column<set>([&](int k) { row[k] = sums[k]; });
}

// Whether this block is the last of `all` to get here: then what the others have written is seen.
__device__ inline bool last_to_arrive(int32_t* arrived, int all) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) last = add_acquire_release(arrived, 1) == all - 1;
  __syncthreads();
  return last;
}

}  // namespace wdk
