// The plan: every tensor of an optimizer, its chunks and its groups' numbers.
//
// Built once per set of parameters (wdkernels/native.py) and checked each step: `gather` looks at
// every tensor again and copies only what may change, the gradients' addresses. It knows Python
// objects and addresses, neither chunks nor loops.
#pragma once

#include <array>
#include <memory>
#include <vector>

#include "step.h"
#include "tensor.h"

namespace wdk {

class Plan {
 public:
  // `state`: the optimizer's state, a dict of dicts; `groups`: its param_groups. `memory` is that of
  // the GPU (number `device`) on which all tensors are; None for the CPU.
  Plan(py::dict state, py::list groups, int32_t device, py::object memory);

  // In the order of the groups. `weight` is the dense tensor the loops write: the parameter itself
  // or a copy of it. `state` is None as long as there is none.
  // `index`: its position among all parameters.
  void add_parameter(py::object parameter, py::object weight, py::object state, int32_t group,
                     uint32_t index);

  // Before the parameters; later only with numbers changed.
  void set_hyper(int32_t group, const Hyper& hyper);

  // Looks at every tensor. None if something other than a gradient has changed, so that the plan
  // must be built anew; else the parameters (by position) whose gradients lie in another order
  // than the weight, or are no plain tensors: these need `set_gradient` before `step`.
  py::object gather(const py::dict& state, const py::list& groups);
  void set_gradient(int32_t position, py::object gradient);

  // One optimizer step over what was gathered; returns the parameters it updated, none if the step
  // was skipped and the host knows. Gives the gradients back when it is done.
  py::list step(const Request& request, Stream stream);

  // For Python's garbage collector: a parameter may reach its optimizer, and so this plan.
  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  // The state tensors of a parameter, named as in torch.optim.
  enum Slot {
    kStep,
    kExpAvg,
    kExpAvgSq,
    kMaxExpAvgSq,
    kAnchor,
    kCompensation,
    kMaster,
    kEma,
    kExpAvgSqSum,
    kSlots
  };
  static int slot_of(PyObject* name);
  static bool is_scalar(int slot) { return slot == kStep || slot == kExpAvgSqSum; }
  static bool is_of_type(int slot, DType type, const Layout& weight);
  bool fits(const DLTensor& view, int slot, const Layout& weight, bool counted) const;

  // A tensor in the state; elements in the order of the weight, or a single number.
  struct Stored {
    bool exists = false;
    void* data = nullptr;
    DType dtype = DType::float32;
  };

  // What a state holds, in its order: walking through a dict costs less than looking things up.
  struct Entry {
    py::object key, value;
    int slot;  // or kSlots: none of ours
  };

  struct Parameter {
    py::object object;
    Layout layout;
    Layout weight;  // the layout of what the loops write
    py::object weight_object;
    py::object state;
    std::vector<Entry> entries;
    std::array<Stored, kSlots> stored;
    int32_t group;
    uint32_t index;
    py::object gradient;
    const void* gradient_data = nullptr;
  };

  void refuse_while_running() const;
  bool unchanged(const Parameter& p) const;
  bool same_objects(const py::dict& state, const py::list& groups) const;
  void list_tensors();
  void number_tensors();

  DLDevice device_;
  bool running_ = false;  // a step in another thread, which has released the GIL
  py::dict state_;
  py::list groups_;
  std::vector<py::object> parameter_lists_;  // of the groups: owned, so that no other list can
  std::vector<py::object> state_values_;     // take the address; likewise the state's values
  std::vector<Hyper> hypers_;
  std::vector<Parameter> parameters_;

  std::vector<int32_t> active_, listed_;  // positions of parameters that have a gradient: now, and
                                          // when the tensors were listed
  py::list updated_;
  std::vector<Tensor> tensors_;
  std::vector<Row> rows_;
  std::unique_ptr<Step> loops_;
};

}  // namespace wdk
