// The routed experts that lie in a device's memory, and the copies that bring them from RAM.
//
// The device's memory is a fixed number of equal slots. At most `cache_slots` hold cached experts;
// the others are for those that only pass through. But for errors and memory that is not pinned, no
// call here but wait_copied(), wait_sent_back(), resize() and the destructor waits for the device:
// events order a slot's next copies behind the ops that read it, and ops behind the copies of what
// they read.
//
// An expert that has to go may be copied back to RAM first; nobody finds it here from then on, but
// its slot is free only once that has been done.
//
// Errors: after one of the device nobody knows which copies were made, so experts whose copies were
// not known to be done are given up; see drop_uncopied().
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "base/counter.h"
#include "memory/arena.h"
#include "ops/device.h"
#include "ops/views.h"
#include "residency/device_trace.h"
#include "residency/file_image.h"
#include "residency/policy.h"

namespace dsfp4::residency {

struct DeviceStats {
  Counter<std::uint64_t> hits;     // finds that found the expert cached
  Counter<std::uint64_t> passing;  // and those that found one which only passes through
  Counter<std::uint64_t> brought;  // experts whose copies were queued
  Counter<std::uint64_t> brought_bytes;
  Counter<std::uint64_t> evictions;  // cached experts that made room for another
  Counter<std::uint64_t> sent_back;  // of those, experts whose copies to RAM were queued
};

/// Used by one thread; the statistics may be read by any. Not while a segment is recorded. Keys
/// that are too large are std::out_of_range.
class DeviceExperts {
 public:
  /// Tells what experts are worth keeping, one value for each key; only the order means something.
  using Worth = std::function<void(std::span<const ExpertKey> keys, std::span<float> worth)>;
  /// `slots` >= 1 of `slot_bytes` bytes, of which at most `cache_slots` < slots hold experts that
  /// stay when nobody uses them. Keys are below `experts`. The device must outlive this, and so
  /// must `trace`, if there is one. Throws ParameterError, MemoryLimitError.
  DeviceExperts(ops::Device& device, std::size_t slot_bytes, std::size_t slots,
                std::size_t cache_slots, std::uint64_t experts, Worth worth,
                DeviceTrace* trace = nullptr);
  /// Waits until nothing reads or writes the slots any more.
  ~DeviceExperts();
  DeviceExperts(const DeviceExperts&) = delete;
  DeviceExperts& operator=(const DeviceExperts&) = delete;

  /// Bytes of a slot for experts of these formats and sizes: each matrix's data and scales begin at
  /// a multiple of Arena::kAlignment.
  static std::size_t slot_bytes(const ops::ExpertView& shape);

  /// The expert if it is there, pinned until release() has been called as often as find() and
  /// bring() gave it; null if not. Ops that are queued from now on wait for its copies, if they are
  /// not known to be made. Throws CudaError; then it is not pinned. The view stays until then; so
  /// does what it shows, and longer, for ops that were queued before.
  const ops::ExpertView* find(ExpertKey key);
  /// True where find() would find it.
  bool has(ExpertKey key) const { return slot_of_.at(key) >= 0; }
  /// True where it is there to stay.
  bool is_cached(ExpertKey key) const;
  /// Brings an expert that is not there, pinned until release(): queues its copies from `from`, in
  /// the device's staging memory, and makes all ops that are queued from now on wait for them; so
  /// those that need others are best queued before. With `keep` it is cached from now on if there
  /// is room, or if it is worth more than the cached one of least worth, which goes then. Null: no
  /// slot is free before something is released or has been sent back. Throws std::logic_error if it
  /// is there or larger than a slot, and CudaError; then it is not there, and none of its copies is
  /// under way.
  const ops::ExpertView* bring(ExpertKey key, const ops::HostExpertView& from, bool keep);
  /// The same for one that is not needed yet: no op waits for its copies before find() gives it.
  /// False where bring() is null. Pinned as by bring().
  bool bring_for_later(ExpertKey key, const ops::HostExpertView& from, bool keep);
  /// Whether the last bring() of this expert has made its copies: until then `from` must stay, also
  /// where the expert was released or given up. Both throw CudaError.
  bool copied(ExpertKey key);
  void wait_copied(ExpertKey key);
  /// Ops queued so far were the last of this user to read it: the slot may be overwritten once they
  /// have run. One that is not cached cannot be found any more after its last release. Throws
  /// nothing of the device's, so that work which ends with an error can give back its pins.
  void release(ExpertKey key);
  /// The cached expert that bring() of this one, to stay, would give up; none if there is room or
  /// nothing that is worth less.
  std::optional<ExpertKey> victim(ExpertKey key);
  /// Until then victim() and bring() go by what cached experts were worth before, and do not see
  /// those that came since.
  void revalue() noexcept { is_ranked_ = false; }
  /// True where a cached expert may be sent back: nobody has it pinned, its own copies are known to
  /// be made, and fewer than kMostLeaving are on their way. Throws CudaError.
  bool can_send_back(ExpertKey key);
  /// Gives it up and queues its copies to `to`, in the device's staging memory. Throws
  /// std::logic_error where it may not be, and CudaError; then it is given up all the same, and
  /// `to` is written no more.
  void send_back(ExpertKey key, const ExpertBytes& to);
  /// The first of the experts sent back that has not been named yet, if its copies have been made.
  /// Throws CudaError.
  std::optional<ExpertKey> sent_back();
  /// How many sent_back() has still to name.
  std::size_t leaving() const noexcept { return leaving_.size(); }
  /// Waits until sent_back() names one, if there is any. Throws CudaError.
  void wait_sent_back();
  /// The same without asking the device, after an error of it: those copies may not be whole.
  std::optional<ExpertKey> drop_leaving() noexcept;
  /// After an error of the device: gives up the experts for which copied() has not said yes yet,
  /// those that are pinned when they are released.
  void drop_uncopied() noexcept;

  std::size_t slots() const noexcept { return slots_.size(); }
  std::size_t cache_slots() const noexcept { return cache_slots_; }
  std::size_t cached() const noexcept { return cached_; }
  /// Cached experts that there is room for.
  std::size_t cache_room() const noexcept { return cache_slots_ - cached_; }
  /// Takes or gives back slots. Of the cached experts those that are worth most stay, but for some
  /// that lie beside free slots. std::logic_error where something is pinned or on its way back.
  /// Waits for the device. Throws ParameterError, CudaError and MemoryLimitError; then there are as
  /// many slots as before, which may hold less. If they are not to be had again either, there are
  /// fewer, of which one at least caches nothing, and bring() throws MemoryLimitError while there
  /// are none.
  void resize(std::size_t slots, std::size_t cache_slots);
  /// The cached experts that resize() will give up unless others come, those worth most first.
  std::vector<ExpertKey> going(std::size_t slots, std::size_t cache_slots);
  const DeviceStats& stats() const noexcept { return stats_; }
  /// Every slot is free, cached or pinned, and counted as that: for tests.
  bool is_consistent() const;

 private:
  static constexpr ExpertKey kNoKey = std::numeric_limits<ExpertKey>::max();
  /// Copies that copied() can tell apart; of older ones it learns a little late.
  static constexpr std::size_t kCopyEvents = 256;
  /// Experts on their way back to RAM; more would take slots from those that pass through.
  static constexpr std::size_t kMostLeaving = 2;

  struct Slot {
    DevicePtr<std::byte> memory;
    ops::ExpertView view;
    ExpertKey key = kNoKey;  // kNoKey: the slot is free
    int pins = 0;
    bool cached = false;
    ops::Event read;                   // the ops that read it, as it was released
    bool read_is_recorded = true;      // else only an empty queue says that they have run
    std::uint64_t release_number = 0;  // 0: never released
  };
  struct Block {
    std::unique_ptr<memory::Arena> memory;
    std::size_t slots = 0;
  };
  struct Staying {
    std::pair<std::size_t, std::size_t> counts;  // that were asked for
    std::vector<bool> blocks, slots;             // by number
  };
  struct Leaving {
    int slot = -1;
    ExpertKey key = kNoKey;
    std::size_t event = 0;
  };

  static void check_counts(std::size_t slots, std::size_t cache_slots);
  Slot& slot(int number) { return slots_[static_cast<std::size_t>(number)]; }
  bool make_cache_room(ExpertKey key);
  float worth(ExpertKey key) const;
  void rank();
  const ops::ExpertView* take_in(ExpertKey key, const ops::HostExpertView& from, bool keep,
                                 bool now);
  void queue_copies(ExpertKey key, Slot& slot, const ops::HostExpertView& from);
  std::uint64_t copies_to_ask_for(ExpertKey key) const;
  ops::Event& copy_event(std::uint64_t number) { return copy_events_[number % kCopyEvents]; }
  std::pair<std::uint64_t, int> order_of(int number) {
    return {slot(number).release_number, number};
  }
  void make_free(int number) noexcept;
  void settle() noexcept;
  std::size_t bytes_of(std::size_t slots) const;
  void add_slots(std::size_t count);
  Staying staying(std::size_t slots, std::size_t cache_slots);
  void drop_others(const Staying& staying);
  void take_back(std::size_t slots);

  ops::Device& device_;
  const std::size_t slot_bytes_;
  const Worth worth_;
  DeviceTrace* const trace_;  // null: none was asked for

  std::vector<Block> blocks_;
  std::vector<Slot> slots_;   // block by block
  std::vector<int> slot_of_;  // by key; -1 absent
  std::vector<int> free_;     // a heap: the one released first is in front; has room for all
  std::size_t cache_slots_ = 0;
  std::size_t cached_ = 0;
  std::uint64_t releases_ = 0;
  // Cached experts by worth, those worth most in front; some may be gone or pinned by now.
  std::vector<std::pair<float, ExpertKey>> ranked_;
  bool is_ranked_ = false;
  std::optional<Staying> decided_;  // by going()
  std::deque<Leaving> leaving_;     // in the order of their copies
  std::vector<ops::Event> leaving_events_;
  std::size_t left_ = 0;  // that were ever sent back: chooses the event

  // Each bring()'s copies have a number, from 1 on; they are made in that order.
  std::vector<std::uint64_t> copy_of_;   // by key: of its last ones; 0 none
  std::vector<ops::Event> copy_events_;  // those of number n are n % kCopyEvents
  std::uint64_t copies_ = 0;             // the last number
  std::uint64_t made_ = 0;               // up to here they are known to be made
  DeviceStats stats_;
};

}  // namespace dsfp4::residency
