// How much of one tier of memory may be taken, and how much of it is.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>

namespace dsfp4::memory {

/// Counts bytes of one tier ("RAM") against a limit. Safe to use from several threads.
class Budget {
 public:
  Budget(std::string tier, std::uint64_t limit);
  Budget(const Budget&) = delete;
  Budget& operator=(const Budget&) = delete;

  const std::string& tier() const noexcept { return tier_; }
  std::uint64_t limit() const noexcept { return limit_; }
  std::uint64_t reserved() const;
  std::uint64_t left() const;

  /// Bytes that stay reserved as long as it lives. Movable.
  class Reservation {
   public:
    Reservation() = default;
    ~Reservation();
    Reservation(Reservation&& other) noexcept;
    Reservation& operator=(Reservation&& other) noexcept;

    std::uint64_t bytes() const noexcept { return bytes_; }

   private:
    friend class Budget;
    Reservation(Budget* budget, std::uint64_t bytes) : budget_(budget), bytes_(bytes) {}

    Budget* budget_ = nullptr;
    std::uint64_t bytes_ = 0;
  };

  /// Reserves `bytes` bytes for `purpose` ("the weights"). Throws MemoryLimitError if they are not
  /// left; then nothing has changed. The budget must outlive the reservation.
  Reservation reserve(std::uint64_t bytes, const char* purpose);

 private:
  std::string tier_;
  std::uint64_t limit_;
  mutable std::mutex mutex_;
  std::uint64_t reserved_ = 0;  // guarded by mutex_
};

}  // namespace dsfp4::memory
