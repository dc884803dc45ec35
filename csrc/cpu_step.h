// A step on the CPU: the tables that the loops of cpu.cpp walk through, and the phases.
#pragma once

#include <string>

#include "cpu.h"
#include "step.h"

namespace wdk {

class CpuStep : public Step {
 public:
  void plan(const std::vector<Tensor>& tensors, bool projected) override;
  void run(const std::vector<Tensor>& tensors, const std::vector<Row>& rows, Stream) override;

 private:
  void apply_mean_square(const std::vector<Tensor>& tensors);

  bool parallel_ = false;
  std::vector<Chunk> chunks_;
  std::vector<int32_t> first_chunks_;
  std::vector<Item> items_;
  std::vector<Batch> batches_;
  std::vector<int32_t> pending_;
  std::vector<Row> rows_;
  std::vector<double> sums_, shrink_;
  std::vector<ProjectionSums> projections_;
};

// The instruction set of every step in this process.
void use_instruction_set(const std::string& name);
std::string instruction_set();

}  // namespace wdk
