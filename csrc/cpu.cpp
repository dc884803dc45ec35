// The CPU loops. They know streams, chunks and threads; the math is update.h's.
//
// This file is compiled once per instruction set (WDK_ISA: baseline, avx2, avx512) into a
// namespace of that name; dispatch.cpp chooses at run time. It therefore calls nothing out of line
// but the C library and OpenMP: a shared inline function could be merged across instruction sets.
#include "cpu.h"

#include <sched.h>

#ifndef WDK_ISA
#define WDK_ISA baseline
#endif

namespace wdk::WDK_ISA {

namespace {

// Accumulators per sum. Fixed, so that every instruction set adds in the same order; 16 is what
// vectorises best on all of them.
constexpr int kLanes = 16;

// Terms that are added in their own type before they are added in double.
constexpr int kRun = 16;

// Elements of a tile: what passes through scratch stays in the L1 cache.
constexpr int kTile = 1024;

// ---- run-time flags and types become template arguments here, and nowhere else -------------------

template <bool value>
struct Flag {
  static constexpr bool on = value;
};

template <class Body>
WDK_INLINE void with(bool flag, const Body& body) {
  if (flag)
    body(Flag<true>{});
  else
    body(Flag<false>{});
}

// What is computed in.
template <class Body>
WDK_INLINE void with_type(DType type, const Body& body) {
  if (type == DType::float32)
    body(float{});
  else
    body(double{});
}

template <class Body>
WDK_INLINE void with_storage(DType type, const Body& body) {
  switch (type) {
    case DType::float32:
      return body(float{});
    case DType::float64:
      return body(double{});
    case DType::bfloat16:
      return body(BFloat16{});
    case DType::float16:
      return body(Float16{});
  }
}

template <class Body>
WDK_INLINE void with_narrow(DType type, const Body& body) {
  if (type == DType::bfloat16)
    body(BFloat16{});
  else
    body(Float16{});
}

// ---- tiles -------------------------------------------------------------------------------------

template <class S>
S* at(void* stream, int64_t begin) {
  return static_cast<S*>(stream) + begin;
}
template <class S>
const S* at(const void* stream, int64_t begin) {
  return static_cast<const S*>(stream) + begin;
}

template <class T>
constexpr DType dtype_of = sizeof(T) == 8 ? DType::float64 : DType::float32;

// To 16 bits, stochastically; element i has the noise of `first` + i.
template <bool high, class S>
void store_randomly(S* __restrict to, const float* __restrict from, int n, uint32_t key,
                    uint32_t first) {
  for (int i = 0; i < n; ++i) {
    const uint32_t random = noise(key, first + uint32_t(i));
    to[i].bits = narrow<false>(from[i], high ? random >> 16 : random, S{});
  }
}

template <class S>
void store_nearest(S* __restrict to, const float* __restrict from, int n) {
  for (int i = 0; i < n; ++i) to[i].bits = narrow<true>(from[i], 0, S{});
}

// Kahan: what the weight cannot hold.
template <class S>
void store_both(S* __restrict to, S* __restrict rest, const float* __restrict from, int n) {
  for (int i = 0; i < n; ++i) {
    const float x = from[i];
    const S stored{narrow<true>(x, 0, S{})};
    to[i] = stored;
    rest[i].bits = narrow<true>(x - widen(stored), 0, S{});
  }
}

template <class S>
void load_both(float* __restrict to, const S* __restrict from, const S* __restrict rest, int n) {
  for (int i = 0; i < n; ++i) to[i] = widen(from[i]) + widen(rest[i]);
}

// Some elements of a tensor as the rule sees them, every stream in the type that is computed in:
// where it lies, if it lies there so, or else in scratch, from where it is stored again.
template <class T>
class Tile {
 public:
  T* w;
  const T* g;
  T *m, *v, *vmax;
  const T* a;
  int n;

  Tile(const Tensor& tensor, const Row& row) : tensor_(tensor), hyper_(row.hyper) {
    const Noise keys(tensor_key(row.numbers.key, tensor.index));
    weight_key_ = keys.weight;
    pulled_key_ = keys.pulled;
    moments_key_ = keys.moments;
  }

  // The elements that the calls below are about: at most kTile, unless all streams are plain.
  WDK_INLINE void move_to(int64_t begin, int64_t size) {
    begin_ = begin;
    n = static_cast<int>(size);
  }

  WDK_INLINE void load_weight() {
    if (tensor_.master)
      w = at<T>(tensor_.master, begin_);
    else if (tensor_.compensation)
      load_compensated();
    else
      w = load(scratch_w_, tensor_.w, tensor_.weight_type);
  }
  WDK_INLINE void load_gradient() { g = load(scratch_g_, tensor_.g, tensor_.weight_type); }
  WDK_INLINE void load_moments() {
    m = load(scratch_m_, tensor_.m, tensor_.moment_type);
    v = load(scratch_v_, tensor_.v, tensor_.moment_type);
    vmax = tensor_.vmax ? load(scratch_vmax_, tensor_.vmax, tensor_.moment_type) : nullptr;
  }
  // `always`: if there is none, zeros, with which w - a has the bits of w.
  WDK_INLINE void load_anchor(bool always = false) {
    a = hyper_.is.anchored ? load(scratch_a_, tensor_.a, tensor_.anchor_type) : nullptr;
    if (a || !always) return;
    for (int i = 0; i < n; ++i) scratch_a_[i] = 0;
    a = scratch_a_;
  }

  // `pulled`: once more in the same step.
  WDK_INLINE void store_weight(bool pulled) {
    if (!is_narrow(tensor_.weight_type)) return;
    if constexpr (sizeof(T) == sizeof(float))
      with_narrow(tensor_.weight_type, [&](auto type) {
        using S = decltype(type);
        S* to = at<S>(tensor_.w, begin_);
        if (tensor_.compensation)
          store_both(to, at<S>(tensor_.compensation, begin_), w, n);
        else if (tensor_.master || hyper_.rounding == Rounding::nearest)
          store_nearest(to, w, n);
        else
          store_randomly<false>(to, w, n, pulled ? pulled_key_ : weight_key_, uint32_t(begin_));
      });
  }
  WDK_INLINE void store_moments() {
    if (tensor_.moment_type == dtype_of<T>) return;
    if constexpr (sizeof(T) == sizeof(float)) {
      const auto first = uint32_t(begin_);
      store_randomly<false>(at<BFloat16>(tensor_.m, begin_), m, n, moments_key_, first);
      store_randomly<true>(at<BFloat16>(tensor_.v, begin_), v, n, moments_key_, first);
      if (vmax)
        store_randomly<true>(at<BFloat16>(tensor_.vmax, begin_), vmax, n, moments_key_, first);
    }
  }

  // With the weight as it has been stored.
  WDK_INLINE void update_average(const Coefficients<T>& c) {
    if (!tensor_.ema) return;
    with_storage(tensor_.weight_type, [&](auto type) {
      const Coefficients<T> numbers = c;  // a copy no store can alias
      T* __restrict ema = at<T>(tensor_.ema, begin_);
      const auto* __restrict stored =
          at<decltype(type)>(static_cast<const void*>(tensor_.w), begin_);
      for (int i = 0; i < n; ++i) ema[i] = average(ema[i], T(widen(stored[i])), numbers);
    });
  }

 private:
  template <class Stream>
  WDK_INLINE auto load(T* scratch, Stream* stream, DType type) {
    using Address = decltype(at<T>(stream, begin_));
    if (type == dtype_of<T>) return at<T>(stream, begin_);
    with_storage(type, [&](auto storage) {
      T* __restrict to = scratch;
      const auto* __restrict from = at<decltype(storage)>(static_cast<const void*>(stream), begin_);
      for (int i = 0; i < n; ++i) to[i] = T(widen(from[i]));
    });
    return Address(scratch);
  }

  WDK_INLINE void load_compensated() {
    if constexpr (sizeof(T) == sizeof(float))
      with_narrow(tensor_.weight_type, [&](auto type) {
        using S = decltype(type);
        load_both(scratch_w_, at<S>(tensor_.w, begin_), at<S>(tensor_.compensation, begin_), n);
      });
    w = scratch_w_;
  }

  const Tensor& tensor_;
  const Hyper& hyper_;
  uint32_t weight_key_, pulled_key_, moments_key_;
  int64_t begin_ = 0;
  alignas(64) T scratch_w_[kTile], scratch_g_[kTile], scratch_m_[kTile], scratch_v_[kTile],
      scratch_vmax_[kTile], scratch_a_[kTile];
};

// Calls body() with the tile at each part of a chunk in turn.
template <class T, class Body>
WDK_INLINE void for_each_tile(Tile<T>& tile, const Chunk& chunk, int size, const Body& body) {
  for (int64_t done = 0; done < chunk.size; done += size) {
    const int64_t left = chunk.size - done;
    tile.move_to(chunk.begin + done, left < size ? left : size);
    body();
  }
}

// ---- elementwise -------------------------------------------------------------------------------

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
  for (int i = 0; i < n; ++i) {
    Element<T> x{w[i], g[i], m[i], v[i], amsgrad ? vmax[i] : T(0), anchored ? a[i] : T(0), 0, 0};
    update(x, c, is);
    w[i] = x.w;
    m[i] = x.m;
    v[i] = x.v;
    if (amsgrad) vmax[i] = x.vmax;
  }
}

template <bool anchored, class T>
void pull(const Tile<T>& s, T shrink) {
  T* __restrict w = s.w;
  const T* __restrict a = s.a;
  const int n = s.n;
  for (int i = 0; i < n; ++i) w[i] = project(w[i], anchored ? a[i] : T(0), shrink, anchored);
}

// ---- sums over elements ------------------------------------------------------------------------

// N sums in kLanes accumulators each; term(i, terms) gives what element i adds to them, in T, and may
// write element i of its streams, which do not overlap. Runs of kRun terms are added in T before
// they are added in double: for float that halves the cost, and a run's rounding is no larger than
// that of its terms.
template <class T, int N>
struct Sums {
  double lanes[N][kLanes] = {};

  template <class Term>
  WDK_INLINE void add(int64_t n, const Term& term) {
    int64_t i = 0;
    for (; i + kRun * kLanes <= n; i += kRun * kLanes) add_run<kRun>(i, term);
    for (; i + kLanes <= n; i += kLanes) add_run<1>(i, term);
    for (int lane = 0; i < n; ++i, ++lane) {
      T terms[N];
      term(i, terms);
      for (int k = 0; k < N; ++k) lanes[k][lane] += double(terms[k]);
    }
  }

  template <int size, class Term>
  WDK_INLINE void add_run(int64_t begin, const Term& term) {
    T run[N][kLanes] = {};
    for (int64_t i = begin; i < begin + size * kLanes; i += kLanes)
#pragma GCC ivdep
      for (int lane = 0; lane < kLanes; ++lane) {
        T terms[N];
        term(i + lane, terms);
        for (int k = 0; k < N; ++k) run[k][lane] += terms[k];
      }
    for (int k = 0; k < N; ++k)
      for (int lane = 0; lane < kLanes; ++lane) lanes[k][lane] += double(run[k][lane]);
  }

  double total(int k) const {
    double sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += lanes[k][lane];
    return sum;
  }
};

template <class S>
void add_squares(Sums<double, 1>& sums, const S* __restrict g, int64_t n) {
  sums.add(n,
           [=](int64_t i, double* terms) { terms[0] = double(widen(g[i])) * double(widen(g[i])); });
}

// The maximum has no recurrence, so this phase computes it and the next one computes it again.
template <class T>
void add_maxima(Sums<double, 1>& sums, const Tile<T>& s, T scale, T one_minus_beta2) {
  const T* __restrict g = s.g;
  const T* __restrict v = s.v;
  const T* __restrict vmax = s.vmax;
  sums.add(s.n, [=](int64_t i, double* terms) {
    terms[0] = maximum(vmax[i], second_moment(v[i], scale * g[i], one_minus_beta2));
  });
}

// The step, and what it adds to the projection's sums.
template <bool anchored, bool amsgrad, class T>
void step_and_sum(Sums<T, 3>& sums, const Tile<T>& s, const Coefficients<T>& c) {
  constexpr Variant is{Decay::projection, anchored, amsgrad, false};
  sums.add(s.n, [w = s.w, g = s.g, m = s.m, v = s.v, vmax = s.vmax, a = s.a, c](int64_t i,
                                                                                T* terms) {
    Element<T> x{w[i], g[i], m[i], v[i], amsgrad ? vmax[i] : T(0), anchored ? a[i] : T(0), 0, 0};
    const T before = x.w;
    update(x, c, is);
    w[i] = x.w;
    m[i] = x.m;
    v[i] = x.v;
    if (amsgrad) vmax[i] = x.vmax;
    const ProjectionTerms<T> p = projection_terms(before, c.scale * x.g, x.a, x.w, anchored);
    terms[0] = p.alignment;
    terms[1] = p.distance2;
    terms[2] = p.growth2;
  });
}

// The step, and what it adds to telemetry's sums and the projection's. There is an anchor: the few
// steps that are measured may read zeros.
template <Decay decay, bool amsgrad, bool cautious, class T>
void step_and_measure(Sums<T, 10>& sums, const Tile<T>& s, const Coefficients<T>& c) {
  static constexpr Variant is{decay, true, amsgrad, cautious};
  sums.add(s.n,
           [w = s.w, g = s.g, m = s.m, v = s.v, vmax = s.vmax, a = s.a, c](int64_t i, T* terms) {
             Element<T> x{w[i], g[i], m[i], v[i], amsgrad ? vmax[i] : T(0), a[i], 0, 0};
             const T before = x.w;
             update(x, c, is);
             w[i] = x.w;
             m[i] = x.m;
             v[i] = x.v;
             if (amsgrad) vmax[i] = x.vmax;
             const ProjectionTerms<T> p = projection_terms(before, c.scale * x.g, x.a, x.w, true);
             terms[0] = p.alignment;
             terms[1] = p.distance2;
             terms[2] = p.growth2;
             const MeasuredTerms<T> t = measured_terms(before, x, c, is);
             terms[3] = t.weight2;
             terms[4] = t.gradient2;
             terms[5] = t.update2;
             terms[6] = t.decay2;
             terms[7] = t.distance2;
             terms[8] = t.update_weight;
             terms[9] = t.rate;
           });
}

// ---- one chunk ---------------------------------------------------------------------------------

void square_chunk(const CpuWork& work, int64_t index) {
  const Chunk& chunk = work.chunks[index];
  const Tensor& tensor = work.tensors[chunk.tensor];
  Sums<double, 1> sums;
  with_storage(tensor.weight_type, [&](auto type) {
    add_squares(sums, at<decltype(type)>(tensor.g, chunk.begin), chunk.size);
  });
  work.sums[index] = sums.total(0);
}

void maximize_chunk(const CpuWork& work, int64_t index) {
  const Chunk& chunk = work.chunks[index];
  const Tensor& tensor = work.tensors[chunk.tensor];
  const Row& row = work.rows[tensor.row];
  if (!row.hyper.is.amsgrad) return;
  with_type(tensor.type(), [&](auto zero) {
    using T = decltype(zero);
    const Coefficients<T> c = rounded<T>(joined(row.hyper, row.numbers, *work.whole));
    Sums<double, 1> sums;
    Tile<T> tile(tensor, row);
    for_each_tile(tile, chunk, kTile, [&] {
      tile.load_gradient();
      tile.load_moments();
      add_maxima(sums, tile, c.scale, c.one_minus_beta2);
    });
    work.sums[index] = sums.total(0);
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
void measure_tile(Sums<T, 10>& sums, const Tile<T>& s, const Coefficients<T>& c, Variant is) {
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
      case Decay::projection:
        return step_and_measure<Decay::projection, has_max, false>(sums, s, c);
    }
  });
}

void update_chunk(const CpuWork& work, int64_t index) {
  const Chunk& chunk = work.chunks[index];
  const Tensor& tensor = work.tensors[chunk.tensor];
  const Row& row = work.rows[tensor.row];
  const Variant is = row.hyper.is;
  const bool projected = is.decay == Decay::projection;
  with_type(tensor.type(), [&](auto zero) {
    using T = decltype(zero);
    const Coefficients<T> c = rounded<T>(joined(row.hyper, row.numbers, *work.whole));
    Tile<T> tile(tensor, row);
    const auto for_each = [&](const auto& body) {
      const bool whole = tensor.plain() && !tensor.ema && !work.measured;
      for_each_tile(tile, chunk, whole ? chunk.size : kTile, [&] {
        tile.load_weight();
        tile.load_gradient();
        tile.load_moments();
        tile.load_anchor(work.measured);
        body();
        tile.store_weight(false);
        tile.store_moments();
        if (!projected) tile.update_average(c);  // else by the second touch
      });
    };
    if (work.measured) {
      Sums<T, 10> sums;
      for_each([&] { measure_tile(sums, tile, c, is); });
      const auto total = [&](int k) { return sums.total(k); };
      work.projections[index] = {total(0), total(1), total(2)};
      work.measured[index] = {total(3), total(4), total(5), total(6), total(7), total(8), total(9)};
    } else if (projected) {
      Sums<T, 3> sums;
      with(is.anchored, [&](auto anchored) {
        with(is.amsgrad, [&](auto amsgrad) {
          for_each(
              [&] { step_and_sum<decltype(anchored)::on, decltype(amsgrad)::on>(sums, tile, c); });
        });
      });
      work.projections[index] = {sums.total(0), sums.total(1), sums.total(2)};
    } else {
      for_each([&] { step_tile(tile, c, is); });
    }
  });
}

// ---- SPD: the decision over a tensor, the second touch ------------------------------------------

void pull_chunk(const CpuWork& work, int64_t index) {
  const Chunk& chunk = work.chunks[index];
  const Tensor& tensor = work.tensors[chunk.tensor];
  const Row& row = work.rows[tensor.row];
  const double shrink = work.shrink[chunk.tensor];
  if (shrink == 0 && !tensor.ema) return;
  with_type(tensor.type(), [&](auto zero) {
    using T = decltype(zero);
    const Coefficients<T> c = rounded<T>(joined(row.hyper, row.numbers, *work.whole));
    Tile<T> tile(tensor, row);
    for_each_tile(tile, chunk, kTile, [&] {
      if (shrink != 0) {
        tile.load_weight();
        tile.load_anchor();
        with(row.hyper.is.anchored,
             [&](auto anchored) { pull<decltype(anchored)::on>(tile, T(shrink)); });
        tile.store_weight(true);
      }
      tile.update_average(c);
    });
  });
}

// SPD's decision over a tensor all of whose chunks have been updated.
void select(const CpuWork& work, int32_t index) {
  ProjectionSums sums{};
  for (int32_t k = work.first_chunks[index]; k < work.first_chunks[index + 1]; ++k)
    add(sums, work.projections[k]);
  const double lambda = work.rows[work.tensors[index].row].numbers.coefficients.decay;
  work.shrink[index] = lambda * projection_ratio(sums);
}

void finish_item(const CpuWork& work, const Item& item) {
  int32_t& pending = work.pending[item.batch];
  if (__atomic_sub_fetch(&pending, 1, __ATOMIC_ACQ_REL) > 1) return;
  const Batch& batch = work.batches[item.batch];
  for (int32_t t = batch.first_tensor; t < batch.last_tensor; ++t) select(work, t);
  __atomic_store_n(&pending, 0, __ATOMIC_RELEASE);
}

void wait_for_batch(const CpuWork& work, const Item& item) {
  while (__atomic_load_n(&work.pending[item.batch], __ATOMIC_ACQUIRE) > 0) sched_yield();
}

}  // namespace

// ---- all chunks --------------------------------------------------------------------------------

void square(const CpuWork& work) {
#pragma omp parallel for schedule(dynamic) if (work.parallel)
  for (int32_t i = 0; i < work.n_items; ++i)
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
      wait_for_batch(work, item);
      for (int32_t k = item.first_chunk; k < item.last_chunk; ++k) pull_chunk(work, k);
    } else {
      for (int32_t k = item.first_chunk; k < item.last_chunk; ++k) update_chunk(work, k);
      if (work.pending) finish_item(work, item);
    }
  }
}

}  // namespace wdk::WDK_ISA
