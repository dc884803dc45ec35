// The update rule: what one optimizer step does to one element, on registers.
//
// This is the only statement of the rule in C++. The CPU loops (cpu.cpp) and the GPU kernels call
// it; they know no math, and it knows no loops, tensors or threads. With contraction switched off
// every backend computes the same bits.
//
//   0  g  <- scale * g                             unscaled, clipped; negative to maximize
//   1  g  <- g + lambda (w - a)                    L2: the penalty enters both moments
//   2  m  <- m + (1 - beta1)(g - m)
//      v  <- v + (1 - beta2)(g^2 - v)              amsgrad: vmax <- max(vmax, v) takes v's place below
//   3  u   = eta/(1 - beta1^t) * m / (sqrt(v)/sqrt(1 - beta2^t) + eps)
//   4  w  <- w - (decay (w - a) + u)               decoupled: decay of the old weights
//   5  ema <- ema + (1 - k)(w - ema)               if there is an average
//
// `adam` is lines 0 to 3 and yields the step u; `move` is line 4 and applies any step with a decay.
#pragma once

#include <cmath>

#include "inline.h"
#include "sums.h"

namespace wdk {

// Where the pull towards the anchor enters the step.
enum class Decay {
  l2,          // the gradient, hence both moments (Kingma & Ba 2014; torch.optim.Adam)
  unmixed,     // the numerator of the step only (the ablation of arXiv 2012.13841)
  decoupled,   // the weights, past the moments (arXiv 1711.05101); SWD scales it (arXiv 2011.11152)
  projection,  // the weights, per tensor, after the step: SPD (arXiv 2411.01713)
};

// Which of the rule's terms there are. The CPU loops know it when they are compiled; on a GPU it is
// the same for all threads of a block, and costs a branch that all of them take together.
struct Variant {
  Decay decay = Decay::decoupled;
  bool anchored = false;
  bool amsgrad = false;
  bool cautious = false;
};

// The numbers of one parameter's step, computed in double and rounded once (coefficients.h).
template <class T>
struct Coefficients {
  T scale;            // of the gradient: -1 to maximize, and what unscaling and clipping add
  T one_minus_beta1;  // 1 - 0.999f would be off by 1.3e-5 already
  T one_minus_beta2;
  T step_size;  // eta sqrt(1 - beta2^t) / (1 - beta1^t)
  T eps;        // eps sqrt(1 - beta2^t): both bias corrections leave the element loop this way
  T decay;      // what multiplies (w - a) in the line where this decay enters
  T average;    // 1 - k: the weight's share of its new average
};

template <class T>
WDK_INLINE Coefficients<T> rounded(const Coefficients<double>& c) {
  return {T(c.scale), T(c.one_minus_beta1), T(c.one_minus_beta2), T(c.step_size),
          T(c.eps),   T(c.decay),           T(c.average)};
}

// One element of every stream the step reads or writes, in the type it is computed in.
template <class T>
struct Element {
  T w, g, m, v;
  T vmax;  // amsgrad only
  T a;     // anchor; only if there is one

  // By-products, for who measures the step.
  T u, denominator;  // of line 3
};

template <class T>
WDK_INLINE T square_root(T x) {
  return std::sqrt(x);  // IEEE-rounded; under nvcc by its default, -prec-sqrt=true
}

// a + weight (b - a), from the nearer end: beta1 = 0 must give the gradient exactly.
template <class T>
WDK_INLINE T lerp(T a, T b, T weight) {
  return weight < T(0.5) ? a + weight * (b - a) : b - (T(1) - weight) * (b - a);
}

// lerp of v and g^2. Where g^2 overflows, or v has, it is what torch.optim computes: finite as long
// as weight g^2 is, and then inf for good, where the lerp alone would turn it into NaN.
template <class T>
WDK_INLINE T second_moment(T v, T g, T weight) {
  const T mean = lerp(v, g * g, weight);
  return mean - mean == T(0) ? mean : (T(1) - weight) * v + (weight * g) * g;
}

// NaN in v wins, as in torch.maximum.
template <class T>
WDK_INLINE T maximum(T vmax, T v) {
  return vmax > v ? vmax : v;
}

// Step and pull point in opposite directions; signs, because their product may underflow.
template <class T>
WDK_INLINE bool opposed(T u, T d) {
  return ((u > T(0)) & (d < T(0))) | ((u < T(0)) & (d > T(0)));
}

// How far a weight is from what it decays to.
template <class T>
WDK_INLINE T displacement(T w, T a, Variant is) {
  return is.anchored ? w - a : w;
}

// Lines 0 to 3: the moments, and Adam's step u; d is the weight's displacement.
template <class T>
WDK_INLINE void adam(Element<T>& x, T d, const Coefficients<T>& c, Variant is) {
  T g = c.scale * x.g;                             // unscaled, clipped, ascent or descent
  if (is.decay == Decay::l2) g = g + c.decay * d;  // penalty into the gradient

  x.m = lerp(x.m, g, c.one_minus_beta1);  // first moment
  x.v = second_moment(x.v, g, c.one_minus_beta2);
  if (is.amsgrad) x.vmax = maximum(x.vmax, x.v);

  T numerator = x.m;
  if (is.decay == Decay::unmixed) numerator = numerator + c.decay * d;
  x.denominator = square_root(is.amsgrad ? x.vmax : x.v) + c.eps;
  x.u = c.step_size * numerator / x.denominator;
}

// Line 4: the weight after the step u, whoever computed it, with its decay.
template <class T>
WDK_INLINE T move(T w, T u, T d, const Coefficients<T>& c, Variant is) {
  T step = u;
  if (is.decay == Decay::decoupled) {
    const T pull = c.decay * d;
    step = is.cautious && opposed(u, d) ? u : pull + u;  // summed first: w is rounded once
  }
  return w - step;
}

template <class T>
WDK_INLINE void update(Element<T>& x, const Coefficients<T>& c, Variant is) {
  const T d = displacement(x.w, x.a, is);
  adam(x, d, c, is);
  x.w = move(x.w, x.u, d, c, is);
}

// The average, with the weight as it is stored.
template <class T>
WDK_INLINE T average(T ema, T w, const Coefficients<T>& c) {
  return lerp(ema, w, c.average);
}

// w~ - shrink (w~ - a) of a tensor that SPD selected, shrink = lambda r.
template <class T>
WDK_INLINE T project(T w, T a, T shrink, Variant is) {
  return w - shrink * displacement(w, a, is);
}

// ---- what an element adds to the sums over its tensor --------------------------------------------

// Telemetry's, of an element that has been updated; w is the weight before. Squares of floats may be
// too large or too small for another float, so S is double where that costs nothing.
template <class S, class T>
WDK_INLINE void measured_terms(S (&terms)[kSums], T w, const Element<T>& x,
                               const Coefficients<T>& c, Variant is) {
  const T d = displacement(w, x.a, is);
  T decay = c.decay * d;
  if (is.decay == Decay::unmixed) decay = c.step_size * decay / x.denominator;
  if (is.decay == Decay::decoupled && is.cautious && opposed(x.u, d)) decay = T(0);
  if (is.decay == Decay::projection) decay = T(0);  // which is known after the sums
  terms[kWeight2] = S(w) * S(w);
  terms[kUpdate2] = S(x.u) * S(x.u);
  terms[kDecay2] = S(decay) * S(decay);
  terms[kDistance2] = S(d) * S(d);
  terms[kUpdateWeight] = S(x.u) * S(w);
  terms[kRate] = S(T(1) / x.denominator);
}

// Selective Projection Decay's; w is the weight before, g the gradient after line 0.
template <class T>
WDK_INLINE void projection_terms(T (&terms)[kSums], T w, T g, T a, T stepped, Variant is) {
  const T before = displacement(w, a, is);
  const T after = displacement(stepped, a, is);
  terms[kAlignment] = g * before;
  terms[kSteppedDistance2] = after * after;
  terms[kGrowth2] = (stepped - w) * (after + before);
}

}  // namespace wdk
