// What every kind of loops is given: plain tables, no Python, no ownership.
#pragma once

#include <cstdint>

#include "coefficients.h"
#include "dtype.h"

namespace wdk {

// Parameters of one group at the same step count share a row of numbers.
struct Row {
  Hyper hyper;
  Coefficients<double> numbers;
  double t;     // step count
  Number step;  // where it stands on the device, if capturable: then t and numbers are found there
};

struct Tensor {
  void* w;
  const void* g;
  void* m;
  void* v;
  void* vmax;     // amsgrad only
  const void* a;  // anchor; only if there is one
  double* v_sum;  // SWD without amsgrad: the sum of v, kept up
  int64_t numel;
  DType dtype;
  int32_t row;
};

// Sums are taken per chunk and chunks are added up in order, so results do not depend on the number
// of threads.
struct Chunk {
  int32_t tensor;
  int32_t size;
  int64_t begin;  // elements
};

// A tensor's streams from some element on.
template <class T>
struct Streams {
  T* w;
  const T* g;
  T* m;
  T* v;
  T* vmax;
  const T* a;

  WDK_INLINE Streams(const Tensor& t, int64_t begin)
      : w(static_cast<T*>(t.w) + begin),
        g(static_cast<const T*>(t.g) + begin),
        m(static_cast<T*>(t.m) + begin),
        v(static_cast<T*>(t.v) + begin),
        vmax(t.vmax ? static_cast<T*>(t.vmax) + begin : nullptr),
        a(t.a ? static_cast<const T*>(t.a) + begin : nullptr) {}
};

}  // namespace wdk
