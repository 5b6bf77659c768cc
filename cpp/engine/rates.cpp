#include "engine/rates.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "base/seconds.h"
#include "engine/copies.h"
#include "engine/wires.h"
#include "memory/slot_pool.h"
#include "residency/plan.h"

namespace dsfp4::engine {
namespace {

using Clock = std::chrono::steady_clock;
using memory::SlotPool;
using residency::ExpertImage;

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

}  // namespace

bool are_measurable(const Wires& wires, const RateLimits& limits) {
  return !wires.images.empty() && wires.slots >= 4 &&
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
  std::vector<StagedExpert> experts(pool.count());
  for (std::size_t i = 0; i < experts.size(); ++i) {
    ask(poll);
    const Filled& from = read[i % read.size()];
    std::byte* const slot = pool.data(static_cast<int>(i));
    std::memcpy(slot, from.slot, wires.slot_bytes);
    experts[i] = {from.image->view_in(slot), from.image->files.bytes()};
  }
  const WireShape shape{std::min(wires.top_k, static_cast<std::int64_t>(experts.size() / 2)),
                        wires.hidden_size, wires.moe_intermediate_size};
  const double seconds = std::chrono::duration<double>(limits.time).count();
  rates.host_experts = host_rate(wires.host, experts, shape, seconds, poll);
  if (wires.gpu == nullptr) return;
  const WireRates measured = wire_rates(*wires.gpu, wires.host, experts, wires.device_slot_bytes,
                                        std::min(wires.device_slots, residency::kDeviceRing), shape,
                                        rates.host_experts, seconds, poll);
  rates.copy_in = measured.copies;
  rates.both_host_experts = measured.host_beside;
  rates.both_copy_in = measured.copies_beside;
  std::vector<std::byte*> blocks(pool.count());
  for (std::size_t i = 0; i < blocks.size(); ++i) blocks[i] = pool.data(static_cast<int>(i));
  rates.copy_out = copy_rate(*wires.gpu, CopyWay::kOut, blocks,
                             std::min(wires.slot_bytes, wires.device_slot_bytes), seconds, poll);
}

}  // namespace dsfp4::engine
