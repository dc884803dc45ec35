// The GPU kernels and their launches. They know streams, chunks, blocks and the order of work; the
// math is update.h's and decide.h's, storage cuda_streams.h's.
//
// A kernel takes all tensors that are computed in one type, in one launch; in which types they are
// stored, each block reads in the table of tensors. Blocks stay, and take one chunk after the other.
// Nothing here waits for the device.
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda_errors.h"
#include "cuda_kernels.h"
#include "cuda_sums.h"

namespace wdk {

namespace {

// ---- what all tensors share, and rows whose steps are counted on the device ----------------------

// Whether this step is to be skipped.
__device__ bool skipped(const GpuWork& work) { return work.decision && work.decision->skip; }

__device__ Decision decision_of(const GpuWork& work) {
  return work.decision ? *work.decision : Decision{};
}

template <class T>
__device__ Coefficients<T> coefficients_of(const GpuWork& work, const Row& row) {
  Coefficients<T> c = rounded<T>(joined(row.options, row.numbers, decision_of(work)));
  // Out of a shuffle, though all lanes have the same: else they are rounded again at every element.
  c.one_minus_beta1 = __shfl_sync(0xffffffff, c.one_minus_beta1, 0);
  c.one_minus_beta2 = __shfl_sync(0xffffffff, c.one_minus_beta2, 0);
  return c;
}

// One thread tells it to all others, and to who has asked.
__device__ void announce(const GpuWork& work, const Request& request, const Decision& decision) {
  if (work.decision) *work.decision = decision;
  if (request.grad_norm) *request.grad_norm = decision.grad_norm;
  if (decision.skip) ++*request.skipped;
}

// Counts the next step of a row, if it is counted here, and finds its numbers.
__device__ void count(Row& row) {
  if (!row.step.data) return;
  row.t = row.step.get() + 1;
  row.step.set(row.t);
  GroupOptions options = row.options;
  if (options.device_lr.data) options.lr = options.device_lr.get();
  if (options.device_weight_decay.data) options.weight_decay = options.device_weight_decay.get();
  row.numbers = numbers_of(options, row.t);
}

// SWD: what a tensor adds to V, times all elements. Its kept sum obeys the recurrence of v itself; the
// maxima of amsgrad have none, and were summed as they will be.
__device__ double part_of_v(const GpuWork& work, int index, double scale) {
  const Tensor& tensor = work.tensors[index];
  const StepNumbers& numbers = work.rows[tensor.row].numbers;
  const double* sums = work.sums[index];
  double sum;
  if (tensor.v_sum)
    sum = *tensor.v_sum = kept_sum(*tensor.v_sum, tensor.total, sums[kGradient2], scale,
                                   numbers.coefficients.one_minus_beta2);
  else
    sum = sums[kMaximum];
  return sum / numbers.bias_correction2;
}

// Decides, from the table of sums, and counts the rows. One block does it; or several, which share the
// rows, where no sum is needed.
__device__ void conclude(const GpuWork& work, const Request& request, Round round, int block,
                         int blocks) {
  __shared__ Decision decision;
  double sum = 0;
  if (round.first) {
    if (request.needs_norm()) {
#pragma unroll 1
      for (int i = threadIdx.x; i < work.n_tensors; i += kThreads) sum += work.sums[i][kGradient2];
      sum = sum_over_block(sum);
      if (request.whole) sum = request.whole->gradient2;
    }
    if (threadIdx.x == 0) decision = decide(request, sum);
    if (threadIdx.x == 0 && block == 0) announce(work, request, decision);
  } else if (threadIdx.x == 0) {
    decision = *work.decision;
  }
  __syncthreads();
  if (decision.skip) return;
  if (round.first)
#pragma unroll 1
    for (int i = block * kThreads + threadIdx.x; i < work.n_rows; i += blocks * kThreads)
      count(work.rows[i]);
  if (!round.mean_v || work.total == 0) return;
  __syncthreads();  // the rows have been counted
  sum = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < work.n_tensors; i += kThreads)
    sum += part_of_v(work, i, decision.scale);
  sum = sum_over_block(sum);
  if (threadIdx.x != 0) return;
  work.decision->mean_v =
      request.whole ? mean_v_of(*request.whole, decision.scale) : sum / work.total;
}

__global__ void __launch_bounds__(kThreads)
    decide_kernel(const GpuWork work, const Request request, const Round round) {
  conclude(work, request, round, blockIdx.x, gridDim.x);
}

// ---- sums before the step ----------------------------------------------------------------------

// The squares of gradients that are stored as S, 16 bytes at a time.
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

// The vmax that this step will have: it is computed here and once more in the step.
template <class T>
__device__ double maxima(const Tensor& tensor, const Row& row, const Chunk& chunk, double scale) {
  const Strips<T> s(tensor, row, chunk);
  const T scale_of_g = T(scale), one_minus_beta2 = T(1 - row.options.beta2);
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
    reduce_kernel(const GpuWork work, const Request request, const Round round,
                  const bool decides) {
  if (!round.first && work.decision->skip) return;
  const double scale = !round.maxima ? 1
                       : round.first ? decide(request, 0).scale  // no norm is asked for
                                     : work.decision->scale;
  for (int index = work.first_chunk + blockIdx.x; index < work.last_chunk; index += gridDim.x) {
    const Chunk& chunk = work.chunks[index];
    const Tensor& tensor = work.tensors[chunk.tensor];
    const Row& row = work.rows[tensor.row];
    const Span span = work.spans[chunk.tensor];
    const Sum column = round.maxima && tensor.vmax ? kMaximum : kGradient2;
    double sum;
    if (column == kMaximum)
      sum = tensor.type() == DType::float32 ? maxima<float>(tensor, row, chunk, scale)
                                            : maxima<double>(tensor, row, chunk, scale);
    else if (round.squares)
      sum = squares(tensor, chunk);
    else
      continue;
    sum = sum_over_block(sum);
    if (span.count > 1) {
      if (threadIdx.x == 0) work.chunk_sums[index][column] = sum;
      if (!last_to_arrive(&work.done[chunk.tensor], span.count)) continue;
      sum = sum_over_rows(work.chunk_sums + span.first, column, span.count);
    }
    if (threadIdx.x == 0) work.sums[chunk.tensor][column] = sum;
  }
  if (decides && last_to_arrive(work.blocks_done, gridDim.x)) conclude(work, request, round, 0, 1);
}

// ---- the step of a chunk -----------------------------------------------------------------------

// The step of n elements at i, and what they add to the sums: SPD's, and telemetry's.
template <bool projected, bool measured, int n, class T>
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

  T few[kSums] = {};  // terms that are added in their own type first
#pragma unroll
  for (int k = 0; k < n; ++k) {
    Element<T> x{w.x[k], g.x[k], m.x[k], v.x[k], vmax.x[k], a.x[k], 0, 0};
    update(x, c, is);
    if (projected) {
      T terms[kSums];
      projection_terms(terms, w.x[k], c.scale * x.g, x.a, x.w, is);
      for_each_column<kProjectedColumns>([&](int j) { few[j] += terms[j]; });
    }
    if (measured) {
      double terms[kSums];
      measured_terms(terms, w.x[k], x, c, is);
      terms[kGradient2] = double(x.g) * double(x.g);
      for_each_column<kToldColumns>([&](int j) { sums[j] += terms[j]; });
    }
    w.x[k] = x.w;
    m.x[k] = x.m;
    v.x[k] = x.v;
    vmax.x[k] = x.vmax;
  }
  if (projected) for_each_column<kProjectedColumns>([&](int j) { sums[j] += double(few[j]); });

  const Vector<T, n> seen = s.store_weights(i, w, false);
  s.template store_moment<false>(s.m, i, m);
  s.template store_moment<true>(s.v, i, v);
  if (is.amsgrad) s.template store_moment<true>(s.vmax, i, vmax);
  if (averaged) s.update_average(i, widened(raw_ema, s.ema.type), seen, c);
}

// Its sums are in thread 0 afterwards; telemetry's are left in the chunk's row.
template <bool projected, bool measured, class T>
__device__ void update_chunk(const GpuWork& work, int index, double (&sums)[kSums]) {
  const Chunk& chunk = work.chunks[index];
  const Tensor& tensor = work.tensors[chunk.tensor];
  const Row& row = work.rows[tensor.row];
  const Strips<T> s(tensor, row, chunk);
  const Coefficients<T> c = coefficients_of<T>(work, row);
  Variant is = tensor.variant(row.options);
  if (projected) is.decay = Decay::projection;  // known to the compiler
  for_each_vector(s, chunk.size, [&](auto width, int i) {
    update_vector<projected, measured, decltype(width)::value>(s, i, c, is, sums);
  });
  constexpr unsigned set = (projected ? kProjectedColumns : 0) | (measured ? kToldColumns : 0);
  if (set) sum_over_block<set>(sums);
  if (measured && threadIdx.x == 0) leave<kToldColumns>(work.chunk_sums[index], sums);
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
    double sums[kSums] = {};
    update_chunk<false, measured, T>(work, k, sums);
  }
}

// ---- SPD: the step, the decision over a tensor, the second touch --------------------------------

// Pulls the weights as they are stored, and takes the average of what then stands there.
template <class T>
__device__ void pull_chunk(const GpuWork& work, const Chunk& chunk, double shrink) {
  const Tensor& tensor = work.tensors[chunk.tensor];
  if (shrink == 0 && !tensor.ema) return;
  const Row& row = work.rows[tensor.row];
  const Variant is = tensor.variant(row.options);
  const Strips<T> s(tensor, row, chunk);
  const Coefficients<T> c = coefficients_of<T>(work, row);
  for_each_vector(s, chunk.size, [&](auto width, int i) {
    constexpr int n = decltype(width)::value;
    const bool pulled = shrink != 0;
    Raw<T, n> raw_w, raw_rest, raw_a, raw_seen, raw_ema;
    load(raw_w, s.weight, i, pulled);
    load(raw_seen, s.w, i, !pulled);
    load(raw_rest, s.compensation, i, pulled && s.compensation);
    load(raw_a, s.a, i, pulled && is.anchored);
    load(raw_ema, s.ema, i, bool(s.ema));
    Vector<T, n> w;
    if (pulled) {
      w = s.weights(raw_w, raw_rest);
      const Vector<T, n> a = widened(raw_a, s.a.type);
#pragma unroll
      for (int k = 0; k < n; ++k) w.x[k] = project(w.x[k], a.x[k], T(shrink), is);
      w = s.store_weights(i, w, true);
    } else {
      w = widened(raw_seen, s.w.type);
    }
    if (s.ema) s.update_average(i, widened(raw_ema, s.ema.type), w, c);
  });
}

// One thread finds it from a tensor's row of sums.
__device__ double shrink_of(const GpuWork& work, int tensor, const double* sums) {
  const Row& row = work.rows[work.tensors[tensor].row];
  return row.numbers.coefficients.decay * projection_ratio(sums);
}

// Decides over a tensor all of whose chunks have been updated. The block that was the last to update
// one does it.
__device__ void select(const GpuWork& work, int tensor, Span span) {
  double sums[kSums];
  sum_over_rows<kProjectedColumns>(sums, work.chunk_sums + span.first, span.count);
  if (threadIdx.x != 0) return;
  leave<kProjectedColumns>(work.sums[tensor], sums);
  work.shrink[tensor] = shrink_of(work, tensor, sums);
  store_release(&work.decided[tensor], 1);
}

// Tickets are drawn in order: whoever waits for a decision waits for blocks that are at work.
__device__ void wait_for(const int32_t* decided) {
  while (!load_relaxed(decided)) __nanosleep(200);
  load_acquire(decided);
}

template <class T, bool measured>
__global__ void __launch_bounds__(kThreads, measured ? 3 : 4)
    project_kernel(const GpuWork work, const Touch touch) {
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
    const bool alone = span.count == 1;

    if (!ticket.second_touch && touch != Touch::second) {
      double sums[kSums] = {};
      update_chunk<true, measured, T>(work, ticket.chunk, sums);
      if (threadIdx.x == 0)
        leave<kProjectedColumns>((alone ? work.sums[chunk.tensor] : work.chunk_sums[ticket.chunk]),
                                 sums);
      if (alone) {
        if (threadIdx.x == 0) shrink = shrink_of(work, chunk.tensor, sums);
      } else if (last_to_arrive(&work.done[chunk.tensor], span.count)) {
        select(work, chunk.tensor, span);
      }
    }
    if (touch == Touch::first || !(ticket.second_touch || alone)) continue;

    if (threadIdx.x == 0) {
      if (touch == Touch::second) {
        shrink = shrink_of(work, chunk.tensor, work.sums[chunk.tensor]);
      } else if (!alone) {
        wait_for(&work.decided[chunk.tensor]);
        shrink = work.shrink[chunk.tensor];
      }
    }
    __syncthreads();
    pull_chunk<T>(work, chunk, shrink);
  }
}

// ---- telemetry ---------------------------------------------------------------------------------

// A block writes the row of one tensor.
__global__ void __launch_bounds__(kThreads)
    tell_kernel(const GpuWork work, const bool add_up, double* rows) {
  if (skipped(work)) return;
  const int index = blockIdx.x;
  double* const sums = work.sums[index];
  if (add_up) {
    const Span span = work.spans[index];
    double found[kSums];
    sum_over_rows<kToldColumns>(found, work.chunk_sums + span.first, span.count);
    if (threadIdx.x == 0) {
      leave<kMeasuredColumns>(sums, found);
      // Between phases it stands there already, with other shards' added.
      if (rows) sums[kGradient2] = found[kGradient2];
    }
  }
  if (!rows || threadIdx.x != 0) return;
  const Row& row = work.rows[work.tensors[index].row];
  const Number device_lr = row.options.device_lr;
  write_telemetry(rows + int64_t(index) * kColumns, sums,
                  device_lr.data ? device_lr.get() : row.options.lr, row.options, row.numbers,
                  decision_of(work));
}

// ---- launches ----------------------------------------------------------------------------------

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int blocks, cuda::Stream stream, const char* what,
            Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  cuda::check(cudaLaunchKernelEx(&config, kernel, arguments...), what);
}

// The one of a kernel's instances that a step takes.
template <class Kernel>
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
  (cuda::check(cudaFuncGetAttributes(&attributes, kernels), "loading a kernel"), ...);
}

}  // namespace

namespace cuda {

cudaError_t ask_for_code() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, update_kernel<float, false>);
}

int resident_blocks(int device) {
  preload(decide_kernel, reduce_kernel, tell_kernel);
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

void reduce(const GpuWork& work, const Request& request, Round round, bool decides, int blocks,
            Stream stream) {
  launch(reduce_kernel, blocks, stream, "the sum over the gradients", work, request, round,
         decides);
}

// One block, if sums are read.
void decide(const GpuWork& work, const Request& request, Round round, Stream stream) {
  const bool sums = request.needs_norm() || round.mean_v;
  const int blocks = sums ? 1 : (std::max(work.n_rows, 1) + kThreads - 1) / kThreads;
  launch(decide_kernel, blocks, stream, "counting the step", work, request, round);
}

void update(const GpuWork& work, int blocks, Stream stream) {
  launch(chosen(work, update_kernel<float, false>, update_kernel<double, false>,
                update_kernel<float, true>, update_kernel<double, true>),
         blocks, stream, "the optimizer's step", work);
}

void project(const GpuWork& work, Touch touch, int blocks, Stream stream) {
  launch(chosen(work, project_kernel<float, false>, project_kernel<double, false>,
                project_kernel<float, true>, project_kernel<double, true>),
         blocks, stream, "the optimizer's step", work, touch);
}

void tell(const GpuWork& work, bool add_up, double* rows, Stream stream) {
  launch(tell_kernel, work.n_tensors, stream, "telemetry", work, add_up, rows);
}

}  // namespace cuda

}  // namespace wdk
