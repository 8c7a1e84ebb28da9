#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <string>
#include <thread>

namespace specformer {
namespace {

// How long a thread looks for the next operation before it sleeps: a decode step has one every few microseconds.
constexpr auto kSpin = std::chrono::microseconds(50);

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int from_cgroup() {
  double quota = 0, period = 0;
  if (std::ifstream v2("/sys/fs/cgroup/cpu.max"); !(v2 >> quota >> period)) {  // "max" is no number: no limit
    std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") >> quota;
    std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_period_us") >> period;
  }
  return quota > 0 && period > 0 ? std::max(1, static_cast<int>(quota / period + 0.5)) : 1 << 16;
}

int from_affinity() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

// One operation that is being shared out.
struct Job {
  Work work;
  const void* context;
  int64_t count, grain;
  int threads;
  std::atomic<int64_t> next{0};

  // Takes parts until none is left; they shrink towards the end, so that all threads finish together.
  void take_parts() {
    int64_t begin = next.load(std::memory_order_relaxed);
    while (begin < count) {
      int64_t size = std::max<int64_t>((count - begin) / (2 * threads), 1);
      if (size > grain) size -= size % grain;
      if (next.compare_exchange_weak(begin, begin + size, std::memory_order_relaxed)) {
        work(context, begin, begin + size);
        begin = next.load(std::memory_order_relaxed);
      }
    }
  }
};

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads) {
    sigset_t all, before;  // signals are for the threads that the program knows of
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (int i = 1; i < threads; i++) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {  // no more threads are to be had: those that began will do
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  bool try_take() { return !taken_.exchange(true, std::memory_order_acquire); }

  void run(Job& job) {
    job.threads = threads_;
    job_ = &job;
    gate_.store(kOpen, std::memory_order_release);
    epoch_.fetch_add(1);
    if (sleeping_.load() > 0) {
      std::lock_guard lock(mutex_);
      wake_.notify_all();
    }
    job.take_parts();
    gate_.fetch_and(~kOpen, std::memory_order_acq_rel);  // who has not begun by now stays outside
    for (int spins = 0; gate_.load(std::memory_order_acquire) != 0; spins++) {
      if (spins < 2000) pause();
      else std::this_thread::yield();
    }
    taken_.store(false, std::memory_order_release);
  }

 private:
  static constexpr uint32_t kOpen = 1u << 31;

  void serve() {
    for (uint32_t seen = 0;;) {
      seen = await(seen);
      uint32_t inside = gate_.load(std::memory_order_relaxed);
      while (inside & kOpen) {
        if (!gate_.compare_exchange_weak(inside, inside + 1, std::memory_order_acq_rel)) continue;
        job_->take_parts();
        gate_.fetch_sub(1, std::memory_order_acq_rel);
        break;
      }
    }
  }

  // Waits for an epoch other than the one seen: spinning at first, then asleep.
  uint32_t await(uint32_t seen) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < 64; i++, pause()) {
        if (uint32_t epoch = epoch_.load(std::memory_order_acquire); epoch != seen) return epoch;
      }
    } while (std::chrono::steady_clock::now() < until);
    std::unique_lock lock(mutex_);
    sleeping_.fetch_add(1);  // before the epoch is read once more: `run` reads them the other way round
    wake_.wait(lock, [&] { return epoch_.load() != seen; });
    sleeping_.fetch_sub(1);
    return epoch_.load();
  }

  const int threads_;
  Job* job_ = nullptr;  // written before the gate opens, read by those inside
  std::atomic<bool> taken_{false};
  alignas(64) std::atomic<uint32_t> epoch_{0};
  alignas(64) std::atomic<uint32_t> gate_{0};  // kOpen, and how many threads are inside
  std::atomic<int> sleeping_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

// Never destroyed: its threads sleep until the process ends. A forked child has none of them and begins with null.
std::atomic<Pool*> pool{nullptr};
std::atomic<bool> creating{false};

Pool* take_pool() {
  Pool* found = pool.load(std::memory_order_acquire);
  if (found == nullptr) {
    if (creating.exchange(true)) return nullptr;
    static const int watched = pthread_atfork(nullptr, nullptr, [] {
      pool.store(nullptr);
      creating.store(false);
    });
    (void)watched;
    found = pool.load();
    if (found == nullptr) pool.store(found = new Pool(thread_count()));
    creating.store(false);
  }
  return found->try_take() ? found : nullptr;
}

}  // namespace

int thread_count() {
  static const int count = [] {
    if (const char* named = std::getenv("SPECFORMER_THREADS"); named != nullptr && std::atoi(named) > 0) {
      return std::atoi(named);
    }
    return std::min(from_affinity(), from_cgroup());
  }();
  return count;
}

void share_out(int64_t count, int64_t grain, bool alone, Work work, const void* context) {
  Pool* taken = alone || count < 2 || thread_count() == 1 ? nullptr : take_pool();
  if (taken == nullptr) return work(context, 0, count);
  Job job{work, context, count, grain, 1};
  taken->run(job);
}

}  // namespace specformer
