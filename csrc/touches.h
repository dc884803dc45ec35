// The order of Selective Projection Decay's work in one pass over all tensors.
//
// A tensor is decided over when all of it has been updated, and then touched a second time. Tensors
// come in batches, none of which is pulled before all of it has been updated, and a batch's second
// touches stand in the order behind the steps of about `batch` further elements: by then its steps are
// normally done, and what they wrote is still in a cache.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace wdk {

// Appends units of work to a list: steps as they are given, second touches where they belong. A unit
// has a field `second_touch`, false for a step.
template <class Unit>
class Touches {
 public:
  Touches(std::vector<Unit>& order, int64_t batch) : order_(order), batch_(batch) {}

  // Whether a tensor of so many elements should begin a batch of its own; call close_batch() then.
  bool full(int64_t elements) const { return elements_ > 0 && elements_ + elements > batch_; }

  // A step, which the caller may still lengthen where it stands: order.back(). `again`: it has a second
  // touch.
  void add_step(const Unit& step, bool again) {
    if (elements_ >= batch_) flush();
    if (again) updated_.push_back(order_.size());
    order_.push_back(step);
  }
  void add_elements(int64_t elements) { elements_ += elements; }  // of the last step

  void close_batch() {
    flush();
    waiting_.assign(updated_.rbegin(), updated_.rend());  // last written, first read
    updated_.clear();
    elements_ = 0;
  }

  // Behind the last tensor.
  void finish() {
    close_batch();
    flush();
  }

 private:
  void flush() {
    for (const size_t position : waiting_) {
      Unit touch = order_[position];
      touch.second_touch = true;
      order_.push_back(touch);
    }
    waiting_.clear();
  }

  std::vector<Unit>& order_;
  const int64_t batch_;
  int64_t elements_ = 0;         // of the batch that is being filled
  std::vector<size_t> updated_;  // its steps that have a second touch: where they stand
  std::vector<size_t> waiting_;  // those of the batch before it
};

}  // namespace wdk
