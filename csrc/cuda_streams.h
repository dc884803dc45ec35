// Streams on a GPU: how a thread takes numbers out of memory, several at a time and in whichever type
// they are stored, and puts them back.
//
// Storage is read at run time, out of the table of tensors. The raw bits of all streams are loaded
// first and widened afterwards, so that the loads are on their way together.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "work.h"

namespace wdk {

constexpr int kThreads = 128;  // of a block

// As many elements as a thread takes at once: 16 bytes of a stream in the type that is computed in,
// fewer of a narrower one. Where a stream is not aligned to that, one.
template <class T, int n>
struct alignas(n * sizeof(T)) Vector {
  T x[n];
};

template <class T>
constexpr DType dtype_of = sizeof(T) == 8 ? DType::float64 : DType::float32;

// A stream from a chunk's first element on; or none.
struct Strip {
  char* data = nullptr;
  DType type = DType::float32;

  Strip() = default;
  __device__ Strip(const void* stream, DType type, int64_t begin) : type(type) {
    if (stream) data = static_cast<char*>(const_cast<void*>(stream)) + begin * size_of(type);
  }
  __device__ explicit operator bool() const { return data; }
  __device__ bool aligned(int n) const {
    return reinterpret_cast<uintptr_t>(data) % (n * size_of(type)) == 0;
  }

  // Element i, if elements are stored as S. Addresses come out of tables: that they are global
  // memory's, the compiler has to be told.
  template <class S, class X>
  __device__ X& at(int i) const {
    S* const element = reinterpret_cast<S*>(data) + i;
    __builtin_assume(__isGlobal(element));
    return *reinterpret_cast<X*>(element);
  }
};

template <class To, class From>
__device__ To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <int bytes>
using Bits =
    std::conditional_t<bytes == 8, uint64_t, std::conditional_t<bytes == 4, uint32_t, uint16_t>>;

// n numbers as they lie in memory, the bits of narrow ones side by side. They are unpacked and widened
// later, so that the loads of all streams are on their way before the first is waited for.
template <class T, int n>
struct Raw {
  Bits<sizeof(T)> words[n];

  // If they are stored as S.
  template <class S>
  __device__ void load(const Strip& s, int i) {
    constexpr int bytes = n * sizeof(S), word = bytes < sizeof(T) ? bytes : sizeof(T);
    const auto x = s.at<S, Vector<Bits<word>, bytes / word>>(i);
#pragma unroll
    for (int k = 0; k < bytes / word; ++k) words[k] = x.x[k];
  }
  template <class S>
  __device__ S get(int k) const {
    constexpr int share = sizeof(T) / sizeof(S);  // of a word
    const auto bits = words[k / share] >> (k % share * 8 * sizeof(S));
    return bit_cast<S>(static_cast<Bits<sizeof(S)>>(bits));
  }
};

// If the stream is wanted. Zeros else, and where there is no more to load: what nobody has set would
// have to keep its register from one vector to the next.
template <int n, class T>
__device__ void load(Raw<T, n>& raw, const Strip& s, int i, bool wanted = true) {
  raw = {};
  if (!wanted) return;
  if (s.type == dtype_of<T>)
    raw.template load<T>(s, i);
  else if (sizeof(T) == 4 || is_narrow(s.type))
    raw.template load<uint16_t>(s, i);
  else
    raw.template load<float>(s, i);  // an anchor of float64 weights
}

template <int n, class T>
__device__ Vector<T, n> widened(const Raw<T, n>& raw, DType type) {
  Vector<T, n> x;
  const auto widen_as = [&](auto storage) {
#pragma unroll
    for (int k = 0; k < n; ++k) x.x[k] = T(widen(raw.template get<decltype(storage)>(k)));
  };
  if (type == dtype_of<T>)
    widen_as(T{});
  else if (type == DType::bfloat16)
    widen_as(BFloat16{});
  else if (sizeof(T) == 4 || type == DType::float16)
    widen_as(Float16{});
  else
    widen_as(float{});
  return x;
}

template <int n, class T>
__device__ void store(const Strip& s, int i, const Vector<T, n>& x) {
  s.at<T, Vector<T, n>>(i) = x;
}

// In 16 bits; random(k): what element k is rounded up by, if not to nearest.
template <bool nearest, int n, class Random>
__device__ Vector<uint16_t, n> narrowed(const Vector<float, n>& x, DType type,
                                        const Random& random) {
  Vector<uint16_t, n> bits;
  const auto narrow_to = [&](auto storage) {
#pragma unroll
    for (int k = 0; k < n; ++k) bits.x[k] = narrow<nearest>(x.x[k], random(k), storage);
  };
  if (type == DType::bfloat16)
    narrow_to(BFloat16{});
  else
    narrow_to(Float16{});
  return bits;
}

template <int n>
__device__ Vector<uint16_t, n> to_nearest(const Vector<float, n>& x, DType type) {
  return narrowed<true>(x, type, [](int) { return 0u; });
}

template <int n>
__device__ Vector<float, n> widened(const Vector<uint16_t, n>& bits, DType type) {
  Vector<float, n> x;
#pragma unroll
  for (int k = 0; k < n; ++k)
    x.x[k] = type == DType::bfloat16 ? widen(BFloat16{bits.x[k]}) : widen(Float16{bits.x[k]});
  return x;
}

// The whole tensor's numbers of a chunk's elements, on which random bits depend. Divided by no more
// than 32 bits, and only behind the end of a run.
class Numbers {
 public:
  __device__ Numbers(const Numbering& numbering, int64_t begin)
      : first_(numbering.first + uint32_t(begin)) {
    const int64_t run = numbering.run;
    if (run == 0) return;
    // A chunk is smaller than 2^31: it has one end of a longer run, if any.
    const auto clipped = [](int64_t x) { return int32_t(x < INT32_MAX ? x : INT32_MAX); };
    const int64_t before = begin / run;
    run_ = clipped(run);
    left_ = clipped((before + 1) * run - begin);
    gap_ = uint32_t(numbering.pitch - run);
    first_ += uint32_t(before) * gap_;
  }

  __device__ uint32_t operator()(int i) const {
    return first_ + i + (i < left_ ? 0 : (1 + uint32_t(i - left_) / uint32_t(run_)) * gap_);
  }

 private:
  uint32_t first_;
  int32_t left_ = INT32_MAX;  // elements of the run in which the chunk begins
  int32_t run_ = 1;
  uint32_t gap_ = 0;  // of the whole, between two runs
};

// A tensor's streams from a chunk's first element on, and how they are stored.
template <class T>
class Strips {
 public:
  Strip weight;  // as it is computed with: w, or its master copy
  Strip w, compensation, g, m, v, vmax, a, ema;

  __device__ Strips(const Tensor& t, const Row& row, const Chunk& chunk)
      : numbers_(t.numbering, chunk.begin), keys_(tensor_key(row.numbers.key, t.index)) {
    // Known to the compiler: for float64 only an anchor may be of another type.
    const DType weights = sizeof(T) == 8 ? DType::float64 : t.weight_type;
    const DType moments = sizeof(T) == 8                    ? DType::float64
                          : t.moment_type == DType::float32 ? DType::float32
                                                            : DType::bfloat16;
    const auto strip = [&](const void* stream, DType type) {
      return Strip(stream, type, chunk.begin);
    };
    w = strip(t.w, weights);
    g = strip(t.g, weights);
    m = strip(t.m, moments);
    v = strip(t.v, moments);
    vmax = strip(t.vmax, moments);
    a = strip(t.a, t.anchor_type);
    ema = strip(t.ema, dtype_of<T>);
    const bool narrow = sizeof(T) == 4;  // may be
    if (narrow && t.storage == Storage::kahan) compensation = strip(t.companion, weights);
    weight = narrow && t.storage == Storage::master ? strip(t.companion, dtype_of<T>) : w;
    stochastic_ = t.storage == Storage::stochastic;
  }

  __device__ bool aligned(int n) const {
    return weight.aligned(n) && w.aligned(n) && compensation.aligned(n) && g.aligned(n) &&
           m.aligned(n) && v.aligned(n) && vmax.aligned(n) && a.aligned(n) && ema.aligned(n);
  }

  // The numbers that `weight` and `compensation` held.
  template <int n>
  __device__ Vector<T, n> weights(const Raw<T, n>& x, const Raw<T, n>& rest) const {
    Vector<T, n> sum = widened(x, weight.type);
    if (!compensation) return sum;
    const Vector<T, n> lost = widened(rest, compensation.type);
#pragma unroll
    for (int k = 0; k < n; ++k) sum.x[k] = sum.x[k] + lost.x[k];
    return sum;
  }

  // Returns the weights as the model sees them. `pulled`: once more in the same step.
  template <int n>
  __device__ Vector<T, n> store_weights(int i, const Vector<T, n>& x, bool pulled) const {
    if constexpr (sizeof(T) == 4)
      if (is_narrow(w.type)) {
        if (weight.data != w.data) store(weight, i, x);
        const uint32_t key = pulled ? keys_.pulled : keys_.weight;
        const Vector<uint16_t, n> bits =
            stochastic_ ? at_random<0>(i, x, w.type, key) : to_nearest(x, w.type);
        store(w, i, bits);
        const Vector<T, n> seen = widened(bits, w.type);
        if (compensation) {
          Vector<T, n> lost;
#pragma unroll
          for (int k = 0; k < n; ++k) lost.x[k] = x.x[k] - seen.x[k];
          store(compensation, i, to_nearest(lost, w.type));
        }
        return seen;
      }
    store(w, i, x);
    return x;
  }

  // v and vmax take the higher half of an element's random bits, m the lower one.
  template <bool higher, int n>
  __device__ void store_moment(const Strip& s, int i, const Vector<T, n>& x) const {
    if constexpr (sizeof(T) == 4)
      if (is_narrow(s.type)) {
        store(s, i, at_random<higher ? 16 : 0>(i, x, DType::bfloat16, keys_.moments));
        return;
      }
    store(s, i, x);
  }

  template <int n>
  __device__ void update_average(int i, Vector<T, n> average, const Vector<T, n>& seen,
                                 const Coefficients<T>& c) const {
#pragma unroll
    for (int k = 0; k < n; ++k) average.x[k] = wdk::average(average.x[k], seen.x[k], c);
    store(ema, i, average);
  }

 private:
  template <int shift, int n>
  __device__ Vector<uint16_t, n> at_random(int i, const Vector<T, n>& x, DType type,
                                           uint32_t key) const {
    return narrowed<false>(x, type, [&](int k) { return noise(key, numbers_(i + k)) >> shift; });
  }

  Numbers numbers_;
  Noise keys_;
  bool stochastic_;
};

// Calls body(Width<n>{}, i) for vectors of n elements at i, all those of this block's share.
template <int n>
struct Width {
  static constexpr int value = n;
};

// `ahead`: how many are begun before the first is done; of use where nothing is stored.
template <int n, int ahead, class Body>
__device__ void for_each_vector(bool aligned, int size, const Body& body) {
  const int vectors = aligned ? size - size % n : 0;  // their elements
#pragma unroll ahead
  for (int i = threadIdx.x * n; i < vectors; i += kThreads * n) body(Width<n>{}, i);
#pragma unroll 1
  for (int i = vectors + threadIdx.x; i < size; i += kThreads) body(Width<1>{}, i);
}

template <class T, class Body>
__device__ void for_each_vector(const Strips<T>& s, int size, const Body& body) {
  constexpr int n = 16 / sizeof(T);
  for_each_vector<n, 1>(s.aligned(n), size, body);
}

}  // namespace wdk
