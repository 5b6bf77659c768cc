// One account of RAM for all models of a process. Memory that is reserved but was never written
// shows neither in what the process has nor in what the machine has left, so two models that only
// looked there would promise the same memory.
#pragma once

#include <cstdint>
#include <functional>
#include <mutex>

#include "memory/limits.h"

namespace dsfp4::memory {

/// From any thread. Must outlive its leases.
class Account {
 public:
  /// Bytes that one model may take, until this is destroyed. Moves, but is not copied.
  class Lease {
   public:
    Lease() = default;
    Lease(Lease&& other) noexcept;
    Lease& operator=(Lease&& other) noexcept;
    ~Lease();

    std::uint64_t bytes() const noexcept { return bytes_; }
    /// Leases what `decide` returns instead, given the bytes of all other leases. Nobody else
    /// reserves meanwhile; what `decide` throws leaves everything as it was. Not for an empty one.
    void resize(const std::function<std::uint64_t(std::uint64_t others)>& decide);

   private:
    friend class Account;
    Lease(Account& account, std::uint64_t bytes) noexcept : account_(&account), bytes_(bytes) {}

    Account* account_ = nullptr;
    std::uint64_t bytes_ = 0;
  };

  /// Decides how many bytes to lease of what is there, `leased` of them to others.
  using Decide = std::function<std::uint64_t(const MachineMemory& committed, std::uint64_t leased)>;

  /// The measured memory, as it will be once all that is leased has been written.
  MachineMemory committed(const MachineMemory& measured) const;
  /// Leases what `decide` returns. Nobody else reserves meanwhile; what `decide` throws leaves
  /// nothing leased.
  Lease reserve(const MachineMemory& measured, const Decide& decide);

 private:
  /// Bytes of the process that no lease covers, at least.
  std::uint64_t outside(const MachineMemory& measured) const noexcept;
  MachineMemory commit(const MachineMemory& measured) const noexcept;

  mutable std::mutex mutex_;
  std::uint64_t leased_ = 0;
  std::uint64_t outside_ = 0;  // as of the last reserve()
};

/// The process's own.
Account& ram_account() noexcept;

}  // namespace dsfp4::memory
