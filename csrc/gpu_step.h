// A step on a GPU: tables in device memory, refreshed where something changed, and the launches.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "cuda_kernels.h"
#include "step.h"

namespace wdk {

// Device memory, and who keeps it.
struct Buffer {
  std::shared_ptr<void> owner;
  char* data = nullptr;
};

// Where it comes from: torch's allocators (torch_memory.h). It belongs to the stream that is current
// when it is made.
class DeviceMemory {
 public:
  virtual ~DeviceMemory() = default;

  // A copy of these bytes, which is made asynchronously. A graph that is being captured repeats the
  // copy, from memory that `reserve` has set aside.
  virtual Buffer send(std::vector<char>& bytes, bool capturing) = 0;
  virtual Buffer empty(size_t bytes) = 0;
  virtual void reserve(size_t bytes) = 0;
  virtual void keep(const std::vector<Buffer>& buffers) = 0;  // for the life of the process
};

class GpuStep : public Step {
 public:
  GpuStep(int device, std::unique_ptr<DeviceMemory> memory);

  void set_tensors(const std::vector<Tensor>& tensors, bool projected) override;

  void begin(const StepInput& input) override;
  void reduce(int round) override;
  bool decide(int round) override;
  void update() override;
  void finish() override;
  bool run(const StepInput& input) override;

 private:
  // Tensors that are computed in one type, which share a launch.
  struct List {
    DType type;
    int32_t first_chunk, last_chunk;
    int32_t first_ticket, last_ticket;
  };

  void add_list(DType type, const std::vector<Tensor>& tensors, int64_t chunk, bool projected);
  void make_tables(Stream stream);
  void send_changes(const StepInput& input);
  int32_t blocks_for(int32_t first_chunk, int32_t last_chunk) const;
  void launch_reduce(Round round, bool decides) const;
  void launch_decide(Round round) const;
  void launch_update(Touch touch) const;
  void launch_tell(bool add_up, double* rows) const;

  int device_;
  std::unique_ptr<DeviceMemory> memory_;
  int resident_blocks_;

  // The list of tensors, as the host sees it.
  std::vector<List> lists_;
  std::vector<Chunk> chunks_;
  std::vector<Span> spans_;
  std::vector<Ticket> tickets_;
  double total_ = 0;
  bool without_elements_ = false;  // some tensor has none here

  // On the device, for the steps of one stream.
  void* stream_ = nullptr;
  Buffer tables_, scratch_, tensors_buffer_, rows_buffer_;
  size_t clear_bytes_ = 0;
  GpuWork known_{};
  std::vector<Tensor> sent_tensors_;  // what stands there
  std::vector<Row> sent_rows_;

  // The step that is being taken.
  std::optional<StepInput> input_;
  GpuWork work_{};
};

}  // namespace wdk
