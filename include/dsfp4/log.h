// What the library has to say besides results and errors: a path that is slower than it could be, a
// device that is not used. It prints nothing itself; whoever embeds it decides where this goes.
#pragma once

#include <cstdint>
#include <functional>
#include <string_view>

#include "dsfp4/api.h"

namespace dsfp4 {
inline namespace DSFP4_ABI_NAMESPACE {

enum class LogLevel : std::uint8_t {
  kDebug,    // of use to those who develop dsfp4
  kInfo,     // what was decided: the plan, the device
  kWarning,  // it works, but not as well as it could; the message says what to do about it
};

/// Called with a message of one or more sentences, UTF-8, no newline at its end. The view is valid
/// during the call only.
///
/// Threads: called on whichever thread has something to say, possibly several at once. It must
/// return soon, as the engine waits for it, and must not call into a Model. What it throws is
/// dropped.
using LogCallback = std::function<void(LogLevel level, std::string_view message)>;

/// Sets the one callback of the process in place of the one before; an empty one, as at the start,
/// drops all messages. May be called at any time on any thread; a call to the callback before that
/// is under way on another thread ends as it may.
DSFP4_API void set_log_callback(LogCallback callback);

}  // namespace DSFP4_ABI_NAMESPACE
}  // namespace dsfp4
