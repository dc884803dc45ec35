// The GPU kernels, as the host calls them (gpu_step.cpp). No Python here, and no ownership.
#pragma once

#include <string>
#include <vector>

#include "work.h"

namespace wdk {

// A piece of work that one block takes at a time, in this order: an SPD tensor's second touch stands
// behind the step of all its chunks.
struct Ticket {
  int32_t chunk;
  bool second_touch;
};

// Chunks of a tensor.
struct Span {
  int32_t first, count;
};

// All tables are in device memory. Tensors of one type at a time: chunks and tickets say which.
struct GpuWork {
  DType dtype;
  const Tensor* tensors;
  const Span* spans;    // of each tensor
  const Chunk* chunks;  // of all tensors
  const Ticket* tickets;
  Row* rows;
  int32_t n_tensors;  // of all types
  int32_t n_rows;
  int32_t first_chunk, last_chunk;  // of this type's tensors
  int32_t first_ticket, last_ticket;

  // Zero when a step starts.
  int32_t* next_ticket;  // of this type
  int32_t* done;         // per tensor: chunks whose sums are there
  int32_t* decided;      // per tensor: whether shrink is there
  int32_t* blocks_done;  // of `reduce`, of all types

  double* sums;                 // per chunk: what `reduce` found
  double* means;                // per tensor: its part of SWD's V, times elements
  double* mean_square;          // V
  double elements;              // of all tensors
  ProjectionSums* projections;  // per chunk: what `update` found
  double* shrink;               // per tensor: SPD's lambda r
};

namespace cuda {

using Stream = void*;  // a cudaStream_t

// Why this build cannot run on a device of this machine; empty if it can.
std::string refusal(int device);

// What this build was made with.
int toolkit();                     // 13000: CUDA 13.0
std::vector<int> architectures();  // 90: compute capability 9.0

// Blocks of any kernel that the device can hold at once.
int resident_blocks(int device);

// The device on which the calls below take place.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;

 private:
  int before_;
};

// Each throws std::runtime_error if it could not be launched. `blocks`: at most resident_blocks.
void clear(void* memory, size_t bytes, Stream stream);
void count(const GpuWork& work,
           Stream stream);  // capturable: the step counts, and the rows' numbers
void reduce(const GpuWork& work, int blocks, int all_blocks, Stream stream);  // SWD
void update(const GpuWork& work, int blocks, Stream stream);
void project(const GpuWork& work, int blocks, Stream stream);  // SPD: the step and its second touch

}  // namespace cuda

}  // namespace wdk
