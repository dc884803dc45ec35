// The machine behind cuda_runtime.h: CUDA threads as fibers, blocks on OS threads, one grid at a time.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "watch.h"

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;

namespace emulated {

constexpr int kProcessors = 2, kBlocksPerProcessor = 2;
constexpr unsigned kMaxThreads = 1024, kWarp = 32;
constexpr size_t kStack = 128 << 10;
constexpr std::chrono::seconds kPatience(30);

struct Grid {
  std::function<void()> kernel;
  dim3 blocks, threads;
  const char* seed;  // may be null
  std::atomic<unsigned> next_block{0};
  std::atomic<uint64_t> progress{0};  // turns in which some thread of a block did not just sleep
};

// Runs one block after the other, always on the same OS thread.
class Block {
 public:
  static inline thread_local Block* current;

  WDK_UNWATCHED void run(Grid& grid, unsigned index) {
    grid_ = &grid;
    current = this;
    blockIdx = {index, 0, 0};
    gridDim = grid.blocks;
    blockDim = grid.threads;
    live_ = blockDim.x;
    at_barrier_ = 0;
    while (fibers_.size() < live_) fibers_.emplace_back(fibers_.size());
    for (unsigned i = 0; i < live_; ++i) fibers_[i].finished = false;

    std::vector<unsigned> order(live_);
    std::iota(order.begin(), order.end(), 0);
    std::seed_seq seed{grid.seed ? std::atoi(grid.seed) : 0, int(index)};
    std::minstd_rand random(seed);
    watched_since_ = Clock::now();
    scheduler_watched_ = watch::current();
    watch::release(&begin_);
    while (live_) {
      if (grid.seed) std::shuffle(order.begin(), order.end(), random);
      bool ran = false;
      busy_ = false;
      for (unsigned i : order) {
        Fiber& fiber = fibers_[i];
        if (fiber.finished || fiber.waits_at) continue;
        ran = true;
        running_ = i;
        threadIdx = {i, 0, 0};
        watch::enter(fiber.watched);
        swapcontext(&scheduler_, &fiber.context);
      }
      if (!ran) fail("all threads wait, but not for the same: " + waiting());
      if (busy_)
        grid.progress.fetch_add(1, std::memory_order_relaxed);
      else
        idle();
    }
    watch::acquire(&end_);
  }

  // The others have a turn.
  WDK_UNWATCHED void yield() {
    Fiber& fiber = fibers_[running_];
    watch::enter(scheduler_watched_);
    swapcontext(&fiber.context, &scheduler_);
  }

  // It orders what comes before it and what comes behind. The next one has another place: a thread that
  // is there already has not been waited for here.
  WDK_UNWATCHED void barrier(const char* name) {
    char* const place = &barriers_[barriers_passed_ % 2];
    wait_at(name);
    ++at_barrier_;
    watch::release(place);
    try_barrier();
    yield();
    watch::acquire(place);
  }

  // Waits for the other lanes of the mask; the value that lane `source` brought along.
  WDK_UNWATCHED uint64_t exchange(const char* name, unsigned mask, uint64_t value, int source) {
    Fiber& fiber = fibers_[running_];
    if (!(mask >> running_ % kWarp & 1)) fail(std::string(name) + ": the mask lacks the caller");
    wait_at(name);
    fiber.mask = mask;
    fiber.value = value;
    fiber.source = source;
    try_exchange(fiber);
    yield();
    return fiber.value;
  }

 private:
  using Clock = std::chrono::steady_clock;

  struct Fiber {
    std::unique_ptr<char[]> stack{new char[kStack]};  // not cleared: what is not used costs nothing
    ucontext_t context;
    void* const watched = watch::create();
    bool finished = true;
    const char* waits_at = nullptr;  // null: it can run

    // At a shuffle; else the mask is 0.
    unsigned mask;
    uint64_t value;  // what it brought, and then what it gets
    int source;

    explicit Fiber(size_t index) {
      getcontext(&context);
      context.uc_stack.ss_sp = stack.get();
      // Started at the same offset they would all share a few lines of the caches.
      context.uc_stack.ss_size = kStack - index % 61 * 576;
      context.uc_link = nullptr;
      makecontext(&context, live, 0);
    }
  };

  // A fiber's life: a thread of one block after the other.
  WDK_UNWATCHED static void live() {
    for (;;) {
      watch::acquire(&current->begin_);
      current->grid_->kernel();
      current->finish();
    }
  }

  // Who has left is not waited for.
  WDK_UNWATCHED void finish() {
    watch::release(&end_);
    busy_ = true;
    fibers_[running_].finished = true;
    --live_;
    try_barrier();
    for (unsigned lane = 0; lane < kWarp; ++lane)
      if (const Fiber* fiber = in_warp(lane); fiber && fiber->waits_at && fiber->mask)
        try_exchange(*fiber);
    yield();
  }

  WDK_UNWATCHED void wait_at(const char* name) {
    busy_ = true;
    fibers_[running_].waits_at = name;
    fibers_[running_].mask = 0;
  }

  WDK_UNWATCHED void try_barrier() {
    if (at_barrier_ < live_) return;
    at_barrier_ = 0;
    ++barriers_passed_;
    for (unsigned i = 0; i < blockDim.x; ++i) fibers_[i].waits_at = nullptr;
  }

  // A lane of the running thread's warp; null if it has left, or never was.
  WDK_UNWATCHED Fiber* in_warp(unsigned lane) {
    const unsigned i = running_ / kWarp * kWarp + lane;
    return i < blockDim.x && !fibers_[i].finished ? &fibers_[i] : nullptr;
  }

  // If all lanes of its mask are where this one is, they get their values: all at once, for the first
  // to run on may be at the next shuffle before the last has run.
  WDK_UNWATCHED void try_exchange(const Fiber& one) {
    const char* const name = one.waits_at;
    const unsigned mask = one.mask;
    Fiber* lanes[kWarp] = {};
    for (unsigned i = 0; i < kWarp; ++i) {
      if (mask >> i & 1) lanes[i] = in_warp(i);
      if (lanes[i] && (lanes[i]->waits_at != name || lanes[i]->mask != mask)) return;
    }
    uint64_t values[kWarp];
    for (unsigned i = 0; i < kWarp; ++i) values[i] = lanes[i] ? lanes[i]->value : ~uint64_t(0);
    for (Fiber* lane : lanes)
      if (lane) {
        lane->value = values[lane->source];
        lane->waits_at = nullptr;
      }
  }

  // All that can run sleep: perhaps other blocks get on.
  void idle() {
    std::this_thread::yield();
    const auto now = Clock::now();
    if (const uint64_t progress = grid_->progress.load(std::memory_order_relaxed);
        progress != seen_) {
      seen_ = progress;
      watched_since_ = now;
    } else if (now - watched_since_ > kPatience) {
      fail("the whole grid sleeps or spins; here " + waiting());
    }
  }

  std::string waiting() const {
    std::map<std::string, std::pair<int, unsigned>> places;  // how many, and the first of them
    for (unsigned i = blockDim.x; i-- > 0;)
      if (const Fiber& fiber = fibers_[i]; !fiber.finished) {
        auto& [count, first] = places[fiber.waits_at ? fiber.waits_at : "no barrier"];
        ++count;
        first = i;
      }
    std::string text;
    for (const auto& [name, place] : places)
      text += (text.empty() ? "" : ", ") + std::to_string(place.first) + " at " + name +
              ", thread " + std::to_string(place.second) + " the first";
    return text;
  }

  [[noreturn]] void fail(const std::string& why) const {
    std::fprintf(stderr, "Emulated CUDA, block %u: %s\n", blockIdx.x, why.c_str());
    std::abort();
  }

  Grid* grid_;
  std::deque<Fiber> fibers_;  // kept for the next block; a context must not move
  ucontext_t scheduler_;
  unsigned running_, live_, at_barrier_;
  void* scheduler_watched_;
  char begin_, end_, barriers_[2];  // places of the race detector
  uint64_t barriers_passed_ = 0;
  bool busy_;  // some thread did not just sleep
  uint64_t seen_ = 0;
  Clock::time_point watched_since_;
};

// The OS threads, each of which has one block at a time. They stay: launches are cheap, and __shared__
// memory is never fresh.
class Device {
 public:
  static Device& get() {
    static Device* const device = new Device;  // never deleted: its threads wait until the end
    return *device;
  }

  void run(Grid& grid) {
    std::lock_guard<std::mutex> one_grid(in_use_);
    std::unique_lock<std::mutex> lock(mutex_);
    grid_ = &grid;
    at_work_ = kProcessors * kBlocksPerProcessor;
    ++launches_;
    wake_.notify_all();
    done_.wait(lock, [&] { return at_work_ == 0; });
  }

 private:
  Device() {
    for (int i = 0; i < kProcessors * kBlocksPerProcessor; ++i)
      std::thread([this] { work(); }).detach();
  }

  void work() {
    Block block;
    std::unique_lock<std::mutex> lock(mutex_);
    for (uint64_t seen = 0;;) {
      wake_.wait(lock, [&] { return launches_ != seen; });
      seen = launches_;
      lock.unlock();
      for (unsigned i;
           (i = grid_->next_block.fetch_add(1, std::memory_order_relaxed)) < grid_->blocks.x;)
        block.run(*grid_, i);
      lock.lock();
      if (--at_work_ == 0) done_.notify_one();
    }
  }

  std::mutex in_use_, mutex_;
  std::condition_variable wake_, done_;
  Grid* grid_;
  uint64_t launches_ = 0;
  int at_work_;
};

}  // namespace emulated
