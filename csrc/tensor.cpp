#include "tensor.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace wdk {

namespace {

py::object attribute(const char* name) { return py::module_::import("torch").attr(name); }

const DLPackExchangeAPI* exchange_api() {
  static const DLPackExchangeAPI* api = []() -> const DLPackExchangeAPI* {
    const py::object capsule =
        py::getattr(attribute("Tensor"), "__dlpack_c_exchange_api__", py::none());
    if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
    auto* header = static_cast<DLPackExchangeAPIHeader*>(
        PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    while (header && header->major != dl::kMajorVersion) header = header->prev_api;
    auto* found = reinterpret_cast<const DLPackExchangeAPI*>(header);
    return found && found->dltensor_from_py_object_no_sync ? found : nullptr;
  }();
  return api;
}

// Tensors of torch < 2.10. A type that is not ours keeps 0 bits.
bool read_attributes(py::handle tensor, DLTensor& out) {
  // Kept for the life of the process: the interpreter may be gone when statics are destroyed.
  static const py::handle strided = attribute("strided").release();
  static const std::pair<py::handle, DLDataType> types[] = {
      {attribute("float32").release(), {dl::kFloat, 32, 1}},
      {attribute("float64").release(), {dl::kFloat, 64, 1}},
      {attribute("bfloat16").release(), {dl::kBfloat, 16, 1}},
      {attribute("float16").release(), {dl::kFloat, 16, 1}},
      {attribute("complex64").release(), {dl::kComplex, 64, 1}},
      {attribute("complex128").release(), {dl::kComplex, 128, 1}},
      {attribute("int64").release(), {dl::kInt, 64, 1}}};
  thread_local std::vector<int64_t> shape, strides;

  if (!py::object(tensor.attr("layout")).is(strided)) return false;
  shape.clear();
  strides.clear();
  for (py::handle size : tensor.attr("shape")) shape.push_back(size.cast<int64_t>());
  for (py::handle stride : tensor.attr("stride")()) strides.push_back(stride.cast<int64_t>());
  const py::object type = tensor.attr("dtype");
  const py::object device = tensor.attr("device");
  const std::string kind = device.attr("type").cast<std::string>();
  const py::object index = device.attr("index");

  out = {};
  out.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
  out.device.device_type = kind == "cpu" ? dl::kCPU : kind == "cuda" ? dl::kCUDA : 0;
  out.device.device_id = index.is_none() ? 0 : index.cast<int32_t>();
  out.ndim = static_cast<int32_t>(shape.size());
  for (const auto& [known, code] : types)
    if (type.is(known)) out.dtype = code;
  out.shape = shape.data();
  out.strides = strides.data();
  return true;
}

bool calls_true(PyObject* tensor, PyObject* method) {
  const py::object result =
      py::reinterpret_steal<py::object>(PyObject_CallMethodObjArgs(tensor, method, nullptr));
  if (!result) throw py::error_already_set();
  return result.ptr() == Py_True;
}

// Null where there is none.
py::object optional_attribute(PyObject* object, PyObject* name) {
  PyObject* found = PyObject_GetAttr(object, name);
  if (!found) PyErr_Clear();
  return py::reinterpret_steal<py::object>(found);
}

}  // namespace

bool read(PyObject* tensor, DLTensor& out) {
  if (const DLPackExchangeAPI* api = exchange_api()) {
    if (api->dltensor_from_py_object_no_sync(tensor, &out) == 0) return true;
    PyErr_Clear();
    return false;
  }
  return read_attributes(tensor, out);
}

bool is_lazy(PyObject* tensor, const DLTensor& view) {
  static PyObject* is_conj = PyUnicode_InternFromString("is_conj");
  static PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  // Among torch's public functions only `imag` of a conjugated tensor negates lazily, and its stride is
  // 2: among tensors of one element alone can it be taken for a dense one.
  if (view.dtype.code == dl::kComplex) return calls_true(tensor, is_conj);
  return numel(view) == 1 && calls_true(tensor, is_neg);
}

py::object local_of(PyObject* tensor) {
  static PyObject* name = PyUnicode_InternFromString("_local_tensor");
  return optional_attribute(tensor, name);
}

py::object spec_of(PyObject* tensor) {
  static PyObject* name = PyUnicode_InternFromString("_spec");
  return optional_attribute(tensor, name);
}

int64_t numel(const DLTensor& tensor) {
  int64_t product = 1;
  for (int32_t i = 0; i < tensor.ndim; ++i) product *= tensor.shape[i];
  return product;
}

std::optional<DType> dtype(const DLTensor& tensor) {
  if (tensor.dtype.code == dl::kBfloat && tensor.dtype.bits == 16) return DType::bfloat16;
  if (tensor.dtype.code == dl::kFloat && tensor.dtype.bits == 16) return DType::float16;
  const int reals = tensor.dtype.code == dl::kComplex ? 2 : 1;
  if (tensor.dtype.code != dl::kFloat && tensor.dtype.code != dl::kComplex) return std::nullopt;
  if (tensor.dtype.bits == 32 * reals) return DType::float32;
  if (tensor.dtype.bits == 64 * reals) return DType::float64;
  return std::nullopt;
}

Layout::Layout(const DLTensor& t)
    : data_(address(t)),
      elements_(numel(t) * (t.dtype.code == dl::kComplex ? 2 : 1)),
      device_(t.device),
      type_(t.dtype),
      shape_(t.shape, t.shape + t.ndim),
      strides_(t.strides, t.strides + t.ndim) {
  const auto known = wdk::dtype(t);
  if (!known) throw std::invalid_argument("tensor of a type this backend does not know");
  dtype_ = *known;
}

bool Layout::operator==(const DLTensor& t) const {
  return data_ == address(t) && (data_ || elements_ == 0) && same_order(t);
}

bool Layout::same_order(const DLTensor& t) const {
  return t.dtype.code == type_.code && t.dtype.bits == type_.bits && same_elements(t);
}

bool Layout::same_elements(const DLTensor& t) const {
  if ((t.dtype.code == dl::kComplex) != (type_.code == dl::kComplex) ||
      t.device.device_type != device_.device_type || t.device.device_id != device_.device_id ||
      t.ndim != static_cast<int32_t>(shape_.size()) ||
      !std::equal(shape_.begin(), shape_.end(), t.shape))
    return false;
  for (int32_t i = 0; i < t.ndim; ++i)
    if (strides_[i] != t.strides[i] && shape_[i] > 1) return elements_ == 0;
  return true;
}

}  // namespace wdk
