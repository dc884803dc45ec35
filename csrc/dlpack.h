// The few structures of the DLPack ABI that reading a tensor needs (version 1.3,
// https://github.com/dmlc/dlpack/blob/main/include/dlpack/dlpack.h). Field order is the ABI.
#pragma once

#include <cstdint>

extern "C" {

struct DLDevice {
  int32_t device_type;
  int32_t device_id;
};

struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPIHeader {
  uint32_t major, minor;
  DLPackExchangeAPIHeader* prev_api;
};

struct DLPackExchangeAPI {
  DLPackExchangeAPIHeader header;
  void (*managed_tensor_allocator)();  // the functions we do not call stand by their place only
  void (*managed_tensor_from_py_object_no_sync)();
  void (*managed_tensor_to_py_object_no_sync)();
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out_stream);
};

}  // extern "C"

namespace wdk::dl {
constexpr int32_t kCPU = 1;
#ifdef WDK_EMULATED  // the GPU's half of the module, run by a CPU for its tests
constexpr int32_t kCUDA = kCPU;
#else
constexpr int32_t kCUDA = 2;
#endif
constexpr uint8_t kInt = 0;
constexpr uint8_t kFloat = 2;
constexpr uint8_t kBfloat = 4;
constexpr uint8_t kComplex = 5;
constexpr uint32_t kMajorVersion = 1;
}  // namespace wdk::dl
