#include "plan.h"

#include <algorithm>
#include <stdexcept>
#include <tuple>

#include "cpu.h"

namespace wdk {

namespace {

// Elements of a batch of tensors: its w~ and a should still be in the last-level cache at the second
// touch, when the 20 bytes of each element of two batches have passed through it.
constexpr int64_t kBatch = 1 << 18;

// Waking the other threads costs as much as this many elements.
constexpr int64_t kParallel = 2 * kChunk;

struct Chosen {
  std::string name = instruction_sets().back();
  CpuLoops loops = cpu_loops(name);
};

Chosen& chosen() {
  static Chosen instance;
  return instance;
}

// A step count or a sum: a 0-d tensor of the state.
double read_number(const void* data, DType dtype) {
  return dtype == DType::float32 ? double(*static_cast<const float*>(data))
                                 : *static_cast<const double*>(data);
}

void write_number(void* data, DType dtype, double value) {
  if (dtype == DType::float32)
    *static_cast<float*>(data) = static_cast<float>(value);
  else
    *static_cast<double*>(data) = value;
}

bool is_number(const DLTensor& view) {
  return view.device.device_type == dl::kCPU && numel(view) == 1 && dtype(view).has_value();
}

Layout layout_of(const py::object& tensor) {
  DLTensor view;
  if (!read(tensor.ptr(), view) || view.device.device_type != dl::kCPU)
    throw std::invalid_argument("not a strided CPU tensor");
  return Layout(view);
}

}  // namespace

void use_instruction_set(const std::string& name) { chosen() = {name, cpu_loops(name)}; }
std::string instruction_set() { return chosen().name; }

// ---- building ----------------------------------------------------------------------------------

const std::array<PyObject*, Plan::kSlots>& Plan::slot_names() {
  static const std::array<PyObject*, kSlots> names = {
      PyUnicode_InternFromString("step"),       PyUnicode_InternFromString("exp_avg"),
      PyUnicode_InternFromString("exp_avg_sq"), PyUnicode_InternFromString("max_exp_avg_sq"),
      PyUnicode_InternFromString("anchor"),     PyUnicode_InternFromString("exp_avg_sq_sum"),
  };
  return names;
}

Plan::Plan(py::dict state, py::list groups)
    : state_(std::move(state)), groups_(std::move(groups)), hypers_(groups_.size()) {
  for (py::handle group : groups_)
    parameter_lists_.push_back(py::reinterpret_borrow<py::object>(group["params"]));
  for (auto entry : state_)
    state_values_.push_back(py::reinterpret_borrow<py::object>(entry.second));
}

void Plan::add_parameter(py::object parameter, py::object weight, py::object state, int32_t group) {
  Parameter p;
  p.layout = layout_of(parameter);
  p.weight = layout_of(weight);
  p.object = std::move(parameter);
  p.weight_object = std::move(weight);
  p.state = std::move(state);
  p.group = group;
  if (!p.state.is_none()) {
    for (int slot = 0; slot < kSlots; ++slot) {
      PyObject* tensor = PyDict_GetItem(p.state.ptr(), slot_names()[slot]);
      if (!tensor) continue;
      DLTensor view;
      if (!read(tensor, view) || !(is_scalar(slot) ? is_number(view) : p.weight.same_order(view)))
        throw std::invalid_argument("state tensor in another layout than its parameter");
      p.stored[slot] = {py::reinterpret_borrow<py::object>(tensor), address(view), *dtype(view)};
    }
    const Hyper& h = hypers_.at(group);
    const auto missing = [&](Slot slot) { return !p.stored[slot].object; };
    if (missing(kStep) || missing(kExpAvg) || missing(kExpAvgSq) ||
        (h.amsgrad && missing(kMaxExpAvgSq)) || (h.anchored && missing(kAnchor)) ||
        (h.stable && !h.amsgrad && missing(kExpAvgSqSum)))
      throw std::invalid_argument("incomplete state");
  }
  parameters_.push_back(std::move(p));
}

void Plan::set_hyper(int32_t group, const Hyper& hyper) {
  Hyper& current = hypers_.at(group);
  const bool same_streams = hyper.decay == current.decay && hyper.stable == current.stable &&
                            hyper.amsgrad == current.amsgrad && hyper.anchored == current.anchored;
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
    for (const Stored& stored : p.stored) Py_VISIT(stored.object.ptr());
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

bool Plan::Parameter::unchanged() const {
  DLTensor view;
  if (!read(object.ptr(), view) || !(layout == view)) return false;
  for (int slot = 0; slot < kSlots; ++slot) {
    const Stored& known = stored[slot];
    PyObject* now = PyDict_GetItem(state.ptr(), slot_names()[slot]);
    if (now != known.object.ptr()) return false;
    if (!now) continue;
    if (!read(now, view) || address(view) != known.data) return false;
    if (is_scalar(slot) ? !is_number(view) || *dtype(view) != known.dtype
                        : !weight.same_order(view))
      return false;
  }
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

    if (p.state.is_none() || !p.unchanged()) return py::none();

    active_.push_back(static_cast<int32_t>(i));
    DLTensor view;
    if (read(p.gradient.ptr(), view) && p.weight.same_order(view) &&
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

// ---- tables ------------------------------------------------------------------------------------

// SPD's second touch of a batch stands behind the step of the next one: far enough for the step to
// be done when its turn comes, near enough for the batch to be in cache.
void Plan::build_tables() {
  tensors_.clear();
  chunks_.clear();
  items_.clear();
  batches_.clear();
  bool projected = false;
  int64_t item_elements = 0, batch_elements = 0;
  size_t first_item = 0;    // of the batch that is being filled
  std::vector<Item> touch;  // the second touch of the batch before it

  const auto close_batch = [&] {
    const int32_t first_tensor = batches_.empty() ? 0 : batches_.back().last_tensor;
    batches_.push_back({first_tensor, static_cast<int32_t>(tensors_.size()),
                        static_cast<int32_t>(items_.size() - first_item)});
    // Last written, first read: of a large batch the caches hold the end.
    std::vector<Item> reversed(items_.rbegin(), items_.rend() - first_item);
    for (Item& item : reversed) item.second_touch = true;
    items_.insert(items_.end(), touch.begin(), touch.end());
    touch = std::move(reversed);
    first_item = items_.size();
    item_elements = batch_elements = 0;
  };

  for (int32_t position : active_) {
    const Parameter& p = parameters_[position];
    projected = hypers_[p.group].decay == Decay::projection;
    const int64_t n = p.weight.elements();
    if (projected && batch_elements > 0 && batch_elements + n > kBatch) close_batch();

    const auto index = static_cast<int32_t>(tensors_.size());
    const auto first_chunk = static_cast<int32_t>(chunks_.size());
    for (int64_t begin = 0; begin < n; begin += kChunk) {
      const int64_t size = std::min(kChunk, n - begin);
      const auto chunk = static_cast<int32_t>(chunks_.size());
      if (items_.size() == first_item || item_elements + size > kChunk) {
        items_.push_back({chunk, chunk, static_cast<int32_t>(batches_.size()), false});
        item_elements = 0;
      }
      items_.back().last_chunk = chunk + 1;
      chunks_.push_back({index, static_cast<int32_t>(size), begin});
      item_elements += size;
    }
    batch_elements += n;
    tensors_.push_back({p.weight.data(), nullptr, p.stored[kExpAvg].data, p.stored[kExpAvgSq].data,
                        p.stored[kMaxExpAvgSq].data, p.stored[kAnchor].data, n, p.weight.dtype(), 0,
                        first_chunk, static_cast<int32_t>(chunks_.size())});
  }
  if (projected) {
    close_batch();
    items_.insert(items_.end(), touch.begin(), touch.end());
  }
  pending_.resize(batches_.size());
  sums_.resize(chunks_.size());
  projections_.resize(chunks_.size());
  shrink_.resize(tensors_.size());
}

void Plan::build_rows() {
  rows_.clear();
  int32_t group = -1;
  double previous = -1;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    Parameter& p = parameters_[active_[i]];
    const Stored& step = p.stored[kStep];
    const double t = read_number(step.data, step.dtype) + 1;
    write_number(step.data, step.dtype, t);
    if (p.group != group || t != previous) {
      const Hyper& hyper = hypers_[group = p.group];
      rows_.push_back({hyper, coefficients(hyper, previous = t), t});
    }
    tensors_[i].row = static_cast<int32_t>(rows_.size()) - 1;
    tensors_[i].g = p.gradient_data;
  }
}

// SWD's V, from the chunks' sums. sum(v) obeys the recurrence of v itself, so that a sum over the
// gradient replaces one over v; the maxima of amsgrad have none and were summed as they will be.
void Plan::apply_mean_square() {
  double total = 0;
  int64_t elements = 0;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const Tensor& tensor = tensors_[i];
    const Row& row = rows_[tensor.row];
    double sum = 0;
    for (int32_t k = tensor.first_chunk; k < tensor.last_chunk; ++k) sum += sums_[k];
    if (!row.hyper.amsgrad) {
      const Stored& stored = parameters_[active_[i]].stored[kExpAvgSqSum];
      const double kept = read_number(stored.data, stored.dtype);
      const double mean = lerp(kept, sum, 1 - row.hyper.beta2);
      sum = std::isnan(mean) ? kept + sum : mean;  // inf stays inf, as v does
      write_number(stored.data, stored.dtype, sum);
    }
    total += sum / row.hyper.bias_correction2(row.t);
    elements += tensor.numel;
  }
  const double mean_square = elements ? total / static_cast<double>(elements) : 0;
  for (Row& row : rows_) row.numbers.decay = stable_decay(row.numbers.decay, mean_square);
}

py::list Plan::step() {
  refuse_while_running();
  if (active_ != planned_) {
    build_tables();
    planned_ = active_;
    updated_ = py::list();
    for (int32_t position : active_) updated_.append(parameters_[position].object);
  }
  running_ = true;
  if (!tensors_.empty()) {
    py::gil_scoped_release release;
    build_rows();
    int64_t elements = 0;
    for (const Tensor& tensor : tensors_) elements += tensor.numel;
    for (size_t i = 0; i < batches_.size(); ++i) pending_[i] = batches_[i].n_items + 1;
    Work work{};
    work.tensors = tensors_.data();
    work.chunks = chunks_.data();
    work.items = items_.data();
    work.batches = batches_.data();
    work.pending = batches_.empty() ? nullptr : pending_.data();
    work.rows = rows_.data();
    work.n_items = static_cast<int32_t>(items_.size());
    work.parallel = elements > kParallel;
    work.sums = sums_.data();
    work.projections = projections_.data();
    work.shrink = shrink_.data();
    const CpuLoops& loops = chosen().loops;
    if (rows_.front().hyper.stable) {
      loops.reduce(work);
      apply_mean_square();
    }
    loops.update(work);
  }
  running_ = false;
  for (int32_t position : active_) parameters_[position].gradient = py::none();
  return updated_;
}

}  // namespace wdk
