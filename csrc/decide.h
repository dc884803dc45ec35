// What a step decides once its sums are known (sums.h): how gradients are scaled, whether the step is
// skipped, SWD's V, SPD's projections; and the row that telemetry keeps of a tensor.
#pragma once

#include <cmath>

#include "coefficients.h"

namespace wdk {

// What all tensors share.
struct Decision {
  double unscale = 1;    // of the gradients: undoes a GradScaler's scale
  double scale = 1;      // of the gradients: unscaled and clipped
  double grad_norm = 0;  // unscaled, before clipping
  double mean_v = 0;     // SWD's V
  bool skip = false;     // nothing is to be updated, or counted
};

// `squares`: the sum of g^2 over all gradients as they are, if it is asked for. torch's formula:
// torch.nn.utils.clip_grad_norm_. A norm that is NaN makes everything NaN.
WDK_INLINE Decision decide(const Request& r, double squares) {
  Decision d;
  if (r.grad_scale.data) d.scale = d.unscale = 1 / r.grad_scale.get();
  if (r.found_inf.data) d.skip = r.found_inf.get() != 0;
  if (r.needs_norm()) {
    d.grad_norm = d.scale * std::sqrt(squares);
    if (r.skip_nonfinite && !(d.grad_norm - d.grad_norm == 0)) d.skip = true;
    if (r.max_grad_norm < INFINITY) {
      const double share = r.max_grad_norm / (d.grad_norm + 1e-6);
      if (!(share > 1)) d.scale *= share;
    }
  }
  return d;
}

// SWD: sum(v) after a step, from the one before and a tensor's sum of g^2, for it obeys the recurrence
// of v itself. What has overflowed stays inf, as v. Of no elements the sum is 0, were the scale NaN.
WDK_INLINE double kept_sum(double kept, int64_t elements, double gradient2, double scale,
                           double one_minus_beta2) {
  const double squares = elements ? scale * scale * gradient2 : 0;
  const double mean = lerp(kept, squares, one_minus_beta2);
  return std::isnan(mean) ? kept + squares : mean;
}

// SWD's V, where other processes hold some of the tensors.
WDK_INLINE double mean_v_of(const Whole& whole, double scale) {
  return whole.elements ? (whole.kept_v + scale * scale * whole.new_v) / whole.elements : 0;
}

// SWD: d / sqrt(V); nothing has been learnt of the gradient's scale while V = 0.
WDK_INLINE double swd_decay(double decay, double mean_v) {
  return mean_v == 0 ? 0 : decay / std::sqrt(mean_v);
}

// A group's numbers with what all tensors share.
WDK_INLINE Coefficients<double> joined(const GroupOptions& o, const StepNumbers& numbers,
                                       const Decision& d) {
  Coefficients<double> c = numbers.coefficients;
  c.scale *= d.scale;
  if (o.swd) c.decay = swd_decay(c.decay, d.mean_v);
  return c;
}

// SPD: whether a tensor is selected, and r; 0 where it is not.
WDK_INLINE bool selected(const double* sums) { return sums[kAlignment] > 0; }  // c < 0
WDK_INLINE double projection_ratio(const double* sums) {
  if (!selected(sums) || sums[kSteppedDistance2] == 0) return 0;
  const double after = std::sqrt(sums[kSteppedDistance2]);
  const double before2 = sums[kSteppedDistance2] - sums[kGrowth2];
  const double before = std::sqrt(before2 > 0 ? before2 : 0);
  const double ratio = sums[kGrowth2] / ((after + before) * after);  // (after - before) / after
  return ratio < 0 ? 0 : ratio > 1 ? 1 : ratio;                      // NaN stays NaN
}

// ---- telemetry ---------------------------------------------------------------------------------

// In the order of COLUMNS in wdkernels/telemetry.py, which explains them.
enum Column {
  kColumnWeight2,
  kColumnGradient2,
  kColumnUpdate2,
  kColumnDecay2,
  kColumnDistance2,
  kColumnUpdateWeight,
  kColumnRate,
  kColumnLr,
  kColumnDecay,
  kColumnSelected,
  kColumnRatio,
  kColumnMeanV,
  kColumns
};

// A tensor's row of the table, from its sums.
WDK_INLINE void write_telemetry(double* row, const double* sums, double lr, const GroupOptions& o,
                                const StepNumbers& numbers, const Decision& d) {
  const bool projected = o.decay == Decay::projection;
  const Coefficients<double> c = joined(o, numbers, d);
  const double ratio = projected ? projection_ratio(sums) : 0;
  const double shrink = c.decay * ratio;  // of SPD; a sum that it leaves alone may be inf
  row[kColumnWeight2] = sums[kWeight2];
  row[kColumnGradient2] = d.unscale * d.unscale * sums[kGradient2];
  row[kColumnUpdate2] = sums[kUpdate2];
  row[kColumnDecay2] = ratio == 0 ? sums[kDecay2] : shrink * shrink * sums[kSteppedDistance2];
  row[kColumnDistance2] = sums[kDistance2];
  row[kColumnUpdateWeight] = sums[kUpdateWeight];
  row[kColumnRate] = sums[kRate] * c.step_size * numbers.bias_correction1;
  row[kColumnLr] = lr;
  row[kColumnDecay] = o.decay == Decay::unmixed ? c.decay / numbers.bias_correction1 : c.decay;
  row[kColumnSelected] = projected && selected(sums);
  row[kColumnRatio] = ratio;
  row[kColumnMeanV] = d.mean_v;
}

}  // namespace wdk
