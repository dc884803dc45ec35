// The plan: every tensor of an optimizer, and its groups' options.
//
// Built once per set of parameters (wdkernels/native.py) and checked each step: `gather` looks at
// every tensor again and copies only what may change, the gradients' addresses. It knows Python
// objects and addresses, neither chunks nor loops.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "step.h"
#include "tensor.h"

namespace wdk {

class Plan;

// A gradient that a step reads. It is owned, so that its memory stays whatever other threads do.
struct Gradient {
  int32_t position;   // of its parameter
  py::object tensor;  // null as long as it is in another order than the weight
  const void* data;
};

// What `Plan::gather` has found: the gradients of one step, which is taken with it, once.
class Gathered {
 public:
  size_t size() const { return gradients_.size(); }

  // The parameters, by position, whose gradients lie in another order than the weight, or are no plain
  // tensors: these need set_gradient before the step.
  const std::vector<int32_t>& irregular() const { return irregular_; }
  void set_gradient(int32_t position, py::object gradient);

 private:
  friend class Plan;
  explicit Gathered(Plan& plan) : plan_(&plan) {}

  Plan* plan_;  // null once the step has been taken
  std::vector<Gradient> gradients_;
  std::vector<int32_t> irregular_;
};

class Plan {
 public:
  // `state`: the optimizer's state, a dict of dicts; `groups`: its param_groups. `memory` is that of
  // the GPU (number `device`) on which all tensors are; None for the CPU.
  Plan(py::dict state, py::list groups, int32_t device, py::object memory);

  // In the order of the groups. `weight` is the dense tensor the loops write: the parameter itself
  // or a copy of it. `state` is None as long as there is none; `streams` are its tensors that a step
  // reads or writes. `index`: its position among all parameters. A DTensor is a parameter or a value
  // of a state as it is; weight and streams are its local tensors.
  void add_parameter(const py::object& parameter, const py::object& weight, py::object state,
                     const py::dict& streams, Storage storage, int32_t group, uint32_t index,
                     int64_t total, const Numbering& numbering);

  // Before the parameters; later only with numbers changed.
  void set_options(int32_t group, const GroupOptions& options);
  void set_number(int32_t group, const char* name, double value);

  // Looks at every tensor. Nothing if something other than a gradient has changed, so that the plan
  // must be built anew.
  std::optional<Gathered> gather(const py::dict& state, const py::list& groups);

  // One optimizer step over what was gathered; returns the parameters it updated, none if the step
  // was skipped and the host knows. `sums` is the table of step.h, or None where nobody needs it.
  py::list step(Gathered& gathered, const Request& request, const py::object& sums, Stream stream);

  // The same, phase by phase (step.h). No other step begins before `end`, which may come at any time.
  int begin(Gathered& gathered, const Request& request, const py::object& sums, Stream stream);
  void reduce(int round);
  bool decide(int round);
  py::list update();
  void finish();
  void end();

  // For Python's garbage collector: a parameter may reach its optimizer, and so this plan.
  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  friend class Gathered;
  struct Role;
  static const Role kRoles[];

  // What a state holds, in its order: walking through a dict costs less than looking things up.
  struct Entry {
    py::object key, value;
    bool stream = false;  // a step reads or writes it
    bool scalar = false;  // a single number; else its elements are in the order of the weight
    bool wraps = false;   // a DTensor
    void* data = nullptr;
    DType dtype = DType::float32;
  };

  struct Parameter {
    py::object object;
    bool wraps = false;  // a DTensor
    py::object weight_object;
    Layout layout, weight;  // of the parameter, and of what the loops write
    py::object state;
    std::vector<Entry> entries;
    int32_t group = 0;
    Tensor tensor{};  // its streams, all but the gradient
    Number step;
    py::object known_spec;  // of a DTensor's gradient, the last one that was found equal to its own
  };

  void add_streams(Parameter& p, const py::dict& streams);
  bool unchanged(const Parameter& p) const;
  bool same_objects(const py::dict& state, const py::list& groups) const;
  static bool read_gradient(Parameter& p, Gradient& gradient);
  void refuse_while_running() const;
  Step& phases() const;
  StepInput start(Gathered& gathered, const Request& request, const py::object& sums,
                  Stream stream);
  void list_tensors();
  void number_tensors();
  void count_steps();

  DLDevice device_;
  py::dict state_;
  py::list groups_;
  std::vector<py::object> parameter_lists_;  // of the groups: owned, so that no other list can
  std::vector<py::object> state_values_;     // take the address; likewise the state's values
  std::vector<GroupOptions> options_;
  std::vector<Parameter> parameters_;

  std::vector<int32_t> listed_;  // positions of the parameters whose tensors are listed
  py::list updated_;             // what a step changes, for autograd
  std::vector<Tensor> tensors_;
  std::vector<Row> rows_;
  std::unique_ptr<Step> loops_;

  // These belong to the step that is running: in another thread, which has released the GIL, or between
  // phases.
  bool running_ = false;
  bool phased_ = false;
  std::vector<Gradient> gradients_;
};

}  // namespace wdk
