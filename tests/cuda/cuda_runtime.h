// The part of CUDA that csrc/cuda.cu uses, on the CPU: kernels run, and are tested, without a GPU.
//
//     g++ -std=c++17 -pthread -Itests/cuda -x c++ -DWDK_EMULATED -Wno-unknown-pragmas csrc/cuda.cu
//
// finds this file in place of CUDA's. What it is:
//
// - A block runs on one OS thread (machine.h), its CUDA threads as fibers on stacks of their own. Up
//   to 4 blocks run at once, for the system to interleave; they start in order 0, 1, 2, ... What the
//   device says of its multiprocessors is the same number, so blocks that are all resident may wait
//   for one another.
// - A fiber runs until it waits, sleeps, ends or comes to an atomic: there the others have a turn, in
//   the order of threadIdx. WDK_EMULATE_SEED=<number> in the environment shuffles that order anew for
//   every turn, so that a missing barrier shows. A loop that only reads, without a __nanosleep, never
//   gives the other threads of its block a turn.
// - What waits in vain is ended with a message and abort(): when all threads of a block wait, but not
//   for the same, or when for half a minute all of a grid do nothing but sleep and atomics.
// - A launch returns when the grid is done, and so does every asynchronous call. No streams overlap,
//   nothing is captured.
// - Addresses are the host's. A stray access is a segmentation fault, or for -fsanitize=address.
// - __shared__ memory starts with what the block before left behind: not with zeros.
// - A lane that is not there, or does not take part, is shuffled as all ones: NaN, or -1.
// - Atomics have the orders that CUDA gives them, barriers order a block's threads, and nothing else
//   does: g++ -fsanitize=thread judges all accesses by that (watch.h). __threadfence() it does not
//   understand, so there is none. Nor do too many registers show.
// - As with CUDA, a process that has launched something must not fork and launch again.
//
// wdk_emulate_failure("cudaLaunchKernelEx", 1, cudaErrorIllegalAddress) makes the second launch from
// now on fail; likewise every other call that returns an error, by its name. How many there were,
// wdk_emulated_calls("cudaLaunchKernelEx") tells.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "machine.h"

#define CUDART_VERSION 13000

// ---- what kernels are written in ---------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static thread_local  // of the OS thread, hence of the block
#define __builtin_assume(condition) static_cast<void>(0)

namespace emulated {

template <class T>
using Same = std::common_type_t<T>;  // not deduced: atomicAdd(double*, 1) is fine

inline int lane() { return int(threadIdx.x % kWarp); }

template <class T>
T shuffle(const char* name, unsigned mask, T value, int source) {
  static_assert(std::is_arithmetic<T>::value && sizeof(T) <= sizeof(uint64_t), "as in CUDA");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = Block::current->exchange(name, mask, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// Atomics order nothing else, as on the device: those that do are below. The others have their turn first, so that a loop of
// atomics ends.
template <class T, class Change>
T atomically(T* address, const Change& change) {
  Block::current->yield();
  T before, after;
  __atomic_load(address, &before, __ATOMIC_RELAXED);
  do {
    after = change(before);
  } while (!__atomic_compare_exchange(address, &before, &after, true, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED));
  return before;
}

}  // namespace emulated

inline void __syncthreads() { emulated::Block::current->barrier(__func__); }

inline void __syncwarp(unsigned mask = 0xffffffff) {
  emulated::Block::current->exchange(__func__, mask, 0, emulated::lane());
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulated::shuffle(__func__, mask, value, source & 31);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip) {
  return emulated::shuffle(__func__, mask, value, (emulated::lane() ^ flip) & 31);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const unsigned lane = emulated::lane(), source = lane + delta;
  return emulated::shuffle(__func__, mask, value, source < 32 ? source : lane);
}

inline void __nanosleep(unsigned) { emulated::Block::current->yield(); }

template <class T>
T atomicAdd(T* address, emulated::Same<T> value) {
  return emulated::atomically(address, [=](T before) { return before + value; });
}
template <class T>
T atomicSub(T* address, emulated::Same<T> value) {
  return emulated::atomically(address, [=](T before) { return before - value; });
}
template <class T>
T atomicMax(T* address, emulated::Same<T> value) {
  return emulated::atomically(address, [=](T before) { return before < value ? value : before; });
}

inline bool __isGlobal(const void*) { return true; }

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
void __stcg(T* address, emulated::Same<T> value) {
  *address = value;
}

// ---- csrc/cuda_order.h -------------------------------------------------------------------------

inline int32_t add_acquire_release(int32_t* address, int32_t value) {
  emulated::Block::current->yield();
  return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
}
inline void store_release(int32_t* address, int32_t value) {
  __atomic_store_n(address, value, __ATOMIC_RELEASE);
}
inline int32_t load_acquire(const int32_t* address) {
  return __atomic_load_n(address, __ATOMIC_ACQUIRE);
}
inline int32_t load_relaxed(const int32_t* address) {
  return __atomic_load_n(address, __ATOMIC_RELAXED);
}

// ---- errors ------------------------------------------------------------------------------------

#define WDK_CUDA_ERRORS(X)                                     \
  X(cudaSuccess, 0, "no error")                                \
  X(cudaErrorInvalidValue, 1, "invalid argument")              \
  X(cudaErrorMemoryAllocation, 2, "out of memory")             \
  X(cudaErrorInvalidConfiguration, 9, "invalid configuration") \
  X(cudaErrorInsufficientDriver, 35, "driver too old")         \
  X(cudaErrorNoDevice, 100, "no CUDA-capable device")          \
  X(cudaErrorInvalidDevice, 101, "invalid device ordinal")     \
  X(cudaErrorNoKernelImageForDevice, 209, "no kernel image")   \
  X(cudaErrorUnsupportedPtxVersion, 222, "unsupported PTX")    \
  X(cudaErrorIllegalAddress, 700, "an illegal memory access")  \
  X(cudaErrorLaunchFailure, 719, "launch failure")             \
  X(cudaErrorUnknown, 999, "unknown error")

#define WDK_ENUMERATOR(name, number, text) name = number,
#define WDK_NAME(name, number, text) \
  if (error == name) return #name;
#define WDK_TEXT(name, number, text) \
  if (error == name) return text;

enum cudaError_t { WDK_CUDA_ERRORS(WDK_ENUMERATOR) };

inline const char* cudaGetErrorName(cudaError_t error) {
  WDK_CUDA_ERRORS(WDK_NAME)
  return "unrecognized error code";
}

inline const char* cudaGetErrorString(cudaError_t error) {
  WDK_CUDA_ERRORS(WDK_TEXT)
  return "unrecognized error code";
}

namespace emulated {

inline thread_local cudaError_t last_error = cudaSuccess;

struct Failure {
  std::mutex mutex;
  std::string call;  // empty: nothing is to fail
  int passing;
  cudaError_t error;
  std::map<std::string, int> calls;  // so far
};
inline Failure failure;

inline cudaError_t failure_of(const char* name) {
  std::lock_guard<std::mutex> lock(failure.mutex);
  ++failure.calls[name];
  if (failure.call != name || failure.passing-- > 0) return cudaSuccess;
  failure.call.clear();
  return failure.error;
}

// A call of the runtime: what it does, unless it is to fail.
template <class Action>
cudaError_t call(const char* name, const Action& action) {
  cudaError_t error = failure_of(name);
  if (error == cudaSuccess) error = action();
  if (error != cudaSuccess) last_error = error;
  return error;
}

template <class T>
cudaError_t answer(const char* name, T* out, const T& value) {
  return call(name, [&] { return *out = value, cudaSuccess; });
}

}  // namespace emulated

// Makes the call named `call` behind the `passing` next ones fail, and do nothing. Exported, for
// tests to find it in a library.
extern "C" __attribute__((used, visibility("default"))) inline void wdk_emulate_failure(
    const char* call, int passing, int error) {
  std::lock_guard<std::mutex> lock(emulated::failure.mutex);
  emulated::failure.call = call;
  emulated::failure.passing = passing;
  emulated::failure.error = cudaError_t(error);
}

extern "C" __attribute__((used, visibility("default"))) inline int wdk_emulated_calls(
    const char* call) {
  std::lock_guard<std::mutex> lock(emulated::failure.mutex);
  return emulated::failure.calls[call];
}

inline cudaError_t cudaPeekAtLastError() { return emulated::last_error; }
inline cudaError_t cudaGetLastError() { return std::exchange(emulated::last_error, cudaSuccess); }

// ---- what the host calls -----------------------------------------------------------------------

using cudaStream_t = struct CUstream_st*;

enum cudaMemcpyKind {
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
};

struct cudaFuncAttributes {
  int maxThreadsPerBlock, ptxVersion, binaryVersion;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;  // neither this nor what follows is read
  cudaStream_t stream;
  struct cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaDriverGetVersion(int* version) {
  return emulated::answer(__func__, version, CUDART_VERSION);
}

inline cudaError_t cudaRuntimeGetVersion(int* version) {
  return emulated::answer(__func__, version, CUDART_VERSION);
}

inline cudaError_t cudaGetDeviceCount(int* count) { return emulated::answer(__func__, count, 1); }

inline cudaError_t cudaGetDevice(int* device) { return emulated::answer(__func__, device, 0); }

inline cudaError_t cudaSetDevice(int device) {
  return emulated::call(__func__, [=] { return device ? cudaErrorInvalidDevice : cudaSuccess; });
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const bool processors = attribute == cudaDevAttrMultiProcessorCount;
  const bool major = attribute == cudaDevAttrComputeCapabilityMajor;
  return emulated::answer(__func__, value, processors ? emulated::kProcessors : major ? 8 : 0);
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  return emulated::answer(__func__, blocks, emulated::kBlocksPerProcessor);
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return emulated::call(__func__, [] { return cudaSuccess; });
}

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  return emulated::answer(__func__, attributes, {emulated::kMaxThreads, 80, 80});
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t = nullptr) {
  return emulated::call(__func__, [=] { return std::memcpy(to, from, bytes), cudaSuccess; });
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) {
  return emulated::call(__func__, [=] { return std::memset(to, value, bytes), cudaSuccess; });
}

inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return emulated::call(__func__, [] { return cudaSuccess; });
}

inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return emulated::answer(__func__, status, cudaStreamCaptureStatusNone);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return emulated::call(__func__, [&] {
    const dim3 blocks = config->gridDim, threads = config->blockDim;
    if (blocks.x == 0 || threads.x == 0 || threads.x > emulated::kMaxThreads ||
        blocks.y * blocks.z * threads.y * threads.z != 1)
      return cudaErrorInvalidConfiguration;
    const std::tuple<std::decay_t<Parameters>...> parameters(arguments...);
    emulated::Grid grid;
    grid.blocks = blocks;
    grid.threads = threads;
    grid.kernel = [&] { std::apply(kernel, parameters); };
    grid.seed = std::getenv("WDK_EMULATE_SEED");
    emulated::Device::get().run(grid);
    return cudaSuccess;
  });
}
