// A step on the CPU: the tables that the loops of cpu.cpp walk through, and the phases.
#pragma once

#include <string>

#include "cpu.h"
#include "step.h"

namespace wdk {

class CpuStep : public Step {
 public:
  void plan(const std::vector<Tensor>& tensors, bool projected) override;
  bool run(const std::vector<Tensor>& tensors, const std::vector<Row>& rows, const Request& request,
           Stream) override;

 private:
  CpuWork work_on(const std::vector<Tensor>& tensors, const std::vector<Row>& rows);
  Whole reduce(CpuWork work, const std::vector<Row>& rows, const Request& request);
  double sum_over(int32_t tensor) const;
  void tell(double* table, const CpuWork& work, const std::vector<Row>& rows,
            const Whole& whole) const;

  bool parallel_ = false;
  std::vector<Chunk> chunks_;
  std::vector<int32_t> first_chunks_;
  std::vector<Item> items_;
  std::vector<Batch> batches_;
  std::vector<int32_t> pending_;
  std::vector<double> sums_, squares_, shrink_;  // squares: of each tensor
  std::vector<ProjectionSums> projections_;
  std::vector<MeasuredSums> measured_;
};

// The instruction set of every step in this process.
void use_instruction_set(const std::string& name);
std::string instruction_set();

}  // namespace wdk
