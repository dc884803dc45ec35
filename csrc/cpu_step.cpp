#include "cpu_step.h"

#include <pybind11/pybind11.h>

#include <algorithm>

#include "touches.h"

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

void CpuStep::set_tensors(const std::vector<Tensor>& tensors, bool projected) {
  chunks_.clear();
  first_chunks_.clear();
  items_.clear();
  batches_.clear();

  int64_t all_elements = 0;
  for (const Tensor& tensor : tensors) all_elements += tensor.numel;
  const int64_t largest = projected ? kLargestProjectedItem : kLargestItem;
  const int64_t item_size = std::clamp(all_elements / kItems, kChunk, largest);

  Touches<Item> touches(items_, kBatch);
  Batch batch{};              // that is being filled
  int64_t item_elements = 0;  // of the item that is being filled, which belongs to this batch
  const auto close_batch = [&] {
    touches.close_batch();
    batches_.push_back(batch);
    batch = {batch.last_tensor, batch.last_tensor, 0};
  };
  const auto add = [&](const Chunk& chunk) {
    const auto index = static_cast<int32_t>(chunks_.size());
    if (batch.n_items == 0 || item_elements + chunk.size > item_size) {
      touches.add_step({index, index, static_cast<int32_t>(batches_.size()), false}, projected);
      ++batch.n_items;
      item_elements = 0;
    }
    items_.back().last_chunk = index + 1;
    chunks_.push_back(chunk);
    item_elements += chunk.size;
    touches.add_elements(chunk.size);
  };

  for (const Tensor& tensor : tensors) {
    if (projected && touches.full(tensor.numel)) close_batch();
    first_chunks_.push_back(static_cast<int32_t>(chunks_.size()));
    for (int64_t begin = 0; begin < tensor.numel; begin += kChunk)
      add({batch.last_tensor, static_cast<int32_t>(std::min(kChunk, tensor.numel - begin)), begin});
    ++batch.last_tensor;
  }
  first_chunks_.push_back(static_cast<int32_t>(chunks_.size()));
  if (projected) close_batch();
  touches.finish();

  parallel_ = all_elements > kParallel;
  pending_.resize(batches_.size());
  shrink_.resize(projected ? tensors.size() : 0);
}

// ---- the step ----------------------------------------------------------------------------------

void CpuStep::begin(const StepInput& input) {
  if (input.sums) chunk_sums_.resize(chunks_.size() * kSums);
  input_.emplace(input);
  decision_ = {};
  work_ = {};
  work_.tensors = input.tensors.data();
  work_.chunks = chunks_.data();
  work_.first_chunks = first_chunks_.data();
  work_.items = items_.data();
  work_.batches = batches_.data();
  work_.rows = input.rows.data();
  work_.decision = &decision_;
  work_.n_items = static_cast<int32_t>(items_.size());
  work_.parallel = parallel_;
  work_.measured = input.request.telemetry != nullptr;
  work_.chunk_sums = reinterpret_cast<double (*)[kSums]>(chunk_sums_.data());
  work_.sums = input.sums;
  work_.shrink = shrink_.data();
}

void CpuStep::reduce(int round) {
  const pybind11::gil_scoped_release release;
  sum_gradients(round);
}

// One sum over the gradients serves the norm and SWD's V: sum(v) obeys the recurrence of v itself, so
// that a sum over the gradient replaces one over v. The maxima of amsgrad have none and are summed as
// they will be.
void CpuStep::sum_gradients(int round) {
  if (round == 0 && input_->needs_squares()) {
    chosen().loops.square(work_);
    add_up_all(kGradient2, kGradient2 + 1);
  }
  if (!input_->needs_maxima() || round + 1 < rounds(*input_)) return;
  if (round == 0) decision_ = wdk::decide(input_->request, 0);  // no norm is asked for
  chosen().loops.maximize(work_);
  add_up_all(kMaximum, kMaximum + 1);
}

bool CpuStep::decide(int round) {
  const Request& request = input_->request;
  if (round == 0) {
    double squares = 0;
    if (request.whole)
      squares = request.whole->gradient2;
    else if (request.needs_norm())
      for (size_t i = 0; i < input_->tensors.size(); ++i) squares += work_.sums[i][kGradient2];
    decision_ = wdk::decide(request, squares);
    if (request.grad_norm) *request.grad_norm = decision_.grad_norm;
    if (decision_.skip) {
      ++*request.skipped;
      return false;
    }
  }
  if (input_->swd() && round + 1 >= rounds(*input_)) decision_.mean_v = mean_v();
  return true;
}

// SWD's V, and the sums of v that are kept.
double CpuStep::mean_v() {
  double total = 0;
  int64_t elements = 0;
  for (size_t i = 0; i < input_->tensors.size(); ++i) {
    const Tensor& tensor = input_->tensors[i];
    const StepNumbers& numbers = input_->rows[tensor.row].numbers;
    const double* sums = work_.sums[i];
    double sum = sums[kMaximum];
    if (!tensor.vmax) {
      sum = kept_sum(*tensor.v_sum, tensor.total, sums[kGradient2], decision_.scale,
                     numbers.coefficients.one_minus_beta2);
      *tensor.v_sum = sum;
    }
    total += sum / numbers.bias_correction2;
    elements += tensor.total;
  }
  if (input_->request.whole) return mean_v_of(*input_->request.whole, decision_.scale);
  return elements ? total / static_cast<double>(elements) : 0;
}

void CpuStep::update() {
  const pybind11::gil_scoped_release release;
  chosen().loops.update(work_);
  if (work_.measured) add_up_all(kFirstMeasured, kLastMeasured);
  if (input_->projected()) add_up_all(kFirstProjected, kLastProjected);
}

void CpuStep::finish() {
  const pybind11::gil_scoped_release release;
  if (input_->projected()) {
    for (size_t i = 0; i < input_->tensors.size(); ++i) select(work_, static_cast<int32_t>(i));
    chosen().loops.pull(work_);
  }
  if (work_.measured) write_telemetry();
}

// Second touches follow their steps, and the gradients' squares are taken where they are in the cache
// if only telemetry asks for them.
bool CpuStep::run(const StepInput& input) {
  const pybind11::gil_scoped_release release;
  begin(input);
  for (size_t i = 0; i < batches_.size(); ++i) pending_[i] = batches_[i].n_items + 1;
  if (!batches_.empty()) work_.pending = pending_.data();
  work_.squares_left = work_.measured && !input.request.needs_norm() && !input.swd();

  int round = 0;
  do {
    if (round < rounds(input) && !work_.squares_left) sum_gradients(round);
    if (!decide(round)) return false;
  } while (++round < rounds(input));
  chosen().loops.update(work_);
  if (work_.measured) {
    if (work_.squares_left) add_up_all(kGradient2, kGradient2 + 1);
    add_up_all(kFirstMeasured, kLastProjected);
    write_telemetry();
  }
  return true;
}

void CpuStep::add_up_all(int first, int last) {
  for (size_t i = 0; i < input_->tensors.size(); ++i)
    add_up(work_, static_cast<int32_t>(i), first, last);
}

// The table of a measured step.
void CpuStep::write_telemetry() const {
  double* row = input_->request.telemetry;
  for (size_t i = 0; i < input_->tensors.size(); ++i, row += kColumns) {
    const auto& [options, numbers, t, step] = input_->rows[input_->tensors[i].row];
    wdk::write_telemetry(row, work_.sums[i], options.lr, options, numbers, decision_);
  }
}

}  // namespace wdk
