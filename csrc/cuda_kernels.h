// The GPU kernels, as the host calls them (gpu_step.cpp). No Python here, and no ownership.
#pragma once

#include <string>
#include <vector>

#include "work.h"

namespace wdk {

// A piece of work that one block takes at a time, in this order (touches.h). A tensor of one chunk has
// no second touch: the block that updates it decides over it and pulls it at once.
struct Ticket {
  int32_t chunk;
  bool second_touch;
};

// A tensor's chunks.
struct Span {
  int32_t first, count;
};

// All tables are in device memory.
struct GpuWork {
  const Tensor* tensors;
  const Span* spans;  // of each tensor
  const Chunk* chunks;
  const Ticket* tickets;
  Row* rows;
  int32_t n_tensors;
  int32_t n_rows;
  double total;  // elements of all tensors, of which these may be shards

  // What a launch takes: `reduce` all chunks, the others those of the tensors that are computed in one
  // type.
  DType type;
  int32_t first_chunk, last_chunk;
  int32_t first_ticket, last_ticket;

  // Zero when `reduce` or `project` starts.
  int32_t* next_ticket;  // of this type
  int32_t* done;         // per tensor: chunks whose sums are there
  int32_t* decided;      // per tensor: whether shrink is there
  int32_t* blocks_done;

  bool measured;                // for telemetry
  Decision* decision;           // null: nothing has to be decided
  double (*chunk_sums)[kSums];  // what a kernel has summed over a chunk
  double (*sums)[kSums];        // per tensor: the table of the step
  double* shrink;               // per tensor: SPD's lambda r
};

// A round of sums over the gradients, and what is decided behind it.
struct Round {
  bool first;    // of the step: nothing has been decided yet
  bool squares;  // g^2 is summed, of tensors whose maxima are not
  bool maxima;   // the vmax that the step will have is summed, of tensors that have one
  bool mean_v;   // SWD's V is decided
};

// Which touches of SPD a launch makes: a tensor's second one right behind its first, as tickets have it,
// or one of the two.
enum class Touch { both, first, second };

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

// Each tensor's sums over its gradient, into the table of sums. `decides`: the last block does what
// `decide` would do.
void reduce(const GpuWork& work, const Request& request, Round round, bool decides, int blocks,
            Stream stream);
// Numbers that only the device knows: what all tensors share, and rows whose steps are counted there.
void decide(const GpuWork& work, const Request& request, Round round, Stream stream);

// The step. If it is measured, telemetry's sums are left for each chunk; SPD's are in the table.
void update(const GpuWork& work, int blocks, Stream stream);
void project(const GpuWork& work, Touch touch, int blocks, Stream stream);

// Telemetry. `add_up`: a measured step's sums over chunks, into the table of sums. `rows`: the table is
// written to these; may be null.
void tell(const GpuWork& work, bool add_up, double* rows, Stream stream);

}  // namespace cuda

}  // namespace wdk
