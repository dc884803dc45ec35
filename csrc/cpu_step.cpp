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
  squares_.resize(tensors.size());
  projections_.resize(chunks_.size());
  shrink_.resize(tensors.size());
}

// ---- the step ----------------------------------------------------------------------------------

CpuWork CpuStep::work_on(const std::vector<Tensor>& tensors, const std::vector<Row>& rows) {
  for (size_t i = 0; i < batches_.size(); ++i) pending_[i] = batches_[i].n_items + 1;
  CpuWork work{};
  work.tensors = tensors.data();
  work.chunks = chunks_.data();
  work.first_chunks = first_chunks_.data();
  work.items = items_.data();
  work.batches = batches_.data();
  work.pending = batches_.empty() ? nullptr : pending_.data();
  work.rows = rows.data();
  work.n_items = static_cast<int32_t>(items_.size());
  work.parallel = parallel_;
  work.sums = sums_.data();
  work.projections = projections_.data();
  work.shrink = shrink_.data();
  return work;
}

bool CpuStep::run(const std::vector<Tensor>& tensors, const std::vector<Row>& rows,
                  const Request& request, Stream) {
  const pybind11::gil_scoped_release release;
  CpuWork work = work_on(tensors, rows);
  const Whole whole = reduce(work, rows, request);
  if (request.grad_norm) *request.grad_norm = whole.grad_norm;
  if (whole.skip) {
    ++*request.skipped;
    return false;
  }
  work.whole = &whole;
  if (request.telemetry) {
    measured_.resize(chunks_.size());
    work.measured = measured_.data();
  }
  chosen().loops.update(work);
  if (request.telemetry) tell(request.telemetry, work, rows, whole);
  return true;
}

double CpuStep::sum_over(int32_t tensor) const {
  double sum = 0;
  for (int32_t k = first_chunks_[tensor]; k < first_chunks_[tensor + 1]; ++k) sum += sums_[k];
  return sum;
}

// What has to be known before anything is written. One sum over the gradients serves the norm and
// SWD's V: sum(v) obeys the recurrence of v itself, so that a sum over the gradient replaces one over
// v. The maxima of amsgrad have none and are summed as they will be.
Whole CpuStep::reduce(CpuWork work, const std::vector<Row>& rows, const Request& request) {
  const auto n = static_cast<int32_t>(squares_.size());
  const bool stable = !rows.empty() && rows.front().hyper.stable;
  const auto is_amsgrad = [](const Row& row) { return row.hyper.is.amsgrad; };
  const bool maximized = stable && std::any_of(rows.begin(), rows.end(), is_amsgrad);
  double squares = 0;
  if (request.needs_norm() || (stable && !std::all_of(rows.begin(), rows.end(), is_amsgrad))) {
    chosen().loops.square(work);
    for (int32_t i = 0; i < n; ++i) squares += squares_[i] = sum_over(i);
  }
  Whole whole = whole_of(request, squares);
  if (whole.skip || !stable) return whole;

  work.whole = &whole;
  if (maximized) chosen().loops.maximize(work);
  double total = 0;
  int64_t elements = 0;
  for (int32_t i = 0; i < n; ++i) {
    const Tensor& tensor = work.tensors[i];
    const Row& row = rows[tensor.row];
    double sum;
    if (row.hyper.is.amsgrad)
      sum = sum_over(i);
    else
      sum = *tensor.v_sum =
          kept_sum(*tensor.v_sum, scaled_squares(tensor.numel, squares_[i], whole),
                   row.numbers.coefficients.one_minus_beta2);
    total += sum / row.numbers.bias_correction2;
    elements += tensor.numel;
  }
  if (elements) whole.mean_square = total / static_cast<double>(elements);
  return whole;
}

// The table of a measured step.
void CpuStep::tell(double* table, const CpuWork& work, const std::vector<Row>& rows,
                   const Whole& whole) const {
  for (size_t i = 0; i < squares_.size(); ++i) {
    MeasuredSums sums{};
    ProjectionSums projection{};
    for (int32_t k = first_chunks_[i]; k < first_chunks_[i + 1]; ++k) {
      add(sums, measured_[k]);
      add(projection, projections_[k]);
    }
    const Row& row = rows[work.tensors[i].row];
    write_telemetry(table + i * kTelemetry, sums, sum_over(static_cast<int32_t>(i)),
                    row.hyper.is.decay == Decay::projection ? &projection : nullptr, row.hyper.lr,
                    row.hyper, row.numbers, whole);
  }
}

}  // namespace wdk
