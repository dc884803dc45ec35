// Storage types: how a stream of numbers lies in memory.
//
// The rule (update.h) computes in float or double. A type belongs here once a loop can load it
// into one of those and store it back; everything else refers to it by DType.
#pragma once

#include <cstdint>

namespace wdk {

enum class DType : uint8_t { float32, float64 };

constexpr int64_t size_of(DType type) { return type == DType::float32 ? 4 : 8; }

}  // namespace wdk
