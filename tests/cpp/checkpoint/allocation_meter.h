// Counts what operator new gives out. The program that links allocation_meter.cpp has its own
// operators new and delete.
#pragma once

#include <cstddef>

namespace dsfp4::testing {

/// The most bytes held at once since its construction, over those held then. One at a time.
class AllocationMeter {
 public:
  AllocationMeter();
  std::size_t peak_bytes() const;

 private:
  std::size_t before_;
};

}  // namespace dsfp4::testing
