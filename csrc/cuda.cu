// The GPU kernels and their launches. They know streams, chunks, blocks and the order of work; the
// math is update.h's and coefficients.h's, storage dtype.h's.
//
// A kernel takes all tensors that are computed in one type, in one launch; in which types they are
// stored, each block reads in the table of tensors. Blocks stay, and take one chunk after the other.
// Nothing here waits for the device.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>

#include "cuda_kernels.h"

namespace wdk {

namespace {

constexpr int kThreads = 128;
constexpr int kWarp = 32;

// ---- streams -----------------------------------------------------------------------------------

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

// A tensor's streams from a chunk's first element on, and how they are stored.
template <class T>
class Strips {
 public:
  Strip weight;  // as it is computed with: w, or its master copy
  Strip w, compensation, g, m, v, vmax, a, ema;

  __device__ Strips(const Tensor& t, const Row& row, const Chunk& chunk)
      : first_(uint32_t(chunk.begin)), keys_(tensor_key(row.numbers.key, t.index)) {
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
    if (sizeof(T) == 4) compensation = strip(t.compensation, weights);
    weight = sizeof(T) == 4 && t.master ? strip(t.master, dtype_of<T>) : w;
    stochastic_ = !t.master && !t.compensation && row.hyper.rounding == Rounding::stochastic;
  }

  __device__ bool aligned(int n) const {
    return weight.aligned(n) && w.aligned(n) && compensation.aligned(n) && g.aligned(n) &&
           m.aligned(n) && v.aligned(n) && vmax.aligned(n) && a.aligned(n) && ema.aligned(n);
  }

  // Of what `weight` and `compensation` held.
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
    return narrowed<false>(x, type, [&](int k) { return noise(key, first_ + i + k) >> shift; });
  }

  uint32_t first_;  // index in the tensor
  Noise keys_;
  bool stochastic_;
};

// Calls body(Width<n>{}, i) for vectors of n elements at i, all of them of this block's share.
template <int n>
struct Width {
  static constexpr int value = n;
};

// `ahead`: how many are begun before the first is done; of use where nothing is stored.
template <int n, int ahead, class Body>
__device__ void for_each_vector(bool aligned, int size, const Body& body) {
  const int whole = aligned ? size - size % n : 0;
#pragma unroll ahead
  for (int i = threadIdx.x * n; i < whole; i += kThreads * n) body(Width<n>{}, i);
#pragma unroll 1
  for (int i = whole + threadIdx.x; i < size; i += kThreads) body(Width<1>{}, i);
}

template <class T, class Body>
__device__ void for_each_vector(const Strips<T>& s, int size, const Body& body) {
  constexpr int n = 16 / sizeof(T);
  for_each_vector<n, 1>(s.aligned(n), size, body);
}

// ---- sums --------------------------------------------------------------------------------------

// The sums over all threads, in thread 0; always in the same order.
template <int n>
__device__ void sum_over_block(double (&x)[n]) {
  __shared__ double warps[n][kThreads / kWarp];
  __syncthreads();  // the sums before these have been read
#pragma unroll
  for (int k = 0; k < n; ++k) {
    for (int delta = kWarp / 2; delta > 0; delta /= 2)
      x[k] += __shfl_down_sync(0xffffffff, x[k], delta);
    if (threadIdx.x % kWarp == 0) warps[k][threadIdx.x / kWarp] = x[k];
  }
  __syncthreads();
  if (threadIdx.x == 0)
    for (int k = 0; k < n; ++k) {
      x[k] = 0;
      for (int warp = 0; warp < kThreads / kWarp; ++warp) x[k] += warps[k][warp];
    }
}

// The sums over all chunks of a tensor, in thread 0, from a table that other blocks have written.
template <int n>
__device__ void sum_over_chunks(double (&x)[n], const double (*table)[n], Span span) {
#pragma unroll
  for (int j = 0; j < n; ++j) x[j] = 0;
#pragma unroll 1
  for (int k = threadIdx.x; k < span.count; k += kThreads)
#pragma unroll
    for (int j = 0; j < n; ++j) x[j] += __ldcg(&table[span.first + k][j]);
  sum_over_block(x);
}

// Whether this block is the last of `all` to get here. What the others wrote before is then to be
// seen, past the L1 cache.
__device__ bool last_to_arrive(int32_t* arrived, int all) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(arrived, 1) == all - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

__device__ ProjectionSums projection_sums(const double* x) { return {x[0], x[1], x[2]}; }
__device__ MeasuredSums measured_sums(const double* x) {
  return {x[0], x[1], x[2], x[3], x[4], x[5]};
}

// ---- numbers of the whole step, and of rows whose steps are counted on the device ---------------

// Whether this step is to be skipped.
__device__ bool skipped(const GpuWork& work) { return work.whole && work.whole->skip; }

template <class T>
__device__ Coefficients<T> coefficients_of(const GpuWork& work, const Row& row) {
  Coefficients<T> c =
      rounded<T>(joined(row.hyper, row.numbers, work.whole ? *work.whole : Whole{}));
  // Out of a shuffle, though all lanes have the same: else they are rounded again at every element.
  c.one_minus_beta1 = __shfl_sync(0xffffffff, c.one_minus_beta1, 0);
  c.one_minus_beta2 = __shfl_sync(0xffffffff, c.one_minus_beta2, 0);
  return c;
}

// By one thread, for all.
__device__ void announce(const GpuWork& work, const Request& request, const Whole& whole) {
  if (work.whole) *work.whole = whole;
  if (request.grad_norm) *request.grad_norm = whole.grad_norm;
  if (whole.skip) ++*request.skipped;
}

// The next step of a row, if it is counted here; of one that is not skipped.
__device__ void count(Row& row) {
  if (!row.step.data) return;
  row.t = row.step.get() + 1;
  row.step.set(row.t);
  Hyper hyper = row.hyper;
  if (hyper.live_lr.data) hyper.lr = hyper.live_lr.get();
  if (hyper.live_weight_decay.data) hyper.weight_decay = hyper.live_weight_decay.get();
  row.numbers = numbers_of(hyper, row.t);
}

__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const GpuWork work, const Request request) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  const Whole whole = whole_of(request, 0);  // nothing has been summed, for there are no elements
  if (i == 0) announce(work, request, whole);
  if (!whole.skip && i < work.n_rows) count(work.rows[i]);
}

// SWD: a tensor's part of V, times elements. Its kept sum obeys the recurrence of v itself; the
// maxima of amsgrad have none, and were summed as they will be.
__device__ double mean_part(const GpuWork& work, int index, double scale) {
  const Tensor& tensor = work.tensors[index];
  if (tensor.numel == 0) return 0;
  const Numbers& numbers = work.rows[tensor.row].numbers;
  double sum = __ldcg(&work.totals[index]);
  if (tensor.v_sum)
    sum = *tensor.v_sum =
        kept_sum(*tensor.v_sum, scale * scale * sum, numbers.coefficients.one_minus_beta2);
  return sum / numbers.bias_correction2;
}

// What becomes of the sums over all tensors; by one block.
__device__ void conclude(const GpuWork& work, const Request& request, Reduction what) {
  __shared__ Whole whole;
  double sum[1] = {0};
  if (what.first) {
#pragma unroll 1
    for (int i = threadIdx.x; i < work.n_tensors; i += kThreads)
      if (work.spans[i].count) sum[0] += __ldcg(&work.totals[i]);
    sum_over_block(sum);
    if (threadIdx.x == 0) announce(work, request, whole = whole_of(request, sum[0]));
  } else if (threadIdx.x == 0) {
    whole = *work.whole;
  }
  __syncthreads();
  if (whole.skip) return;
  if (what.first)
#pragma unroll 1
    for (int i = threadIdx.x; i < work.n_rows; i += kThreads) count(work.rows[i]);
  if (!what.stable) return;
  __syncthreads();  // the rows have been counted
  sum[0] = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < work.n_tensors; i += kThreads)
    sum[0] += mean_part(work, i, whole.scale);
  sum_over_block(sum);
  if (threadIdx.x == 0) work.whole->mean_square = sum[0] / work.elements;
}

// ---- sums before the step ----------------------------------------------------------------------

// Of gradients that are stored as S, 16 bytes at a time.
template <class S>
__device__ double squares(const Strip& g, int size) {
  constexpr int n = 16 / sizeof(S);
  double sum = 0;
  for_each_vector<n, 4>(g.aligned(n), size, [&](auto width, int i) {
    const auto x = g.at<S, Vector<S, decltype(width)::value>>(i);
#pragma unroll
    for (int k = 0; k < decltype(width)::value; ++k)
      sum += double(widen(x.x[k])) * double(widen(x.x[k]));
  });
  return sum;
}

__device__ double squares(const Tensor& tensor, const Chunk& chunk) {
  const Strip g(tensor.g, tensor.weight_type, chunk.begin);
  switch (tensor.weight_type) {
    case DType::float32:
      return squares<float>(g, chunk.size);
    case DType::float64:
      return squares<double>(g, chunk.size);
    case DType::bfloat16:
      return squares<BFloat16>(g, chunk.size);
    default:
      return squares<Float16>(g, chunk.size);
  }
}

// Of the vmax that this step will have: it is computed here and once more in the step.
template <class T>
__device__ double maxima(const Tensor& tensor, const Row& row, const Chunk& chunk, double scale) {
  const Strips<T> s(tensor, row, chunk);
  const T scale_of_g = T(scale), one_minus_beta2 = T(1 - row.hyper.beta2);
  double sum = 0;
  for_each_vector(s, chunk.size, [&](auto width, int i) {
    constexpr int n = decltype(width)::value;
    Raw<T, n> raw_g, raw_v, raw_vmax;
    load(raw_g, s.g, i);
    load(raw_v, s.v, i);
    load(raw_vmax, s.vmax, i);
    const Vector<T, n> g = widened(raw_g, s.g.type), v = widened(raw_v, s.v.type);
    const Vector<T, n> vmax = widened(raw_vmax, s.vmax.type);
#pragma unroll
    for (int k = 0; k < n; ++k)
      sum +=
          double(maximum(vmax.x[k], second_moment(v.x[k], scale_of_g * g.x[k], one_minus_beta2)));
  });
  return sum;
}

__global__ void __launch_bounds__(kThreads, 5)
    reduce_kernel(const GpuWork work, const Request request, const Reduction what) {
  if (!what.first && work.whole->skip) return;
  const double scale = !what.maxima ? 1
                       : what.first ? whole_of(request, 0).scale
                                    : work.whole->scale;
  for (int index = work.first_chunk + blockIdx.x; index < work.last_chunk; index += gridDim.x) {
    const Chunk& chunk = work.chunks[index];
    const Tensor& tensor = work.tensors[chunk.tensor];
    const Row& row = work.rows[tensor.row];
    const Span span = work.spans[chunk.tensor];
    double sum[1];
    if (what.maxima && row.hyper.is.amsgrad)
      sum[0] = tensor.type() == DType::float32 ? maxima<float>(tensor, row, chunk, scale)
                                               : maxima<double>(tensor, row, chunk, scale);
    else if (what.first)
      sum[0] = squares(tensor, chunk);
    else
      continue;
    sum_over_block(sum);
    if (span.count > 1) {
      if (threadIdx.x == 0) work.sums[index][0] = sum[0];
      if (!last_to_arrive(&work.done[chunk.tensor], span.count)) continue;
      sum_over_chunks(sum, work.sums, span);
    }
    if (threadIdx.x == 0) work.totals[chunk.tensor] = sum[0];
  }
  if (last_to_arrive(work.blocks_done, gridDim.x)) conclude(work, request, what);
}

// ---- the step of a chunk -----------------------------------------------------------------------

// The step of n elements at i, and what they add to the sums: SPD's, and telemetry's behind them.
template <bool projected, bool measured, int n, class T, int kSums>
__device__ void update_vector(const Strips<T>& s, int i, const Coefficients<T>& c, Variant is,
                              double (&sums)[kSums]) {
  Raw<T, n> raw_w, raw_rest, raw_g, raw_m, raw_v, raw_vmax, raw_a, raw_ema;
  const bool averaged = !projected && s.ema;  // else after the second touch
  load(raw_w, s.weight, i);
  load(raw_g, s.g, i);
  load(raw_m, s.m, i);
  load(raw_v, s.v, i);
  load(raw_vmax, s.vmax, i, is.amsgrad);
  load(raw_a, s.a, i, is.anchored);
  load(raw_rest, s.compensation, i, bool(s.compensation));
  load(raw_ema, s.ema, i, averaged);

  Vector<T, n> w = s.weights(raw_w, raw_rest), m = widened(raw_m, s.m.type);
  Vector<T, n> v = widened(raw_v, s.v.type), vmax{};
  const Vector<T, n> g = widened(raw_g, s.g.type), a = widened(raw_a, s.a.type);
  if (is.amsgrad) vmax = widened(raw_vmax, s.vmax.type);

  T terms[kProjected] = {};
#pragma unroll
  for (int k = 0; k < n; ++k) {
    Element<T> x{w.x[k], g.x[k], m.x[k], v.x[k], vmax.x[k], a.x[k], 0, 0};
    update(x, c, is);
    if (projected) {
      const ProjectionTerms<T> p = projection_terms(w.x[k], c.scale * x.g, x.a, x.w, is.anchored);
      terms[0] += p.alignment;
      terms[1] += p.distance2;
      terms[2] += p.growth2;
    }
    if (measured) {
      const MeasuredSums t = measured_terms<double>(w.x[k], x, c, is);
      double* to = sums + (projected ? kProjected : 0);
      to[0] += t.weight2;
      to[1] += t.update2;
      to[2] += t.decay2;
      to[3] += t.distance2;
      to[4] += t.update_weight;
      to[5] += t.rate;
      to[6] += double(x.g) * double(x.g);
    }
    w.x[k] = x.w;
    m.x[k] = x.m;
    v.x[k] = x.v;
    vmax.x[k] = x.vmax;
  }
#pragma unroll
  for (int k = 0; projected && k < kProjected; ++k) sums[k] += double(terms[k]);

  const Vector<T, n> seen = s.store_weights(i, w, false);
  s.template store_moment<false>(s.m, i, m);
  s.template store_moment<true>(s.v, i, v);
  if (is.amsgrad) s.template store_moment<true>(s.vmax, i, vmax);
  if (averaged) s.update_average(i, widened(raw_ema, s.ema.type), seen, c);
}

template <bool projected, bool measured, class T, int kSums>
__device__ void update_chunk(const GpuWork& work, const Chunk& chunk, double (&sums)[kSums]) {
  const Tensor& tensor = work.tensors[chunk.tensor];
  const Row& row = work.rows[tensor.row];
  const Strips<T> s(tensor, row, chunk);
  const Coefficients<T> c = coefficients_of<T>(work, row);
  Variant is = row.hyper.is;
  if (projected) is.decay = Decay::projection;  // known to the compiler
  for_each_vector(s, chunk.size, [&](auto width, int i) {
    update_vector<projected, measured, decltype(width)::value>(s, i, c, is, sums);
  });
}

// Blocks that a multiprocessor is to hold at once, if it has registers for them.
template <class T, bool measured>
constexpr int kResident = measured         ? 3
                          : sizeof(T) == 4 ? 5
                                           : 4;

template <class T, bool measured>
__global__ void __launch_bounds__(kThreads, kResident<T, measured>)
    update_kernel(const GpuWork work) {
  if (skipped(work)) return;
  for (int k = work.first_chunk + blockIdx.x; k < work.last_chunk; k += gridDim.x) {
    double sums[measured ? kMeasured : 1] = {};
    update_chunk<false, measured, T>(work, work.chunks[k], sums);
    if (!measured) continue;
    sum_over_block(sums);
    if (threadIdx.x == 0)
      for (int j = 0; j < kMeasured; ++j) work.measured[k][j] = sums[j];
  }
}

// ---- SPD: the step, the decision over a tensor, the second touch --------------------------------

// Pulls the weights as they are stored, and takes the average of what then stands there.
template <class T>
__device__ void pull_chunk(const GpuWork& work, const Chunk& chunk, double shrink) {
  const Tensor& tensor = work.tensors[chunk.tensor];
  if (shrink == 0 && !tensor.ema) return;
  const Row& row = work.rows[tensor.row];
  const bool anchored = row.hyper.is.anchored;
  const Strips<T> s(tensor, row, chunk);
  const Coefficients<T> c = coefficients_of<T>(work, row);
  for_each_vector(s, chunk.size, [&](auto width, int i) {
    constexpr int n = decltype(width)::value;
    const bool pulled = shrink != 0;
    Raw<T, n> raw_w, raw_rest, raw_a, raw_seen, raw_ema;
    load(raw_w, s.weight, i, pulled);
    load(raw_seen, s.w, i, !pulled);
    load(raw_rest, s.compensation, i, pulled && s.compensation);
    load(raw_a, s.a, i, pulled && anchored);
    load(raw_ema, s.ema, i, bool(s.ema));
    Vector<T, n> w;
    if (pulled) {
      w = s.weights(raw_w, raw_rest);
      const Vector<T, n> a = widened(raw_a, s.a.type);
#pragma unroll
      for (int k = 0; k < n; ++k) w.x[k] = project(w.x[k], a.x[k], T(shrink), anchored);
      w = s.store_weights(i, w, true);
    } else {
      w = widened(raw_seen, s.w.type);
    }
    if (s.ema) s.update_average(i, widened(raw_ema, s.ema.type), w, c);
  });
}

// In thread 0.
__device__ double shrink_of(const GpuWork& work, const Chunk& chunk, const double* sums) {
  const Row& row = work.rows[work.tensors[chunk.tensor].row];
  return row.numbers.coefficients.decay * projection_ratio(projection_sums(sums));
}

// The decision over a tensor all of whose chunks have been updated.
__device__ void decide(const GpuWork& work, const Chunk& chunk, Span span) {
  double sums[kProjected];
  sum_over_chunks(sums, work.projections, span);
  if (threadIdx.x == 0) {
    work.shrink[chunk.tensor] = shrink_of(work, chunk, sums);
    __threadfence();
    atomicExch(&work.decided[chunk.tensor], 1);
  }
}

// Tickets are drawn in order: whoever waits for a decision waits for blocks that are at work.
template <class T, bool measured>
__global__ void __launch_bounds__(kThreads, measured ? 3 : 4) project_kernel(const GpuWork work) {
  __shared__ int drawn;
  __shared__ double shrink;
  if (skipped(work)) return;
  for (;;) {
    __syncthreads();  // all have read what was drawn before
    if (threadIdx.x == 0) drawn = work.first_ticket + atomicAdd(work.next_ticket, 1);
    __syncthreads();
    if (drawn >= work.last_ticket) return;
    const Ticket ticket = work.tickets[drawn];
    const Chunk& chunk = work.chunks[ticket.chunk];
    const Span span = work.spans[chunk.tensor];

    if (!ticket.second_touch) {
      double sums[kProjected + (measured ? kMeasured : 0)] = {};
      update_chunk<true, measured, T>(work, chunk, sums);
      sum_over_block(sums);
      if (threadIdx.x == 0) {
        for (int j = 0; j < kProjected; ++j) work.projections[ticket.chunk][j] = sums[j];
        for (int j = 0; measured && j < kMeasured; ++j)
          work.measured[ticket.chunk][j] = sums[kProjected + j];
      }
      if (span.count > 1) {
        if (last_to_arrive(&work.done[chunk.tensor], span.count)) decide(work, chunk, span);
        continue;
      }
      if (threadIdx.x == 0) shrink = shrink_of(work, chunk, sums);
    } else if (threadIdx.x == 0) {
      const volatile int32_t* decided = &work.decided[chunk.tensor];
      while (!*decided) __nanosleep(200);
      __threadfence();
      shrink = __ldcg(&work.shrink[chunk.tensor]);
    }
    __syncthreads();
    pull_chunk<T>(work, chunk, shrink);
  }
}

// ---- telemetry ---------------------------------------------------------------------------------

// A tensor's row of the table, by a block.
__global__ void __launch_bounds__(kThreads) tell_kernel(const GpuWork work, double* table) {
  if (skipped(work)) return;
  const int index = blockIdx.x;
  const Row& row = work.rows[work.tensors[index].row];
  const bool projected = row.hyper.is.decay == Decay::projection;
  double measured[kMeasured], projection[kProjected];
  sum_over_chunks(measured, work.measured, work.spans[index]);
  if (projected) sum_over_chunks(projection, work.projections, work.spans[index]);
  if (threadIdx.x != 0) return;
  const ProjectionSums of_projection = projection_sums(projection);
  const double lr = row.hyper.live_lr.data ? row.hyper.live_lr.get() : row.hyper.lr;
  write_telemetry(table + int64_t(index) * kTelemetry, measured_sums(measured),
                  measured[kMeasured - 1], projected ? &of_projection : nullptr, lr, row.hyper,
                  row.numbers, work.whole ? *work.whole : Whole{});
}

// ---- the host's side ---------------------------------------------------------------------------

std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // forget it, if it can be forgotten
  throw std::runtime_error(
      std::string(what) + " failed: " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) +
      "). If an earlier kernel, of whatever library, is to blame, CUDA_LAUNCH_BLOCKING=1 names it");
}

template <class... Arguments>
void launch(void (*kernel)(Arguments...), int blocks, cuda::Stream stream, const char* what,
            Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, arguments...), what);
}

using Kernel = void (*)(GpuWork);

Kernel chosen(const GpuWork& work, Kernel of_float, Kernel of_double, Kernel of_float_measured,
              Kernel of_double_measured) {
  if (work.type == DType::float32) return work.measured ? of_float_measured : of_float;
  return work.measured ? of_double_measured : of_double;
}

// Kernels onto the device, which CUDA else does when they are first launched: the second launch of a
// step must not fail for want of memory when the first has written.
template <class... Kernels>
void preload(Kernels... kernels) {
  cudaFuncAttributes attributes;
  (check(cudaFuncGetAttributes(&attributes, kernels), "loading a kernel"), ...);
}

}  // namespace

namespace cuda {

int toolkit() { return CUDART_VERSION; }

std::vector<int> architectures() {
#ifdef __CUDA_ARCH_LIST__
  std::vector<int> list{__CUDA_ARCH_LIST__};
  for (int& each : list) each /= 10;
  return list;
#else
  return {};
#endif
}

std::string refusal(int device) {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
    return "there is no NVIDIA driver";
  int before;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) {
    error = cudaFuncGetAttributes(&attributes, update_kernel<float, false>);
    cudaSetDevice(before);
  }
  cudaGetLastError();
  if (error == cudaErrorInsufficientDriver)
    return "the driver, for CUDA " + version(driver) +
           ", is too old for this build, made with CUDA " + version(toolkit()) +
           ": update the driver, or install a build for an older CUDA";
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    const std::string chip = std::to_string(major) + std::to_string(minor);
    return "this build has no code for compute capability " + std::to_string(major) + "." +
           std::to_string(minor) + ": build it with WDK_CUDA_ARCHS=" + chip;
  }
  if (error != cudaSuccess) return std::string("CUDA says: ") + cudaGetErrorString(error);
  return "";
}

int resident_blocks(int device) {
  preload(prepare_kernel, reduce_kernel, tell_kernel);
  preload(update_kernel<float, false>, update_kernel<float, true>, update_kernel<double, false>,
          update_kernel<double, true>);
  preload(project_kernel<float, false>, project_kernel<float, true>, project_kernel<double, false>,
          project_kernel<double, true>);
  int processors = 0, blocks = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
        "asking for the number of multiprocessors");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, update_kernel<float, false>,
                                                      kThreads, 0),
        "asking for the occupancy of a kernel");
  return processors * blocks;
}

OnDevice::OnDevice(int device) {
  check(cudaGetDevice(&before_), "asking for the current device");
  if (device != before_) check(cudaSetDevice(device), "choosing a device");
}

OnDevice::~OnDevice() {
  int now;
  if (cudaGetDevice(&now) == cudaSuccess && now != before_) cudaSetDevice(before_);
}

void clear(void* memory, size_t bytes, Stream stream) {
  check(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)), "clearing a table");
}

void prepare(const GpuWork& work, const Request& request, Stream stream) {
  launch(prepare_kernel, (std::max(work.n_rows, 1) + kThreads - 1) / kThreads, stream,
         "counting the step", work, request);
}

void reduce(const GpuWork& work, const Request& request, Reduction what, int blocks,
            Stream stream) {
  launch(reduce_kernel, blocks, stream, "the sum over the gradients", work, request, what);
}

void update(const GpuWork& work, int blocks, Stream stream) {
  launch(chosen(work, update_kernel<float, false>, update_kernel<double, false>,
                update_kernel<float, true>, update_kernel<double, true>),
         blocks, stream, "the optimizer's step", work);
}

void project(const GpuWork& work, int blocks, Stream stream) {
  launch(chosen(work, project_kernel<float, false>, project_kernel<double, false>,
                project_kernel<float, true>, project_kernel<double, true>),
         blocks, stream, "the optimizer's step", work);
}

void tell(const GpuWork& work, double* table, Stream stream) {
  launch(tell_kernel, work.n_tensors, stream, "telemetry", work, table);
}

}  // namespace cuda

}  // namespace wdk
