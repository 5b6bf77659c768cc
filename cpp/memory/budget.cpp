#include "memory/budget.h"

#include <utility>

#include "dsfp4/error.h"

namespace dsfp4::memory {

Budget::Budget(std::string tier, std::uint64_t limit) : tier_(std::move(tier)), limit_(limit) {}

std::uint64_t Budget::reserved() const {
  const std::lock_guard lock(mutex_);
  return reserved_;
}

std::uint64_t Budget::left() const {
  const std::lock_guard lock(mutex_);
  return limit_ - reserved_;
}

Budget::Reservation Budget::reserve(std::uint64_t bytes, const char* purpose) {
  const std::lock_guard lock(mutex_);
  if (bytes > limit_ - reserved_) throw MemoryLimitError(purpose, bytes, limit_ - reserved_);
  reserved_ += bytes;
  return {this, bytes};
}

Budget::Reservation::~Reservation() {
  if (budget_ == nullptr) return;
  const std::lock_guard lock(budget_->mutex_);
  budget_->reserved_ -= bytes_;
}

Budget::Reservation::Reservation(Reservation&& other) noexcept
    : budget_(std::exchange(other.budget_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Budget::Reservation& Budget::Reservation::operator=(Reservation&& other) noexcept {
  std::swap(budget_, other.budget_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

}  // namespace dsfp4::memory
