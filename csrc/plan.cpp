#include "plan.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <tuple>

#include "cpu_step.h"
#ifdef WDK_CUDA
#include "torch_memory.h"
#endif

namespace wdk {

namespace {

bool is_on(const DLTensor& view, DLDevice device) {
  return view.device.device_type == device.device_type &&
         (device.device_type == dl::kCPU || view.device.device_id == device.device_id);
}

constexpr DLDevice kHost{dl::kCPU, 0};

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

// Where the numbers are that a step reads and writes. `local` owns them if they are those of a DTensor.
bool read_inside(PyObject* tensor, bool wraps, py::object& local, DLTensor& view) {
  if (!wraps) return read(tensor, view);
  local = local_of(tensor);
  return local && read(local.ptr(), view);
}

// A step's table of sums, which torch has allocated; null for None.
double (*table_of(const py::object& sums, size_t rows, DLDevice device)) [kSums] {
  if (sums.is_none()) return nullptr;
  DLTensor view;
  if (!read(sums.ptr(), view) || !is_on(view, device) || dtype(view) != DType::float64 ||
      numel(view) < static_cast<int64_t>(rows * kSums))
    throw std::invalid_argument("not a table of sums for so many tensors");
  return static_cast<double (*)[kSums]>(address(view));
}

}  // namespace

// ---- building ----------------------------------------------------------------------------------

Plan::Plan(py::dict state, py::list groups, int32_t device, py::object memory)
    : device_{memory.is_none() ? dl::kCPU : dl::kCUDA, device},
      state_(std::move(state)),
      groups_(std::move(groups)),
      options_(groups_.size()) {
  if (memory.is_none()) loops_ = std::make_unique<CpuStep>();
#ifdef WDK_CUDA
  else
    loops_ = std::make_unique<GpuStep>(device, torch_memory(std::move(memory)));
#endif
  if (!loops_) throw std::invalid_argument("this module was built without CUDA");
  for (py::handle group : groups_)
    parameter_lists_.push_back(py::reinterpret_borrow<py::object>(group["params"]));
  for (auto entry : state_)
    state_values_.push_back(py::reinterpret_borrow<py::object>(entry.second));
}

// The streams as Python names them (wdkernels/plan.py), and where each goes.
struct Plan::Role {
  const char* name;
  bool scalar;
  void (*set)(Parameter& p, void* data, DType type);
};

const Plan::Role Plan::kRoles[] = {
    {"step", true, [](Parameter& p, void* data, DType type) { p.step = {data, type}; }},
    {"exp_avg", false,
     [](Parameter& p, void* data, DType type) { p.tensor.m = data, p.tensor.moment_type = type; }},
    {"exp_avg_sq", false, [](Parameter& p, void* data, DType) { p.tensor.v = data; }},
    {"max_exp_avg_sq", false, [](Parameter& p, void* data, DType) { p.tensor.vmax = data; }},
    {"anchor", false,
     [](Parameter& p, void* data, DType type) { p.tensor.a = data, p.tensor.anchor_type = type; }},
    {"companion", false, [](Parameter& p, void* data, DType) { p.tensor.companion = data; }},
    {"ema", false, [](Parameter& p, void* data, DType) { p.tensor.ema = data; }},
    {"exp_avg_sq_sum", true,
     [](Parameter& p, void* data, DType) { p.tensor.v_sum = static_cast<double*>(data); }},
};

void Plan::add_parameter(const py::object& parameter, const py::object& weight, py::object state,
                         const py::dict& streams, Storage storage, int32_t group, uint32_t index,
                         int64_t total, const Numbering& numbering) {
  if (group < 0 || group >= static_cast<int32_t>(options_.size()))
    throw std::invalid_argument("a parameter of no group");
  Parameter& p = parameters_.emplace_back();
  p.group = group;
  p.object = parameter;
  p.state = std::move(state);
  if (p.state.is_none()) return;  // until it has a gradient, whatever it is does not count
  const py::object local = local_of(parameter.ptr());
  p.wraps = bool(local);
  p.layout = layout_of(local ? local : parameter, device_);
  p.weight = layout_of(weight, device_);
  p.weight_object = weight;
  p.tensor.w = p.weight.data();
  p.tensor.weight_type = p.weight.dtype();
  p.tensor.numel = p.weight.elements();
  p.tensor.total = total;
  p.tensor.numbering = numbering;
  p.tensor.storage = storage;
  p.tensor.index = index;
  add_streams(p, streams);
}

// Python has checked the types. What is looked at here is what the loops could not survive.
void Plan::add_streams(Parameter& p, const py::dict& streams) {
  for (auto [key, value] : py::reinterpret_borrow<py::dict>(p.state)) {
    Entry entry;
    entry.key = py::reinterpret_borrow<py::object>(key);
    entry.value = py::reinterpret_borrow<py::object>(value);
    p.entries.push_back(std::move(entry));
  }
  for (auto [key, value] : streams) {
    const auto is_named = [name = key.ptr()](const Role& role) {
      return PyUnicode_CompareWithASCIIString(name, role.name) == 0;
    };
    const Role* role = std::find_if(std::begin(kRoles), std::end(kRoles), is_named);
    if (role == std::end(kRoles)) throw std::invalid_argument("a stream that no step knows");
    const auto holds = [&, stream = value](const Entry& entry) {
      return entry.value.is(stream) || (p.wraps && local_of(entry.value.ptr()).is(stream));
    };
    const auto entry = std::find_if(p.entries.begin(), p.entries.end(), holds);
    if (entry == p.entries.end()) throw std::invalid_argument("a stream that is not in the state");
    DLTensor view;
    const bool readable = read(value.ptr(), view) && dtype(view) &&
                          (is_on(view, device_) || (role->scalar && is_on(view, kHost)));
    if (!readable || !(role->scalar ? numel(view) == 1 : p.weight.same_elements(view)))
      throw std::invalid_argument("a stream in another layout than its parameter");
    entry->stream = true;
    entry->scalar = role->scalar;
    entry->wraps = !entry->value.is(value);
    entry->data = address(view);
    entry->dtype = *dtype(view);
    // A stream of no elements has no address, and yet there is one.
    static double nothing;
    role->set(p, entry->data ? entry->data : &nothing, entry->dtype);
  }
}

void Plan::set_options(int32_t group, const GroupOptions& options) { options_.at(group) = options; }

void Plan::set_number(int32_t group, const char* name, double value) {
  static constexpr std::pair<const char*, double GroupOptions::*> numbers[] = {
      {"lr", &GroupOptions::lr},       {"weight_decay", &GroupOptions::weight_decay},
      {"beta1", &GroupOptions::beta1}, {"beta2", &GroupOptions::beta2},
      {"eps", &GroupOptions::eps},
  };
  for (const auto& [known, number] : numbers)
    if (std::strcmp(known, name) == 0) {
      options_.at(group).*number = value;
      return;
    }
  throw std::invalid_argument("not a number of a group's options");
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
    for (const Entry& entry : p.entries) Py_VISIT(entry.value.ptr());
  }
  for (const Gradient& gradient : gradients_) Py_VISIT(gradient.tensor.ptr());
  return 0;
}

void Plan::clear() {
  const auto dropped =
      std::make_tuple(std::move(parameters_), std::move(state_values_), std::move(parameter_lists_),
                      std::move(updated_), std::move(state_), std::move(groups_));
}

// ---- looking at every tensor -------------------------------------------------------------------

// Nothing that a step relies on has changed: the parameter's memory; the objects of its state and,
// where a step reads or writes them, their memory. An object may be given other memory, and memory that
// was given back is handed out again, so both are looked at.
bool Plan::unchanged(const Parameter& p) const {
  py::object local;
  DLTensor view;
  if (!read_inside(p.object.ptr(), p.wraps, local, view) || !(p.layout == view)) return false;
  Py_ssize_t position = 0;
  PyObject *key, *value;
  for (const Entry& entry : p.entries) {
    if (!PyDict_Next(p.state.ptr(), &position, &key, &value) || key != entry.key.ptr())
      return false;
    if (!entry.stream) continue;
    if (value != entry.value.ptr() || !read_inside(value, entry.wraps, local, view) ||
        address(view) != entry.data || dtype(view) != entry.dtype ||
        !(entry.scalar ? numel(view) == 1 : p.weight.same_elements(view)))
      return false;
  }
  return PyDict_Size(p.state.ptr()) == static_cast<Py_ssize_t>(p.entries.size());
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

// Where a parameter's gradient can be read as it is. False where it lies in another order than the
// weight, is no plain tensor, or is sharded otherwise than a DTensor.
bool Plan::read_gradient(Parameter& p, Gradient& gradient) {
  if (p.wraps) {
    py::object spec = spec_of(gradient.tensor.ptr());
    if (!spec) return false;
    if (const py::object own = spec_of(p.object.ptr()); !spec.is(own) && !spec.is(p.known_spec)) {
      if (!own || !own.equal(spec)) return false;
      p.known_spec = std::move(spec);  // comparing specs takes microseconds
    }
    gradient.tensor = local_of(gradient.tensor.ptr());
    if (!gradient.tensor) return false;
  }
  DLTensor view;
  if (!read(gradient.tensor.ptr(), view) || !p.weight.same_order(view) || !address(view) ||
      address(view) == p.weight.data() || is_lazy(gradient.tensor.ptr(), view))
    return false;
  gradient.data = address(view);
  return true;
}

std::optional<Gathered> Plan::gather(const py::dict& state, const py::list& groups) {
  static PyObject* grad = PyUnicode_InternFromString("grad");
  refuse_while_running();
  if (!same_objects(state, groups)) return std::nullopt;

  Gathered gathered(*this);
  gathered.gradients_.reserve(parameters_.size());
  for (size_t i = 0; i < parameters_.size(); ++i) {
    Parameter& p = parameters_[i];
    Gradient gradient{static_cast<int32_t>(i), {}, nullptr};
    gradient.tensor = py::reinterpret_steal<py::object>(PyObject_GetAttr(p.object.ptr(), grad));
    if (!gradient.tensor) throw py::error_already_set();
    if (gradient.tensor.is_none()) continue;

    if (p.state.is_none() || !unchanged(p)) return std::nullopt;

    if (!read_gradient(p, gradient)) {
      gradient.tensor = {};
      gathered.irregular_.push_back(gradient.position);
    }
    gathered.gradients_.push_back(std::move(gradient));
  }
  return gathered;
}

void Gathered::set_gradient(int32_t position, py::object tensor) {
  const auto gradient =
      std::find_if(gradients_.begin(), gradients_.end(),
                   [&](const Gradient& each) { return each.position == position; });
  DLTensor view;
  if (gradient == gradients_.end() || !read(tensor.ptr(), view) ||
      !plan_->parameters_[position].weight.same_order(view))
    throw std::invalid_argument("gradient in another layout than its parameter");
  gradient->data = address(view);
  gradient->tensor = std::move(tensor);
}

// ---- the step ----------------------------------------------------------------------------------

void Plan::refuse_while_running() const {
  if (running_) throw std::runtime_error("this optimizer is at work on a step in another thread");
}

void Plan::list_tensors() {
  tensors_.clear();
  listed_.clear();
  updated_ = py::list();
  bool projected = false;
  for (const Gradient& gradient : gradients_) {
    const Parameter& p = parameters_[gradient.position];
    projected = options_[p.group].decay == Decay::projection;
    tensors_.push_back(p.tensor);
    updated_.append(p.object);
  }
  loops_->set_tensors(tensors_, projected);
  for (const Gradient& gradient : gradients_) listed_.push_back(gradient.position);
}

void Plan::number_tensors() {
  rows_.clear();
  int32_t group = -1;
  double previous = -1;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const Parameter& p = parameters_[listed_[i]];
    const GroupOptions& options = options_[p.group];
    if (options.counted_on_device) {
      Row& row = rows_.emplace_back();  // padding cleared: a GPU's are compared byte by byte
      row.options = options;
      row.step.data = p.step.data;
      row.step.type = p.step.type;
    } else if (const double t = p.step.get() + 1; p.group != group || t != previous) {
      rows_.push_back({options, numbers_of(options, t), t, {}});
      group = p.group;
      previous = t;
    }
    tensors_[i].row = static_cast<int32_t>(rows_.size()) - 1;
    tensors_[i].g = gradients_[i].data;
  }
}

// From here to `end` the gradients are the plan's.
StepInput Plan::start(Gathered& gathered, const Request& request, const py::object& sums,
                      Stream stream) {
  if (gathered.plan_ != this) throw std::logic_error("a step needs gradients of its own");
  for (const Gradient& gradient : gathered.gradients_)
    if (!gradient.tensor)
      throw std::logic_error("a gradient in another order has not been replaced");
  gathered.plan_ = nullptr;
  gradients_ = std::move(gathered.gradients_);

  const auto is_listed = [](const Gradient& gradient, int32_t position) {
    return gradient.position == position;
  };
  if (!std::equal(gradients_.begin(), gradients_.end(), listed_.begin(), listed_.end(), is_listed))
    list_tensors();
  number_tensors();
  StepInput input{tensors_, rows_, request, stream, table_of(sums, tensors_.size(), device_)};
  if (!input.sums && input.needs_sums() && !tensors_.empty())
    throw std::invalid_argument("this step needs a table of sums");
  return input;
}

// The host's; on a GPU kernels may count.
void Plan::count_steps() {
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const Row& row = rows_[tensors_[i].row];
    if (!row.options.counted_on_device) parameters_[listed_[i]].step.set(row.t);
  }
}

py::list Plan::step(Gathered& gathered, const Request& request, const py::object& sums,
                    Stream stream) {
  refuse_while_running();
  running_ = true;
  const Finally finally([this] { end(); });
  if (!loops_->run(start(gathered, request, sums, stream))) return py::list();
  count_steps();
  return updated_;
}

int Plan::begin(Gathered& gathered, const Request& request, const py::object& sums, Stream stream) {
  refuse_while_running();
  running_ = true;
  try {
    const StepInput input = start(gathered, request, sums, stream);
    loops_->begin(input);
    phased_ = true;
    return Step::rounds(input);
  } catch (...) {
    end();
    throw;
  }
}

Step& Plan::phases() const {
  if (!phased_) throw std::logic_error("no step has begun");
  return *loops_;
}

void Plan::reduce(int round) { phases().reduce(round); }
bool Plan::decide(int round) { return phases().decide(round); }

py::list Plan::update() {
  phases().update();
  count_steps();
  return updated_;
}

void Plan::finish() { phases().finish(); }

void Plan::end() {
  const auto dropped = std::move(gradients_);
  gradients_.clear();
  running_ = phased_ = false;
}

}  // namespace wdk
