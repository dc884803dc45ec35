// One optimizer step over a list of tensors, by the loops of one kind of device, in phases:
//
//   begin    the tables are made ready; the last thing that may fail
//   reduce   each tensor's sums over its gradient are left in the table of sums
//   decide   from these: how gradients are scaled, whether the step is skipped, SWD's V
//   update   the rule; the sums of SPD and telemetry are left in the table
//   finish   SPD's second touch, averages behind it, telemetry
//
// `run` is all of them over one process's tensors, fused where that is faster: SPD's second touch
// follows its step while the tensor is still in the cache. Called one by one they give the same bits,
// and between `reduce` and `decide`, and between `update` and `finish`, the sums of other shards may be
// added to the table.
#pragma once

#include <algorithm>
#include <vector>

#include "work.h"

namespace wdk {

// Where a GPU's work is queued; nothing to a CPU.
struct Stream {
  void* handle = nullptr;  // a cudaStream_t
  bool capturing = false;  // into a CUDA graph
};

// One step's input; the tables outlive the step.
struct StepInput {
  const std::vector<Tensor>& tensors;
  const std::vector<Row>& rows;
  Request request;
  Stream stream;
  // A row for each tensor, on the device; may be null where needs_sums() says no.
  double (*sums)[kSums];

  bool swd() const { return !rows.empty() && rows.front().options.swd; }
  bool projected() const {
    return !rows.empty() && rows.front().options.decay == Decay::projection;
  }

  // What is to be summed over the gradients.
  bool needs_maxima() const {
    return swd() && std::any_of(tensors.begin(), tensors.end(), has_maximum);
  }
  bool needs_squares() const {
    return request.needs_norm() || request.telemetry ||
           (swd() && !std::all_of(tensors.begin(), tensors.end(), has_maximum));
  }
  bool needs_sums() const { return projected() || needs_maxima() || needs_squares(); }

 private:
  static bool has_maximum(const Tensor& tensor) { return tensor.vmax != nullptr; }
};

class Step {
 public:
  virtual ~Step() = default;

  // Another list of tensors, all of one method; their gradients and rows are still to come.
  virtual void set_tensors(const std::vector<Tensor>& tensors, bool projected) = 0;

  // How often `reduce` and `decide` take turns. The maxima of amsgrad are those of the scaled gradients:
  // for SWD's V they have to wait for the norm, and are round 1 behind that of the squares, round 0.
  static int rounds(const StepInput& input) {
    if (input.needs_maxima()) return input.request.needs_norm() ? 2 : 1;
    return input.needs_squares() ? 1 : 0;
  }

  virtual void begin(const StepInput& input) = 0;
  virtual void reduce(int round) = 0;
  virtual bool decide(int round) = 0;  // false if the step is skipped, where the host knows
  virtual void update() = 0;
  virtual void finish() = 0;

  // Whatever it throws, it throws before it writes. False if the step was skipped, where the host
  // knows.
  virtual bool run(const StepInput& input) = 0;
};

}  // namespace wdk
