// One optimizer step over a list of tensors, by the loops of one kind of device.
#pragma once

#include <vector>

#include "work.h"

namespace wdk {

// Where a GPU's work is queued; nothing to a CPU.
struct Stream {
  void* handle = nullptr;  // a cudaStream_t
  bool capturing = false;  // into a CUDA graph
};

class Step {
 public:
  virtual ~Step() = default;

  // Another list of tensors, all of one method; their gradients and rows are still to come.
  virtual void plan(const std::vector<Tensor>& tensors, bool projected) = 0;

  // Whatever it throws, it throws before it writes. False if the step was skipped, where the host
  // knows.
  virtual bool run(const std::vector<Tensor>& tensors, const std::vector<Row>& rows,
                   const Request& request, Stream stream) = 0;
};

}  // namespace wdk
