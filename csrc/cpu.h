// The CPU backend: the element loops, compiled once per instruction set.
#pragma once

#include <string>
#include <vector>

#include "work.h"

namespace wdk {

struct CpuLoops {
  // Sum over each chunk of g^2, or with amsgrad of the vmax this step will have.
  void (*reduce)(const Work&);
  // The step itself, and for SPD the second touch of the tensors it selected.
  void (*update)(const Work&);
};

// Instruction sets that this build has and this processor runs, the best one last.
std::vector<std::string> instruction_sets();

// Throws std::invalid_argument for one that is not among them.
CpuLoops cpu_loops(const std::string& instruction_set);

}  // namespace wdk
