// Numbers as messages say them.
#pragma once

#include <cstdint>
#include <string>

namespace dsfp4 {

/// "1.234 GB", of 10^9 bytes.
std::string gigabytes(std::uint64_t bytes);

}  // namespace dsfp4
