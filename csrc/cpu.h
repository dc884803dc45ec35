// The CPU backend: the element loops, compiled once per instruction set.
#pragma once

#include <string>
#include <vector>

#include "work.h"

namespace wdk {

// Elements of a chunk: its streams (7 x 64 KiB) stay within a core's L2 cache.
constexpr int64_t kChunk = 16384;

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

// A list of tensors and what the loops need to walk through it.
struct CpuWork {
  const Tensor* tensors;
  const Chunk* chunks;
  const int32_t* first_chunks;  // of each tensor, and behind them the number of chunks
  const Item* items;
  const Batch* batches;
  int32_t* pending;  // per batch: items whose step is not done, and 1 for the selection
  const Row* rows;
  const Whole* whole;
  int32_t n_items;
  bool parallel;                // worth waking the other threads
  double* sums;                 // per chunk: what `square` or `maximize` found, or squares again
  ProjectionSums* projections;  // per chunk: what `update` found
  MeasuredSums* measured;       // likewise; null if nobody asks
  double* shrink;               // per tensor: SPD's lambda r
};

struct CpuLoops {
  // Sum over each chunk of g^2, as the gradients are.
  void (*square)(const CpuWork&);
  // Sum over each chunk of the vmax that this step will have; of tensors with amsgrad.
  void (*maximize)(const CpuWork&);
  // The step itself, and for SPD the second touch of the tensors it selected.
  void (*update)(const CpuWork&);
};

// Instruction sets that this build has and this processor runs, the best one last.
std::vector<std::string> instruction_sets();

// Throws std::invalid_argument for one that is not among them.
CpuLoops cpu_loops(const std::string& instruction_set);

}  // namespace wdk
