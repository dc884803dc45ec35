// What the files that call CUDA's runtime share.
#pragma once

#include <cuda_runtime.h>

namespace wdk::cuda {

// Throws std::runtime_error, which says what has failed and why, unless it has succeeded.
void check(cudaError_t error, const char* what);

// Whether there is code for the current device: an error if not.
cudaError_t ask_for_code();

}  // namespace wdk::cuda
