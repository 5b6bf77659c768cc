// The routed experts that lie in RAM, the ones on their way there, and the reads that bring them.
//
// RAM is a fixed number of equal slots, taken at start. At most `cache_slots` hold cached experts;
// the others are for reads in flight, speculation and experts that only pass by. An expert that is
// pinned stays where it is. However many ask for an expert, it is read once: a second demand joins
// the read in flight, and a demand for an expert that is read on speculation promotes that read.
//
// Threads: all functions may be called from any thread; policy and pins are under one lock, which
// no read is waited for under.
// Errors: a failed read fails those who wait for that expert, with an IoError that names layer,
// expert, file and offset; the expert is absent afterwards and may be asked for again.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "base/poll.h"
#include "base/trace.h"
#include "memory/slot_pool.h"
#include "ops/ops.h"
#include "residency/file_image.h"
#include "residency/policy.h"
#include "storage/reader.h"

namespace dsfp4::residency {

struct StoreStats {
  std::uint64_t hits = 0;        // pins that found the expert ready
  std::uint64_t misses = 0;      // pins that had to wait for a read of their own
  std::uint64_t joined = 0;      // pins that found it on its way: a demand's read, or from VRAM
  std::uint64_t prefetched = 0;  // pins that found a speculative read, done or under way
  std::uint64_t prefetched_bytes = 0;
  std::uint64_t demand_bytes = 0;  // read because an expert was needed
  std::uint64_t speculative_bytes = 0;
  std::uint64_t wasted_bytes = 0;  // of those, read and given up unused
  std::uint64_t warm_bytes = 0;    // read by warm_up()
  std::uint64_t evictions = 0;
};

class ExpertStore {
 public:
  struct Options {
    std::int64_t layers = 0;       // MoE layers
    std::int64_t first_layer = 0;  // the model's number of the first of them, for messages
    std::int64_t experts = 0;      // of a layer
    std::size_t slots = 0;
    std::size_t cache_slots = 0;  // < slots
    /// Says whether what was read is what it should be, before it is used: throws if not. Called
    /// from check(), without a lock; may be empty.
    std::function<void(std::span<const ExpertKey> keys, std::span<const ops::HostExpertView> views)>
        check;
    Trace* trace = nullptr;  // may be null
    /// Memory of the slots, which the processor can touch.
    memory::MemorySource* memory = &memory::host_memory();
  };
  /// `images`: by key. The reader must outlive the store. Throws MemoryLimitError.
  ExpertStore(Options options, std::vector<ExpertImage> images, storage::Reader& reader,
              std::unique_ptr<Policy> policy);
  /// Cancels what is unfinished and waits for nothing: the reader keeps the slots. But where they
  /// are a device's, it waits for the system to let go of them, for two seconds.
  ~ExpertStore();
  ExpertStore(const ExpertStore&) = delete;
  ExpertStore& operator=(const ExpertStore&) = delete;

  const Options& options() const noexcept { return options_; }
  std::uint64_t slot_size() const noexcept { return pool_->slot_bytes(); }
  std::uint64_t image_bytes(ExpertKey key) const { return images_[key].files.bytes(); }

  /// What a pin found. kNoRoom: nothing is pinned, all slots are in use; unpin something first.
  enum class Found : std::uint8_t { kReady, kReading, kAbsent, kNoRoom };
  /// Pins the expert if it is in RAM or on its way (and makes that a demand); kAbsent if not.
  /// With `keep` it is a cached expert from now on.
  Found pin(ExpertKey key, bool keep);
  /// Pins an absent expert and submits its read: kReading, or kNoRoom; as pin() if it is there by
  /// now. With `keep` it stays in the
  /// cache if its value is high enough, and cached experts are given up for it; without, it passes
  /// by and takes only slots that hold nothing cached.
  Found fetch(ExpertKey key, bool keep);
  void unpin(ExpertKey key);
  /// Pins the expert if it is ready and checked. Counts nothing.
  bool pin_if_ready(ExpertKey key);
  /// Unpins an expert that another memory keeps now: it is no cached one any more, and its slot is
  /// among the first to be taken.
  void let_go(ExpertKey key);
  /// The ready ones of `pinned`, after waiting for the first of them for at most `wait`.
  /// Throws the error of one whose read failed.
  std::vector<ExpertKey> ready_of(std::span<const ExpertKey> pinned,
                                  std::chrono::milliseconds wait = {});
  /// Lets Options::check look at those of `pinned`, all ready, that it has not seen since they were
  /// read. If it throws, they are absent once nobody has them pinned.
  void check(std::span<const ExpertKey> pinned);
  /// Call after kNoRoom with nothing pinned: waits a moment for a read to end. False: none is under
  /// way, and the room is others' pins and cached experts. Throws IoError if all that could make
  /// room are reads that the disk does not answer.
  bool wait_for_room();
  /// Of a pinned expert that is ready.
  ops::HostExpertView view(ExpertKey key) const;

  /// Submits a speculative read if the expert is absent and a slot is free of anything cached:
  /// kReading or kNoRoom; kReady if it is there or on its way.
  Found prefetch(ExpertKey key);
  /// Cancels the speculative reads of that MoE layer that are not pinned, and frees their slots;
  /// what has arrived stays while the cache has room.
  void drop_speculation(std::int64_t layer);
  /// The experts of a MoE layer by the policy's value, the highest first.
  std::vector<ExpertKey> most_valued(std::int64_t layer) const;

  // Experts that another memory gives up.

  /// If the expert is in RAM still, it is a cached one again.
  bool take_back(ExpertKey key);
  /// Of an absent expert: a slot that holds nothing worth more, where it is to be written until
  /// came_back(). It is cached and pinned, and who asks for it waits as for a read. None: there is
  /// no such slot, or it is there or on its way.
  std::optional<ExpertBytes> make_room_for(ExpertKey key);
  /// Unpins it. If it has not come `whole` it is absent.
  void came_back(ExpertKey key, bool whole);

  /// The policy's values of experts, one for each key.
  void worth(std::span<const ExpertKey> keys, std::span<float> worth) const;
  /// The policy's use(); then gives up cached experts beyond cache_slots.
  void note_use(std::int64_t layer, std::span<const std::int32_t> experts,
                std::span<const float> scores);
  void trim();
  /// True where the cache is as large as all experts.
  bool holds_all() const noexcept { return options_.cache_slots >= images_.size(); }
  /// Cached experts that there is room for.
  std::size_t cache_room() const;

  StoreStats stats() const;
  std::vector<float> policy_state() const;
  bool restore_policy(std::span<const float> state);
  /// Changes the number of slots and of cached experts among them. What has the highest values and
  /// fits stays. Only while nothing is pinned; waits for reads in flight, and cancels speculation.
  /// Throws ParameterError, MemoryLimitError, IoError while the system still has a read that was
  /// given up, and what `poll` throws during the wait; the slots are as they were then.
  void resize(std::size_t slots, std::size_t cache_slots, const Poll& poll = {});

  /// Submits reads, behind every demand, of the absent experts with the highest values until the
  /// cache is full.
  void warm_up();
  /// Every slot is free, ready or being read, and nothing is pinned: for tests.
  bool is_consistent() const;

 private:
  static constexpr std::chrono::milliseconds kLookAgain{1};
  static constexpr std::chrono::milliseconds kGiveUp{2000};
  static constexpr ExpertKey kNoKey = std::numeric_limits<ExpertKey>::max();
  // For find_slot().
  static constexpr float kAny = std::numeric_limits<float>::infinity();
  static constexpr float kNone = -kAny;
  enum class State : std::uint8_t { kFree, kReading, kReady, kFailed };
  struct Slot {
    State state = State::kFree;
    ExpertKey key = kNoKey;
    int pins = 0;
    bool keep = false;
    bool speculative = false;  // nobody has asked for it yet
    bool cancelled = false;    // and nobody will: its read is to end
    bool checked = false;      // what was read is what it should be
    Trace::Clock::time_point asked;
    storage::ReadTicket ticket;
    storage::ReadResult result;  // kFailed, or
    std::exception_ptr error;    // what check() threw
  };
  /// The way of a completion to the store, which may be gone by then.
  struct Link {
    std::mutex mutex;
    ExpertStore* store;
  };
  using Lock = std::unique_lock<std::mutex>;

  static void check_counts(std::size_t slots, std::size_t cache_slots);
  // All but the first are called under the lock.
  void arrived(int slot, const storage::ReadResult& result) noexcept;
  void trace_read(const Slot& slot) const noexcept;
  void cancel(Lock& lock, const std::vector<storage::ReadTicket>& tickets);
  Found pin_locked(ExpertKey key, bool keep);
  void unpin_locked(ExpertKey key);
  int free_or_passing();
  void reclaim();
  void throw_if_stalled(const char* problem) const;
  int find_slot(float below);
  void give_up_speculation(Slot& slot) noexcept;
  void forget(Slot& slot) noexcept;
  void pass_by(int slot);
  void read_into(int slot, ExpertKey key, storage::Priority priority);
  void start_over(const std::vector<ExpertKey>& keys, std::size_t cache_slots);
  ops::HostExpertView view_locked(ExpertKey key) const;
  [[noreturn]] void throw_failure(ExpertKey key, const Slot& slot) const;

  Options options_;
  std::vector<ExpertImage> images_;
  storage::Reader& reader_;
  std::unique_ptr<Policy> policy_;
  std::shared_ptr<memory::SlotPool> pool_;
  std::shared_ptr<Link> link_;

  mutable std::mutex mutex_;
  std::condition_variable arrival_;
  std::vector<Slot> slots_;
  std::vector<int> slot_of_;  // by key; -1 absent
  std::vector<int> passing_;  // slots that may be free for the taking; checked when taken
  std::vector<bool> queued_;  // whether a slot is in there
  std::size_t cached_ = 0;    // slots with keep
  int unread_ = 0;            // completions still to come
  StoreStats stats_;
};

}  // namespace dsfp4::residency
