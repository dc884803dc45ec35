// How the CPU loops see a tensor: some elements at a time, every stream in the type it is computed
// in. Included by cpu.cpp alone, once per instruction set.
#pragma once

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "cpu.h"

#ifndef WDK_ISA
#define WDK_ISA baseline
#endif

namespace wdk::WDK_ISA {

namespace {

// Elements of a tile: what passes through scratch stays in the L1 cache, and what the next tile
// reads fits the queue of outstanding reads.
constexpr int kTile = 256;

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
WDK_INLINE void with_narrow(DType type, const Body& body) {
  if (type == DType::bfloat16)
    body(BFloat16{});
  else
    body(Float16{});
}

template <class Body>
WDK_INLINE void with_storage(DType type, const Body& body) {
  if (is_narrow(type))
    with_narrow(type, body);
  else
    with_type(type, body);
}

// ---- streams -----------------------------------------------------------------------------------

template <class S>
WDK_INLINE S* at(void* stream, int64_t begin) {
  return static_cast<S*>(stream) + begin;
}
template <class S>
WDK_INLINE const S* at(const void* stream, int64_t begin) {
  return static_cast<const S*>(stream) + begin;
}

// Loops over streams that are not as they are computed with. Not inlined: their callers are many.

#define WDK_OUTLINE __attribute__((noinline))

template <class T, class S>
WDK_OUTLINE void widen_all(T* __restrict to, const S* __restrict from, int n) {
  for (int i = 0; i < n; ++i) to[i] = T(widen(from[i]));
}

// To 16 bits, stochastically; element i has the noise of `first` + i.
template <class S>
WDK_OUTLINE void store_randomly(S* __restrict to, const float* __restrict from, int n, uint32_t key,
                                uint32_t first) {
  for (int i = 0; i < n; ++i)
    to[i].bits = narrow<false>(from[i], noise(key, first + uint32_t(i)), S{});
}

// Both moments: a noise's low half is for m, its high half for v, and for the maximum of v.
template <bool amsgrad>
WDK_OUTLINE void store_moments_randomly(BFloat16* __restrict m, BFloat16* __restrict v,
                                        BFloat16* __restrict vmax, const float* __restrict from_m,
                                        const float* __restrict from_v,
                                        const float* __restrict from_vmax, int n, uint32_t key,
                                        uint32_t first) {
  for (int i = 0; i < n; ++i) {
    const uint32_t random = noise(key, first + uint32_t(i));
    m[i].bits = narrow<false>(from_m[i], random, BFloat16{});
    v[i].bits = narrow<false>(from_v[i], random >> 16, BFloat16{});
    if (amsgrad) vmax[i].bits = narrow<false>(from_vmax[i], random >> 16, BFloat16{});
  }
}

template <class S>
WDK_OUTLINE void store_nearest(S* __restrict to, const float* __restrict from, int n) {
  for (int i = 0; i < n; ++i) to[i].bits = narrow<true>(from[i], 0, S{});
}

// Kahan: with what the weight cannot hold.
template <class S>
WDK_OUTLINE void store_both(S* __restrict to, S* __restrict rest, const float* __restrict from,
                            int n) {
  for (int i = 0; i < n; ++i) {
    const S stored{narrow<true>(from[i], 0, S{})};
    to[i] = stored;
    rest[i].bits = narrow<true>(from[i] - widen(stored), 0, S{});
  }
}

template <class S>
WDK_OUTLINE void load_both(float* __restrict to, const S* __restrict from, const S* __restrict rest,
                           int n) {
  for (int i = 0; i < n; ++i) to[i] = widen(from[i]) + widen(rest[i]);
}

template <class T, class S>
WDK_OUTLINE void average_all(T* __restrict ema, const S* __restrict stored, int n,
                             const Coefficients<T>& coefficients) {
  const Coefficients<T> c = coefficients;  // a copy no store can alias
  for (int i = 0; i < n; ++i) ema[i] = average(ema[i], T(widen(stored[i])), c);
}

// float16 by the processor's own conversions, eight at a time and in a fraction of the time. Their bits
// are those of dtype.h: NaN is made the one that there is.
#ifdef __F16C__

WDK_OUTLINE void widen_all(float* __restrict to, const Float16* __restrict from, int n) {
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(x));
  }
  for (; i < n; ++i) to[i] = widen(from[i]);
}

WDK_OUTLINE void store_nearest(Float16* __restrict to, const float* __restrict from, int n) {
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 x = _mm256_loadu_ps(from + i);
    const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    const __m256 known = _mm256_blendv_ps(x, _mm256_set1_ps(from_bits(0x7fc00000u)), nan);
    const __m128i found = _mm256_cvtps_ph(known, _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), found);
  }
  for (; i < n; ++i) to[i].bits = narrow<true>(from[i], 0, Float16{});
}

WDK_OUTLINE void store_both(Float16* __restrict to, Float16* __restrict rest,
                            const float* __restrict from, int n) {
  alignas(64) float lost[kTile];
  store_nearest(to, from, n);
  widen_all(lost, to, n);
  for (int i = 0; i < n; ++i) lost[i] = from[i] - lost[i];
  store_nearest(rest, lost, n);
}

WDK_OUTLINE void load_both(float* __restrict to, const Float16* __restrict from,
                           const Float16* __restrict rest, int n) {
  alignas(64) float lost[kTile];
  widen_all(to, from, n);
  widen_all(lost, rest, n);
  for (int i = 0; i < n; ++i) to[i] += lost[i];
}

#endif

#undef WDK_OUTLINE

// Some elements of a tensor, every stream in T: where it lies, if it lies there so, or else in
// scratch, from where it is stored again.
template <class T>
class Tile {
 public:
  T* w;
  const T* g;
  T *m, *v, *vmax;
  const T* a;
  int n;

  Tile(const Tensor& tensor, const Row& row)
      : tensor_(tensor), keys_(tensor_key(row.numbers.key, tensor.index)) {}

  // The elements that the calls below are about: at most kTile, unless no stream needs scratch.
  void move_to(int64_t begin, int64_t size) {
    begin_ = begin;
    n = static_cast<int>(size);
  }

  void load_weight() {
    if (tensor_.storage == Storage::master)
      w = at<T>(tensor_.companion, begin_);
    else if (tensor_.storage == Storage::kahan)
      load_compensated();
    else
      w = load(scratch_w_, tensor_.w, tensor_.weight_type);
  }
  void load_gradient() { g = load(scratch_g_, tensor_.g, tensor_.weight_type); }
  void load_moments() {
    m = load(scratch_m_, tensor_.m, tensor_.moment_type);
    v = load(scratch_v_, tensor_.v, tensor_.moment_type);
    vmax = tensor_.vmax ? load(scratch_vmax_, tensor_.vmax, tensor_.moment_type) : nullptr;
  }
  // `always`: if there is none, zeros, with which w - a has the bits of w.
  void load_anchor(bool always) {
    a = tensor_.a ? load(scratch_a_, tensor_.a, tensor_.anchor_type) : nullptr;
    if (a || !always) return;
    for (int i = 0; i < n; ++i) scratch_a_[i] = 0;
    a = scratch_a_;
  }

  // Lets memory begin with what the next tile reads, by halves: while the step's own loop keeps it
  // busy with some streams, and while the loops that only convert would leave it idle.
  void fetch_weights() const {
    if (is_narrow(tensor_.weight_type)) {
      fetch(tensor_.w, 2);
      fetch(tensor_.g, 2);
      if (tensor_.storage == Storage::kahan) fetch(tensor_.companion, 2);
    }
    if (tensor_.ema) fetch(tensor_.ema, sizeof(T));
  }
  void fetch_moments() const {
    const auto size = static_cast<int>(size_of(tensor_.moment_type));
    fetch(tensor_.m, size);
    fetch(tensor_.v, size);
  }

  // `pulled`: once more in the same step.
  void store_weight(bool pulled) {
    if constexpr (sizeof(T) == sizeof(float))
      if (tensor_.storage != Storage::direct)
        with_narrow(tensor_.weight_type, [&](auto type) {
          using S = decltype(type);
          S* to = at<S>(tensor_.w, begin_);
          if (tensor_.storage == Storage::kahan)
            store_both(to, at<S>(tensor_.companion, begin_), w, n);
          else if (tensor_.storage == Storage::stochastic)
            for_each_run([&](int64_t i, int size, uint32_t number) {
              store_randomly(to + i, w + i, size, pulled ? keys_.pulled : keys_.weight, number);
            });
          else
            store_nearest(to, w, n);
        });
  }
  void store_moments() {
    if constexpr (sizeof(T) == sizeof(float)) {
      if (tensor_.moment_type != DType::bfloat16) return;
      BFloat16* const to_m = at<BFloat16>(tensor_.m, begin_);
      BFloat16* const to_v = at<BFloat16>(tensor_.v, begin_);
      BFloat16* const to_vmax = vmax ? at<BFloat16>(tensor_.vmax, begin_) : nullptr;
      for_each_run([&](int64_t i, int size, uint32_t number) {
        if (vmax)
          store_moments_randomly<true>(to_m + i, to_v + i, to_vmax + i, m + i, v + i, vmax + i,
                                       size, keys_.moments, number);
        else
          store_moments_randomly<false>(to_m + i, to_v + i, nullptr, m + i, v + i, nullptr, size,
                                        keys_.moments, number);
      });
    }
  }

  // With the weight as it has been stored.
  void update_average(const Coefficients<T>& c) {
    if (!tensor_.ema) return;
    with_storage(tensor_.weight_type, [&](auto type) {
      average_all(at<T>(tensor_.ema, begin_), at<decltype(type)>(tensor_.w, begin_), n, c);
    });
  }

 private:
  template <class Stream>
  auto load(T* scratch, Stream* stream, DType type) -> decltype(at<T>(stream, 0)) {
    if (type == (sizeof(T) == 8 ? DType::float64 : DType::float32)) return at<T>(stream, begin_);
    with_storage(type, [&](auto storage) {
      widen_all(scratch, at<decltype(storage)>(static_cast<const void*>(stream), begin_), n);
    });
    return scratch;
  }

  void load_compensated() {
    if constexpr (sizeof(T) == sizeof(float))
      with_narrow(tensor_.weight_type, [&](auto type) {
        using S = decltype(type);
        load_both(scratch_w_, at<S>(tensor_.w, begin_), at<S>(tensor_.companion, begin_), n);
      });
    w = scratch_w_;
  }

  // body(i, size, number) for elements i and behind that follow each other in the whole tensor, where
  // the first of them has this number.
  template <class Body>
  void for_each_run(const Body& body) const {
    const Numbering& numbering = tensor_.numbering;
    for (int64_t i = 0; i < n;) {
      const int64_t left = n - i;
      const int64_t run = numbering.run ? numbering.run - (begin_ + i) % numbering.run : left;
      const int64_t size = run < left ? run : left;
      body(i, static_cast<int>(size), numbering(begin_ + i));
      i += size;
    }
  }

  void fetch(const void* stream, int size) const {
    const char* first = static_cast<const char*>(stream) + (begin_ + n) * size;
    for (int i = 0; i < kTile * size; i += 64) __builtin_prefetch(first + i);
  }

  const Tensor& tensor_;
  const Noise keys_;
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

}  // namespace

}  // namespace wdk::WDK_ISA
