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

// Sums of a chunk: the fields of ProjectionSums; those of MeasuredSums, and g^2.
constexpr int kProjected = 3, kMeasured = 7;

// All tables are in device memory.
struct GpuWork {
  const Tensor* tensors;
  const Span* spans;  // of each tensor
  const Chunk* chunks;
  const Ticket* tickets;
  Row* rows;
  int32_t n_tensors;
  int32_t n_rows;
  double elements;

  // Those of the tensors that are computed in one type; `reduce` takes all chunks.
  DType type;
  int32_t first_chunk, last_chunk;
  int32_t first_ticket, last_ticket;

  // Zero when `reduce` or `project` starts.
  int32_t* next_ticket;  // of this type
  int32_t* done;         // per tensor: chunks whose sums are there
  int32_t* decided;      // per tensor: whether shrink is there
  int32_t* blocks_done;

  Whole* whole;                       // null: nothing is asked of the step as a whole
  double (*sums)[1];                  // per chunk: what `reduce` found
  double* totals;                     // per tensor: the same
  double (*projections)[kProjected];  // per chunk: what the step found
  double (*measured)[kMeasured];      // likewise; null if nobody asks
  double* shrink;                     // per tensor: SPD's lambda r
};

// What `reduce` sums, and what becomes of it.
struct Reduction {
  bool first;   // g^2, for the numbers of the whole step; else these are known
  bool maxima;  // of tensors with amsgrad the vmax that the step will have
  bool stable;  // for SWD's V
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

// Numbers that only the device knows: of the whole step, and of rows whose steps are counted there.
// One of the two, before the step: `prepare` where nothing has to be summed for them.
void prepare(const GpuWork& work, const Request& request, Stream stream);
void reduce(const GpuWork& work, const Request& request, Reduction what, int blocks, Stream stream);

void update(const GpuWork& work, int blocks, Stream stream);
void project(const GpuWork& work, int blocks, Stream stream);  // SPD: the step and its second touch
void tell(const GpuWork& work, double* table, Stream stream);  // telemetry, after a measured step

}  // namespace cuda

}  // namespace wdk
