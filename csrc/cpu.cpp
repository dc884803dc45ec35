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

// ---- elementwise -------------------------------------------------------------------------------

template <Decay decay, bool anchored, bool amsgrad, bool cautious, class T>
void step(const Streams<T>& s, int64_t n, const Coefficients<T>& coefficients) {
  constexpr Variant is{decay, anchored, amsgrad, cautious};
  const Coefficients<T> c = coefficients;  // a copy no store can alias
  T* __restrict w = s.w;
  const T* __restrict g = s.g;
  T* __restrict m = s.m;
  T* __restrict v = s.v;
  T* __restrict vmax = s.vmax;
  const T* __restrict a = s.a;
  for (int64_t i = 0; i < n; ++i) {
    Element<T> x{w[i], g[i], m[i], v[i], amsgrad ? vmax[i] : T(0), anchored ? a[i] : T(0)};
    update(x, c, is);
    w[i] = x.w;
    m[i] = x.m;
    v[i] = x.v;
    if (amsgrad) vmax[i] = x.vmax;
  }
}

template <bool anchored, class T>
void pull(const Streams<T>& s, int64_t n, T shrink) {
  T* __restrict w = s.w;
  const T* __restrict a = s.a;
  for (int64_t i = 0; i < n; ++i) w[i] = project(w[i], anchored ? a[i] : T(0), shrink, anchored);
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

template <class T>
double sum_of_squares(const T* __restrict g, int64_t n) {
  Sums<double, 1> sums;
  sums.add(n, [=](int64_t i, double* terms) { terms[0] = double(g[i]) * double(g[i]); });
  return sums.total(0);
}

// The maximum has no recurrence, so this phase computes it and the next one computes it again.
template <class T>
double sum_of_maxima(const Streams<T>& s, int64_t n, T one_minus_beta2) {
  const T* __restrict g = s.g;
  const T* __restrict v = s.v;
  const T* __restrict vmax = s.vmax;
  Sums<double, 1> sums;
  sums.add(n, [=](int64_t i, double* terms) {
    terms[0] = maximum(vmax[i], second_moment(v[i], g[i], one_minus_beta2));
  });
  return sums.total(0);
}

// The step of a chunk and its part of the projection's sums.
template <bool anchored, bool amsgrad, class T>
ProjectionSums step_and_sum(const Streams<T>& s, int64_t n, const Coefficients<T>& c) {
  constexpr Variant is{Decay::projection, anchored, amsgrad, false};
  Sums<T, 3> sums;
  sums.add(n, [s, c](int64_t i, T* terms) {
    Element<T> x{
        s.w[i], s.g[i], s.m[i], s.v[i], amsgrad ? s.vmax[i] : T(0), anchored ? s.a[i] : T(0)};
    const T before = x.w;
    update(x, c, is);
    s.w[i] = x.w;
    s.m[i] = x.m;
    s.v[i] = x.v;
    if (amsgrad) s.vmax[i] = x.vmax;
    const ProjectionTerms<T> p = projection_terms(before, c.sign * x.g, x.a, x.w, anchored);
    terms[0] = p.alignment;
    terms[1] = p.distance2;
    terms[2] = p.growth2;
  });
  return {sums.total(0), sums.total(1), sums.total(2)};
}

// ---- one chunk: run-time flags become template arguments here, and nowhere else -----------------

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

template <class Body>
WDK_INLINE void with_type(DType type, const Body& body) {
  if (type == DType::float32)
    body(float{});
  else
    body(double{});
}

void reduce_chunk(const CpuWork& work, int64_t index) {
  const Chunk& chunk = work.chunks[index];
  const Tensor& tensor = work.tensors[chunk.tensor];
  const Row& row = work.rows[tensor.row];
  with_type(tensor.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Streams<T> s(tensor, chunk.begin);
    work.sums[index] = row.hyper.is.amsgrad
                           ? sum_of_maxima(s, chunk.size, T(row.numbers.one_minus_beta2))
                           : sum_of_squares(s.g, chunk.size);
  });
}

void update_chunk(const CpuWork& work, int64_t index) {
  const Chunk& chunk = work.chunks[index];
  const Tensor& tensor = work.tensors[chunk.tensor];
  const Row& row = work.rows[tensor.row];
  with_type(tensor.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Streams<T> s(tensor, chunk.begin);
    const Coefficients<T> c = rounded<T>(row.numbers);
    const int64_t n = chunk.size;
    with(row.hyper.is.anchored, [&](auto anchored_flag) {
      with(row.hyper.is.amsgrad, [&](auto amsgrad_flag) {
        constexpr bool anchored = decltype(anchored_flag)::on;
        constexpr bool amsgrad = decltype(amsgrad_flag)::on;
        switch (row.hyper.is.decay) {
          case Decay::l2:
            return step<Decay::l2, anchored, amsgrad, false>(s, n, c);
          case Decay::unmixed:
            return step<Decay::unmixed, anchored, amsgrad, false>(s, n, c);
          case Decay::decoupled:
            if (row.hyper.is.cautious)
              return step<Decay::decoupled, anchored, amsgrad, true>(s, n, c);
            return step<Decay::decoupled, anchored, amsgrad, false>(s, n, c);
          case Decay::projection:
            work.projections[index] = step_and_sum<anchored, amsgrad>(s, n, c);
        }
      });
    });
  });
}

void pull_chunk(const CpuWork& work, int64_t index) {
  const Chunk& chunk = work.chunks[index];
  const Tensor& tensor = work.tensors[chunk.tensor];
  const double shrink = work.shrink[chunk.tensor];
  if (shrink == 0) return;
  with_type(tensor.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Streams<T> s(tensor, chunk.begin);
    with(work.rows[tensor.row].hyper.is.anchored,
         [&](auto anchored) { pull<decltype(anchored)::on>(s, chunk.size, T(shrink)); });
  });
}

// SPD's decision over a tensor all of whose chunks have been updated.
void select(const CpuWork& work, int32_t index) {
  ProjectionSums sums{};
  for (int32_t k = work.first_chunks[index]; k < work.first_chunks[index + 1]; ++k) {
    sums.alignment += work.projections[k].alignment;
    sums.distance2 += work.projections[k].distance2;
    sums.growth2 += work.projections[k].growth2;
  }
  work.shrink[index] = selected_decay(work.rows[work.tensors[index].row].numbers.decay, sums);
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

void reduce(const CpuWork& work) {
#pragma omp parallel for schedule(dynamic) if (work.parallel)
  for (int32_t i = 0; i < work.n_items; ++i)
    for (int32_t k = work.items[i].first_chunk; k < work.items[i].last_chunk; ++k)
      reduce_chunk(work, k);
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
