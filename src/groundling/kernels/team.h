// Threads that do one job together, again and again, and meet between its parts.
//
// Invariant: `work` returns when every thread has come to the job's last meeting; after it none touches the job's
// memory until the next `work`.

#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace groundling {

class Team {
 public:
  // `job` is called on every thread with the thread's number; the caller of `work` is thread 0. It must end with `meet`.
  Team(int n_threads, std::function<void(int)> job) : n_(n_threads), job_(std::move(job)) {
    try {
      for (int thread = 1; thread < n_; ++thread) threads_.emplace_back([this, thread] { serve(thread); });
    } catch (...) {  // the system has no more threads: those that began must end before their object does
      end();
      throw;
    }
  }

  ~Team() { end(); }

  void work() {
    begin();
    job_(0);
  }

  // Waits until every thread is here.
  void meet() {
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == n_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round;)
      if (spins < 10000)
        ++spins;
      else
        std::this_thread::yield();  // another program wants this core
  }

 private:
  // Between two passes a token is drawn; to fall asleep and be woken would take longer than that.
  static constexpr std::chrono::milliseconds kPatience{1};

  void end() {
    closing_ = true;
    begin();
    for (auto& thread : threads_) thread.join();
  }

  void begin() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      jobs_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
  }

  void serve(int thread) {
    for (int64_t seen = 0;; ++seen) {
      const auto begun = [&] { return jobs_.load(std::memory_order_acquire) != seen; };
      const auto until = std::chrono::steady_clock::now() + kPatience;
      while (!begun() && std::chrono::steady_clock::now() < until) {
      }
      if (!begun()) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, begun);
      }
      if (closing_) return;
      job_(thread);
    }
  }

  const int n_;
  const std::function<void(int)> job_;
  std::atomic<int> arrived_{0};
  std::atomic<uint32_t> round_{0};
  std::atomic<int64_t> jobs_{0};
  std::atomic<bool> closing_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> threads_;  // last: they use the rest
};

}  // namespace groundling
