// Storage types: how a stream of numbers lies in memory, and how what is computed is rounded to it.
//
// The rule (update.h) computes in float or double. A type belongs here once it can be widened into
// one of those and stored back; everything else refers to it by DType.
#pragma once

#include <cstdint>
#include <cstring>

#include "inline.h"

namespace wdk {

enum class DType : uint8_t { float32, float64, bfloat16, float16 };

WDK_INLINE constexpr int64_t size_of(DType type) {
  return type == DType::float64 ? 8 : type == DType::float32 ? 4 : 2;
}
WDK_INLINE constexpr bool is_narrow(DType type) { return size_of(type) == 2; }

// What a step of weights of this type is computed in.
WDK_INLINE constexpr DType computed_in(DType type) {
  return type == DType::float64 ? DType::float64 : DType::float32;
}

// How a weight is stored. All but the first are for weights of 16 bits.
enum class Storage : uint8_t {
  direct,      // in the type that is computed in
  nearest,     // what a step adds is lost where it is less than half of the last bit
  stochastic,  // up or down, by chance, so that nothing is lost on average
  kahan,       // to nearest; what was lost is kept in a companion stream of the same type
  master,      // to nearest, of a companion stream in the type that is computed in
};

// Names of an enumeration's values, in their order: how Python spells them (options.h, bind.cpp).
constexpr const char* kStorageNames[] = {"direct", "nearest", "stochastic", "kahan", "master"};

// ---- random bits -------------------------------------------------------------------------------

// A hash of 32 bits, in which every bit of x decides over every bit (lowbias32, Chris Wellons).
WDK_INLINE uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// Random bits come from seed, step, parameter and element alone: whoever repeats a step, on
// whichever device and with however many threads, rounds as it was rounded before.
WDK_INLINE uint32_t step_key(uint32_t seed, uint64_t t) { return mix(mix(seed) + uint32_t(t)); }
WDK_INLINE uint32_t tensor_key(uint32_t step_key, uint32_t index) {
  return mix(step_key ^ index * 0x9e3779b9u);
}

// Where a tensor's elements stand in the whole tensor of which it may be a shard: random bits depend on
// that, and so they are the same however it is sharded. Only the low 32 bits count.
struct Numbering {
  uint32_t first = 0;  // the whole's number of the shard's first element
  int64_t run = 0;     // elements of the shard that follow each other in the whole; 0: all of them
  int64_t pitch = 0;   // from one run's first element to the next one's, in the whole

  WDK_INLINE uint32_t operator()(int64_t i) const {
    return first + static_cast<uint32_t>(run ? i / run * pitch + i % run : i);
  }
};

// A tensor's random bits in one step.
struct Noise {
  uint32_t weight, pulled, moments;  // pulled: the weight's, stored once more by a second touch

  WDK_INLINE explicit Noise(uint32_t key)
      : weight(key), pulled(mix(key + 1)), moments(mix(key + 2)) {}
};
WDK_INLINE uint32_t noise(uint32_t key, uint32_t element) { return mix(key ^ element); }

// ---- 16 bits -----------------------------------------------------------------------------------

WDK_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
WDK_INLINE float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
WDK_INLINE T widen(T x) {
  return x;
}
WDK_INLINE float widen(BFloat16 x) { return from_bits(uint32_t(x.bits) << 16); }

// By integers, and for subnormals by a subtraction of normal numbers: flags that flush subnormals to
// zero do not matter, and every backend has the same bits.
WDK_INLINE float widen(Float16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu, sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t shifted = magnitude << 13;
  const uint32_t special = shifted + (224u << 23);  // inf, NaN
  const uint32_t normal = shifted + (112u << 23);
  const uint32_t small = bits_of(from_bits(shifted + (113u << 23)) - from_bits(113u << 23));
  return from_bits(sign | (magnitude >= 0x7c00u ? special : magnitude >= 0x400u ? normal : small));
}

// x in 16 bits. What is dropped is rounded up where `random` says so: uniformly random bits make
// that unbiased; `nearest` is to nearest, ties to even.
template <bool nearest>
WDK_INLINE uint16_t narrow(float x, uint32_t random, BFloat16) {
  const uint32_t bits = bits_of(x);
  const uint32_t up = nearest ? 0x7fffu + ((bits >> 16) & 1u) : random & 0xffffu;
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : uint16_t((bits + up) >> 16);  // NaN stays
}

template <bool nearest>
WDK_INLINE uint16_t narrow(float x, uint32_t random, Float16) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
  const uint32_t exponent = magnitude >> 23;
  const uint32_t implicit = exponent ? 1u : 0u;
  const uint32_t own = exponent ? exponent : 1u;  // a subnormal's exponent is that of 1
  const uint32_t kept = own > 113u ? own : 113u;  // below are float16's subnormals
  const uint32_t distance = 13u + (kept - own);
  const uint32_t dropped = distance < 31u ? distance : 31u;  // bits
  const uint32_t beyond = distance - dropped < 31u ? distance - dropped : 31u;
  const uint32_t mantissa = ((magnitude & 0x7fffffu) | implicit << 23) >> beyond;
  const uint32_t half = 1u << (dropped - 1u);
  const uint32_t up =
      nearest ? half - 1u + ((mantissa >> dropped) & 1u) : random & ((half << 1) - 1u);
  uint32_t found = ((mantissa + up) >> dropped) + ((kept - 113u) << 10);
  found = found > 0x7c00u ? 0x7c00u : found;  // overflows to inf
  found |= (bits >> 16) & 0x8000u;
  return magnitude > 0x7f800000u ? 0x7e00u : uint16_t(found);  // NaN stays
}

// ---- where a type is known only when the code runs ---------------------------------------------

// A number in memory, such as a 0-d tensor's.
struct Number {
  void* data = nullptr;  // or none
  DType type = DType::float32;

  WDK_INLINE double get() const {
    switch (type) {
      case DType::float64:
        return *static_cast<const double*>(data);
      case DType::bfloat16:
        return widen(*static_cast<const BFloat16*>(data));
      case DType::float16:
        return widen(*static_cast<const Float16*>(data));
      default:
        return *static_cast<const float*>(data);
    }
  }
  // Only of a counter: float32 or float64.
  WDK_INLINE void set(double value) const {
    if (type == DType::float32)
      *static_cast<float*>(data) = float(value);
    else
      *static_cast<double*>(data) = value;
  }
};

}  // namespace wdk
