// Kernels that have to run alike on a GPU and on tests/cuda: test_cuda_emulation.py runs them.
//
//     kernels CASE    prints nothing and returns 0 if all is as CUDA has it
#include <cuda_runtime.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda_order.h"

extern "C" void wdk_emulate_failure(const char* call, int passing, int error);

namespace {

constexpr int kThreads = 256;
constexpr unsigned kAll = 0xffffffff;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("not so: %s\n", what);
  std::exit(1);
}

template <class... Parameters, class... Arguments>
cudaError_t launch(int blocks, int threads, void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// ---- sums --------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads) tree_sum(const double* x, double* sums) {
  __shared__ double s[kThreads];
  const int i = threadIdx.x;
  s[i] = __ldg(&x[blockIdx.x * blockDim.x + i]);
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (i < half) s[i] += s[i + half];
  }
  if (i == 0) sums[blockIdx.x] = s[0];
}

__global__ void __launch_bounds__(kThreads)
    shuffle_sum(const double* x, double* sums, double* all) {
  __shared__ double warps[kThreads / 32];
  const int i = threadIdx.x, lane = i % 32;
  double sum = x[blockIdx.x * blockDim.x + i];
  for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_down_sync(kAll, sum, delta);
  if (lane == 0) warps[i / 32] = sum;
  __syncthreads();
  if (i >= 32) return;
  sum = lane < kThreads / 32 ? warps[lane] : 0;
  for (int flip = 16; flip > 0; flip /= 2) sum += __shfl_xor_sync(kAll, sum, flip);
  if (__shfl_sync(kAll, lane, 5) != 5) return;
  if (lane == 31) {
    __stcg(&sums[blockIdx.x], sum);
    atomicAdd(all, sum);
  }
}

void sums() {
  const int blocks = 11;
  std::vector<double> x(blocks * kThreads), tree(blocks), shuffled(blocks);
  double all = 0, expected_all = 0;
  for (size_t i = 0; i < x.size(); ++i) x[i] = double(i * i % 1000);
  expect(!launch(blocks, kThreads, tree_sum, x.data(), tree.data()), "tree_sum runs");
  expect(!launch(blocks, kThreads, shuffle_sum, x.data(), shuffled.data(), &all),
         "shuffle_sum runs");
  for (int b = 0; b < blocks; ++b) {
    double expected = 0;
    for (int i = 0; i < kThreads; ++i) expected += x[b * kThreads + i];
    expect(tree[b] == expected, "the sum by a tree");
    expect(shuffled[b] == expected, "the sum by shuffles");
    expected_all += expected;
  }
  expect(all == expected_all, "the sum by atomics");
}

// ---- blocks that wait for one another ----------------------------------------------------------

// Drawn in order; ticket k adds to what ticket k - 1 has left.
__global__ void tickets(int n, int* next, int* ready, double* value) {
  __shared__ int drawn;
  for (;;) {
    __syncthreads();
    if (threadIdx.x == 0) drawn = atomicAdd(next, 1);
    __syncthreads();
    if (drawn >= n) return;
    if (threadIdx.x == 0) {
      while (!load_acquire(&ready[drawn])) __nanosleep(100);
      value[drawn + 1] = value[drawn] * 0.5 + drawn;
      store_release(&ready[drawn + 1], 1);
    }
  }
}

void waiting() {
  int processors = 0, blocks = 0;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, tickets, 64, 0);
  const int n = 500;
  std::vector<int> ready(n + 1);
  std::vector<double> value(n + 1);
  int next = 0;
  ready[0] = 1;
  expect(!launch(processors * blocks, 64, tickets, n, &next, ready.data(), value.data()),
         "it runs");
  double expected = 0;
  for (int k = 0; k < n; ++k) expected = expected * 0.5 + k;
  expect(value[n] == expected, "tickets in order");
  expect(next == n + processors * blocks, "each block draws one in vain");
}

// ---- threads that leave, or wait for one of their own block ------------------------------------

// A block of 70 has a last warp of 6. Of the first warp the lanes from 20 on leave.
__global__ void leaving(int* sum) {
  __shared__ int s;
  const int i = threadIdx.x;
  if (i >= 20 && i < 32) return;
  if (i == 0) s = 0;
  __syncthreads();
  const int lanes = i < 32 ? 20 : i < 64 ? 32 : 6;
  const int next = __shfl_down_sync(kAll, i, 1);
  atomicAdd(&s, i % 32 + 1 < lanes ? next - i : 1);
  __syncwarp();
  __syncthreads();
  if (i == 0) *sum = s;
}

__global__ void last_first(int* turn) {
  while (atomicAdd(turn, 0) != int(blockDim.x - 1 - threadIdx.x)) {
  }
  atomicMax(turn, int(blockDim.x - threadIdx.x));
}

void threads() {
  int sum = 0, turn = 0;
  expect(!launch(1, 70, leaving, &sum) && sum == 58, "the others go on");
  expect(!launch(1, 40, last_first, &turn) && turn == 40, "a loop of atomics lets others run");
}

// ---- errors ------------------------------------------------------------------------------------

__global__ void increment(int* x) { atomicSub(x, -1); }

void failures() {
  int x = 0;
  wdk_emulate_failure("cudaLaunchKernelEx", 1, cudaErrorIllegalAddress);
  expect(launch(1, 1, increment, &x) == cudaSuccess && x == 1, "the first passes");
  expect(launch(1, 1, increment, &x) == cudaErrorIllegalAddress && x == 1, "the second fails");
  expect(cudaPeekAtLastError() == cudaErrorIllegalAddress, "it is the last error");
  expect(cudaGetLastError() == cudaErrorIllegalAddress, "it is told");
  expect(cudaGetLastError() == cudaSuccess, "and forgotten");
  expect(launch(1, 1, increment, &x) == cudaSuccess && x == 2, "the third passes");
  expect(launch(0, 1, increment, &x) == cudaErrorInvalidConfiguration, "a grid has blocks");
  expect(launch(1, 2000, increment, &x) == cudaErrorInvalidConfiguration, "2000 are too many");
  expect(cudaGetErrorName(cudaErrorNoDevice) == std::string("cudaErrorNoDevice"), "names");
}

// ---- what is wrong -----------------------------------------------------------------------------

__global__ void divergent() {
  if (threadIdx.x < 8)
    __shfl_sync(kAll, 0, 0);
  else
    __syncthreads();
}

void deadlock() { launch(1, 64, divergent); }

// Right only if the threads run in order: before s is read there is no barrier.
__global__ void race(int* wrong) {
  __shared__ int s[kThreads];
  const int i = threadIdx.x;
  s[i] = -1;
  __syncthreads();
  s[i] = i;
  if (i > 0 && s[i - 1] != i - 1) atomicAdd(wrong, 1);
}

void racing() {
  int wrong = 0;
  launch(1, kThreads, race, &wrong);
  expect(wrong == 0, "the race is won");
}

// ---- cost --------------------------------------------------------------------------------------

__global__ void barriers(int n) {
  for (int i = 0; i < n; ++i) __syncthreads();
}

void cost() {
  const int n = 1000;
  const auto start = std::chrono::steady_clock::now();
  launch(1, kThreads, barriers, n);
  const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - start;
  std::printf("%.2f microseconds per thread and barrier\n", took.count() / n / kThreads);
}

}  // namespace

int main(int, char** arguments) {
  const std::string name = arguments[1];
  if (name == "sums") sums();
  if (name == "waiting") waiting();
  if (name == "threads") threads();
  if (name == "failures") failures();
  if (name == "deadlock") deadlock();
  if (name == "racing") racing();
  if (name == "cost") cost();
}
