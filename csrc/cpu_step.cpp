#include "cpu_step.h"

#include <pybind11/pybind11.h>

#include <algorithm>

namespace wdk {

namespace {

// Elements of a batch of tensors, and elements updated between a batch and its second touch: far
// enough for other threads to be done with the batch, near enough for its w~ and a to be in the
// last-level cache, through which the 20 bytes of each element pass.
constexpr int64_t kBatch = 1 << 18;

// Elements of an item, where there are enough for kItems of them: a thread that goes on for a while
// where it is keeps 4% more of the memory's speed than one that jumps about.
constexpr int64_t kItems = 256;
constexpr int64_t kLargestItem = 16 * kChunk;
constexpr int64_t kLargestProjectedItem = 4 * kChunk;  // more than one in a batch

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

}  // namespace

void use_instruction_set(const std::string& name) { chosen() = {name, cpu_loops(name)}; }
std::string instruction_set() { return chosen().name; }

void CpuStep::plan(const std::vector<Tensor>& tensors, bool projected) {
  chunks_.clear();
  first_chunks_.clear();
  items_.clear();
  batches_.clear();

  Batch batch{};            // that is being filled
  std::vector<Item> steps;  // of that batch
  std::vector<Item> touch;  // the second touch of the batch before it
  int64_t batch_elements = 0, all_elements = 0, item_elements = 0;
  for (const Tensor& tensor : tensors) all_elements += tensor.numel;
  const int64_t item =
      std::clamp(all_elements / kItems, kChunk, projected ? kLargestProjectedItem : kLargestItem);

  const auto flush_touch = [&] {
    items_.insert(items_.end(), touch.begin(), touch.end());
    touch.clear();
  };
  const auto close_batch = [&] {
    flush_touch();
    batch.n_items = static_cast<int32_t>(steps.size());
    batches_.push_back(batch);
    batch.first_tensor = batch.last_tensor;
    // Last written, first read: of a large batch the caches hold the end.
    touch.assign(steps.rbegin(), steps.rend());
    for (Item& item : touch) item.second_touch = true;
    steps.clear();
    batch_elements = 0;
  };
  const auto add = [&](const Chunk& chunk) {
    const auto index = static_cast<int32_t>(chunks_.size());
    if (steps.empty() || item_elements + chunk.size > item) {
      if (batch_elements >= kBatch) flush_touch();
      steps.push_back({index, index, static_cast<int32_t>(batches_.size()), false});
      items_.push_back(steps.back());
      item_elements = 0;
    }
    steps.back().last_chunk = items_.back().last_chunk = index + 1;
    chunks_.push_back(chunk);
    item_elements += chunk.size;
    batch_elements += chunk.size;
  };

  for (const Tensor& tensor : tensors) {
    if (projected && batch_elements > 0 && batch_elements + tensor.numel > kBatch) close_batch();
    first_chunks_.push_back(static_cast<int32_t>(chunks_.size()));
    for (int64_t begin = 0; begin < tensor.numel; begin += kChunk)
      add({batch.last_tensor, static_cast<int32_t>(std::min(kChunk, tensor.numel - begin)), begin});
    ++batch.last_tensor;
  }
  first_chunks_.push_back(static_cast<int32_t>(chunks_.size()));
  if (projected) {
    close_batch();
    flush_touch();
  }

  parallel_ = all_elements > kParallel;
  pending_.resize(batches_.size());
  sums_.resize(chunks_.size());
  projections_.resize(chunks_.size());
  shrink_.resize(tensors.size());
}

void CpuStep::run(const std::vector<Tensor>& tensors, const std::vector<Row>& rows, Stream) {
  const pybind11::gil_scoped_release release;
  rows_ = rows;
  for (size_t i = 0; i < batches_.size(); ++i) pending_[i] = batches_[i].n_items + 1;
  CpuWork work{};
  work.tensors = tensors.data();
  work.chunks = chunks_.data();
  work.first_chunks = first_chunks_.data();
  work.items = items_.data();
  work.batches = batches_.data();
  work.pending = batches_.empty() ? nullptr : pending_.data();
  work.rows = rows_.data();
  work.n_items = static_cast<int32_t>(items_.size());
  work.parallel = parallel_;
  work.sums = sums_.data();
  work.projections = projections_.data();
  work.shrink = shrink_.data();

  const CpuLoops& loops = chosen().loops;
  if (rows_.front().hyper.stable) {
    loops.reduce(work);
    apply_mean_square(tensors);
  }
  loops.update(work);
}

// SWD's V, from the chunks' sums. sum(v) obeys the recurrence of v itself, so that a sum over the
// gradient replaces one over v; the maxima of amsgrad have none and were summed as they will be.
void CpuStep::apply_mean_square(const std::vector<Tensor>& tensors) {
  double total = 0;
  int64_t elements = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = tensors[i];
    const Row& row = rows_[tensor.row];
    double sum = 0;
    for (int32_t k = first_chunks_[i]; k < first_chunks_[i + 1]; ++k) sum += sums_[k];
    if (tensor.v_sum) sum = *tensor.v_sum = kept_sum(*tensor.v_sum, sum, 1 - row.hyper.beta2);
    total += sum / row.hyper.bias_correction2(row.t);
    elements += tensor.numel;
  }
  const double mean_square = elements ? total / static_cast<double>(elements) : 0;
  for (Row& row : rows_) row.numbers.decay = stable_decay(row.numbers.decay, mean_square);
}

}  // namespace wdk
