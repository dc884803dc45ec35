// A step on the CPU: the tables that the loops of cpu.cpp walk through, and the phases.
#pragma once

#include <optional>
#include <string>

#include "cpu.h"
#include "step.h"

namespace wdk {

class CpuStep : public Step {
 public:
  void set_tensors(const std::vector<Tensor>& tensors, bool projected) override;

  void begin(const StepInput& input) override;
  void reduce(int round) override;
  bool decide(int round) override;
  void update() override;
  void finish() override;
  bool run(const StepInput& input) override;

 private:
  void sum_gradients(int round);
  double mean_v();
  void add_up_all(int first, int last);
  void write_telemetry() const;

  // These last as long as the list of tensors.
  bool parallel_ = false;
  std::vector<Chunk> chunks_;
  std::vector<int32_t> first_chunks_;
  std::vector<Item> items_;
  std::vector<Batch> batches_;

  // These are a step's.
  std::optional<StepInput> input_;
  CpuWork work_{};
  Decision decision_;
  std::vector<int32_t> pending_;
  std::vector<double> shrink_;
  std::vector<double> chunk_sums_;  // kSums of each chunk
};

// The instruction set of every step in this process.
void use_instruction_set(const std::string& name);
std::string instruction_set();

}  // namespace wdk
