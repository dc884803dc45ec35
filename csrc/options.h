// What the user has chosen, checked and made plain by wdkernels/options.py: a param group's options, and
// what is asked of a step.
#pragma once

#include <cmath>

#include "dtype.h"
#include "update.h"

namespace wdk {

// A multiplier of weight_decay, or of the average's decay, as a function of the parameter's own step
// count t = 1, 2, 3, ...; wdkernels/schedules.py.
struct ScheduleFactor {
  enum class Kind { constant, window, linear, cosine, inverse };
  Kind kind = Kind::constant;
  double start = 1;  // window: first decayed step; linear, cosine: value at t = 1; inverse: offset
  double end = 1;    // window: first step past the decay; linear, cosine: value after `steps` steps
  double steps = 1;  // linear, cosine
};
constexpr const char* kScheduleKindNames[] = {"constant", "window", "linear", "cosine", "inverse"};

// What multiplies lambda in a decoupled decay.
enum class DecayScale {
  lr,           // eta
  relative_lr,  // eta / eta_max: only the learning rate's schedule, as in arXiv 1711.05101
  corrected,    // eta^2 / eta_max: AdamC, arXiv 2506.02285
  independent,  // 1: no learning rate at all
};
constexpr const char* kDecayScaleNames[] = {"lr", "relative_lr", "corrected", "independent"};

constexpr const char* kDecayNames[] = {"l2", "unmixed", "decoupled", "projection"};

struct GroupOptions {
  Decay decay = Decay::decoupled;
  bool swd = false;  // the decay is divided by sqrt(V)
  bool cautious = false;
  bool maximize = false;
  double lr = 0;
  double lr_max = 0;
  double beta1 = 0;
  double beta2 = 0;
  double eps = 0;
  double weight_decay = 0;
  DecayScale decay_scale = DecayScale::lr;
  ScheduleFactor decay_schedule[2];  // their product
  uint32_t seed = 0;

  // The share k of the average that stays: a product too.
  double ema_decay = 1;
  ScheduleFactor ema_schedule[2];

  // Step counts stand on the device, where the numbers are then computed: for CUDA graphs, and where
  // only the device knows whether a step is skipped. So may lr and weight_decay.
  bool counted_on_device = false;
  Number device_lr, device_weight_decay;
};

// Sums over all tensors, where other processes hold some of them (WHOLE in wdkernels/shards.py). SWD's V
// is (kept_v + scale^2 new_v) / elements.
struct Whole {
  double gradient2, kept_v, new_v, elements;
};

// What is asked of a step, beside its tensors (wdkernels/plan.py).
struct Request {
  Number grad_scale, found_inf;  // of a GradScaler
  double max_grad_norm = INFINITY;
  bool skip_nonfinite = false;
  const Whole* whole = nullptr;  // null: all tensors are in the table of sums

  // What it writes; null where nobody asks.
  double* grad_norm = nullptr;
  int64_t* skipped = nullptr;   // counts
  double* telemetry = nullptr;  // a row of kColumns for each tensor

  WDK_INLINE bool needs_norm() const { return grad_norm != nullptr; }
  WDK_INLINE bool may_skip() const { return skipped != nullptr; }
};

}  // namespace wdk
