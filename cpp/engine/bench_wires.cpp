#include "engine/bench_wires.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

#include "base/thread_pool.h"
#include "dsfp4/error.h"
#include "memory/arena.h"
#include "ops/measure/random_data.h"
#include "ops/scratch.h"
#include "residency/device_experts.h"
#include "residency/plan.h"

namespace dsfp4::engine {
namespace {

using Clock = std::chrono::steady_clock;
using residency::DeviceExperts;
using residency::ExpertKey;

constexpr std::int64_t kMostWidth = std::int64_t{1} << 16;
constexpr std::int64_t kMostExperts = 1024;  // of one go

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

void check(std::int64_t value, std::int64_t most, const char* parameter) {
  if (value >= 1 && value <= most) return;
  throw ParameterError(parameter,
                       "must be 1 to " + std::to_string(most) + ", not " + std::to_string(value));
}

void check_width(std::int64_t value, format::WeightFormat format, const char* parameter) {
  check(value, kMostWidth, parameter);
  const std::int64_t group = format == format::WeightFormat::kNvfp4   ? format::kNvfp4Group
                             : format == format::WeightFormat::kMxfp4 ? format::kMxfp4Group
                                                                      : 1;
  if (value % group == 0) return;
  throw ParameterError(parameter, "must be a multiple of " + std::to_string(group) + ", not " +
                                      std::to_string(value));
}

// Copies of one random expert, side by side in staging memory.
class StagedExperts {
 public:
  StagedExperts(memory::MemorySource& staging, const WireOptions& options)
      : made_(make(options)),
        count_(count(options)),
        memory_(count_ * padded_bytes(), "the benchmark's experts", staging) {
    views_.reserve(count_);
    for (std::size_t i = 0; i < count_; ++i) {
      views_.push_back({put(staging, made_[0]), put(staging, made_[1]), put(staging, made_[2])});
    }
  }

  std::size_t size() const noexcept { return count_; }
  /// Of one expert.
  std::uint64_t bytes() const noexcept {
    std::uint64_t bytes = 0;
    for (const format::EncodedMatrix& matrix : made_) {
      bytes += matrix.data.size() + matrix.scales.size();
    }
    return bytes;
  }
  const ops::HostExpertView& operator[](std::size_t i) const { return views_[i % count_]; }

 private:
  using Expert = std::array<format::EncodedMatrix, 3>;  // gate, up, down

  static Expert make(const WireOptions& options) {
    ThreadPool pool(1);
    const auto matrix = [&](std::int64_t rows, std::int64_t cols, std::uint64_t seed) {
      return ops::measure::random_weight(pool, options.format, rows, cols, seed);
    };
    return {matrix(options.moe_intermediate_size, options.hidden_size, 1),
            matrix(options.moe_intermediate_size, options.hidden_size, 2),
            matrix(options.hidden_size, options.moe_intermediate_size, 3)};
  }
  // No expert is computed twice in one go, nor copied while it is still on its way.
  std::size_t count(const WireOptions& options) const {
    const std::uint64_t enough = (options.bytes + bytes() - 1) / bytes();
    return static_cast<std::size_t>(
        std::max(enough, static_cast<std::uint64_t>(2 * options.top_k)));
  }
  std::size_t padded_bytes() const {
    std::size_t bytes = 0;
    for (const format::EncodedMatrix& matrix : made_) {
      bytes += memory::Arena::padded(matrix.data.size());
      bytes += memory::Arena::padded(matrix.scales.size());
    }
    return bytes;
  }
  format::WeightView put(memory::MemorySource& staging, const format::EncodedMatrix& matrix) {
    const auto copy = [&](const std::vector<std::byte>& from) -> const std::byte* {
      if (from.empty()) return nullptr;
      std::byte* to = memory::on_host(staging, memory_.take(from.size()));
      std::memcpy(to, from.data(), from.size());
      return to;
    };
    format::WeightView view = matrix.view();
    view.data = copy(matrix.data);
    view.scales = copy(matrix.scales);
    return view;
  }

  const Expert made_;
  const std::size_t count_;
  memory::Arena memory_;
  std::vector<ops::HostExpertView> views_;
};

// Copies to the device, some of them under way, as the engine makes them.
class Copies {
 public:
  Copies(ops::Device& device, const StagedExperts& experts)
      : staged_(experts),
        experts_(device, DeviceExperts::slot_bytes(experts[0]), residency::kDeviceRing, 0,
                 experts.size(),
                 [](auto, std::span<float> worth) { std::ranges::fill(worth, 0.0f); }) {}

  // Nothing is counted yet.
  void begin() { made_ = 0; }
  void fill(std::size_t under_way) {
    while (keys_.size() < std::min(under_way, staged_.size() - 1)) {
      const ExpertKey key = next_++ % staged_.size();
      experts_.bring(key, staged_[key], false);
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
  double bytes() const { return static_cast<double>(made_) * static_cast<double>(staged_.bytes()); }

 private:
  void pop() {
    keys_.pop_front();
    ++made_;
  }

  const StagedExperts& staged_;
  DeviceExperts experts_;
  std::deque<ExpertKey> keys_;  // under way, in order
  std::uint64_t next_ = 0;
  std::uint64_t made_ = 0;
};

// The processor's side: one token through top_k experts at a time.
class HostWork {
 public:
  HostWork(ops::Ops& host, memory::MemorySource& staging, const StagedExperts& experts,
           const WireOptions& options)
      : host_(host),
        staged_(experts),
        top_k_(options.top_k),
        memory_(ops::scratch_bytes(options.hidden_size) +
                    ops::scratch_bytes(top_k_ * options.moe_intermediate_size) +
                    ops::scratch_bytes(top_k_ * options.hidden_size),
                "the benchmark's activations", staging),
        x_(ops::scratch_matrix(memory_, 1, options.hidden_size)),
        hidden_(ops::scratch_matrix(memory_, top_k_, options.moe_intermediate_size)),
        out_(ops::scratch_matrix(memory_, top_k_, options.hidden_size)) {
    const std::vector<float> x = ops::measure::random_floats(options.hidden_size, 4);
    std::ranges::copy(x, memory::on_host(staging, x_.data));
    for (std::int32_t pair = 0; pair < top_k_; ++pair) pairs_.push_back(pair);
  }

  void run_once() {
    std::vector<ops::ExpertView> views(pairs_.size());
    std::vector<ops::ExpertTask> tasks(pairs_.size());
    for (std::size_t i = 0; i < views.size(); ++i) {
      views[i] = staged_[next_++];
      tasks[i] = {&views[i], std::span(pairs_).subspan(i, 1)};
    }
    host_.experts(tasks, top_k_, x_, hidden_, out_, ops::Phase::kDecode);
  }
  double bytes_at_once() const {
    return static_cast<double>(top_k_) * static_cast<double>(staged_.bytes());
  }

 private:
  ops::Ops& host_;
  const StagedExperts& staged_;
  const std::int64_t top_k_;
  memory::Arena memory_;
  const ops::Matrix x_, hidden_, out_;
  std::vector<std::int32_t> pairs_;
  std::size_t next_ = 0;
};

double copy_rate(Copies& copies, double seconds) {
  constexpr std::size_t kUnderWay = 4;
  copies.fill(kUnderWay);
  copies.wait_for_all();  // the first ones pay for what is new
  copies.begin();
  const auto start = Clock::now();
  do {
    copies.fill(kUnderWay);
    copies.wait_for_one();
  } while (seconds_since(start) < seconds);
  const double rate = copies.bytes() / seconds_since(start);
  copies.wait_for_all();
  return rate;
}

double host_rate(HostWork& work, double seconds) {
  work.run_once();
  double bytes = 0.0;
  const auto start = Clock::now();
  do {
    work.run_once();
    bytes += work.bytes_at_once();
  } while (seconds_since(start) < seconds);
  return bytes / seconds_since(start);
}

// One thread does both, as in the engine: before each go of the processor, more copies are queued
// than can be made meanwhile.
void rates_of_both(Copies& copies, HostWork& work, double seconds, std::uint64_t expert_bytes,
                   WireRates& rates) {
  const double during_a_go = work.bytes_at_once() / rates.host * rates.copies;
  const auto under_way =
      2 + static_cast<std::size_t>(
              std::min(1e6, std::ceil(1.5 * during_a_go / static_cast<double>(expert_bytes))));
  copies.fill(under_way);
  work.run_once();
  double bytes = 0.0;
  const auto start = Clock::now();
  copies.count_made();
  copies.begin();
  do {
    copies.fill(under_way);
    work.run_once();
    bytes += work.bytes_at_once();
    copies.count_made();
  } while (seconds_since(start) < seconds);
  const double took = seconds_since(start);
  rates.copies_beside = copies.bytes() / took;
  rates.host_beside = bytes / took;
  copies.wait_for_all();
}

}  // namespace

WireRates measure_wires(ops::Ops& device, ops::Ops& host, const WireOptions& options) {
  check_width(options.hidden_size, options.format, "hidden_size");
  check_width(options.moe_intermediate_size, options.format, "moe_intermediate_size");
  check(options.top_k, kMostExperts, "top_k");
  constexpr double kMostSeconds = 600.0;
  if (!(options.seconds > 0.0 && options.seconds <= kMostSeconds)) {
    throw ParameterError("seconds", "must be over 0 and at most 600");
  }
  memory::MemorySource& staging = device.device().staging();
  const StagedExperts experts(staging, options);
  HostWork work(host, staging, experts, options);
  Copies copies(device.device(), experts);
  WireRates rates;
  rates.copies = copy_rate(copies, options.seconds);
  rates.host = host_rate(work, options.seconds);
  rates_of_both(copies, work, options.seconds, experts.bytes(), rates);
  return rates;
}

}  // namespace dsfp4::engine
