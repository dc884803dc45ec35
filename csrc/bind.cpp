// Table of contents of wdkernels._C.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
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

using Schedules = std::array<Schedule, 2>;

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

  py::enum_<Decay>(m, "Decay")
      .value("l2", Decay::l2)
      .value("unmixed", Decay::unmixed)
      .value("decoupled", Decay::decoupled)
      .value("projection", Decay::projection);

  py::enum_<DecayScale>(m, "DecayScale")
      .value("lr", DecayScale::lr)
      .value("relative_lr", DecayScale::relative_lr)
      .value("corrected", DecayScale::corrected);

  py::enum_<Schedule::Kind>(m, "ScheduleKind")
      .value("constant", Schedule::Kind::constant)
      .value("window", Schedule::Kind::window)
      .value("linear", Schedule::Kind::linear)
      .value("cosine", Schedule::Kind::cosine);

  py::class_<Schedule>(m, "Schedule")
      .def(py::init<Schedule::Kind, double, double, double>(), py::kw_only(), py::arg("kind"),
           py::arg("start"), py::arg("end"), py::arg("steps"));

  py::enum_<Rounding>(m, "Rounding")
      .value("nearest", Rounding::nearest)
      .value("stochastic", Rounding::stochastic)
      .value("kahan", Rounding::kahan);

  py::class_<Hyper>(m, "Hyper")
      .def(py::init([](Decay decay, bool stable, bool anchored, bool amsgrad, bool cautious,
                       bool maximize, double lr, double lr_max, double beta1, double beta2,
                       double eps, double weight_decay, DecayScale decay_scale,
                       const Schedules& schedule, Rounding rounding, bool master, uint32_t seed,
                       bool averaged, double ema_decay, const Schedules& ema_schedule, bool counted,
                       const py::object& live_lr, const py::object& live_weight_decay) {
             Hyper h;
             h.is = {decay, anchored, amsgrad, cautious};
             h.stable = stable;
             h.maximize = maximize;
             h.lr = lr;
             h.lr_max = lr_max;
             h.beta1 = beta1;
             h.beta2 = beta2;
             h.eps = eps;
             h.weight_decay = weight_decay;
             h.decay_scale = decay_scale;
             std::copy(schedule.begin(), schedule.end(), h.schedule);
             h.rounding = rounding;
             h.master = master;
             h.seed = seed;
             h.averaged = averaged;
             h.ema_decay = ema_decay;
             std::copy(ema_schedule.begin(), ema_schedule.end(), h.ema_schedule);
             h.counted = counted;
             h.live_lr = number(live_lr);
             h.live_weight_decay = number(live_weight_decay);
             return h;
           }),
           py::kw_only(), py::arg("decay"), py::arg("stable"), py::arg("anchored"),
           py::arg("amsgrad"), py::arg("cautious"), py::arg("maximize"), py::arg("lr"),
           py::arg("lr_max"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
           py::arg("weight_decay"), py::arg("decay_scale"), py::arg("schedule"),
           py::arg("rounding"), py::arg("master"), py::arg("seed"), py::arg("averaged"),
           py::arg("ema_decay"), py::arg("ema_schedule"), py::arg("counted"), py::arg("live_lr"),
           py::arg("live_weight_decay"));

  py::class_<Request>(m, "Request")
      .def(py::init([](const py::object& grad_scale, const py::object& found_inf, double max_norm,
                       bool skip_nonfinite, const py::object& grad_norm, const py::object& skipped,
                       const py::object& telemetry) {
             Request r;
             r.grad_scale = number(grad_scale);
             r.found_inf = number(found_inf);
             r.max_norm = max_norm;
             r.skip_nonfinite = skip_nonfinite;
             r.grad_norm = numbers<double>(grad_norm);
             r.skipped = numbers<int64_t>(skipped);
             r.telemetry = numbers<double>(telemetry);
             return r;
           }),
           py::kw_only(), py::arg("grad_scale"), py::arg("found_inf"), py::arg("max_norm"),
           py::arg("skip_nonfinite"), py::arg("grad_norm"), py::arg("skipped"),
           py::arg("telemetry"));

  py::class_<Plan>(m, "Plan", py::custom_type_setup(collectable))
      .def(py::init<py::dict, py::list, int32_t, py::object>(), py::kw_only(), py::arg("state"),
           py::arg("groups"), py::arg("device"), py::arg("memory"))
      .def("add_parameter", &Plan::add_parameter, py::kw_only(), py::arg("parameter"),
           py::arg("weight"), py::arg("state"), py::arg("group"), py::arg("index"))
      .def("set_hyper", &Plan::set_hyper, py::arg("group"), py::arg("hyper"))
      .def("gather", &Plan::gather, py::arg("state"), py::arg("groups"))
      .def("set_gradient", &Plan::set_gradient, py::arg("position"), py::arg("gradient"))
      .def(
          "step",
          [](Plan& plan, const Request& request, uintptr_t stream, bool capturing) {
            return plan.step(request, {reinterpret_cast<void*>(stream), capturing});
          },
          py::kw_only(), py::arg("request"), py::arg("stream"), py::arg("capturing"));

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
