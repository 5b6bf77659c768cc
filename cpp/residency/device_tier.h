// The part of TieredExperts that knows a GPU: which side computes an expert that lies in RAM, and
// what is on its way over PCIe.
//
// An expert in VRAM is computed there. One in RAM is computed by the processor where it lies, or
// copied and computed by the GPU: copies run while the processor computes, and the split is the one
// that lets both end together, by rates measured while running. In a prompt the GPU computes all.
//
// VRAM and RAM are one cache. An expert that VRAM keeps gives its place in RAM to others; one that
// has to go from VRAM goes back to RAM, if it is worth more than what is there. Where experts are
// read from files all the time PCIe is idle, and those that the processor computed are copied, too.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "base/counter.h"
#include "base/poll.h"
#include "memory/arena.h"
#include "ops/ops.h"
#include "residency/device_experts.h"
#include "residency/expert_runner.h"
#include "residency/expert_store.h"

namespace dsfp4::residency {

struct DeviceTierStats {
  Counter<std::uint64_t> copied_ahead;  // experts that were copied before their layer was reached
  Counter<std::uint64_t> host_bytes;    // of experts that the processor computed
  Counter<double> host_seconds;
};

/// Used by one thread.
class DeviceTier {
 public:
  struct Shape {
    std::int64_t top_k = 0;
    std::int64_t hidden_size = 0;
    std::int64_t moe_intermediate_size = 0;
  };
  /// `ops` compute on the GPU that `experts` lie on, `host` in RAM. All must outlive this, and so
  /// must `trace`, if there is one. Throws MemoryLimitError if there is no staging memory for
  /// staging_bytes().
  DeviceTier(ops::Ops& ops, ops::Ops& host, DeviceExperts& experts, ExpertStore& store,
             const Shape& shape, DeviceTrace* trace = nullptr);
  /// Waits for copies under way.
  ~DeviceTier();
  DeviceTier(const DeviceTier&) = delete;
  DeviceTier& operator=(const DeviceTier&) = delete;

  static std::size_t staging_bytes(const Shape& shape);

  /// One expert of a layer, and its pairs.
  struct Job {
    ExpertKey key = 0;
    std::span<const std::int32_t> pairs;
  };
  struct Target {
    const ExpertLayer* layer = nullptr;
    // Scratch on the device: of all pairs or, where they are added at once, of a call's.
    ops::Matrix hidden, routed;
    bool adds = false;  // at once to the layer's y, in the order of the jobs
  };

  /// Queues experts that are in VRAM.
  void compute_cached(std::span<const Job> jobs, const Target& target);
  /// Of `jobs` in RAM, pinned there and checked: the first go to the processor, the others to the
  /// GPU; in prefill all, in their order. Takes the pins over, also where it throws; `keep`: what
  /// is copied may stay in VRAM.
  void compute(std::span<const Job> jobs, const Target& target, bool keep);

  /// A layer is over, and PCIe has nothing to do until the next one's choice is known: copies as
  /// many of its likely experts, the likeliest first, as come in that time. They are found in VRAM
  /// until end_ahead().
  void copy_ahead(std::span<const ExpertKey> likely);
  /// A step begins: the time since a layer ended before it is nobody's measure.
  void begin_step() noexcept { layer_ended_.reset(); }
  /// The next layer's choice is known.
  void reach_layer();
  /// Its experts in VRAM have been queued.
  void end_ahead();
  /// True where an expert's copy fits into that time.
  bool has_time_ahead() const { return most_ahead() > 0; }

  /// Gives back the pins of what has been copied.
  void reap();
  /// Pins that are still held for copies.
  std::size_t copying() const noexcept { return copying_.size(); }
  /// True while experts are on their way back to RAM; reap() finds out that they are there.
  bool takes_back() const noexcept { return experts_.leaving() > 0; }
  /// Waits until the first of them has been copied; some milliseconds at most.
  void wait_for_one();
  /// Until none is left, and the device reads and writes nothing of RAM any more.
  void settle();
  /// After an error: waits for the device, and where it has failed uses nothing whose copies are
  /// not known to be made. Gives all pins back.
  void give_up() noexcept;

  /// Another number of slots in VRAM. Experts that lose theirs go back to RAM if they are worth
  /// more than what is there. Throws what DeviceExperts::resize() and `poll` do.
  void resize(std::size_t slots, std::size_t cache_slots, const Poll& poll = {});

  /// The share of a step's experts in RAM that the processor computes, 0 to 1; none: as said above.
  void set_host_share(std::optional<double> share) {
    share_ = share;
    owed_ = 0.0;
  }
  /// False: ops, or copies, are waited for as soon as they are queued. Between steps only.
  void overlap(bool compute, bool copies) noexcept {
    overlaps_compute_ = compute;
    overlaps_copies_ = copies;
  }
  /// Bytes a second of copies and of the processor, both at work, to start with; 0: not known.
  void start_rates(double copy, double host);
  /// True where the processor may compute in a step of so many rows.
  bool uses_host(std::int64_t rows) const;
  DeviceExperts& experts() noexcept { return experts_; }
  const DeviceTierStats& stats() const noexcept { return stats_; }

 private:
  void run(std::span<const ops::ExpertTask> tasks, const Target& target);
  std::size_t host_jobs(std::size_t jobs, std::uint64_t bytes);
  void measure_copies(double seconds);
  void compute_on_host(std::span<const Job> jobs, const Target& target);
  std::size_t most_ahead() const;
  std::vector<Job> by_worth(std::span<const Job> jobs) const;
  void copy(const Job& job, const Target& target, bool keep);
  bool make_cache_room(ExpertKey key);
  void send_back(ExpertKey key, const ExpertBytes& to);
  bool promote(ExpertKey key);
  void take_returned();
  void run_copied(const Target& target);
  void release_copied();

  struct Copying {
    ExpertKey key;
    std::uint64_t bytes;
  };

  ops::Ops& ops_;
  ops::Ops& host_;
  DeviceExperts& experts_;
  ExpertStore& store_;
  const Shape shape_;
  DeviceTrace* const trace_;  // null: none was asked for
  memory::Arena staging_;
  ops::Matrix host_hidden_, host_routed_;  // of kMostHostRows rows
  const ExpertLayer* rows_of_ = nullptr;   // the last to compute there
  ops::Event rows_copied_;
  std::vector<Copying> copying_;
  std::uint64_t queued_ = 0;  // bytes of them, since it was empty
  // Of compute(): pinned in VRAM, and still to be computed.
  std::vector<ExpertKey> brought_;
  std::vector<ops::ExpertTask> tasks_;
  // Of copy_ahead(): pinned in VRAM.
  std::vector<ExpertKey> ahead_;
  std::optional<std::chrono::steady_clock::time_point> layer_ended_;
  double gap_ = 0.0;    // seconds from there to the next layer's choice
  int promotions_ = 0;  // in this layer
  bool overlaps_compute_ = true;
  bool overlaps_copies_ = true;
  std::optional<double> share_;
  double owed_ = 0.0;  // jobs that the share asks for, beyond those that the processor had
  // Bytes a second. Where no rate is known the first few copies are waited for.
  double copy_rate_ = 0.0;
  int measured_copies_ = 0;
  double host_rate_ = 0.0;
  int idle_host_ = 0;  // calls in a row
  DeviceTierStats stats_;
};

}  // namespace dsfp4::residency
