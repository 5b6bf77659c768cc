// Hands the library's messages to dsfp4._log, which hands them to Python's logging.
#include <string>
#include <string_view>

#include <nanobind/stl/string.h>

#include "base/log.h"
#include "bindings/bindings.h"
#include "bindings/gil.h"

namespace dsfp4::bindings {
namespace {

namespace nb = nanobind;

const char* level_name(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return "DEBUG";
    case LogLevel::kInfo:
      return "INFO";
    case LogLevel::kWarning:
      return "WARNING";
  }
  return "WARNING";
}

void forward(LogLevel level, std::string_view message) {
  call_python([&] {
    try {
      nb::module_::import_("dsfp4._log")
          .attr("emit")(level_name(level), nb::str(message.data(), message.size()));
    } catch (nb::python_error& error) {
      if (error.matches(PyExc_KeyboardInterrupt)) {
        PyErr_SetInterrupt();  // a Ctrl-C that came just now: raised again where it can be
        return;
      }
      error.discard_as_unraisable("dsfp4._log.emit");  // of a handler that the user set
    }
  });
}

}  // namespace

void bind_log(nb::module_& m) {
  set_log_callback(forward);
  m.def(
      "log_warning", [](const std::string& message) { log(LogLevel::kWarning, message); },
      nb::arg("message"), nb::call_guard<ReleasedGil>(),
      "Says `message` as the library itself does.");
}

}  // namespace dsfp4::bindings
