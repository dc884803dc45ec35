// The GPU kernels and their launches. They know streams, chunks, blocks and the order of work; the
// math is update.h's and coefficients.h's.
//
// A kernel takes all tensors of a type in one launch. Blocks stay, and take one chunk after the
// other. Nothing here waits for the device.
#include <cuda_runtime.h>

#include <stdexcept>

#include "cuda_kernels.h"

namespace wdk {

namespace {

constexpr int kThreads = 128;
constexpr int kWarp = 32;

// ---- streams -----------------------------------------------------------------------------------

// As many elements as a thread reads and writes at once: 16 bytes of an aligned stream, else one.
template <class T, int n>
struct alignas(n * sizeof(T)) Vector {
  T x[n];
};

// Addresses come out of tables: that they are global memory's, the compiler has to be told.
template <int n, class T>
__device__ Vector<T, n> load(const T* stream, int i) {
  __builtin_assume(__isGlobal(stream));
  return *reinterpret_cast<const Vector<T, n>*>(stream + i);
}

template <int n, class T>
__device__ void store(T* stream, int i, const Vector<T, n>& x) {
  __builtin_assume(__isGlobal(stream));
  *reinterpret_cast<Vector<T, n>*>(stream + i) = x;
}

template <class T>
__device__ bool aligned(const Streams<T>& s) {
  const auto address = [](const void* x) { return reinterpret_cast<uintptr_t>(x); };
  return (address(s.w) | address(s.g) | address(s.m) | address(s.v) | address(s.vmax) |
          address(s.a)) %
             16 ==
         0;
}

// Calls body(Width<n>{}, i) for vectors of n elements at i, all of them of this block's share.
template <int n>
struct Width {
  static constexpr int value = n;
};

// `ahead`: how many are begun before the first is done; of use where nothing is stored.
template <int ahead, class T, class Body>
__device__ void for_each_vector(const Streams<T>& s, int size, const Body& body) {
  constexpr int n = 16 / sizeof(T);
  const int whole = aligned(s) ? size - size % n : 0;
#pragma unroll ahead
  for (int i = threadIdx.x * n; i < whole; i += kThreads * n) body(Width<n>{}, i);
#pragma unroll 1
  for (int i = whole + threadIdx.x; i < size; i += kThreads) body(Width<1>{}, i);
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

// ---- the step of a chunk -----------------------------------------------------------------------

template <class T>
__device__ Coefficients<T> coefficients_of(const GpuWork& work, const Row& row) {
  Coefficients<double> c = row.numbers;
  if (row.hyper.stable) c.decay = stable_decay(c.decay, *work.mean_square);
  return rounded<T>(c);
}

// The step of n elements at i; what they add to the projection's sums, if there is one.
template <bool projected, int n, class T>
__device__ void update_vector(const Streams<T>& s, int i, const Coefficients<T>& c, Variant is,
                              double (&sums)[3]) {
  Vector<T, n> w = load<n>(s.w, i), m = load<n>(s.m, i), v = load<n>(s.v, i), vmax, a;
  const Vector<T, n> g = load<n>(s.g, i);
  if (is.amsgrad) vmax = load<n>(s.vmax, i);
  if (is.anchored) a = load<n>(s.a, i);

  ProjectionTerms<T> total{};
#pragma unroll
  for (int k = 0; k < n; ++k) {
    Element<T> x{
        w.x[k], g.x[k], m.x[k], v.x[k], is.amsgrad ? vmax.x[k] : T(0), is.anchored ? a.x[k] : T(0)};
    update(x, c, is);
    if (projected) {
      const ProjectionTerms<T> p = projection_terms(w.x[k], c.sign * x.g, x.a, x.w, is.anchored);
      total.alignment += p.alignment;
      total.distance2 += p.distance2;
      total.growth2 += p.growth2;
    }
    w.x[k] = x.w;
    m.x[k] = x.m;
    v.x[k] = x.v;
    vmax.x[k] = x.vmax;
  }
  store<n>(s.w, i, w);
  store<n>(s.m, i, m);
  store<n>(s.v, i, v);
  if (is.amsgrad) store<n>(s.vmax, i, vmax);
  sums[0] += double(total.alignment);
  sums[1] += double(total.distance2);
  sums[2] += double(total.growth2);
}

template <bool projected, class T>
__device__ void update_chunk(const GpuWork& work, const Chunk& chunk, double (&sums)[3]) {
  const Tensor& tensor = work.tensors[chunk.tensor];
  const Row& row = work.rows[tensor.row];
  const Streams<T> s(tensor, chunk.begin);
  const Coefficients<T> c = coefficients_of<T>(work, row);
  Variant is = row.hyper.is;
  if (projected) is.decay = Decay::projection;  // known to the compiler
  for_each_vector<1>(s, chunk.size, [&](auto width, int i) {
    update_vector<projected, decltype(width)::value>(s, i, c, is, sums);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 5 : 4)
    update_kernel(const GpuWork work) {
  double unused[3] = {};
  for (int k = work.first_chunk + blockIdx.x; k < work.last_chunk; k += gridDim.x)
    update_chunk<false, T>(work, work.chunks[k], unused);
}

// ---- SWD: V before the step --------------------------------------------------------------------

// A chunk's sum of g^2, or with amsgrad of the vmax this step will have: the maximum has no
// recurrence, so it is computed here and once more in the step.
template <class T>
__device__ double reduce_chunk(const GpuWork& work, const Chunk& chunk) {
  const Tensor& tensor = work.tensors[chunk.tensor];
  const Row& row = work.rows[tensor.row];
  const Streams<T> s(tensor, chunk.begin);
  const bool amsgrad = row.hyper.is.amsgrad;
  const T one_minus_beta2 = T(row.numbers.one_minus_beta2);
  double sum = 0;
  for_each_vector<4>(s, chunk.size, [&](auto width, int i) {
    constexpr int n = decltype(width)::value;
    const Vector<T, n> g = load<n>(s.g, i);
    if (amsgrad) {
      const Vector<T, n> v = load<n>(s.v, i), vmax = load<n>(s.vmax, i);
#pragma unroll
      for (int k = 0; k < n; ++k)
        sum += double(maximum(vmax.x[k], second_moment(v.x[k], g.x[k], one_minus_beta2)));
    } else {
#pragma unroll
      for (int k = 0; k < n; ++k) sum += double(g.x[k]) * double(g.x[k]);
    }
  });
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 8) reduce_kernel(const GpuWork work, int all_blocks) {
  for (int index = work.first_chunk + blockIdx.x; index < work.last_chunk; index += gridDim.x) {
    const Chunk& chunk = work.chunks[index];
    const Span span = work.spans[chunk.tensor];
    double sum[1] = {reduce_chunk<T>(work, chunk)};
    sum_over_block(sum);
    if (span.count > 1) {
      if (threadIdx.x == 0) work.sums[index] = sum[0];
      if (!last_to_arrive(&work.done[chunk.tensor], span.count)) continue;
      sum[0] = 0;
      for (int k = threadIdx.x; k < span.count; k += kThreads)
        sum[0] += __ldcg(&work.sums[span.first + k]);
      sum_over_block(sum);
    }
    if (threadIdx.x == 0) {
      const Tensor& tensor = work.tensors[chunk.tensor];
      const Row& row = work.rows[tensor.row];
      double v_sum = sum[0];
      if (tensor.v_sum) {
        v_sum = kept_sum(*tensor.v_sum, v_sum, 1 - row.hyper.beta2);
        *tensor.v_sum = v_sum;
      }
      work.means[chunk.tensor] = v_sum / row.hyper.bias_correction2(row.t);
    }
  }

  if (!last_to_arrive(work.blocks_done, all_blocks)) return;
  double total[1] = {0};
  for (int i = threadIdx.x; i < work.n_tensors; i += kThreads) total[0] += __ldcg(&work.means[i]);
  sum_over_block(total);
  if (threadIdx.x == 0) *work.mean_square = total[0] / work.elements;
}

// ---- SPD: the step, the decision over a tensor, the second touch --------------------------------

template <class T>
__device__ void pull_chunk(const GpuWork& work, const Chunk& chunk, T shrink) {
  const Tensor& tensor = work.tensors[chunk.tensor];
  const bool anchored = work.rows[tensor.row].hyper.is.anchored;
  const Streams<T> s(tensor, chunk.begin);
  for_each_vector<1>(s, chunk.size, [&](auto width, int i) {
    constexpr int n = decltype(width)::value;
    Vector<T, n> w = load<n>(s.w, i), a;
    if (anchored) a = load<n>(s.a, i);
#pragma unroll
    for (int k = 0; k < n; ++k)
      w.x[k] = project(w.x[k], anchored ? a.x[k] : T(0), shrink, anchored);
    store<n>(s.w, i, w);
  });
}

// In thread 0.
__device__ double shrink_of(const GpuWork& work, const Chunk& chunk, const double (&sums)[3]) {
  const Row& row = work.rows[work.tensors[chunk.tensor].row];
  return selected_decay(row.numbers.decay, ProjectionSums{sums[0], sums[1], sums[2]});
}

// Sums of all chunks of a tensor, and the decision.
__device__ void decide(const GpuWork& work, const Chunk& chunk, const Span& span) {
  double sums[3] = {};
  for (int k = threadIdx.x; k < span.count; k += kThreads) {
    const ProjectionSums& p = work.projections[span.first + k];
    sums[0] += __ldcg(&p.alignment);
    sums[1] += __ldcg(&p.distance2);
    sums[2] += __ldcg(&p.growth2);
  }
  sum_over_block(sums);
  if (threadIdx.x == 0) {
    work.shrink[chunk.tensor] = shrink_of(work, chunk, sums);
    __threadfence();
    atomicExch(&work.decided[chunk.tensor], 1);
  }
}

// Tickets are drawn in order: whoever waits for a decision waits for blocks that are at work.
template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 4 : 3)
    project_kernel(const GpuWork work) {
  __shared__ int drawn;
  __shared__ double shrink;
  for (;;) {
    __syncthreads();  // all have read what was drawn before
    if (threadIdx.x == 0) drawn = work.first_ticket + atomicAdd(work.next_ticket, 1);
    __syncthreads();
    if (drawn >= work.last_ticket) return;
    const Ticket ticket = work.tickets[drawn];
    const Chunk& chunk = work.chunks[ticket.chunk];
    const Span span = work.spans[chunk.tensor];

    if (!ticket.second_touch) {
      double sums[3] = {};
      update_chunk<true, T>(work, chunk, sums);
      sum_over_block(sums);
      if (span.count > 1) {
        if (threadIdx.x == 0) work.projections[ticket.chunk] = {sums[0], sums[1], sums[2]};
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
    if (shrink != 0) pull_chunk(work, chunk, T(shrink));
  }
}

// ---- numbers on the device ---------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads) count_kernel(const GpuWork work) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= work.n_rows || !work.rows[i].step.data) return;
  Row& row = work.rows[i];
  row.t = row.step.get() + 1;
  row.step.set(row.t);
  Hyper hyper = row.hyper;
  if (hyper.live_lr.data) hyper.lr = hyper.live_lr.get();
  if (hyper.live_weight_decay.data) hyper.weight_decay = hyper.live_weight_decay.get();
  row.numbers = coefficients(hyper, row.t);
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
    error = cudaFuncGetAttributes(&attributes, update_kernel<float>);
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
  int processors = 0, blocks = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
        "asking for the number of multiprocessors");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, update_kernel<float>, kThreads, 0),
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

void count(const GpuWork& work, Stream stream) {
  launch(count_kernel, (work.n_rows + kThreads - 1) / kThreads, stream, "counting the step", work);
}

void reduce(const GpuWork& work, int blocks, int all_blocks, Stream stream) {
  launch(work.dtype == DType::float32 ? reduce_kernel<float> : reduce_kernel<double>, blocks,
         stream, "the sum over the gradients", work, all_blocks);
}

void update(const GpuWork& work, int blocks, Stream stream) {
  launch(work.dtype == DType::float32 ? update_kernel<float> : update_kernel<double>, blocks,
         stream, "the optimizer's step", work);
}

void project(const GpuWork& work, int blocks, Stream stream) {
  launch(work.dtype == DType::float32 ? project_kernel<float> : project_kernel<double>, blocks,
         stream, "the optimizer's step", work);
}

}  // namespace cuda

}  // namespace wdk
