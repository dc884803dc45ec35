// The sums over a tensor that a step takes: the datum that its phases hand on (step.h).
//
// A step's table of sums has a row for each tensor and a column for each name below, in float64 and
// in memory that torch owns: between two phases torch.distributed may add the rows of other shards.
#pragma once

namespace wdk {

// In the order of SUMS in wdkernels/sums.py. w, d = w - a before the step, u Adam's step, w~ = w - u.
enum Sum {
  // Before the update. g as it is, neither scaled nor clipped.
  kGradient2,  // g^2: for the norm, SWD's V and telemetry
  kMaximum,    // max(v) as it will be after the step: SWD with amsgrad

  // During the update of a step that telemetry measures.
  kWeight2,       // w^2
  kUpdate2,       // u^2
  kDecay2,        // squares of what the decay adds, where it enters
  kDistance2,     // d^2
  kUpdateWeight,  // u w
  kRate,          // 1 / (sqrt(v) + eps), the bias corrections left out

  // During the update, for Selective Projection Decay.
  kAlignment,         // g d, g after line 0; it is -c of arXiv 2411.01713
  kSteppedDistance2,  // (w~ - a)^2
  kGrowth2,           // (w~ - a)^2 - d^2, as a product: subtracting two nearly equal squares would
                      // lose the digits that matter
  kSums
};

// The columns of telemetry and of the projection are neighbours: [first, last).
constexpr int kFirstMeasured = kWeight2, kLastMeasured = kAlignment;
constexpr int kFirstProjected = kAlignment, kLastProjected = kSums;

}  // namespace wdk
