#include "torch_memory.h"

#include <stdexcept>

#include "tensor.h"

namespace wdk {

namespace {

class TorchMemory : public DeviceMemory {
 public:
  explicit TorchMemory(py::object memory) : memory_(std::move(memory)) {}

  Buffer send(std::vector<char>& bytes, bool capturing) override {
    const auto size = static_cast<ssize_t>(bytes.size());
    return buffer(memory_.attr("send")(py::memoryview::from_memory(bytes.data(), size), capturing));
  }

  Buffer empty(size_t bytes) override { return buffer(memory_.attr("empty")(bytes)); }

  void reserve(size_t bytes) override { memory_.attr("reserve")(bytes); }

  void keep(const std::vector<Buffer>& buffers) override {
    for (const Buffer& each : buffers)
      memory_.attr("keep")(*static_cast<const py::object*>(each.owner.get()));
  }

 private:
  static Buffer buffer(py::object tensor) {
    DLTensor there;
    if (!read(tensor.ptr(), there)) throw std::runtime_error("no device memory for a table");
    return {std::make_shared<py::object>(std::move(tensor)), static_cast<char*>(address(there))};
  }

  py::object memory_;
};

}  // namespace

std::unique_ptr<DeviceMemory> torch_memory(py::object memory) {
  return std::make_unique<TorchMemory>(std::move(memory));
}

}  // namespace wdk
