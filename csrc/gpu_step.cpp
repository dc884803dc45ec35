#include "gpu_step.h"

#include <algorithm>
#include <cstring>

#include "tensor.h"

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

// Such that all blocks have equally much to do, in as few rounds as the largest chunk allows.
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

GpuStep::GpuStep(int device, py::object memory) : device_(device), memory_(std::move(memory)) {
  const cuda::OnDevice on(device_);
  resident_blocks_ = cuda::resident_blocks(device_);
}

// ---- the list of tensors -----------------------------------------------------------------------

void GpuStep::plan(const std::vector<Tensor>& tensors, bool projected) {
  lists_.clear();
  chunks_.clear();
  tickets_.clear();
  spans_.assign(tensors.size(), {});
  sent_tensors_.clear();
  tables_ = {};

  int64_t elements = 0;
  for (const Tensor& tensor : tensors) elements += tensor.numel;
  elements_ = static_cast<double>(elements);
  const int64_t chunk = projected ? kSmallestChunk : chunk_for(elements, resident_blocks_);
  for (DType type : {DType::float32, DType::float64}) add_list(type, tensors, chunk, projected);
}

// SPD's tickets: the second touch of a batch stands behind kBatch elements' steps after it, as on
// the CPU. A tensor of one chunk needs none: the block that updates it decides and pulls at once.
void GpuStep::add_list(DType type, const std::vector<Tensor>& tensors, int64_t chunk,
                       bool projected) {
  List list{type, static_cast<int32_t>(chunks_.size()), 0, static_cast<int32_t>(tickets_.size()),
            0};
  std::vector<Ticket> touch;  // of the batch before
  std::vector<Ticket> next;   // of the batch that is being filled
  int64_t batch = 0;          // its elements
  const auto flush = [&] {
    tickets_.insert(tickets_.end(), touch.begin(), touch.end());
    touch.clear();
  };
  const auto close = [&] {
    flush();
    touch.assign(next.rbegin(), next.rend());  // last written, first read
    next.clear();
    batch = 0;
  };

  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = tensors[i];
    if (tensor.type() != type) continue;
    if (projected && batch > 0 && batch + tensor.numel > kBatch) close();
    const auto first = static_cast<int32_t>(chunks_.size());
    for (int64_t begin = 0; begin < tensor.numel; begin += chunk) {
      const int64_t size = std::min(chunk, tensor.numel - begin);
      const auto index = static_cast<int32_t>(chunks_.size());
      chunks_.push_back({static_cast<int32_t>(i), static_cast<int32_t>(size), begin});
      if (!projected) continue;
      if (batch >= kBatch) flush();
      tickets_.push_back({index, false});
      if (tensor.numel > chunk) next.push_back({index, true});
      batch += size;
    }
    spans_[i] = {first, static_cast<int32_t>(chunks_.size()) - first};
  }
  close();
  flush();
  list.last_chunk = static_cast<int32_t>(chunks_.size());
  list.last_ticket = static_cast<int32_t>(tickets_.size());
  if (list.last_chunk > list.first_chunk) lists_.push_back(list);
}

// ---- tables in device memory -------------------------------------------------------------------

GpuStep::Buffer GpuStep::send(std::vector<char>& table, bool capturing) const {
  const auto view = py::memoryview::from_memory(table.data(), static_cast<ssize_t>(table.size()));
  py::object tensor = memory_.attr("send")(view, capturing);
  DLTensor there;
  if (!read(tensor.ptr(), there)) throw std::runtime_error("no device memory for a table");
  return {std::move(tensor), static_cast<char*>(address(there))};
}

GpuStep::Buffer GpuStep::empty(size_t bytes) const {
  py::object tensor = memory_.attr("empty")(bytes);
  DLTensor there;
  if (!read(tensor.ptr(), there)) throw std::runtime_error("no device memory for sums");
  return {std::move(tensor), static_cast<char*>(address(there))};
}

// What lasts as long as the list of tensors; again for another stream, because memory is given out
// and taken back in the order of a stream.
void GpuStep::place_tables(Stream stream) {
  if (tables_.tensor && (stream.capturing || stream.handle == stream_)) return;
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
  const size_t whole = scratch.add<Whole>(1);
  const size_t sums = scratch.add<double[1]>(chunks_.size());
  const size_t totals = scratch.add<double>(spans_.size());
  const size_t projections = scratch.add<double[kProjected]>(tickets_.empty() ? 0 : chunks_.size());
  const size_t shrink = scratch.add<double>(spans_.size());

  Buffer sent = send(tables.bytes, false);
  scratch_ = empty(scratch.bytes.size());
  tables_ = std::move(sent);
  stream_ = stream.handle;
  sent_tensors_.clear();
  sent_rows_.clear();

  work_ = {};
  work_.chunks = at<Chunk>(tables_.data, chunks);
  work_.spans = at<Span>(tables_.data, spans);
  work_.tickets = at<Ticket>(tables_.data, tickets);
  work_.n_tensors = static_cast<int32_t>(spans_.size());
  work_.next_ticket = at<int32_t>(scratch_.data, next_tickets);
  work_.blocks_done = at<int32_t>(scratch_.data, blocks_done);
  work_.done = at<int32_t>(scratch_.data, done);
  work_.decided = at<int32_t>(scratch_.data, decided);
  work_.whole = at<Whole>(scratch_.data, whole);
  work_.sums = at<double[1]>(scratch_.data, sums);
  work_.totals = at<double>(scratch_.data, totals);
  work_.projections = at<double[kProjected]>(scratch_.data, projections);
  work_.shrink = at<double>(scratch_.data, shrink);
  work_.elements = elements_;
}

// Addresses and numbers, by one copy of what changed. A graph copies all of it at every replay, from
// and to memory of its own: other steps may change what stands in ours meanwhile.
void GpuStep::send_changes(const std::vector<Tensor>& tensors, const std::vector<Row>& rows,
                           bool capturing, GpuWork& work) {
  const bool new_tensors = capturing || !same(tensors, sent_tensors_);
  const bool new_rows = capturing || !same(rows, sent_rows_);
  if (new_tensors || new_rows) {
    Tables changes;
    const size_t rows_at = new_rows ? changes.add(rows) : 0;
    const size_t tensors_at = new_tensors ? changes.add(tensors) : 0;
    const Buffer sent = send(changes.bytes, capturing);
    if (new_rows) work.rows = at<Row>(sent.data, rows_at);
    if (new_tensors) work.tensors = at<Tensor>(sent.data, tensors_at);
    if (capturing) {
      memory_.attr("keep")(sent.tensor, tables_.tensor, scratch_.tensor);
      return;
    }
    if (new_rows) rows_buffer_ = sent, sent_rows_ = rows;
    if (new_tensors) tensors_buffer_ = sent, sent_tensors_ = tensors;
  }
  if (rows.front().hyper.counted) {
    Tables all;
    all.add<Row>(rows.size());
    all.add<Tensor>(tensors.size());
    memory_.attr("reserve")(all.bytes.size());
  }
}

// ---- the step ----------------------------------------------------------------------------------

// Where a step is skipped, only the device knows.
bool GpuStep::run(const std::vector<Tensor>& tensors, const std::vector<Row>& rows,
                  const Request& request, Stream stream) {
  const cuda::OnDevice on(device_);
  if (tensors.empty()) {
    if (request.needs_norm() || request.may_skip()) cuda::prepare({}, request, stream.handle);
    return true;
  }
  place_tables(stream);
  GpuWork work = work_;
  send_changes(tensors, rows, stream.capturing, work);
  work.n_rows = static_cast<int32_t>(rows.size());
  if (!stream.capturing) work_ = work;

  Buffer measured;
  if (request.telemetry) {
    measured = empty(std::max<size_t>(chunks_.size(), 1) * sizeof(double[kMeasured]));
    work.measured = at<double[kMeasured]>(measured.data, 0);
  }
  const bool of_the_whole = rows.front().hyper.stable || request.needs_norm() ||
                            request.grad_scale.data || request.found_inf.data;
  if (!of_the_whole) work.whole = nullptr;
  prepare(work, rows, request, stream.handle);
  update(work, stream.handle);
  if (request.telemetry) cuda::tell(work, request.telemetry, stream.handle);
  return true;
}

int32_t GpuStep::blocks_for(int32_t first_chunk, int32_t last_chunk) const {
  return std::min(resident_blocks_, last_chunk - first_chunk);
}

// Numbers that only the device knows.
void GpuStep::prepare(const GpuWork& work, const std::vector<Row>& rows, const Request& request,
                      void* stream) const {
  const bool stable = rows.front().hyper.stable;
  const auto is_counted = [](const Row& row) { return row.step.data != nullptr; };
  if (chunks_.empty() || !(stable || request.needs_norm())) {
    if (work.whole || std::any_of(rows.begin(), rows.end(), is_counted))
      cuda::prepare(work, request, stream);
    return;
  }

  GpuWork all = work;
  all.first_chunk = 0;
  all.last_chunk = static_cast<int32_t>(chunks_.size());
  const auto reduce = [&](Reduction what) {
    cuda::clear(scratch_.data, clear_bytes_, stream);
    cuda::reduce(all, request, what, blocks_for(0, all.last_chunk), stream);
  };
  // The maxima of amsgrad are those of the scaled gradients: with a norm they have to wait for it.
  const bool maxima = stable && std::any_of(rows.begin(), rows.end(),
                                            [](const Row& row) { return row.hyper.is.amsgrad; });
  if (maxima && request.needs_norm()) {
    reduce({true, false, false});
    reduce({false, true, true});
  } else {
    reduce({true, maxima, stable});
  }
}

void GpuStep::update(const GpuWork& work, void* stream) const {
  const bool projected = !tickets_.empty();
  if (projected) cuda::clear(scratch_.data, clear_bytes_, stream);
  for (const List& list : lists_) {
    GpuWork part = work;
    part.type = list.type;
    part.first_chunk = list.first_chunk;
    part.last_chunk = list.last_chunk;
    part.first_ticket = list.first_ticket;
    part.last_ticket = list.last_ticket;
    part.next_ticket += &list - lists_.data();
    const int32_t blocks = blocks_for(list.first_chunk, list.last_chunk);
    projected ? cuda::project(part, blocks, stream) : cuda::update(part, blocks, stream);
  }
}

}  // namespace wdk
