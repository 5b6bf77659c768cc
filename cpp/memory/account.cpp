#include "memory/account.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace dsfp4::memory {

Account::Lease::Lease(Lease&& other) noexcept
    : account_(std::exchange(other.account_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Account::Lease& Account::Lease::operator=(Lease&& other) noexcept {
  std::swap(account_, other.account_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Account::Lease::~Lease() {
  if (account_ == nullptr) return;
  const std::lock_guard lock(account_->mutex_);
  account_->leased_ -= bytes_;
}

void Account::Lease::resize(const std::function<std::uint64_t(std::uint64_t others)>& decide) {
  const std::lock_guard lock(account_->mutex_);
  const std::uint64_t others = account_->leased_ - bytes_;
  bytes_ = decide(others);
  account_->leased_ = others + bytes_;
}

MachineMemory Account::committed(const MachineMemory& measured) const {
  const std::lock_guard lock(mutex_);
  return commit(measured);
}

Account::Lease Account::reserve(const MachineMemory& measured, const Decide& decide) {
  const std::lock_guard lock(mutex_);
  outside_ = outside(measured);
  const std::uint64_t bytes = decide(commit(measured), leased_);
  leased_ += bytes;
  return {*this, bytes};
}

// A part of the leases has been written and shows in the process; nobody knows how much. What it
// had before the first of them is outside, and so is what exceeds them all.
std::uint64_t Account::outside(const MachineMemory& measured) const noexcept {
  if (leased_ == 0) return measured.process;
  return std::max(outside_, measured.process - std::min(measured.process, leased_));
}

MachineMemory Account::commit(const MachineMemory& measured) const noexcept {
  MachineMemory memory = measured;
  memory.process = outside(measured) + leased_;
  const std::uint64_t unwritten = memory.process - measured.process;
  if (memory.available != std::numeric_limits<std::uint64_t>::max()) {  // it is known
    memory.available -= std::min(memory.available, unwritten);
  }
  return memory;
}

Account& ram_account() noexcept {
  static Account account;
  return account;
}

}  // namespace dsfp4::memory
