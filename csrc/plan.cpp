#include "plan.h"

#include <algorithm>
#include <stdexcept>
#include <tuple>

#include "cpu_step.h"
#ifdef WDK_CUDA
#include "gpu_step.h"
#endif

namespace wdk {

namespace {

bool is_on(const DLTensor& view, DLDevice device) {
  return view.device.device_type == device.device_type &&
         (device.device_type == dl::kCPU || view.device.device_id == device.device_id);
}

// Runs a function when a scope is left, by whichever way.
template <class Function>
class Finally {
 public:
  explicit Finally(Function function) : function_(std::move(function)) {}
  ~Finally() { function_(); }

 private:
  Function function_;
};

Layout layout_of(const py::object& tensor, DLDevice device) {
  DLTensor view;
  if (!read(tensor.ptr(), view) || !is_on(view, device))
    throw std::invalid_argument("not a strided tensor of the plan's device");
  return Layout(view);
}

}  // namespace

// ---- building ----------------------------------------------------------------------------------

int Plan::slot_of(PyObject* name) {
  static const std::array<const char*, kSlots> names = {
      "step",         "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "anchor",
      "compensation", "master",  "ema",        "exp_avg_sq_sum"};
  int slot = 0;
  while (slot < kSlots &&
         !(PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, names[slot]) == 0))
    ++slot;
  return slot;
}

Plan::Plan(py::dict state, py::list groups, int32_t device, py::object memory)
    : device_{memory.is_none() ? dl::kCPU : dl::kCUDA, device},
      state_(std::move(state)),
      groups_(std::move(groups)),
      hypers_(groups_.size()) {
  if (memory.is_none()) loops_ = std::make_unique<CpuStep>();
#ifdef WDK_CUDA
  else
    loops_ = std::make_unique<GpuStep>(device, std::move(memory));
#endif
  if (!loops_) throw std::invalid_argument("this module was built without CUDA");
  for (py::handle group : groups_)
    parameter_lists_.push_back(py::reinterpret_borrow<py::object>(group["params"]));
  for (auto entry : state_)
    state_values_.push_back(py::reinterpret_borrow<py::object>(entry.second));
}

// Whether the loops can use a tensor of this type in this place.
bool Plan::is_of_type(int slot, DType type, const Layout& weight) {
  const DType computed = computed_in(weight.dtype());
  switch (slot) {
    case kExpAvg:
    case kExpAvgSq:
    case kMaxExpAvgSq:
      return type == computed || (type == DType::bfloat16 && computed == DType::float32);
    case kAnchor:
      return size_of(type) <= size_of(computed);
    case kCompensation:
      return type == weight.dtype() && is_narrow(type);
    case kMaster:
      return type == computed && is_narrow(weight.dtype());
    default:
      return type == computed;
  }
}

// Whether a tensor of the state is one that the loops can use. The host counts the steps, unless
// they are counted on the device.
bool Plan::fits(const DLTensor& view, int slot, const Layout& weight, bool counted) const {
  if (!is_scalar(slot))
    return dtype(view) && weight.same_elements(view) && is_of_type(slot, *dtype(view), weight);
  if (numel(view) != 1 || !dtype(view)) return false;
  if (slot == kExpAvgSqSum) return is_on(view, device_) && dtype(view) == DType::float64;
  return !is_narrow(*dtype(view)) && is_on(view, counted ? device_ : DLDevice{dl::kCPU, 0});
}

void Plan::add_parameter(py::object parameter, py::object weight, py::object state, int32_t group,
                         uint32_t index) {
  Parameter p;
  p.index = index;
  p.layout = layout_of(parameter, device_);
  p.weight = layout_of(weight, device_);
  p.object = std::move(parameter);
  p.weight_object = std::move(weight);
  p.state = std::move(state);
  p.group = group;
  if (!p.state.is_none()) {
    for (auto [key, value] : py::reinterpret_borrow<py::dict>(p.state)) {
      const int slot = slot_of(key.ptr());
      p.entries.push_back({py::reinterpret_borrow<py::object>(key),
                           py::reinterpret_borrow<py::object>(value), slot});
      if (slot == kSlots) continue;
      DLTensor view;
      if (!read(value.ptr(), view) || !fits(view, slot, p.weight, hypers_.at(group).counted))
        throw std::invalid_argument("state tensor in another layout than its parameter");
      p.stored[slot] = {true, address(view), *dtype(view)};
    }
    const Hyper& h = hypers_.at(group);
    const bool narrow = is_narrow(p.weight.dtype());
    const auto missing = [&](Slot slot) { return !p.stored[slot].exists; };
    if (missing(kStep) || missing(kExpAvg) || missing(kExpAvgSq) ||
        p.stored[kExpAvg].dtype != p.stored[kExpAvgSq].dtype ||
        (h.is.amsgrad &&
         (missing(kMaxExpAvgSq) || p.stored[kMaxExpAvgSq].dtype != p.stored[kExpAvg].dtype)) ||
        (h.is.anchored && missing(kAnchor)) || (h.averaged && missing(kEma)) ||
        (h.stable && !h.is.amsgrad && missing(kExpAvgSqSum)) ||
        (narrow && h.master && missing(kMaster)) ||
        (narrow && h.rounding == Rounding::kahan && missing(kCompensation)))
      throw std::invalid_argument("incomplete state");
  }
  parameters_.push_back(std::move(p));
}

void Plan::set_hyper(int32_t group, const Hyper& hyper) {
  Hyper& current = hypers_.at(group);
  const bool same_streams = hyper.is.decay == current.is.decay && hyper.stable == current.stable &&
                            hyper.is.amsgrad == current.is.amsgrad &&
                            hyper.is.anchored == current.is.anchored &&
                            hyper.master == current.master && hyper.rounding == current.rounding &&
                            hyper.averaged == current.averaged && hyper.counted == current.counted;
  if (!same_streams && !parameters_.empty())
    throw std::logic_error("a group that reads other streams needs a new plan");
  current = hyper;
}

int Plan::traverse(visitproc visit, void* arg) const {
  Py_VISIT(state_.ptr());
  Py_VISIT(groups_.ptr());
  Py_VISIT(updated_.ptr());
  for (const py::object& list : parameter_lists_) Py_VISIT(list.ptr());
  for (const py::object& value : state_values_) Py_VISIT(value.ptr());
  for (const Parameter& p : parameters_) {
    Py_VISIT(p.object.ptr());
    Py_VISIT(p.weight_object.ptr());
    Py_VISIT(p.state.ptr());
    Py_VISIT(p.gradient.ptr());
    for (const Entry& entry : p.entries) Py_VISIT(entry.value.ptr());
  }
  return 0;
}

void Plan::clear() {
  const auto dropped =
      std::make_tuple(std::move(parameters_), std::move(state_values_), std::move(parameter_lists_),
                      std::move(updated_), std::move(state_), std::move(groups_));
  active_.clear();
}

void Plan::refuse_while_running() const {
  if (running_) throw std::runtime_error("this optimizer is at work on a step in another thread");
}

// ---- looking at every tensor -------------------------------------------------------------------

bool Plan::unchanged(const Parameter& p) const {
  const bool counted = hypers_[p.group].counted;
  DLTensor view;
  if (!read(p.object.ptr(), view) || !(p.layout == view)) return false;
  Py_ssize_t position = 0;
  PyObject *key, *value;
  for (const Entry& entry : p.entries) {
    if (!PyDict_Next(p.state.ptr(), &position, &key, &value) || key != entry.key.ptr())
      return false;
    if (entry.slot == kSlots) continue;
    const Stored& known = p.stored[entry.slot];
    if (value != entry.value.ptr() || !read(value, view) || address(view) != known.data ||
        !fits(view, entry.slot, p.weight, counted) || *dtype(view) != known.dtype)
      return false;
  }
  if (PyDict_Size(p.state.ptr()) != static_cast<Py_ssize_t>(p.entries.size())) return false;
  return true;
}

bool Plan::same_objects(const py::dict& state, const py::list& groups) const {
  static PyObject* params = PyUnicode_InternFromString("params");
  if (!state.is(state_) || state.size() != state_values_.size()) return false;
  if (!groups.is(groups_) || groups.size() != parameter_lists_.size()) return false;
  auto parameter = parameters_.begin();
  for (size_t i = 0; i < parameter_lists_.size(); ++i) {
    PyObject* list = PyDict_GetItem(PyList_GET_ITEM(groups_.ptr(), i), params);
    if (list != parameter_lists_[i].ptr() || !PyList_Check(list)) return false;
    const Py_ssize_t size = PyList_GET_SIZE(list);
    if (size > parameters_.end() - parameter) return false;
    for (Py_ssize_t k = 0; k < size; ++k, ++parameter)
      if (PyList_GET_ITEM(list, k) != parameter->object.ptr()) return false;
  }
  if (parameter != parameters_.end()) return false;

  Py_ssize_t position = 0;
  PyObject *key, *value;
  for (size_t i = 0; PyDict_Next(state.ptr(), &position, &key, &value); ++i)
    if (value != state_values_[i].ptr()) return false;
  return true;
}

py::object Plan::gather(const py::dict& state, const py::list& groups) {
  static PyObject* grad = PyUnicode_InternFromString("grad");
  refuse_while_running();
  if (!same_objects(state, groups)) return py::none();

  active_.clear();
  py::list irregular;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    Parameter& p = parameters_[i];
    p.gradient = py::reinterpret_steal<py::object>(PyObject_GetAttr(p.object.ptr(), grad));
    if (!p.gradient) throw py::error_already_set();
    if (p.gradient.is_none()) continue;

    if (p.state.is_none() || !unchanged(p)) return py::none();

    active_.push_back(static_cast<int32_t>(i));
    DLTensor view;
    if (read(p.gradient.ptr(), view) && p.weight.same_order(view) && address(view) &&
        address(view) != p.weight.data() && !is_lazy(p.gradient.ptr(), view))
      p.gradient_data = address(view);
    else
      irregular.append(i);
  }
  return irregular;
}

void Plan::set_gradient(int32_t position, py::object gradient) {
  Parameter& p = parameters_.at(position);
  DLTensor view;
  if (!read(gradient.ptr(), view) || !p.weight.same_order(view))
    throw std::invalid_argument("gradient in another layout than its parameter");
  p.gradient_data = address(view);
  p.gradient = std::move(gradient);
}

// ---- the step ----------------------------------------------------------------------------------

void Plan::list_tensors() {
  tensors_.clear();
  updated_ = py::list();
  bool projected = false;
  for (int32_t position : active_) {
    const Parameter& p = parameters_[position];
    const Hyper& hyper = hypers_[p.group];
    projected = hyper.is.decay == Decay::projection;
    Tensor t{};
    const bool narrow = is_narrow(p.weight.dtype());
    t.w = p.weight.data();
    t.m = p.stored[kExpAvg].data;
    t.v = p.stored[kExpAvgSq].data;
    if (hyper.is.amsgrad) t.vmax = p.stored[kMaxExpAvgSq].data;
    if (hyper.is.anchored) t.a = p.stored[kAnchor].data;
    if (narrow && hyper.rounding == Rounding::kahan) t.compensation = p.stored[kCompensation].data;
    if (narrow && hyper.master) t.master = p.stored[kMaster].data;
    if (hyper.averaged) t.ema = p.stored[kEma].data;
    if (hyper.stable && !hyper.is.amsgrad)
      t.v_sum = static_cast<double*>(p.stored[kExpAvgSqSum].data);
    t.numel = p.weight.elements();
    t.weight_type = p.weight.dtype();
    t.moment_type = p.stored[kExpAvg].dtype;
    t.anchor_type = p.stored[kAnchor].dtype;
    t.index = p.index;
    tensors_.push_back(t);
    updated_.append(p.object);
  }
  loops_->plan(tensors_, projected);
  listed_ = active_;
}

void Plan::number_tensors() {
  rows_.clear();
  int32_t group = -1;
  double previous = -1;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const Parameter& p = parameters_[active_[i]];
    const Number step{p.stored[kStep].data, p.stored[kStep].dtype};
    const Hyper& hyper = hypers_[p.group];
    if (hyper.counted) {
      Row& row = rows_.emplace_back();  // padding cleared: a GPU's are compared byte by byte
      row.hyper = hyper;
      row.step.data = step.data;
      row.step.type = step.type;
    } else if (const double t = step.get() + 1; p.group != group || t != previous) {
      rows_.push_back({hyper, numbers_of(hyper, t), t, {}});
      group = p.group;
      previous = t;
    }
    tensors_[i].row = static_cast<int32_t>(rows_.size()) - 1;
    tensors_[i].g = p.gradient_data;
  }
}

py::list Plan::step(const Request& request, Stream stream) {
  refuse_while_running();
  running_ = true;
  const Finally finally([this] {
    running_ = false;
    for (int32_t position : active_) parameters_[position].gradient = py::none();
  });
  if (active_ != listed_) list_tensors();
  number_tensors();
  if (!loops_->run(tensors_, rows_, request, stream)) return py::list();
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const Stored& step = parameters_[active_[i]].stored[kStep];
    const Row& row = rows_[tensors_[i].row];
    if (!row.hyper.counted) Number{step.data, step.dtype}.set(row.t);
  }
  return updated_;
}
}  // namespace wdk
