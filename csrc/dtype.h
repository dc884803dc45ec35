// Storage types: how a stream of numbers lies in memory.
//
// The rule (update.h) computes in float or double. A type belongs here once a loop can load it
// into one of those and store it back; everything else refers to it by DType.
#pragma once

#include <cstdint>

#include "inline.h"

namespace wdk {

enum class DType : uint8_t { float32, float64 };

constexpr int64_t size_of(DType type) { return type == DType::float32 ? 4 : 8; }

// A number in memory, such as a 0-d tensor's.
struct Number {
  void* data = nullptr;  // or none
  DType type = DType::float32;

  WDK_INLINE double get() const {
    return type == DType::float32 ? double(*static_cast<const float*>(data))
                                  : *static_cast<const double*>(data);
  }
  WDK_INLINE void set(double value) const {
    if (type == DType::float32)
      *static_cast<float*>(data) = float(value);
    else
      *static_cast<double*>(data) = value;
  }
};

}  // namespace wdk
