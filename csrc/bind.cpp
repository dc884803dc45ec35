// Table of contents of wdkernels._C.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>
#include <tuple>
#include <type_traits>

#include "cpu.h"
#include "cpu_step.h"
#ifdef WDK_CUDA
#include "cuda_kernels.h"
#endif
#include "plan.h"

namespace py = pybind11;
using namespace wdk;

// A 0-d tensor that is read where it stands; or None.
static Number number(const py::object& tensor) {
  if (tensor.is_none()) return {};
  DLTensor view;
  if (!read(tensor.ptr(), view) || numel(view) != 1 || !dtype(view))
    throw std::invalid_argument("not a tensor of one floating-point number");
  return {address(view), *dtype(view)};
}

// Where a tensor's numbers, of this type, are to be written; or nowhere, for None.
template <class T>
static T* numbers(const py::object& tensor) {
  DLTensor view;
  if (tensor.is_none()) return nullptr;
  const uint8_t code = std::is_integral_v<T> ? dl::kInt : dl::kFloat;
  if (!read(tensor.ptr(), view) || view.dtype.code != code || view.dtype.bits != 8 * sizeof(T))
    throw std::invalid_argument("not a tensor of the type that a step writes");
  return static_cast<T*>(address(view));
}

// The value of an enumeration whose names stand in this order.
template <class Value, size_t count>
static Value named(const char* const (&names)[count], const std::string& name) {
  const auto found = std::find(std::begin(names), std::end(names), name);
  if (found == std::end(names)) throw std::invalid_argument("there is no '" + name + "'");
  return static_cast<Value>(found - names);
}

// A schedule, as a product of two: the kind, start, end and steps of each.
using Factor = std::tuple<std::string, double, double, double>;
static void set_schedule(ScheduleFactor (&schedule)[2], const std::array<Factor, 2>& factors) {
  for (size_t i = 0; i < 2; ++i) {
    const auto& [kind, start, end, steps] = factors[i];
    schedule[i] = {named<ScheduleFactor::Kind>(kScheduleKindNames, kind), start, end, steps};
  }
}

// A property that Python only sets.
template <class Class, class Setter>
static void def_setter(Class& type, const char* name, Setter setter) {
  type.def_property(name, py::cpp_function(), setter);
}

// Lets Python's garbage collector see what a plan refers to.
static void collectable(PyHeapTypeObject* heap_type) {
  PyTypeObject& type = heap_type->ht_type;
  type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    if (!py::detail::is_holder_constructed(self)) return 0;
    return py::cast<Plan&>(py::handle(self)).traverse(visit, arg);
  };
  type.tp_clear = [](PyObject* self) {
    if (py::detail::is_holder_constructed(self)) py::cast<Plan&>(py::handle(self)).clear();
    return 0;
  };
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Fused optimizer steps. Use it through the optimizers of wdkernels.";

  py::class_<GroupOptions> options(m, "GroupOptions");
  options.def(py::init())
      .def_readwrite("swd", &GroupOptions::swd)
      .def_readwrite("cautious", &GroupOptions::cautious)
      .def_readwrite("maximize", &GroupOptions::maximize)
      .def_readwrite("lr", &GroupOptions::lr)
      .def_readwrite("lr_max", &GroupOptions::lr_max)
      .def_readwrite("beta1", &GroupOptions::beta1)
      .def_readwrite("beta2", &GroupOptions::beta2)
      .def_readwrite("eps", &GroupOptions::eps)
      .def_readwrite("weight_decay", &GroupOptions::weight_decay)
      .def_readwrite("seed", &GroupOptions::seed)
      .def_readwrite("ema_decay", &GroupOptions::ema_decay)
      .def_readwrite("counted_on_device", &GroupOptions::counted_on_device);
  def_setter(options, "decay", [](GroupOptions& o, const std::string& name) {
    o.decay = named<Decay>(kDecayNames, name);
  });
  def_setter(options, "decay_scale", [](GroupOptions& o, const std::string& name) {
    o.decay_scale = named<DecayScale>(kDecayScaleNames, name);
  });
  def_setter(options, "decay_schedule", [](GroupOptions& o, const std::array<Factor, 2>& factors) {
    set_schedule(o.decay_schedule, factors);
  });
  def_setter(options, "ema_schedule", [](GroupOptions& o, const std::array<Factor, 2>& factors) {
    set_schedule(o.ema_schedule, factors);
  });
  def_setter(options, "device_lr",
             [](GroupOptions& o, const py::object& x) { o.device_lr = number(x); });
  def_setter(options, "device_weight_decay",
             [](GroupOptions& o, const py::object& x) { o.device_weight_decay = number(x); });

  py::class_<Request> request(m, "Request");
  request.def(py::init())
      .def_readwrite("max_grad_norm", &Request::max_grad_norm)
      .def_readwrite("skip_nonfinite", &Request::skip_nonfinite);
  def_setter(request, "grad_scale",
             [](Request& r, const py::object& x) { r.grad_scale = number(x); });
  def_setter(request, "found_inf",
             [](Request& r, const py::object& x) { r.found_inf = number(x); });
  def_setter(request, "whole", [](Request& r, const py::object& x) {
    r.whole = reinterpret_cast<const Whole*>(numbers<double>(x));
  });
  def_setter(request, "grad_norm",
             [](Request& r, const py::object& x) { r.grad_norm = numbers<double>(x); });
  def_setter(request, "skipped",
             [](Request& r, const py::object& x) { r.skipped = numbers<int64_t>(x); });
  def_setter(request, "telemetry",
             [](Request& r, const py::object& x) { r.telemetry = numbers<double>(x); });

  py::class_<Gathered>(m, "Gathered")
      .def("__len__", &Gathered::size)
      .def_property_readonly("irregular", &Gathered::irregular)
      .def("set_gradient", &Gathered::set_gradient, py::arg("position"), py::arg("gradient"));

  using Numbers = std::tuple<int64_t, int64_t, int64_t>;
  py::class_<Plan>(m, "Plan", py::custom_type_setup(collectable))
      .def(py::init<py::dict, py::list, int32_t, py::object>(), py::kw_only(), py::arg("state"),
           py::arg("groups"), py::arg("device"), py::arg("memory"))
      .def(
          "add_parameter",
          [](Plan& plan, py::object parameter, const py::object& weight, py::object state,
             const py::dict& streams, const std::string& storage, int32_t group, uint32_t index,
             int64_t total, const Numbers& numbering) {
            const auto& [first, run, pitch] = numbering;
            plan.add_parameter(parameter, weight, std::move(state), streams,
                               named<Storage>(kStorageNames, storage), group, index, total,
                               {static_cast<uint32_t>(first), run, pitch});
          },
          py::kw_only(), py::arg("parameter"), py::arg("weight"), py::arg("state"),
          py::arg("streams"), py::arg("storage"), py::arg("group"), py::arg("index"),
          py::arg("total"), py::arg("numbering"))
      .def("set_options", &Plan::set_options, py::arg("group"), py::arg("options"))
      .def("set_number", &Plan::set_number, py::arg("group"), py::arg("name"), py::arg("value"))
      .def("gather", &Plan::gather, py::arg("state"), py::arg("groups"), py::keep_alive<0, 1>())
      .def(
          "step",
          [](Plan& plan, Gathered& gathered, const Request& request, const py::object& sums,
             uintptr_t stream, bool capturing) {
            return plan.step(gathered, request, sums, {reinterpret_cast<void*>(stream), capturing});
          },
          py::arg("gathered"), py::arg("request"), py::arg("sums"), py::arg("stream"),
          py::arg("capturing"))
      .def(
          "begin",
          [](Plan& plan, Gathered& gathered, const Request& request, const py::object& sums,
             uintptr_t stream, bool capturing) {
            return plan.begin(gathered, request, sums,
                              {reinterpret_cast<void*>(stream), capturing});
          },
          py::arg("gathered"), py::arg("request"), py::arg("sums"), py::arg("stream"),
          py::arg("capturing"))
      .def("reduce", &Plan::reduce, py::arg("round"))
      .def("decide", &Plan::decide, py::arg("round"))
      .def("update", &Plan::update)
      .def("finish", &Plan::finish)
      .def("end", &Plan::end);

  m.def("instruction_sets", &instruction_sets, "What this build has and this processor runs.");
  m.def("instruction_set", &instruction_set, "The one in use.");
  m.def("use_instruction_set", &use_instruction_set, py::arg("name"));

#ifdef WDK_CUDA
  m.def("cuda", [] { return py::make_tuple(cuda::toolkit(), cuda::architectures()); });
  m.def("cuda_refusal", &cuda::refusal, py::arg("device"));
#else
  m.def("cuda", [] { return py::none(); }, "The CUDA toolkit (13000: 13.0) and chips it is for.");
  m.def(
      "cuda_refusal", [](int) { return "this build has no CUDA"; }, py::arg("device"),
      "Why this build cannot run on a GPU; empty if it can.");
#endif
}
