// Device memory from torch's allocators, for the tables of a step on a GPU.
#pragma once

#include <pybind11/pybind11.h>

#include "gpu_step.h"

namespace wdk {

// Through a wdkernels.device_memory.DeviceMemory. Its buffers are torch's tensors.
std::unique_ptr<DeviceMemory> torch_memory(pybind11::object memory);

}  // namespace wdk
