// What every kind of loops is given: plain tables, no Python, no ownership.
#pragma once

#include <cstdint>

#include "decide.h"

namespace wdk {

// Parameters of one group at the same step count share a row of numbers.
struct Row {
  GroupOptions options;
  StepNumbers numbers;
  double t;     // step count
  Number step;  // where it stands on the device, if counted: then t and numbers are found there
};

// A tensor's streams: its elements in memory, all in one order. Which of them there are Python decides
// (wdkernels/state.py); null: there is none, and the rule has no such term.
struct Tensor {
  void* w;
  const void* g;
  void* m;
  void* v;
  void* vmax;       // amsgrad
  const void* a;    // anchor; may be the average
  void* companion;  // what is kept of a 16-bit weight beside it, as `storage` says
  void* ema;        // in the type that is computed in
  double* v_sum;    // SWD without amsgrad: the sum of v, kept up
  int64_t numel;    // elements that lie here
  int64_t total;    // elements of the whole tensor, of which this may be a shard
  Numbering numbering;
  DType weight_type;  // of w and g
  DType moment_type;  // of m, v and vmax
  DType anchor_type;
  Storage storage;
  uint32_t index;  // position among all parameters: random bits depend on it
  int32_t row;

  // What is computed in.
  WDK_INLINE DType type() const { return computed_in(weight_type); }
  // Whether every stream of the rule lies in memory as it is computed.
  WDK_INLINE bool direct() const {
    return storage == Storage::direct && moment_type == type() && (!a || anchor_type == type());
  }
  WDK_INLINE Variant variant(const GroupOptions& o) const {
    return {o.decay, a != nullptr, vmax != nullptr, o.cautious};
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
