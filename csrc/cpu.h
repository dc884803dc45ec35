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
  int32_t*
      pending;  // per batch: items whose step is not done, and 1 for the selection; null: second
                // touches are left to `pull`
  const Row* rows;
  const Decision* decision;
  int32_t n_items;
  bool parallel;      // worth waking the other threads
  bool measured;      // telemetry's sums are taken
  bool squares_left;  // for telemetry too: they have not been needed before
  double (*chunk_sums)[kSums];
  double (*sums)[kSums];  // per tensor
  double* shrink;         // per tensor: SPD's lambda r
};

// The sums of a tensor, in the columns [first, last), from those of its chunks.
WDK_INLINE void add_up(const CpuWork& work, int32_t tensor, int first, int last) {
  for (int column = first; column < last; ++column) {
    double sum = 0;
    for (int32_t k = work.first_chunks[tensor]; k < work.first_chunks[tensor + 1]; ++k)
      sum += work.chunk_sums[k][column];
    work.sums[tensor][column] = sum;
  }
}

// SPD's decision over a tensor whose sums are known.
WDK_INLINE void select(const CpuWork& work, int32_t tensor) {
  const double lambda = work.rows[work.tensors[tensor].row].numbers.coefficients.decay;
  work.shrink[tensor] = lambda * projection_ratio(work.sums[tensor]);
}

struct CpuLoops {
  // Sum over each chunk of g^2, as the gradients are.
  void (*square)(const CpuWork&);
  // Sum over each chunk of the vmax that this step will have; of tensors with amsgrad.
  void (*maximize)(const CpuWork&);
  // The step itself, its sums over each chunk and, if it is not left to `pull`, SPD's second touch.
  void (*update)(const CpuWork&);
  // SPD's second touch of all tensors: the pull of those that it selected, and averages.
  void (*pull)(const CpuWork&);
};

// Instruction sets that this build has and this processor runs, the best one last.
std::vector<std::string> instruction_sets();

// Throws std::invalid_argument for one that is not among them.
CpuLoops cpu_loops(const std::string& instruction_set);

}  // namespace wdk
