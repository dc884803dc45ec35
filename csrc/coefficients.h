// Hyper-parameters of a param group -> the few numbers an element needs (update.h).
//
// Everything is computed in double and rounded once, where the element loop starts.
#pragma once

#include <cmath>

#include "dtype.h"
#include "update.h"

namespace wdk {

// A multiplier of weight_decay as a function of the parameter's own step count t = 1, 2, 3, ...
struct Schedule {
  enum class Kind { constant, window, linear, cosine };
  Kind kind = Kind::constant;
  double start = 1;  // window: first decayed step;        linear, cosine: value at t = 1
  double end = 1;    // window: first step past the decay; linear, cosine: value after `steps` steps
  double steps = 1;  // linear, cosine
};

WDK_INLINE double factor(const Schedule& s, double t) {
  const double passed = (t - 1) / s.steps;
  const double progress = passed < 1 ? passed : 1;
  double share = 1 - progress;  // of the start value; of the difference, the end would be inexact
  switch (s.kind) {
    case Schedule::Kind::constant:
      return 1;
    case Schedule::Kind::window:
      return s.start <= t && t < s.end;
    case Schedule::Kind::cosine:
      share = (1 + std::cos(3.14159265358979323846 * progress)) / 2;
      break;
    case Schedule::Kind::linear:
      break;
  }
  return s.start * share + s.end * (1 - share);
}

// What multiplies lambda in a decoupled decay.
enum class DecayScale {
  lr,           // eta
  relative_lr,  // eta / eta_max: independent of the learning rate, as in arXiv 1711.05101
  corrected,    // eta^2 / eta_max: AdamC, arXiv 2506.02285
};

// One param group, as validated by wdkernels/coefficients.py.
struct Hyper {
  Variant is;
  bool stable = false;  // SWD: the decay is divided by sqrt(V)
  bool maximize = false;
  double lr = 0;
  double lr_max = 0;
  double beta1 = 0;
  double beta2 = 0;
  double eps = 0;
  double weight_decay = 0;
  DecayScale decay_scale = DecayScale::lr;
  Schedule schedule[2];  // their product

  // Of 16-bit weights.
  Rounding rounding = Rounding::nearest;
  bool master = false;  // a float32 copy is what is updated
  uint32_t seed = 0;

  // The share k of the average that stays: a product too.
  bool averaged = false;
  double ema_decay = 1;
  Schedule ema_schedule[2];

  // Step counts stand on the device, where the numbers are then computed: for CUDA graphs, and where
  // only the device knows whether a step is skipped. So may lr and weight_decay.
  bool counted = false;
  Number live_lr, live_weight_decay;
};

// The numbers of one step of a group, in double.
struct Numbers {
  Coefficients<double> coefficients;
  double bias_correction1, bias_correction2;
  uint32_t key;  // of the random bits
};

WDK_INLINE Numbers numbers_of(const Hyper& h, double t) {
  const double bias_correction1 = 1 - std::pow(h.beta1, t);
  const double bias_correction2 = 1 - std::pow(h.beta2, t);
  const double root = std::sqrt(bias_correction2);
  const double lambda = h.weight_decay * factor(h.schedule[0], t) * factor(h.schedule[1], t);

  Coefficients<double> c;
  c.scale = h.maximize ? -1 : 1;
  c.one_minus_beta1 = 1 - h.beta1;
  c.one_minus_beta2 = 1 - h.beta2;
  c.step_size = h.lr * root / bias_correction1;
  c.eps = h.eps * root;
  c.decay = lambda;
  if (h.is.decay == Decay::unmixed) c.decay = lambda * bias_correction1;
  if (h.is.decay == Decay::decoupled) {
    const double relative = h.decay_scale == DecayScale::lr ? h.lr : h.lr / h.lr_max;
    c.decay = lambda * (h.decay_scale == DecayScale::corrected ? h.lr * relative : relative);
  }
  c.average = 1 - h.ema_decay * factor(h.ema_schedule[0], t) * factor(h.ema_schedule[1], t);
  return {c, bias_correction1, bias_correction2, step_key(h.seed, static_cast<uint64_t>(t))};
}

// ---- of the whole step, over all tensors --------------------------------------------------------

// What is asked of a step, beside its tensors (wdkernels/plan.py).
struct Request {
  Number grad_scale, found_inf;  // of a GradScaler
  double max_norm = INFINITY;
  bool skip_nonfinite = false;

  // What it writes; null where nobody asks.
  double* grad_norm = nullptr;
  int64_t* skipped = nullptr;   // counts
  double* telemetry = nullptr;  // a row of kTelemetry for each tensor

  WDK_INLINE bool needs_norm() const { return grad_norm != nullptr; }
  WDK_INLINE bool may_skip() const { return skipped != nullptr; }
};

// Numbers that all tensors share.
struct Whole {
  double unscale = 1;      // of the gradients: undoes a GradScaler's scale
  double scale = 1;        // of the gradients: unscaled and clipped
  double grad_norm = 0;    // unscaled, before clipping
  double mean_square = 0;  // SWD's V
  bool skip = false;       // nothing is to be updated, or counted
};

// `squares`: the sum of g^2 over all gradients as they are, if it is asked for. torch's formula:
// torch.nn.utils.clip_grad_norm_. A norm that is NaN makes everything NaN.
WDK_INLINE Whole whole_of(const Request& r, double squares) {
  Whole whole;
  if (r.grad_scale.data) whole.scale = whole.unscale = 1 / r.grad_scale.get();
  if (r.found_inf.data) whole.skip = r.found_inf.get() != 0;
  if (r.needs_norm()) {
    whole.grad_norm = whole.scale * std::sqrt(squares);
    if (r.skip_nonfinite && !(whole.grad_norm - whole.grad_norm == 0)) whole.skip = true;
    if (r.max_norm < INFINITY) {
      const double share = r.max_norm / (whole.grad_norm + 1e-6);
      if (!(share > 1)) whole.scale *= share;
    }
  }
  return whole;
}

// SWD: sum(v) after a step, from the one before and sum(g^2). What has overflowed stays inf, as v.
WDK_INLINE double kept_sum(double kept, double squares, double one_minus_beta2) {
  const double mean = lerp(kept, squares, one_minus_beta2);
  return std::isnan(mean) ? kept + squares : mean;
}

// SWD: the sum of g^2 as the step sees the gradients. Of no elements it is 0, were the scale NaN.
WDK_INLINE double scaled_squares(int64_t numel, double squares, const Whole& whole) {
  return numel ? whole.scale * whole.scale * squares : 0;
}

// SWD: d / sqrt(V); nothing has been learnt of the gradient's scale while V = 0.
WDK_INLINE double stable_decay(double decay, double mean_square) {
  return mean_square == 0 ? 0 : decay / std::sqrt(mean_square);
}

// A group's numbers with those of the whole step.
WDK_INLINE Coefficients<double> joined(const Hyper& h, const Numbers& numbers, const Whole& whole) {
  Coefficients<double> c = numbers.coefficients;
  c.scale *= whole.scale;
  if (h.stable) c.decay = stable_decay(c.decay, whole.mean_square);
  return c;
}

// SPD: whether a tensor whose sums are known is selected, and r; 0 where it is not.
WDK_INLINE bool selected(const ProjectionSums& sums) { return sums.alignment > 0; }  // c < 0
WDK_INLINE double projection_ratio(const ProjectionSums& sums) {
  if (!selected(sums) || sums.distance2 == 0) return 0;
  const double after = std::sqrt(sums.distance2);
  const double before2 = sums.distance2 - sums.growth2;
  const double before = std::sqrt(before2 > 0 ? before2 : 0);
  const double ratio = sums.growth2 / ((after + before) * after);  // (after - before) / after
  return ratio < 0 ? 0 : ratio > 1 ? 1 : ratio;                    // NaN stays NaN
}

// ---- telemetry ---------------------------------------------------------------------------------

constexpr int kTelemetry = 12;  // numbers of a tensor: COLUMNS of wdkernels/telemetry.py

// A tensor's row of the table, from its sums, `squares` that of g^2 as the gradients are; `projection`
// is null but for SPD.
WDK_INLINE void write_telemetry(double* row, const MeasuredSums& sums, double squares,
                                const ProjectionSums* projection, double lr, const Hyper& h,
                                const Numbers& numbers, const Whole& whole) {
  const Coefficients<double> c = joined(h, numbers, whole);
  const double ratio = projection ? projection_ratio(*projection) : 0;
  const double shrink = c.decay * ratio;  // of SPD; a sum that it leaves alone may be inf
  row[0] = sums.weight2;
  row[1] = whole.unscale * whole.unscale * squares;
  row[2] = sums.update2;
  row[3] = ratio == 0 ? sums.decay2 : shrink * shrink * projection->distance2;
  row[4] = sums.distance2;
  row[5] = sums.update_weight;
  row[6] = sums.rate * c.step_size * numbers.bias_correction1;
  row[7] = lr;
  row[8] = h.is.decay == Decay::unmixed ? c.decay / numbers.bias_correction1 : c.decay;
  row[9] = projection ? selected(*projection) : 0;
  row[10] = ratio;
  row[11] = whole.mean_square;
}

}  // namespace wdk
