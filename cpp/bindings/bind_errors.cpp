// Turns the library's exceptions into those of dsfp4.errors, facts included.
#include <exception>
#include <string>
#include <utility>

#include <nanobind/stl/string.h>

#include "bindings/bindings.h"
#include "dsfp4/error.h"

namespace dsfp4::bindings {
namespace {

namespace nb = nanobind;

// Messages and files may hold names that are not UTF-8; Python spells those as os.fsdecode does.
nb::str text(const std::string& bytes) {
  return nb::steal<nb::str>(
      PyUnicode_DecodeFSDefaultAndSize(bytes.data(), static_cast<Py_ssize_t>(bytes.size())));
}

// Raises <name>(message, **facts), a class of the module `errors`.
template <typename... Facts>
void raise(nb::handle errors, const char* name, const Error& error, Facts&&... facts) {
  const nb::object type = errors.attr(name);
  const nb::object instance = type(text(error.what()), std::forward<Facts>(facts)...);
  PyErr_SetObject(type.ptr(), instance.ptr());
}

void raise_as_python(const std::exception_ptr& exception, nb::handle errors) {
  try {
    std::rethrow_exception(exception);
  } catch (const CheckpointError& e) {
    raise(errors, "CheckpointError", e, nb::arg("file") = text(e.file()),
          nb::arg("tensor") = text(e.tensor()), nb::arg("offset") = e.offset());
  } catch (const UnsupportedError& e) {
    raise(errors, "UnsupportedError", e);
  } catch (const IoError& e) {
    raise(errors, "IoError", e, nb::arg("file") = text(e.file()), nb::arg("offset") = e.offset(),
          nb::arg("errno") = e.error_number());
  } catch (const ParameterError& e) {
    raise(errors, "ParameterError", e, nb::arg("parameter") = e.parameter());
  } catch (const ContextLengthError& e) {
    raise(errors, "ContextLengthError", e, nb::arg("requested") = e.requested(),
          nb::arg("limit") = e.limit());
  } catch (const MemoryLimitError& e) {
    raise(errors, "MemoryLimitError", e, nb::arg("needed") = e.needed(),
          nb::arg("available") = e.available());
  } catch (const CancelledError& e) {
    raise(errors, "CancelledError", e);
  } catch (const CudaError& e) {
    raise(errors, "CudaError", e, nb::arg("code") = e.code(), nb::arg("call") = e.call(),
          nb::arg("source") = e.source(), nb::arg("line") = e.line());
  } catch (const Error& e) {
    raise(errors, "Dsfp4Error", e);
  }
}

void translate(const std::exception_ptr& exception, void* errors) {
  try {
    raise_as_python(exception, static_cast<PyObject*>(errors));
  } catch (nb::python_error& error) {
    // Python code ran, and with it the handlers of signals: a Ctrl-C comes out as what it is.
    error.restore();
  }
}

}  // namespace

void bind_errors(nb::module_&) {
  // Imported now, not in the midst of an error; kept for the life of the process.
  nb::register_exception_translator(&translate,
                                    nb::module_::import_("dsfp4.errors").release().ptr());
}

}  // namespace dsfp4::bindings
