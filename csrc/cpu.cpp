// The CPU loops. They know streams, chunks and threads; the math is update.h's.
//
// This file is compiled once per instruction set (WDK_ISA: baseline, avx2, avx512) into a
// namespace of that name; instruction_set.cpp chooses at run time. It therefore calls nothing out of line
// but the C library and OpenMP: a shared inline function could be merged across instruction sets.
#include <sched.h>

#include "cpu_tile.h"

namespace wdk::WDK_ISA {

namespace {

// Accumulators per sum. Fixed, so that every instruction set adds in the same order; 16 is what
// vectorises best on all of them.
constexpr int kLanes = 16;

// Terms that are added in their own type before they are added in double.
constexpr int kRun = 16;

// Before a lambda's body: the compiler takes it into the loop that calls it. A loop with a call in it
// does not vectorise, and which large lambdas stay calls would be the compiler's choice.
#define WDK_INLINE_BODY __attribute__((always_inline))

// ---- elementwise -------------------------------------------------------------------------------

// Elements of a stream that are asked of memory at a time, and how many bytes ahead of the loop; 0:
// what the processor foresees by itself is as good. AVX-512's loop is done with a line of every stream
// before that has asked for the next ones: without, it takes an eighth longer beyond the caches.
#ifdef __AVX512F__
constexpr int kAsked = 64, kAhead = 2048;
#else
constexpr int kAsked = 0, kAhead = 0;
#endif

template <class T>
WDK_INLINE void ask_for(const T* stream) {
  const char* first = reinterpret_cast<const char*>(stream) + kAhead;
  for (size_t i = 0; i < kAsked * sizeof(T); i += 64) __builtin_prefetch(first + i);
}

template <Decay decay, bool anchored, bool amsgrad, bool cautious, class T>
void step(const Tile<T>& s, const Coefficients<T>& coefficients) {
  constexpr Variant is{decay, anchored, amsgrad, cautious};
  const Coefficients<T> c = coefficients;  // a copy no store can alias
  T* __restrict w = s.w;
  const T* __restrict g = s.g;
  T* __restrict m = s.m;
  T* __restrict v = s.v;
  T* __restrict vmax = s.vmax;
  const T* __restrict a = s.a;
  const int n = s.n;
  constexpr int ahead = kAhead / sizeof(T);
  for (int begin = 0, end; begin < n; begin = end) {
    const bool asks = kAsked && n - begin > ahead;  // else it is another tensor's, or nobody's
    end = asks ? begin + kAsked : n;
    if (asks) ask_for(w + begin), ask_for(g + begin), ask_for(m + begin), ask_for(v + begin);
    for (int i = begin; i < end; ++i) {
      Element<T> x{w[i], g[i], m[i], v[i], amsgrad ? vmax[i] : T(0), anchored ? a[i] : T(0), 0, 0};
      update(x, c, is);
      w[i] = x.w;
      m[i] = x.m;
      v[i] = x.v;
      if (amsgrad) vmax[i] = x.vmax;
    }
  }
}

template <bool anchored, class T>
void pull_tile(const Tile<T>& s, T shrink) {
  constexpr Variant is{Decay::projection, anchored};
  T* __restrict w = s.w;
  const T* __restrict a = s.a;
  const int n = s.n;
  for (int i = 0; i < n; ++i) w[i] = project(w[i], anchored ? a[i] : T(0), shrink, is);
}

// ---- sums over elements ------------------------------------------------------------------------

// Sums of the columns [first, last) of sums.h, in `width` accumulators each; term(i, terms) gives what
// element i adds to them, in T, and may write element i of its streams, which do not overlap. Runs of
// kRun terms are added in T before they are added in double: for float that halves the cost, and a run's
// rounding is no larger than that of its terms.
template <class T, int first, int last, int width = kLanes>
struct Sums {
  double lanes[last - first][width] = {};

  template <class Term>
  WDK_INLINE void add(int64_t n, const Term& term) {
    int64_t i = 0;
    for (; i + kRun * width <= n; i += kRun * width) add_run<kRun>(i, term);
    for (; i + width <= n; i += width) add_run<1>(i, term);
    for (int lane = 0; i < n; ++i, ++lane) {
      T terms[kSums];
      term(i, terms);
      for (int k = first; k < last; ++k) lanes[k - first][lane] += double(terms[k]);
    }
  }

  template <int size, class Term>
  WDK_INLINE void add_run(int64_t begin, const Term& term) {
    constexpr int count = last - first;
    T run[count][width] = {};
    for (int64_t i = begin; i < begin + size * width; i += width)
#pragma GCC ivdep
      for (int lane = 0; lane < width; ++lane) {
        T terms[kSums];
        term(i + lane, terms);
        for (int k = 0; k < count; ++k) run[k][lane] += terms[first + k];
      }
    for (int k = 0; k < count; ++k)
      for (int lane = 0; lane < width; ++lane) lanes[k][lane] += double(run[k][lane]);
  }

  // Leaves the sums in a chunk's row.
  void write(double* row) const {
    for (int k = first; k < last; ++k) {
      double sum = 0;
      for (int lane = 0; lane < width; ++lane) sum += lanes[k - first][lane];
      row[k] = sum;
    }
  }
};

using GradientSums = Sums<double, kGradient2, kGradient2 + 1>;
using MaximumSums = Sums<double, kMaximum, kMaximum + 1>;
template <class T>
using ProjectionSums = Sums<T, kFirstProjected, kLastProjected>;

// Telemetry's six sums, in half as many accumulators: more would not stay in registers. With the
// projection's behind them they have as many as those have alone, so that a measured step decides as any
// other one does.
template <class T>
using MeasuringSums = Sums<T, kFirstMeasured, kLastMeasured, kLanes / 2>;
template <class T>
using ProjectedMeasuringSums = Sums<T, kFirstMeasured, kLastProjected>;

// From four places at once: along one run of addresses alone, fewer reads are in flight than memory
// can serve, which costs a third of its speed.
template <class S>
void add_squares(GradientSums& sums, const S* __restrict g, int64_t n) {
  const auto term = [=](int64_t i, double* terms) WDK_INLINE_BODY {
    terms[kGradient2] = double(widen(g[i])) * double(widen(g[i]));
  };
  const int64_t quarter = n / (4 * kLanes) * kLanes;
  for (int64_t i = 0; i < quarter; i += kLanes)
    for (int k = 0; k < 4; ++k) sums.template add_run<1>(k * quarter + i, term);
  const int64_t rest = 4 * quarter;
  sums.add(n - rest, [=](int64_t i, double* terms) WDK_INLINE_BODY { term(rest + i, terms); });
}

// The maximum has no recurrence, so this phase computes it and the next one computes it again.
template <class T>
void add_maxima(MaximumSums& sums, const Tile<T>& s, T scale, T one_minus_beta2) {
  const T* __restrict g = s.g;
  const T* __restrict v = s.v;
  const T* __restrict vmax = s.vmax;
  sums.add(s.n, [=](int64_t i, double* terms) WDK_INLINE_BODY {
    terms[kMaximum] = maximum(vmax[i], second_moment(v[i], scale * g[i], one_minus_beta2));
  });
}

// The step, and what it adds to the projection's sums.
template <bool anchored, bool amsgrad, class T>
void step_and_sum(ProjectionSums<T>& sums, const Tile<T>& s, const Coefficients<T>& c) {
  static constexpr Variant is{Decay::projection, anchored, amsgrad, false};
  sums.add(s.n, [w = s.w, g = s.g, m = s.m, v = s.v, vmax = s.vmax, a = s.a, c](
                    int64_t i, T(&terms)[kSums]) WDK_INLINE_BODY {
    Element<T> x{w[i], g[i], m[i], v[i], amsgrad ? vmax[i] : T(0), anchored ? a[i] : T(0), 0, 0};
    const T before = x.w;
    update(x, c, is);
    w[i] = x.w;
    m[i] = x.m;
    v[i] = x.v;
    if (amsgrad) vmax[i] = x.vmax;
    projection_terms(terms, before, c.scale * x.g, x.a, x.w, is);
  });
}

// The step, and what it adds to telemetry's sums. There is an anchor: the few steps that are
// measured may read zeros.
template <Decay decay, bool amsgrad, bool cautious, class S, class T>
void step_and_measure(S& sums, const Tile<T>& s, const Coefficients<T>& c) {
  static constexpr Variant is{decay, true, amsgrad, cautious};
  constexpr bool projected = decay == Decay::projection;
  const auto term = [w = s.w, g = s.g, m = s.m, v = s.v, vmax = s.vmax, a = s.a, c](
                        int64_t i, T(&terms)[kSums]) WDK_INLINE_BODY {
    Element<T> x{w[i], g[i], m[i], v[i], amsgrad ? vmax[i] : T(0), a[i], 0, 0};
    const T before = x.w;
    update(x, c, is);
    w[i] = x.w;
    m[i] = x.m;
    v[i] = x.v;
    if (amsgrad) vmax[i] = x.vmax;
    measured_terms(terms, before, x, c, is);
    if (projected) projection_terms(terms, before, c.scale * x.g, x.a, x.w, is);
  };
  sums.add(s.n, term);
}

// ---- one chunk ---------------------------------------------------------------------------------

void square_chunk(const CpuWork& work, int64_t index) {
  const Chunk& chunk = work.chunks[index];
  const Tensor& tensor = work.tensors[chunk.tensor];
  GradientSums sums;
  with_storage(tensor.weight_type, [&](auto type) {
    add_squares(sums, at<decltype(type)>(tensor.g, chunk.begin), chunk.size);
  });
  sums.write(work.chunk_sums[index]);
}

void maximize_chunk(const CpuWork& work, int64_t index) {
  const Chunk& chunk = work.chunks[index];
  const Tensor& tensor = work.tensors[chunk.tensor];
  const Row& row = work.rows[tensor.row];
  if (!tensor.vmax) return;
  with_type(tensor.type(), [&](auto zero) {
    using T = decltype(zero);
    const Coefficients<T> c = rounded<T>(joined(row.options, row.numbers, *work.decision));
    MaximumSums sums;
    Tile<T> tile(tensor, row);
    for_each_tile(tile, chunk, kTile, [&] {
      tile.load_gradient();
      tile.load_moments();
      add_maxima(sums, tile, c.scale, c.one_minus_beta2);
    });
    sums.write(work.chunk_sums[index]);
  });
}

// The step of a tile, of whichever decay.
template <class T>
void step_tile(const Tile<T>& s, const Coefficients<T>& c, Variant is) {
  with(is.anchored, [&](auto anchored) {
    with(is.amsgrad, [&](auto amsgrad) {
      constexpr bool has_anchor = decltype(anchored)::on, has_max = decltype(amsgrad)::on;
      switch (is.decay) {
        case Decay::l2:
          return step<Decay::l2, has_anchor, has_max, false>(s, c);
        case Decay::unmixed:
          return step<Decay::unmixed, has_anchor, has_max, false>(s, c);
        case Decay::decoupled:
          return with(is.cautious, [&](auto cautious) {
            step<Decay::decoupled, has_anchor, has_max, decltype(cautious)::on>(s, c);
          });
        case Decay::projection:  // takes sums
          break;
      }
    });
  });
}

template <class T>
void measure_tile(MeasuringSums<T>& sums, const Tile<T>& s, const Coefficients<T>& c, Variant is) {
  with(is.amsgrad, [&](auto amsgrad) {
    constexpr bool has_max = decltype(amsgrad)::on;
    switch (is.decay) {
      case Decay::l2:
        return step_and_measure<Decay::l2, has_max, false>(sums, s, c);
      case Decay::unmixed:
        return step_and_measure<Decay::unmixed, has_max, false>(sums, s, c);
      case Decay::decoupled:
        return with(is.cautious, [&](auto cautious) {
          step_and_measure<Decay::decoupled, has_max, decltype(cautious)::on>(sums, s, c);
        });
      case Decay::projection:  // takes more sums
        break;
    }
  });
}

void update_chunk(const CpuWork& work, int64_t index) {
  const Chunk& chunk = work.chunks[index];
  const Tensor& tensor = work.tensors[chunk.tensor];
  const Row& row = work.rows[tensor.row];
  const Variant is = tensor.variant(row.options);
  const bool projected = is.decay == Decay::projection;
  with_type(tensor.type(), [&](auto zero) {
    using T = decltype(zero);
    const Coefficients<T> c = rounded<T>(joined(row.options, row.numbers, *work.decision));
    Tile<T> tile(tensor, row);
    const auto for_each = [&](const auto& body) {
      const bool at_once = tensor.direct() && !tensor.ema && !work.measured;
      for_each_tile(tile, chunk, at_once ? chunk.size : kTile, [&] {
        tile.load_weight();
        tile.load_gradient();
        tile.load_moments();
        tile.load_anchor(work.measured);
        if (!at_once) tile.fetch_weights();
        body();
        if (!at_once) tile.fetch_moments();
        tile.store_weight(false);
        tile.store_moments();
        if (!projected) tile.update_average(c);  // else in the second touch
      });
    };
    if (work.measured) {
      if (projected) {
        ProjectedMeasuringSums<T> sums;
        with(is.amsgrad, [&](auto amsgrad) {
          constexpr bool has_max = decltype(amsgrad)::on;
          for_each([&] { step_and_measure<Decay::projection, has_max, false>(sums, tile, c); });
        });
        sums.write(work.chunk_sums[index]);
      } else {
        MeasuringSums<T> sums;
        for_each([&] { measure_tile(sums, tile, c, is); });
        sums.write(work.chunk_sums[index]);
      }
      if (work.squares_left) square_chunk(work, index);  // the gradients are still in the cache
    } else if (projected) {
      ProjectionSums<T> sums;
      with(is.anchored, [&](auto anchored) {
        with(is.amsgrad, [&](auto amsgrad) {
          for_each(
              [&] { step_and_sum<decltype(anchored)::on, decltype(amsgrad)::on>(sums, tile, c); });
        });
      });
      sums.write(work.chunk_sums[index]);
    } else {
      for_each([&] { step_tile(tile, c, is); });
    }
  });
}

// ---- SPD's second touch ------------------------------------------------------------------------

void pull_chunk(const CpuWork& work, int64_t index) {
  const Chunk& chunk = work.chunks[index];
  const Tensor& tensor = work.tensors[chunk.tensor];
  const Row& row = work.rows[tensor.row];
  const double shrink = work.shrink[chunk.tensor];
  if (shrink == 0 && !tensor.ema) return;
  with_type(tensor.type(), [&](auto zero) {
    using T = decltype(zero);
    const Coefficients<T> c = rounded<T>(joined(row.options, row.numbers, *work.decision));
    Tile<T> tile(tensor, row);
    for_each_tile(tile, chunk, kTile, [&] {
      if (shrink != 0) {
        tile.load_weight();
        tile.load_anchor(false);
        with(tensor.a != nullptr,
             [&](auto anchored) { pull_tile<decltype(anchored)::on>(tile, T(shrink)); });
        tile.store_weight(true);
      }
      tile.update_average(c);
    });
  });
}

// Whoever finishes the last item of a batch decides for its tensors.
void finish_item(const CpuWork& work, const Item& item) {
  int32_t& pending = work.pending[item.batch];
  if (__atomic_sub_fetch(&pending, 1, __ATOMIC_ACQ_REL) > 1) return;
  const Batch& batch = work.batches[item.batch];
  for (int32_t t = batch.first_tensor; t < batch.last_tensor; ++t) {
    add_up(work, t, kFirstProjected, kLastProjected);
    select(work, t);
  }
  __atomic_store_n(&pending, 0, __ATOMIC_RELEASE);
}

void wait_for_batch(const CpuWork& work, const Item& item) {
  while (__atomic_load_n(&work.pending[item.batch], __ATOMIC_ACQUIRE) > 0) sched_yield();
}

}  // namespace

// ---- all chunks --------------------------------------------------------------------------------

// The last items first: what they leave in the caches is not there any more when the update, which
// begins at the other end, has come to them; what the first ones leave is read at once.
void square(const CpuWork& work) {
#pragma omp parallel for schedule(dynamic) if (work.parallel)
  for (int32_t i = work.n_items - 1; i >= 0; --i)
    for (int32_t k = work.items[i].first_chunk; k < work.items[i].last_chunk; ++k)
      if (!work.items[i].second_touch) square_chunk(work, k);
}

void maximize(const CpuWork& work) {
#pragma omp parallel for schedule(dynamic) if (work.parallel)
  for (int32_t i = 0; i < work.n_items; ++i)
    for (int32_t k = work.items[i].first_chunk; k < work.items[i].last_chunk; ++k)
      maximize_chunk(work, k);
}

// Items are handed out in their order, so whoever waits for a batch waits for items that other
// threads are at work on. There is no barrier but the end.
void update(const CpuWork& work) {
#pragma omp parallel for schedule(monotonic : dynamic) if (work.parallel)
  for (int32_t i = 0; i < work.n_items; ++i) {
    const Item& item = work.items[i];
    if (item.second_touch) {
      if (!work.pending) continue;
      wait_for_batch(work, item);
      for (int32_t k = item.first_chunk; k < item.last_chunk; ++k) pull_chunk(work, k);
    } else {
      for (int32_t k = item.first_chunk; k < item.last_chunk; ++k) update_chunk(work, k);
      if (work.pending) finish_item(work, item);
    }
  }
}

void pull(const CpuWork& work) {
#pragma omp parallel for schedule(dynamic) if (work.parallel)
  for (int32_t i = 0; i < work.n_items; ++i)
    for (int32_t k = work.items[i].first_chunk; k < work.items[i].last_chunk; ++k)
      if (!work.items[i].second_touch) pull_chunk(work, k);
}

}  // namespace wdk::WDK_ISA
