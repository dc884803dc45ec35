// A step on a GPU: tables in device memory, refreshed where something changed, and the launches.
#pragma once

#include <pybind11/pybind11.h>

#include "cuda_kernels.h"
#include "step.h"

namespace wdk {

namespace py = pybind11;

// Memory comes from torch, through a wdkernels.device_memory.DeviceMemory: it belongs to the stream
// that is current when it is made.
class GpuStep : public Step {
 public:
  GpuStep(int device, py::object memory);

  void plan(const std::vector<Tensor>& tensors, bool projected) override;
  bool run(const std::vector<Tensor>& tensors, const std::vector<Row>& rows, const Request& request,
           Stream stream) override;

 private:
  // Tensors that are computed in one type, which share a launch.
  struct List {
    DType type;
    int32_t first_chunk, last_chunk;
    int32_t first_ticket, last_ticket;
  };

  // A tensor of bytes on the device.
  struct Buffer {
    py::object tensor;
    char* data = nullptr;
  };

  void add_list(DType type, const std::vector<Tensor>& tensors, int64_t chunk, bool projected);
  Buffer send(std::vector<char>& table, bool capturing) const;
  Buffer empty(size_t bytes) const;
  void place_tables(Stream stream);
  void send_changes(const std::vector<Tensor>& tensors, const std::vector<Row>& rows,
                    bool capturing, GpuWork& work);
  int32_t blocks_for(int32_t first_chunk, int32_t last_chunk) const;
  void prepare(const GpuWork& work, const std::vector<Row>& rows, const Request& request,
               void* stream) const;
  void update(const GpuWork& work, void* stream) const;

  int device_;
  py::object memory_;
  int resident_blocks_;

  // Of the list of tensors, on the host.
  std::vector<List> lists_;
  std::vector<Chunk> chunks_;
  std::vector<Span> spans_;
  std::vector<Ticket> tickets_;
  double elements_ = 0;

  // On the device, for the steps of one stream.
  void* stream_ = nullptr;
  Buffer tables_, scratch_, tensors_buffer_, rows_buffer_;
  size_t clear_bytes_ = 0;
  GpuWork work_{};
  std::vector<Tensor> sent_tensors_;  // what stands there
  std::vector<Row> sent_rows_;
};

}  // namespace wdk
