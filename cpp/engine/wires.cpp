#include "engine/wires.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <deque>
#include <vector>

#include "base/seconds.h"
#include "memory/arena.h"
#include "ops/scratch.h"
#include "residency/device_experts.h"

namespace dsfp4::engine {
namespace {

using Clock = std::chrono::steady_clock;
using residency::ExpertKey;
using Experts = std::span<const StagedExpert>;

// Copies to the device, some of them under way, as the engine makes them.
class Copies {
 public:
  Copies(ops::Device& device, Experts experts, std::size_t slot_bytes, std::size_t slots)
      : staged_(experts),
        experts_(device, slot_bytes, slots, 0, experts.size(),
                 [](auto, std::span<float> worth) { std::ranges::fill(worth, 0.0f); }) {}

  // Nothing is counted yet.
  void begin() { made_ = 0; }
  void fill(std::size_t under_way) {
    while (keys_.size() < std::min(under_way, staged_.size() - 1)) {
      const ExpertKey key = next_++ % staged_.size();
      experts_.bring(key, staged_[key].view, false);
      experts_.release(key);
      keys_.push_back(key);
    }
  }
  void count_made() {
    while (!keys_.empty() && experts_.copied(keys_.front())) pop();
  }
  void wait_for_one() {
    experts_.wait_copied(keys_.front());
    pop();
  }
  void wait_for_all() {
    while (!keys_.empty()) wait_for_one();
  }
  double bytes() const { return static_cast<double>(made_); }

 private:
  void pop() {
    made_ += staged_[keys_.front()].bytes;
    keys_.pop_front();
  }

  const Experts staged_;
  residency::DeviceExperts experts_;
  std::deque<ExpertKey> keys_;  // under way, in order
  std::uint64_t next_ = 0;
  std::uint64_t made_ = 0;  // bytes
};

// The processor's side: one token through top_k experts at a time.
class HostWork {
 public:
  HostWork(ops::Ops& host, Experts experts, const WireShape& shape)
      : host_(host),
        staged_(experts),
        memory_(ops::scratch_bytes(shape.hidden_size) +
                    ops::scratch_bytes(shape.top_k * shape.moe_intermediate_size) +
                    ops::scratch_bytes(shape.top_k * shape.hidden_size),
                "the steps that are timed", host.device().memory()),
        x_(ops::scratch_matrix(memory_, 1, shape.hidden_size)),
        hidden_(ops::scratch_matrix(memory_, shape.top_k, shape.moe_intermediate_size)),
        out_(ops::scratch_matrix(memory_, shape.top_k, shape.hidden_size)) {
    float* const x = memory::on_host(host.device().memory(), x_.data);
    for (std::int64_t i = 0; i < x_.cols; ++i) x[i] = static_cast<float>(i % 7 - 3) * 0.1f;
    for (std::int32_t pair = 0; pair < shape.top_k; ++pair) pairs_.push_back(pair);
    run_once();  // the first one pays for what is new
  }

  // Returns the bytes of the experts.
  double run_once() {
    std::vector<ops::ExpertView> views(pairs_.size());
    std::vector<ops::ExpertTask> tasks(pairs_.size());
    std::uint64_t bytes = 0;
    for (std::size_t i = 0; i < views.size(); ++i) {
      const StagedExpert& expert = staged_[next_++ % staged_.size()];
      views[i] = expert.view;
      tasks[i] = {&views[i], std::span(pairs_).subspan(i, 1)};
      bytes += expert.bytes;
    }
    host_.experts(tasks, out_.rows, x_, hidden_, out_, ops::Phase::kDecode);
    return static_cast<double>(bytes);
  }

 private:
  ops::Ops& host_;
  const Experts staged_;
  memory::Arena memory_;
  const ops::Matrix x_, hidden_, out_;
  std::vector<std::int32_t> pairs_;
  std::size_t next_ = 0;
};

double rate_of(HostWork& work, double seconds, const Poll& poll) {
  double bytes = 0.0;
  const auto start = Clock::now();
  do {
    ask(poll);
    bytes += work.run_once();
  } while (seconds_since(start) < seconds);
  return bytes / seconds_since(start);
}

double rate_of(Copies& copies, double seconds, const Poll& poll) {
  constexpr std::size_t kUnderWay = 4;
  copies.fill(kUnderWay);
  copies.wait_for_all();  // the first ones pay for what is new
  copies.begin();
  const auto start = Clock::now();
  do {
    ask(poll);
    copies.fill(kUnderWay);
    copies.wait_for_one();
  } while (seconds_since(start) < seconds);
  const double rate = copies.bytes() / seconds_since(start);
  copies.wait_for_all();
  return rate;
}

// One thread does both, as in the engine: before each go of the processor, more copies are queued
// than can be made meanwhile. At least one is made, however slow they are.
void rates_of_both(Copies& copies, HostWork& work, double seconds, const Poll& poll,
                   WireRates& rates) {
  copies.fill(1);
  copies.begin();
  const double a_go = work.run_once();
  copies.wait_for_all();
  const double expert = copies.bytes();
  const double made = 1.5 * a_go / rates.host * rates.copies / expert;  // during a go
  const std::size_t under_way = 2 + static_cast<std::size_t>(std::min(1e6, std::ceil(made)));
  copies.fill(under_way);
  work.run_once();
  double bytes = 0.0;
  const auto start = Clock::now();
  copies.count_made();
  copies.begin();
  do {
    ask(poll);
    copies.fill(under_way);
    bytes += work.run_once();
    copies.count_made();
  } while (seconds_since(start) < seconds || copies.bytes() == 0.0);
  const double took = seconds_since(start);
  rates.copies_beside = copies.bytes() / took;
  rates.host_beside = bytes / took;
  copies.wait_for_all();
}

}  // namespace

double host_rate(ops::Ops& host, Experts experts, const WireShape& shape, double seconds,
                 const Poll& poll) {
  HostWork work(host, experts, shape);
  return rate_of(work, seconds, poll);
}

WireRates wire_rates(ops::Device& device, ops::Ops& host, Experts experts, std::size_t slot_bytes,
                     std::size_t slots, const WireShape& shape, double host_alone, double seconds,
                     const Poll& poll) {
  HostWork work(host, experts, shape);
  Copies copies(device, experts, slot_bytes, slots);
  WireRates rates;
  rates.host = host_alone;
  rates.copies = rate_of(copies, seconds, poll);
  rates_of_both(copies, work, seconds, poll, rates);
  return rates;
}

}  // namespace dsfp4::engine
