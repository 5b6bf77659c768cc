// Addresses in a device's memory. The host cannot read through them: an op can, a copy can.
#pragma once

#include <compare>
#include <concepts>
#include <cstddef>
#include <ranges>
#include <type_traits>
#include <utility>

namespace dsfp4 {

/// An address in the memory of some device, which may be the host itself. An ordinary pointer
/// becomes one without saying so, as the host's device takes the host's memory; the way back is
/// DeviceAccess, for those who implement a device, and Device::on_host().
template <typename T>
class DevicePtr {
 public:
  constexpr DevicePtr() = default;
  constexpr DevicePtr(std::nullptr_t) {}                  // NOLINT: as a pointer's
  constexpr DevicePtr(T* address) : address_(address) {}  // NOLINT: see above
  template <typename U>
    requires std::convertible_to<U*, T*> && (!std::same_as<U, T>)
  constexpr DevicePtr(DevicePtr<U> other) : address_(other.address_) {}  // NOLINT: as pointers do

  constexpr explicit operator bool() const { return address_ != nullptr; }
  constexpr DevicePtr operator+(std::ptrdiff_t count) const
    requires(!std::is_void_v<T>)
  {
    return address_ + count;
  }
  constexpr std::ptrdiff_t operator-(DevicePtr other) const
    requires(!std::is_void_v<T>)
  {
    return address_ - other.address_;
  }
  friend constexpr auto operator<=>(DevicePtr, DevicePtr) = default;

  /// The same address, of values of another type.
  template <typename U>
  DevicePtr<U> as() const {
    return reinterpret_cast<U*>(address_);
  }

 private:
  template <typename U>
  friend class DevicePtr;
  friend struct DeviceAccess;

  T* address_ = nullptr;
};

/// `size` values at `data`.
template <typename T>
struct DeviceSpan {
  constexpr DeviceSpan() = default;
  constexpr DeviceSpan(DevicePtr<T> first, std::size_t count) : data(first), size(count) {}
  template <std::ranges::contiguous_range Range>
    requires std::convertible_to<decltype(std::ranges::data(std::declval<Range&>())), T*>
  constexpr DeviceSpan(Range&& range)  // NOLINT: as std::span's
      : data(std::ranges::data(range)), size(std::ranges::size(range)) {}
  template <typename U>
    requires std::convertible_to<U*, T*> && (!std::same_as<U, T>)
  constexpr DeviceSpan(DeviceSpan<U> other) : data(other.data), size(other.size) {}  // NOLINT

  constexpr bool empty() const { return size == 0; }
  constexpr std::size_t size_bytes() const { return size * sizeof(T); }
  constexpr DeviceSpan subspan(std::size_t first, std::size_t count) const {
    return {data + static_cast<std::ptrdiff_t>(first), count};
  }

  DevicePtr<T> data;
  std::size_t size = 0;
};

}  // namespace dsfp4
