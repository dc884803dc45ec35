// Reading torch tensors from C++ without torch's headers.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <vector>

#include "dlpack.h"
#include "dtype.h"

namespace wdk {

namespace py = pybind11;

// Describes a torch tensor for the duration of the GIL; shape and strides belong to the tensor, or
// to this thread until the next call. False where the tensor has no strided memory (sparse, fake).
//
// torch >= 2.10 fills the structure through its C exchange table in about 45 ns; an older one is
// asked through its Python methods.
bool read(PyObject* tensor, DLTensor& out);

// True where the numbers in memory are not yet the tensor's values: a lazily conjugated or negated
// view. Neither shows in DLPack.
bool is_lazy(PyObject* tensor, const DLTensor& view);

// A DTensor has no memory itself: its numbers are those of its local tensor, and how the whole is
// spread over a mesh of devices stands in its spec. Null of an ordinary tensor.
py::object local_of(PyObject* tensor);
py::object spec_of(PyObject* tensor);

int64_t numel(const DLTensor& tensor);

inline void* address(const DLTensor& tensor) {
  return static_cast<char*>(tensor.data) + tensor.byte_offset;
}

// The storage type of a floating-point or complex tensor; nothing for one the loops do not know.
std::optional<DType> dtype(const DLTensor& tensor);

// What must not have changed since a tensor was last looked at. A pointer alone would not do:
// allocators hand the same address out again.
class Layout {
 public:
  Layout() = default;
  explicit Layout(const DLTensor& tensor);

  // Never of a tensor whose memory has been given back.
  bool operator==(const DLTensor& tensor) const;

  // Same element at the same offset: strides of dimensions of one element do not count.
  bool same_order(const DLTensor& tensor) const;

  // The same of a tensor that may be of another type.
  bool same_elements(const DLTensor& tensor) const;

  void* data() const { return data_; }
  int64_t elements() const { return elements_; }  // reals: twice the numel of a complex tensor
  DType dtype() const { return dtype_; }

 private:
  void* data_ = nullptr;
  int64_t elements_ = 0;
  DType dtype_ = DType::float32;
  DLDevice device_{};
  DLDataType type_{};
  std::vector<int64_t> shape_, strides_;  // as DLPack gave them
};

}  // namespace wdk
