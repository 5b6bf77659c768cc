// Arrays in and out: inputs are views of C-contiguous CPU arrays (NumPy or DLPack), results are
// framework-neutral arrays that own their memory and that NumPy takes over without a copy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <utility>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

namespace dsfp4::bindings {

/// An argument of this type takes arrays of exactly this element type, read-only ones too. Python
/// converts before the call (dsfp4/_arrays.py); nanobind would do it without a word.
template <typename T>
using ConstArray = nanobind::ndarray<const T, nanobind::c_contig, nanobind::device::cpu>;

/// `values`, seen as elements of type T, as a writable array of `shape` that owns them. The shape
/// has as many elements as there are values.
template <typename T, typename Stored>
nanobind::object own_array_as(std::vector<Stored>&& values,
                              std::initializer_list<std::size_t> shape) {
  static_assert(sizeof(T) == sizeof(Stored) && alignof(T) <= alignof(Stored));
  auto kept = std::make_unique<std::vector<Stored>>(std::move(values));
  auto* data = reinterpret_cast<T*>(kept->data());
  const nanobind::capsule owner(
      kept.get(), [](void* memory) noexcept { delete static_cast<std::vector<Stored>*>(memory); });
  static_cast<void>(kept.release());  // the capsule exists now, and owns them
  return nanobind::cast(nanobind::ndarray<nanobind::array_api, T>(data, shape, owner));
}

template <typename T>
nanobind::object own_array(std::vector<T>&& values, std::initializer_list<std::size_t> shape) {
  return own_array_as<T>(std::move(values), shape);
}

/// Stored bytes as uint8.
inline nanobind::object own_array(std::vector<std::byte>&& values,
                                  std::initializer_list<std::size_t> shape) {
  return own_array_as<std::uint8_t>(std::move(values), shape);
}

}  // namespace dsfp4::bindings
