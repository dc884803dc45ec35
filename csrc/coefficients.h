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

  // For CUDA graphs: step counts stand on the device, where the numbers are then computed, and so
  // may lr and weight_decay.
  bool capturable = false;
  Number live_lr, live_weight_decay;

  WDK_INLINE double bias_correction2(double t) const { return 1 - std::pow(beta2, t); }
};

WDK_INLINE Coefficients<double> coefficients(const Hyper& h, double t) {
  const double bias_correction1 = 1 - std::pow(h.beta1, t);
  const double root = std::sqrt(h.bias_correction2(t));
  const double lambda = h.weight_decay * factor(h.schedule[0], t) * factor(h.schedule[1], t);

  Coefficients<double> c;
  c.sign = h.maximize ? -1 : 1;
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
  return c;
}

// SWD: sum(v) after a step, from the one before and sum(g^2). What has overflowed stays inf, as v.
WDK_INLINE double kept_sum(double kept, double squares, double one_minus_beta2) {
  const double mean = lerp(kept, squares, one_minus_beta2);
  return std::isnan(mean) ? kept + squares : mean;
}

// SWD: d / sqrt(V); nothing has been learnt of the gradient's scale while V = 0.
WDK_INLINE double stable_decay(double decay, double mean_square) {
  return mean_square == 0 ? 0 : decay / std::sqrt(mean_square);
}

// SPD: lambda r of a tensor whose sums are known; 0 where it was not selected.
WDK_INLINE double selected_decay(double lambda, const ProjectionSums& sums) {
  const bool selected = sums.alignment > 0;  // c < 0
  if (!selected || sums.distance2 == 0) return 0;
  const double after = std::sqrt(sums.distance2);
  const double before2 = sums.distance2 - sums.growth2;
  const double before = std::sqrt(before2 > 0 ? before2 : 0);
  const double ratio = sums.growth2 / ((after + before) * after);  // (after - before) / after
  return lambda * (ratio < 0 ? 0 : ratio > 1 ? 1 : ratio);         // NaN stays NaN
}

}  // namespace wdk
