// Steps of every kind, for ThreadSanitizer to judge the kernels' order: test_cuda_emulation.py compiles
// this with csrc/cuda.cu and csrc/gpu_step.cpp, and runs it.
//
//     races    names each kind, and returns 0 if nothing is wrong
//
// Memory is the host's, and is given back only at the end: no two tables have the same address.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <vector>

#include "gpu_step.h"

using namespace wdk;

namespace {

class HostMemory : public DeviceMemory {
 public:
  Buffer send(std::vector<char>& bytes, bool) override {
    Buffer buffer = empty(bytes.size());
    std::memcpy(buffer.data, bytes.data(), bytes.size());
    return buffer;
  }
  Buffer empty(size_t bytes) override {
    auto memory = std::make_shared<std::vector<double>>(bytes / sizeof(double) + 1);
    return {memory, reinterpret_cast<char*>(memory->data())};
  }
  void reserve(size_t) override {}
  void keep(const std::vector<Buffer>&) override {}
};

// What a step is asked for.
struct Case {
  const char* name;
  Decay decay = Decay::decoupled;
  bool swd = false, amsgrad = false, norm = false, counted = false, measured = false;
};

const Case kCases[] = {
    {"spd", Decay::projection},
    {"spd measured", Decay::projection, false, true, true, true, true},
    {"swd", Decay::decoupled, true, false, false, true},
    {"swd amsgrad", Decay::decoupled, true, true, true, true, true},
    {"clipped", Decay::decoupled, false, false, true},
    {"counted", Decay::l2, false, false, false, true},
};

// Several tensors in a batch: of one chunk, of several, of none, and of an end that fills no vector.
constexpr int64_t kSizes[] = {3 * 2048 + 5, 700, 5 * 2048, 0, 2048 + 1, 9};

struct Parameter {
  std::vector<float> w, g, m, v, vmax, a, ema;
  double v_sum = 0, step = 0;
};

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("not so: %s\n", what);
  std::exit(1);
}

// One optimizer, and its steps at once or phase by phase.
class Run {
 public:
  explicit Run(const Case& chosen) : case_(chosen), step_(0, std::make_unique<HostMemory>()) {
    for (const int64_t size : kSizes) {
      Parameter& p = parameters_.emplace_back();
      for (auto* stream : {&p.w, &p.g, &p.m, &p.v, &p.vmax, &p.a, &p.ema})
        stream->reserve(size + 1), stream->resize(size);
      for (int64_t i = 0; i < size; ++i) p.w[i] = std::sin(float(i));
      const double total = double(size);
      (void)total;
    }
    options_.decay = case_.decay;
    options_.swd = case_.swd;
    options_.lr = options_.lr_max = 0.1;
    options_.beta1 = 0.9;
    options_.beta2 = 0.99;
    options_.eps = 1e-8;
    options_.weight_decay = 0.2;
    options_.ema_decay = 0.5;
    options_.counted_on_device = case_.counted;
    request_.max_grad_norm = 1;
    if (case_.norm) request_.grad_norm = &norm_;
    if (case_.measured) request_.telemetry = telemetry_;
    for (Parameter& p : parameters_) {
      Tensor t{};
      t.w = p.w.data();
      t.g = p.g.data();
      t.m = p.m.data();
      t.v = p.v.data();
      t.vmax = case_.amsgrad ? p.vmax.data() : nullptr;
      t.a = p.a.data();
      t.ema = p.ema.data();
      t.v_sum = case_.swd && !case_.amsgrad ? &p.v_sum : nullptr;
      t.numel = t.total = int64_t(p.w.size());
      t.index = uint32_t(tensors_.size());
      tensors_.push_back(t);
    }
    step_.set_tensors(tensors_, case_.decay == Decay::projection);
  }

  void take(int t, bool phased) {
    const size_t n = parameters_.size();
    rows_.assign(case_.counted ? n : 1, {options_, numbers_of(options_, t), double(t), {}});
    for (size_t i = 0; i < n; ++i) {
      Parameter& p = parameters_[i];
      for (size_t k = 0; k < p.g.size(); ++k) p.g[k] = std::cos(float(k + 3 * i + 7 * t));
      if (!case_.counted) continue;
      tensors_[i].row =
          int32_t(n - 1 - i);  // another thread counts it than adds up the tensor's part
      rows_[n - 1 - i].step = {&p.step, DType::float64};
    }
    const StepInput input{tensors_, rows_, request_, {}, sums_};
    if (!phased) {
      step_.run(input);
      return;
    }
    step_.begin(input);
    int round = 0;
    do {
      if (round < Step::rounds(input)) step_.reduce(round);
      step_.decide(round);
    } while (++round < Step::rounds(input));
    step_.update();
    step_.finish();
  }

  // All that a step writes.
  bool operator==(const Run& other) const {
    for (size_t i = 0; i < parameters_.size(); ++i) {
      const Parameter &p = parameters_[i], &q = other.parameters_[i];
      if (p.w != q.w || p.m != q.m || p.v != q.v || p.vmax != q.vmax || p.ema != q.ema ||
          p.v_sum != q.v_sum || p.step != q.step)
        return false;
    }
    return norm_ == other.norm_ && !std::memcmp(telemetry_, other.telemetry_, sizeof(telemetry_));
  }

  float first_weight() const { return parameters_[0].w[1]; }

 private:
  Case case_;
  GpuStep step_;
  GroupOptions options_;
  Request request_;
  std::vector<Parameter> parameters_;
  std::vector<Tensor> tensors_;
  std::vector<Row> rows_;
  double sums_[std::size(kSizes)][kSums];
  double telemetry_[std::size(kSizes) * kColumns] = {};
  double norm_ = 0;
};

}  // namespace

int main() {
  for (const Case& each : kCases) {
    std::printf("%s\n", each.name);
    std::fflush(stdout);
    Run at_once(each), phased(each);
    const float before = at_once.first_weight();
    for (int t = 1; t <= 2; ++t) {
      at_once.take(t, false);
      phased.take(t, true);
    }
    expect(std::isfinite(at_once.first_weight()) && at_once.first_weight() != before, "it steps");
    expect(at_once == phased, "phases have the same bits");
  }
}
