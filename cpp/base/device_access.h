// The way from a DevicePtr to the address in it: for memory/ and ops/, which implement devices.
#pragma once

#include "base/device_ptr.h"

namespace dsfp4 {

struct DeviceAccess {
  template <typename T>
  static constexpr T* address(DevicePtr<T> pointer) {
    return pointer.address_;
  }
};

}  // namespace dsfp4
