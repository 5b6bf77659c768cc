// The rooms' way to say something; include/dsfp4/log.h says who hears it.
#pragma once

#include <string_view>

#include "dsfp4/log.h"

namespace dsfp4 {

/// Hands `message` to the callback of the process, if there is one. Any thread; never throws. Not
/// for hot paths: it takes a lock.
void log(LogLevel level, std::string_view message) noexcept;

}  // namespace dsfp4
