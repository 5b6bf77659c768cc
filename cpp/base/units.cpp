#include "base/units.h"

#include <cstdio>

namespace dsfp4 {

std::string gigabytes(std::uint64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.3f GB", static_cast<double>(bytes) * 1e-9);
  return text;
}

}  // namespace dsfp4
