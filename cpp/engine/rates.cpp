#include "engine/rates.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "base/log.h"
#include "memory/arena.h"
#include "memory/slot_pool.h"
#include "ops/scratch.h"

namespace dsfp4::engine {
namespace {

using Clock = std::chrono::steady_clock;
using memory::SlotPool;
using residency::ExpertImage;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

double rate_of(std::uint64_t bytes, double seconds) {
  return static_cast<double>(bytes) / std::max(seconds, 1e-9);
}

/// An expert in a slot.
struct Filled {
  const std::byte* slot = nullptr;
  const ExpertImage* image = nullptr;
};

/// Reads of experts at random places, a poolful at a time.
class RandomReads {
 public:
  RandomReads(const Wires& wires, std::size_t slots)
      : reader_(wires.reader),
        images_(wires.images),
        pool_(std::make_shared<SlotPool>(slots, wires.slot_bytes, "the reads that are timed")) {}
  /// The reads that are left keep the pool.
  ~RandomReads() {
    for (const Read& read : reads_) reader_.cancel(read.ticket);
  }
  RandomReads(const RandomReads&) = delete;
  RandomReads& operator=(const RandomReads&) = delete;

  double rate(std::chrono::milliseconds time, const Poll& poll) {
    const auto start = Clock::now();
    for (int slot = pool_->acquire(); slot >= 0; slot = pool_->acquire()) read(slot);
    std::uint64_t bytes = 0;
    while (Clock::now() - start < time) {
      ask(poll);
      if (!reader_.wait_for(reads_.front().ticket, kPollPeriod)) continue;
      const Read done = reads_.front();
      reader_.wait(done.ticket).throw_if_failed();
      reads_.pop_front();
      bytes += done.image->files.bytes();
      read(done.slot);
    }
    const double seconds = seconds_since(start);
    for (const Read& left : reads_) bytes += left.ticket.bytes_done();
    return rate_of(bytes, seconds);
  }

  /// Waits for the reads that are left, but not for a slow disk, and returns what they brought.
  std::vector<Filled> finish(std::chrono::milliseconds most, const Poll& poll) {
    const auto start = Clock::now();
    std::vector<Filled> filled;
    filled.reserve(reads_.size());
    for (const Read& read : reads_) {
      while (!reader_.wait_for(read.ticket, kPollPeriod)) {
        ask(poll);
        if (Clock::now() - start >= most) return filled;
      }
      reader_.wait(read.ticket).throw_if_failed();
      filled.push_back({pool_->data(read.slot), read.image});
    }
    return filled;
  }

 private:
  struct Read {
    int slot = -1;
    const ExpertImage* image = nullptr;
    storage::ReadTicket ticket;
  };

  void read(int slot) {
    const ExpertImage& image = images_[random_() % images_.size()];
    storage::ReadRequest request;
    request.extents = image.files.extents(pool_->data(slot));
    request.owner = pool_;
    reads_.push_back({slot, &image, reader_.submit(std::move(request))});
  }

  storage::Reader& reader_;
  std::span<const ExpertImage> images_;
  std::shared_ptr<SlotPool> pool_;
  std::mt19937_64 random_{1};
  std::deque<Read> reads_;  // in the order of their submission
};

/// Experts that lie in RAM, and the processor's steps with them: a token's for a layer at a time.
class HostSteps {
 public:
  HostSteps(const Wires& wires, std::span<const Filled> experts)
      : ops_(wires.host),
        experts_(experts),
        top_k_(std::min(static_cast<std::size_t>(wires.top_k), experts.size())),
        arena_(ops::scratch_bytes(wires.hidden_size) +
                   ops::scratch_bytes(wires.top_k * wires.moe_intermediate_size) +
                   ops::scratch_bytes(wires.top_k * wires.hidden_size),
               "the steps that are timed", ops_.device().memory()),
        x_(ops::scratch_matrix(arena_, 1, wires.hidden_size)),
        hidden_(ops::scratch_matrix(arena_, wires.top_k, wires.moe_intermediate_size)),
        out_(ops::scratch_matrix(arena_, wires.top_k, wires.hidden_size)),
        views_(top_k_),
        pairs_(top_k_) {
    float* const x = memory::on_host(ops_.device().memory(), x_.data);
    for (std::int64_t i = 0; i < x_.cols; ++i) x[i] = static_cast<float>(i % 7 - 3) * 0.1f;
    for (std::size_t i = 0; i < top_k_; ++i) pairs_[i] = static_cast<std::int32_t>(i);
  }

  /// Returns the bytes of the experts.
  std::uint64_t step() {
    std::uint64_t bytes = 0;
    std::vector<ops::ExpertTask> tasks(top_k_);
    for (std::size_t i = 0; i < top_k_; ++i) {
      const Filled& expert = experts_[next_++ % experts_.size()];
      views_[i] = expert.image->view_in(expert.slot);
      tasks[i] = {&views_[i], std::span(pairs_).subspan(i, 1)};
      bytes += expert.image->files.bytes();
    }
    ops_.experts(tasks, out_.rows, x_, hidden_, out_, ops::Phase::kDecode);
    return bytes;
  }

 private:
  ops::Ops& ops_;
  std::span<const Filled> experts_;
  std::size_t top_k_;
  memory::Arena arena_;
  ops::Matrix x_, hidden_, out_;
  std::vector<ops::ExpertView> views_;
  std::vector<std::int32_t> pairs_;
  std::size_t next_ = 0;
};

/// Copies in one queue, some of them queued ahead.
class Copies {
 public:
  using Copy = std::function<void(std::uint64_t number)>;
  Copies(ops::Device& device, ops::Queue queue, Copy copy)
      : device_(device), queue_(queue), copy_(std::move(copy)) {
    for (ops::Event& event : made_) event = device.make_event();
  }
  /// Waits for those under way.
  ~Copies() {
    try {
      device_.synchronize();
    } catch (const std::exception& error) {  // it copies nothing any more
      log(LogLevel::kInfo, error.what());
    }
  }
  Copies(const Copies&) = delete;
  Copies& operator=(const Copies&) = delete;

  void queue_ahead() {
    for (; queued_ - done_ < kAhead; ++queued_) {
      copy_(queued_);
      device_.record(queue_, made_[queued_ % kAhead]);
    }
  }
  void count() {
    while (done_ < queued_ && device_.passed(made_[done_ % kAhead])) ++done_;
  }
  void wait_for_one() { device_.wait_for(made_[done_++ % kAhead]); }
  std::uint64_t done() const { return done_; }

 private:
  /// So many are not made before a step of the processor's ends.
  static constexpr std::size_t kAhead = 32;

  ops::Device& device_;
  ops::Queue queue_;
  Copy copy_;
  std::array<ops::Event, kAhead> made_;
  std::uint64_t queued_ = 0;
  std::uint64_t done_ = 0;
};

/// What the wires beyond the SSD are measured with.
struct Room {
  const Wires& wires;
  const Poll& poll;
  std::chrono::milliseconds time;
  SlotPool& pool;
  std::uint64_t block;  // bytes of a copy
};

// The queue is empty as the clock starts, so what is counted began and ended meanwhile.
double copy_rate(const Room& room, ops::Queue queue, const Copies::Copy& copy) {
  Copies(*room.wires.gpu, queue, copy).queue_ahead();  // the first ones pay for what is new
  Copies copies(*room.wires.gpu, queue, copy);
  const auto start = Clock::now();
  do {
    ask(room.poll);
    copies.queue_ahead();
    copies.wait_for_one();
  } while (Clock::now() - start < room.time);
  return rate_of(copies.done() * room.block, seconds_since(start));
}

// The rate of the processor, beside `copies` if there are any; then at least one is made meanwhile.
double host_rate(const Room& room, HostSteps& steps, Copies* copies) {
  std::uint64_t bytes = 0;
  const auto start = Clock::now();
  do {
    ask(room.poll);
    if (copies != nullptr) copies->queue_ahead();
    bytes += steps.step();
    if (copies != nullptr) copies->count();
  } while (Clock::now() - start < room.time || (copies != nullptr && copies->done() == 0));
  return rate_of(bytes, seconds_since(start));
}

void measure_copies(const Room& room, HostSteps& steps, Rates& rates) {
  ops::Device& gpu = *room.wires.gpu;
  const auto count = std::min<std::size_t>(room.wires.device_slots, 4);
  memory::Arena arena(count * memory::Arena::padded(room.block), "the copies that are timed",
                      gpu.memory());
  std::vector<DevicePtr<std::byte>> there(count);
  for (DevicePtr<std::byte>& slot : there) slot = arena.take(room.block);
  const auto slot = [&](std::uint64_t number) {
    return room.pool.data(static_cast<int>(number % room.pool.count()));
  };
  const auto in = [&](std::uint64_t number) {
    gpu.copy_in(ops::Queue::kUpload, slot(number), there[number % count], room.block);
  };
  rates.copy_in = copy_rate(room, ops::Queue::kUpload, in);
  {
    Copies copies(gpu, ops::Queue::kUpload, in);
    const auto start = Clock::now();
    rates.both_host_experts = host_rate(room, steps, &copies);
    rates.both_copy_in = rate_of(copies.done() * room.block, seconds_since(start));
  }
  // Overwrites experts, so it comes last.
  rates.copy_out = copy_rate(room, ops::Queue::kDownload, [&](std::uint64_t number) {
    gpu.copy_out(ops::Queue::kDownload, there[number % count], slot(number), room.block);
  });
}

}  // namespace

bool are_measurable(const Wires& wires, const RateLimits& limits) {
  return !wires.images.empty() && wires.slots >= 2 &&
         wires.slots * wires.slot_bytes >= limits.least_bytes;
}

void measure_rates(const Wires& wires, const RateLimits& limits, const Poll& poll, Rates& rates) {
  const auto slots_of = [&](std::uint64_t bytes) {
    return std::max<std::uint64_t>(1, bytes / wires.slot_bytes);
  };
  const std::size_t reading = std::min(slots_of(limits.in_flight_bytes), wires.slots / 2);
  RandomReads reads(wires, reading);
  rates.ssd = reads.rate(limits.ssd_time, poll);
  const std::vector<Filled> read = reads.finish(3 * limits.ssd_time, poll);
  if (read.empty()) return;

  ops::Device& device = wires.gpu != nullptr ? *wires.gpu : wires.host.device();
  SlotPool pool(std::min(slots_of(limits.most_bytes), wires.slots - reading), wires.slot_bytes,
                "the experts that are timed", device.staging());
  std::vector<Filled> experts(pool.count());
  for (std::size_t i = 0; i < experts.size(); ++i) {
    ask(poll);
    const Filled& from = read[i % read.size()];
    std::byte* const slot = pool.data(static_cast<int>(i));
    std::memcpy(slot, from.slot, wires.slot_bytes);
    experts[i] = {slot, from.image};
  }
  const Room room{wires, poll, limits.time, pool,
                  std::min(wires.slot_bytes, wires.device_slot_bytes)};
  HostSteps steps(wires, experts);
  steps.step();  // the first one pays for what is new
  rates.host_experts = host_rate(room, steps, nullptr);
  if (wires.gpu != nullptr) measure_copies(room, steps, rates);
}

}  // namespace dsfp4::engine
