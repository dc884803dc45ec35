// The host's side of CUDA: what this build and a device can do for each other, and what is said if
// something fails.
#include <stdexcept>

#include "cuda_errors.h"
#include "cuda_kernels.h"

namespace wdk::cuda {

namespace {

std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

}  // namespace

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // forget it, if it can be forgotten
  throw std::runtime_error(
      std::string(what) + " failed: " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) +
      "). If an earlier kernel, of whatever library, is to blame, CUDA_LAUNCH_BLOCKING=1 names it");
}

int toolkit() { return CUDART_VERSION; }

std::vector<int> architectures() {
#ifdef __CUDA_ARCH_LIST__
  std::vector<int> list{__CUDA_ARCH_LIST__};
  for (int& each : list) each /= 10;
  return list;
#else
  return {};
#endif
}

std::string refusal(int device) {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
    return "there is no NVIDIA driver";
  int before;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    error = ask_for_code();
    cudaSetDevice(before);
  }
  cudaGetLastError();
  if (error == cudaErrorInsufficientDriver)
    return "the driver, for CUDA " + version(driver) +
           ", is too old for this build, made with CUDA " + version(toolkit()) +
           ": update the driver, or install a build for an older CUDA";
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    const std::string chip = std::to_string(major) + std::to_string(minor);
    return "this build has no code for compute capability " + std::to_string(major) + "." +
           std::to_string(minor) + ": build it with WDK_CUDA_ARCHS=" + chip;
  }
  if (error != cudaSuccess) return std::string("CUDA says: ") + cudaGetErrorString(error);
  return "";
}

OnDevice::OnDevice(int device) {
  check(cudaGetDevice(&before_), "asking for the current device");
  if (device != before_) check(cudaSetDevice(device), "choosing a device");
}

OnDevice::~OnDevice() {
  int now;
  if (cudaGetDevice(&now) == cudaSuccess && now != before_) cudaSetDevice(before_);
}

void clear(void* memory, size_t bytes, Stream stream) {
  check(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)), "clearing a table");
}

}  // namespace wdk::cuda
