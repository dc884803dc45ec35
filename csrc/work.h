// What a backend's loops are given: plain tables, no Python, no ownership.
#pragma once

#include <cstdint>

#include "coefficients.h"
#include "dtype.h"

namespace wdk {

// Sums are taken per chunk and chunks are added up in order, so results do not depend on the
// number of threads. 16384 elements keep a chunk's streams (7 x 64 KiB) within a core's L2 cache.
constexpr int64_t kChunk = 16384;

// Parameters of one group at the same step count share a row of numbers.
struct Row {
  Hyper hyper;
  Coefficients<double> numbers;
  double t;  // step count
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

struct Chunk {
  int32_t tensor;
  int32_t size;
  int64_t begin;  // elements
};

// A run of chunks that one thread takes at a time: small tensors travel together.
struct Item {
  int32_t first_chunk, last_chunk;
  int32_t batch;      // index into batches
  bool second_touch;  // of SPD, once the whole batch has been updated
};

// Tensors that SPD decides over together: none of them is pulled before all have been updated.
struct Batch {
  int32_t first_tensor, last_tensor;
  int32_t n_items;
};

struct Work {
  const Tensor* tensors;
  const Chunk* chunks;
  const int32_t* first_chunks;  // of each tensor, and behind them the number of chunks
  const Item* items;
  const Batch* batches;
  int32_t* pending;  // per batch: items whose step is not done, and 1 for the selection
  const Row* rows;
  int32_t n_items;
  bool parallel;                // worth waking the other threads
  double* sums;                 // per chunk: what `reduce` found
  ProjectionSums* projections;  // per chunk: what `update` found
  double* shrink;               // per tensor: SPD's lambda r
};

}  // namespace wdk
