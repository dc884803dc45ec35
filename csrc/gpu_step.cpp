#include "gpu_step.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "touches.h"

namespace wdk {

namespace {

// Elements of a chunk. SPD's are small, because what is between a step and its second touch must fit
// the L2 cache.
constexpr int64_t kLargestChunk = 16384;
constexpr int64_t kSmallestChunk = 2048;
constexpr int64_t kGranule = 512;  // what a block takes at once

// Elements of a batch of SPD's tensors, and elements updated before its second touch: more than the
// device has at work at a time, and their 20 bytes each less than its L2 cache holds.
constexpr int64_t kBatch = 1 << 20;

// A chunk's elements, such that all blocks have equally much to do, in as few rounds as the largest
// chunk allows.
int64_t chunk_for(int64_t elements, int64_t blocks) {
  const auto ceil = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t rounds = std::max<int64_t>(ceil(elements, blocks * kLargestChunk), 1);
  return std::max(ceil(ceil(elements, blocks * rounds), kGranule) * kGranule, kSmallestChunk);
}

// Appends tables to a run of bytes, each where 16-byte accesses may find it.
class Tables {
 public:
  template <class T>
  size_t add(const std::vector<T>& table) {
    const size_t offset = add<T>(table.size());
    if (!table.empty()) std::memcpy(bytes.data() + offset, table.data(), table.size() * sizeof(T));
    return offset;
  }

  template <class T>
  size_t add(size_t count) {
    const size_t offset = bytes.size();
    bytes.resize((offset + count * sizeof(T) + 15) / 16 * 16);
    return offset;
  }

  std::vector<char> bytes;
};

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

template <class T>
T* at(char* data, size_t offset) {
  return reinterpret_cast<T*>(data + offset);
}

}  // namespace

GpuStep::GpuStep(int device, std::unique_ptr<DeviceMemory> memory)
    : device_(device), memory_(std::move(memory)) {
  const cuda::OnDevice on(device_);
  resident_blocks_ = cuda::resident_blocks(device_);
}

// ---- the list of tensors -----------------------------------------------------------------------

void GpuStep::set_tensors(const std::vector<Tensor>& tensors, bool projected) {
  lists_.clear();
  chunks_.clear();
  tickets_.clear();
  spans_.assign(tensors.size(), {});
  sent_tensors_.clear();
  tables_ = {};

  int64_t elements = 0, total = 0;
  without_elements_ = false;
  for (const Tensor& tensor : tensors) {
    elements += tensor.numel;
    total += tensor.total;
    without_elements_ |= tensor.numel == 0;
  }
  total_ = static_cast<double>(total);
  const int64_t chunk = projected ? kSmallestChunk : chunk_for(elements, resident_blocks_);
  for (DType type : {DType::float32, DType::float64}) add_list(type, tensors, chunk, projected);
}

// A tensor of one chunk has no second touch: the block that updates it decides and pulls at once.
void GpuStep::add_list(DType type, const std::vector<Tensor>& tensors, int64_t chunk,
                       bool projected) {
  List list{type, static_cast<int32_t>(chunks_.size()), 0, static_cast<int32_t>(tickets_.size()),
            0};
  Touches<Ticket> touches(tickets_, kBatch);
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = tensors[i];
    if (tensor.type() != type) continue;
    if (projected && touches.full(tensor.numel)) touches.close_batch();
    const auto first = static_cast<int32_t>(chunks_.size());
    for (int64_t begin = 0; begin < tensor.numel; begin += chunk) {
      const int64_t size = std::min(chunk, tensor.numel - begin);
      const auto index = static_cast<int32_t>(chunks_.size());
      chunks_.push_back({static_cast<int32_t>(i), static_cast<int32_t>(size), begin});
      if (!projected) continue;
      touches.add_step({index, false}, tensor.numel > chunk);
      touches.add_elements(size);
    }
    spans_[i] = {first, static_cast<int32_t>(chunks_.size()) - first};
  }
  touches.finish();
  list.last_chunk = static_cast<int32_t>(chunks_.size());
  list.last_ticket = static_cast<int32_t>(tickets_.size());
  if (list.last_chunk > list.first_chunk) lists_.push_back(list);
}

// ---- tables in device memory -------------------------------------------------------------------

// What lasts as long as the list of tensors; again for another stream, because memory is given out
// and taken back in the order of a stream.
void GpuStep::make_tables(Stream stream) {
  if (tables_.data && (stream.capturing || stream.handle == stream_)) return;
  if (stream.capturing)
    throw std::runtime_error(
        "a CUDA graph is being captured, which a step can only join after steps outside of it, of "
        "the same parameters");

  Tables tables;
  const size_t chunks = tables.add(chunks_), spans = tables.add(spans_);
  const size_t tickets = tables.add(tickets_);
  Tables scratch;
  const size_t next_tickets = scratch.add<int32_t>(lists_.size());
  const size_t blocks_done = scratch.add<int32_t>(1);
  const size_t done = scratch.add<int32_t>(spans_.size());
  const size_t decided = scratch.add<int32_t>(spans_.size());
  clear_bytes_ = scratch.bytes.size();
  const size_t decision = scratch.add<Decision>(1);
  const size_t chunk_sums = scratch.add<double[kSums]>(chunks_.size());
  const size_t shrink = scratch.add<double>(tickets_.empty() ? 0 : spans_.size());

  Buffer sent = memory_->send(tables.bytes, false);
  scratch_ = memory_->empty(scratch.bytes.size());
  tables_ = std::move(sent);
  stream_ = stream.handle;
  sent_tensors_.clear();
  sent_rows_.clear();

  known_ = {};
  known_.chunks = at<Chunk>(tables_.data, chunks);
  known_.spans = at<Span>(tables_.data, spans);
  known_.tickets = at<Ticket>(tables_.data, tickets);
  known_.n_tensors = static_cast<int32_t>(spans_.size());
  known_.total = total_;
  known_.next_ticket = at<int32_t>(scratch_.data, next_tickets);
  known_.blocks_done = at<int32_t>(scratch_.data, blocks_done);
  known_.done = at<int32_t>(scratch_.data, done);
  known_.decided = at<int32_t>(scratch_.data, decided);
  known_.decision = at<Decision>(scratch_.data, decision);
  known_.chunk_sums = at<double[kSums]>(scratch_.data, chunk_sums);
  known_.shrink = at<double>(scratch_.data, shrink);
}

// Addresses and numbers, by one copy of what changed. A graph copies all of it at every replay, from
// and to memory of its own: other steps may change what stands in ours meanwhile.
void GpuStep::send_changes(const StepInput& input) {
  const bool capturing = input.stream.capturing;
  const bool new_tensors = capturing || !same(input.tensors, sent_tensors_);
  const bool new_rows = capturing || !same(input.rows, sent_rows_);
  work_ = known_;
  if (new_tensors || new_rows) {
    Tables changes;
    const size_t rows = new_rows ? changes.add(input.rows) : 0;
    const size_t tensors = new_tensors ? changes.add(input.tensors) : 0;
    const Buffer sent = memory_->send(changes.bytes, capturing);
    if (new_rows) work_.rows = at<Row>(sent.data, rows);
    if (new_tensors) work_.tensors = at<Tensor>(sent.data, tensors);
    if (capturing) return memory_->keep({sent, tables_, scratch_});
    if (new_rows) rows_buffer_ = sent, sent_rows_ = input.rows;
    if (new_tensors) tensors_buffer_ = sent, sent_tensors_ = input.tensors;
    known_ = work_;
  }
  if (input.rows.front().options.counted_on_device) {
    Tables all;
    all.add<Row>(input.rows.size());
    all.add<Tensor>(input.tensors.size());
    memory_->reserve(all.bytes.size());
  }
}

// ---- phases ------------------------------------------------------------------------------------

void GpuStep::begin(const StepInput& input) {
  const cuda::OnDevice on(device_);
  input_.emplace(input);
  work_ = {};
  if (input.tensors.empty()) return;
  make_tables(input.stream);
  send_changes(input);
  work_.n_rows = static_cast<int32_t>(input.rows.size());
  work_.measured = input.request.telemetry != nullptr;
  work_.sums = input.sums;
  const Request& request = input.request;
  if (!(input.swd() || request.needs_norm() || request.grad_scale.data || request.found_inf.data))
    work_.decision = nullptr;
  // No chunk of theirs will write them.
  if (without_elements_ && input.sums)
    cuda::clear(input.sums, input.tensors.size() * sizeof(double[kSums]), input.stream.handle);
}

// Telemetry asks for squares too; a launch takes either these or the maxima of a tensor.
void GpuStep::reduce(int round) {
  const cuda::OnDevice on(device_);
  const bool first = round == 0, last = round + 1 == rounds(*input_);
  const bool squares = first && input_->needs_squares(), maxima = last && input_->needs_maxima();
  const bool both = work_.measured && squares && maxima;
  if (both) launch_reduce({first, true, false, false}, false);
  launch_reduce({first, squares && !both, maxima, false}, false);
}

// Where a step is skipped, only the device knows.
bool GpuStep::decide(int round) {
  const cuda::OnDevice on(device_);
  const bool last = round + 1 >= rounds(*input_);
  launch_decide({round == 0, false, false, input_->swd() && last});
  return true;
}

void GpuStep::update() {
  const cuda::OnDevice on(device_);
  launch_update(Touch::first);
  launch_tell(true, nullptr);
}

void GpuStep::finish() {
  const cuda::OnDevice on(device_);
  if (input_->projected()) launch_update(Touch::second);
  launch_tell(false, input_->request.telemetry);
}

// The last block of a sum decides, and second touches follow their steps.
bool GpuStep::run(const StepInput& input) {
  begin(input);
  const cuda::OnDevice on(device_);
  const bool norm = input.request.needs_norm(), swd = input.swd(), maxima = input.needs_maxima();
  if (norm && maxima) {
    launch_reduce({true, true, false, false}, true);
    launch_reduce({false, false, true, true}, true);
  } else if (norm || swd) {
    launch_reduce({true, true, maxima, swd}, true);
  } else {
    launch_decide({true, false, false, false});
  }
  launch_update(Touch::both);
  launch_tell(true, input.request.telemetry);
  return true;
}

// ---- launches ----------------------------------------------------------------------------------

int32_t GpuStep::blocks_for(int32_t first_chunk, int32_t last_chunk) const {
  return std::min(resident_blocks_, last_chunk - first_chunk);
}

void GpuStep::launch_reduce(Round round, bool decides) const {
  if (chunks_.empty()) {
    if (decides) launch_decide(round);
    return;
  }
  GpuWork all = work_;
  all.first_chunk = 0;
  all.last_chunk = static_cast<int32_t>(chunks_.size());
  void* const stream = input_->stream.handle;
  cuda::clear(scratch_.data, clear_bytes_, stream);
  cuda::reduce(all, input_->request, round, decides, blocks_for(0, all.last_chunk), stream);
}

void GpuStep::launch_decide(Round round) const {
  const Request& request = input_->request;
  const auto is_counted = [](const Row& row) { return row.step.data != nullptr; };
  const bool asked =
      input_->tensors.empty()
          ? request.needs_norm() || request.may_skip()
          : work_.decision || std::any_of(input_->rows.begin(), input_->rows.end(), is_counted);
  if (asked) cuda::decide(work_, request, round, input_->stream.handle);
}

void GpuStep::launch_update(Touch touch) const {
  void* const stream = input_->stream.handle;
  if (input_->projected()) cuda::clear(scratch_.data, clear_bytes_, stream);
  for (const List& list : lists_) {
    GpuWork part = work_;
    part.type = list.type;
    part.first_chunk = list.first_chunk;
    part.last_chunk = list.last_chunk;
    part.first_ticket = list.first_ticket;
    part.last_ticket = list.last_ticket;
    part.next_ticket += &list - lists_.data();
    const int32_t blocks = blocks_for(list.first_chunk, list.last_chunk);
    if (input_->projected())
      cuda::project(part, touch, blocks, stream);
    else
      cuda::update(part, blocks, stream);
  }
}

void GpuStep::launch_tell(bool add_up, double* rows) const {
  if (work_.measured && work_.n_tensors) cuda::tell(work_, add_up, rows, input_->stream.handle);
}

}  // namespace wdk
