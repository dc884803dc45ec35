// What every kind of loops is given: plain tables, no Python, no ownership.
#pragma once

#include <cstdint>

#include "coefficients.h"
#include "dtype.h"

namespace wdk {

// Parameters of one group at the same step count share a row of numbers.
struct Row {
  Hyper hyper;
  Numbers numbers;
  double t;     // step count
  Number step;  // where it stands on the device, if counted: then t and numbers are found there
};

struct Tensor {
  void* w;
  const void* g;
  void* m;
  void* v;
  void* vmax;          // amsgrad only
  const void* a;       // anchor; only if there is one
  void* compensation;  // Kahan's, of 16-bit weights
  void* master;        // the weight in the type that is computed in; w follows it
  void* ema;           // in the same type
  double* v_sum;       // SWD without amsgrad: the sum of v, kept up
  int64_t numel;
  DType weight_type;  // of w, g and compensation
  DType moment_type;  // of m, v and vmax
  DType anchor_type;
  uint32_t index;  // position among all parameters: random bits depend on it
  int32_t row;

  WDK_INLINE DType type() const { return computed_in(weight_type); }
  // Whether every stream of the rule lies in memory as it is computed.
  WDK_INLINE bool plain() const {
    return weight_type == type() && moment_type == type() && (!a || anchor_type == type());
  }
};

// Sums are taken per chunk and chunks are added up in order, so results do not depend on the number
// of threads.
struct Chunk {
  int32_t tensor;
  int32_t size;
  int64_t begin;  // elements
};

}  // namespace wdk
