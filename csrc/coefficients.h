// A param group's options at a step count -> the few numbers an element needs (update.h).
//
// Everything is computed in double and rounded once, where the element loop starts.
#pragma once

#include <cmath>

#include "options.h"

namespace wdk {

WDK_INLINE double factor(const ScheduleFactor& s, double t) {
  const double passed = (t - 1) / s.steps;
  const double progress = passed < 1 ? passed : 1;
  double share = 1 - progress;  // of the start value; of the difference, the end would be inexact
  switch (s.kind) {
    case ScheduleFactor::Kind::constant:
      return 1;
    case ScheduleFactor::Kind::window:
      return s.start <= t && t < s.end;
    case ScheduleFactor::Kind::inverse:
      return 1 / (t - 1 + s.start);
    case ScheduleFactor::Kind::cosine:
      share = (1 + std::cos(3.14159265358979323846 * progress)) / 2;
      break;
    case ScheduleFactor::Kind::linear:
      break;
  }
  return s.start * share + s.end * (1 - share);
}

// The numbers of one step of a group, in double.
struct StepNumbers {
  Coefficients<double> coefficients;
  double bias_correction1, bias_correction2;
  uint32_t key;  // of the random bits
};

WDK_INLINE StepNumbers numbers_of(const GroupOptions& o, double t) {
  const double bias_correction1 = 1 - std::pow(o.beta1, t);
  const double bias_correction2 = 1 - std::pow(o.beta2, t);
  const double root = std::sqrt(bias_correction2);
  const double lambda =
      o.weight_decay * factor(o.decay_schedule[0], t) * factor(o.decay_schedule[1], t);

  Coefficients<double> c;
  c.scale = o.maximize ? -1 : 1;
  c.one_minus_beta1 = 1 - o.beta1;
  c.one_minus_beta2 = 1 - o.beta2;
  c.step_size = o.lr * root / bias_correction1;
  c.eps = o.eps * root;
  c.decay = lambda;
  if (o.decay == Decay::unmixed) c.decay = lambda * bias_correction1;
  if (o.decay == Decay::decoupled) {
    const double relative = o.decay_scale == DecayScale::lr ? o.lr : o.lr / o.lr_max;
    c.decay = lambda * (o.decay_scale == DecayScale::independent ? 1
                        : o.decay_scale == DecayScale::corrected ? o.lr * relative
                                                                 : relative);
  }
  c.average = 1 - o.ema_decay * factor(o.ema_schedule[0], t) * factor(o.ema_schedule[1], t);
  return {c, bias_correction1, bias_correction2, step_key(o.seed, static_cast<uint64_t>(t))};
}

}  // namespace wdk
