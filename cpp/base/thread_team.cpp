#include "base/thread_team.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <sched.h>
#include <unistd.h>
#include <utility>

namespace dsfp4 {
namespace {

thread_local bool running_a_piece = false;

constexpr int kSpins = 2000;  // 40 to 90 microseconds, as long as `pause` takes

// Below the count of ranges in ThreadTeam::order_: 0 to kMostWorkers workers, or the end.
constexpr std::uint64_t kStop = ThreadTeam::kMostWorkers + 1;
constexpr std::uint64_t kCountStep = kStop + 1;

}  // namespace

ThreadTeam::ThreadTeam(Cores cores, std::string_view mark)
    : cores_(std::move(cores)), mark_name_(mark), process_(getpid()) {}

ThreadTeam::~ThreadTeam() {
  if (!has_its_threads()) {
    // Handles of threads that were never here: they can be neither joined nor detached.
    static_cast<void>(threads_.release());  // NOLINT(bugprone-unused-return-value): left behind
    return;
  }
  order_.store((order_.load() / kCountStep + 1) * kCountStep + kStop);
  order_.notify_all();
  for (std::thread& thread : *threads_) thread.join();
}

bool ThreadTeam::has_its_threads() const noexcept { return getpid() == process_; }

bool ThreadTeam::inside_body() noexcept { return running_a_piece; }

void ThreadTeam::grow(int workers) {
  const Turn turn(*this);
  if (workers > 0 && !mark_) settle_cores();
  threads_->reserve(static_cast<std::size_t>(workers));
  const std::uint64_t seen = order_.load();
  for (int i = this->workers(); i < workers; ++i) {
    threads_->emplace_back([this, i, seen] { worker_loop(i, seen); });
    worker_count_ = i + 1;
  }
}

// Two processes that pin would pin to the same cores, and with a quota or a mask somebody else has
// shared the cores out already.
void ThreadTeam::settle_cores() {
  mark_.emplace(mark_name_);
  pins_ = cores_.all && std::isinf(cores_.quota) && mark_->state() == PinMark::State::kOurs;
  if (const char* wish = std::getenv("DSFP4_PIN")) pins_ = std::string_view(wish) != "0";
}

void ThreadTeam::run(int workers, std::int64_t count, std::int64_t grain,
                     const ThreadPool::Range& range) {
  const Turn turn(*this);
  // Workers without a piece would only be waited for.
  const std::int64_t pieces = (count - 1) / grain + 1;
  workers = static_cast<int>(std::min<std::int64_t>(workers, pieces - 1));
  // All workers wake for an order, also those of larger pools; callers wait for their turn.
  const std::uint64_t callers =
      ticket_.load(std::memory_order_relaxed) - serving_.load(std::memory_order_relaxed);
  const std::uint64_t threads = callers + static_cast<std::uint64_t>(this->workers());
  const bool others = mark_ && mark_->state() == PinMark::State::kTaken;
  spins_.store(!others && threads <= static_cast<std::uint64_t>(cores_.spinners()),
               std::memory_order_relaxed);
  range_ = range;
  count_ = count;
  grain_ = grain;
  next_.store(0, std::memory_order_relaxed);
  running_.store(workers, std::memory_order_relaxed);
  const std::uint64_t number = order_.load(std::memory_order_relaxed) / kCountStep + 1;
  order_.exchange(number * kCountStep + static_cast<std::uint64_t>(workers));
  order_.notify_all();
  run_pieces();
  wait_until(running_, [](std::int32_t left) { return left == 0; });
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void ThreadTeam::run_pieces() {
  running_a_piece = true;
  for (;;) {
    const std::int64_t begin = next_.fetch_add(grain_, std::memory_order_relaxed);
    if (begin >= count_) break;
    try {
      range_.call(range_.body, begin, std::min(begin + grain_, count_));
    } catch (...) {
      const std::lock_guard lock(error_mutex_);
      if (!error_) error_ = std::current_exception();
      next_.store(count_, std::memory_order_relaxed);
    }
  }
  running_a_piece = false;
}

void ThreadTeam::worker_loop(int index, std::uint64_t seen) {
  pin(index);
  for (;;) {
    seen = wait_until(order_, [seen](std::uint64_t order) { return order != seen; });
    const std::uint64_t workers = seen % kCountStep;
    if (workers == kStop) return;
    if (static_cast<std::uint64_t>(index) >= workers) continue;
    run_pieces();
    if (running_.fetch_sub(1) == 1) running_.notify_one();
  }
}

// A core that cannot be had any more (the mask has changed) is no reason to stop: the thread then
// runs where the system puts it.
void ThreadTeam::pin(int index) {
  const auto core = static_cast<std::size_t>(index) + 1;
  if (!pins_ || core >= cores_.physical.size()) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cores_.physical[core], &set);
  static_cast<void>(sched_setaffinity(0, sizeof(set), &set));
}

template <typename Value, typename Ready>
Value ThreadTeam::wait_until(const std::atomic<Value>& value, const Ready& ready) const {
  const int spins = spins_.load(std::memory_order_relaxed) ? kSpins : 0;
  for (int i = 0; i < spins; ++i) {
    const Value now = value.load(std::memory_order_acquire);
    if (ready(now)) return now;
    __builtin_ia32_pause();
  }
  for (;;) {
    const Value now = value.load(std::memory_order_acquire);
    if (ready(now)) return now;
    value.wait(now, std::memory_order_acquire);
  }
}

ThreadTeam::Turn::Turn(ThreadTeam& team) : team_(team) {
  const std::uint64_t mine = team.ticket_.fetch_add(1, std::memory_order_relaxed);
  team.wait_until(team.serving_, [mine](std::uint64_t serving) { return serving == mine; });
}

ThreadTeam::Turn::~Turn() {
  team_.serving_.fetch_add(1);
  team_.serving_.notify_all();
}

}  // namespace dsfp4
