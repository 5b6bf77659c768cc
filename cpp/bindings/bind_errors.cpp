// Turns the library's exceptions into those of dsfp4.errors, facts included.
#include <exception>
#include <utility>

#include <nanobind/stl/string.h>

#include "bindings/bindings.h"
#include "dsfp4/error.h"

namespace dsfp4::bindings {
namespace {

namespace nb = nanobind;

// Raises dsfp4.errors.<name>(message, **facts).
template <typename... Facts>
void raise(const char* name, const Error& error, Facts&&... facts) {
  const nb::object type = nb::module_::import_("dsfp4.errors").attr(name);
  const nb::object instance = type(error.what(), std::forward<Facts>(facts)...);
  PyErr_SetObject(type.ptr(), instance.ptr());
}

void translate(const std::exception_ptr& exception, void*) {
  try {
    std::rethrow_exception(exception);
  } catch (const CheckpointError& e) {
    raise("CheckpointError", e, nb::arg("file") = e.file(), nb::arg("tensor") = e.tensor(),
          nb::arg("offset") = e.offset());
  } catch (const UnsupportedError& e) {
    raise("UnsupportedError", e);
  } catch (const IoError& e) {
    raise("IoError", e, nb::arg("file") = e.file(), nb::arg("offset") = e.offset(),
          nb::arg("errno") = e.error_number());
  } catch (const ParameterError& e) {
    raise("ParameterError", e, nb::arg("parameter") = e.parameter());
  } catch (const ContextLengthError& e) {
    raise("ContextLengthError", e, nb::arg("requested") = e.requested(),
          nb::arg("limit") = e.limit());
  } catch (const MemoryLimitError& e) {
    raise("MemoryLimitError", e, nb::arg("needed") = e.needed(),
          nb::arg("available") = e.available());
  } catch (const CancelledError& e) {
    raise("CancelledError", e);
  } catch (const CudaError& e) {
    raise("CudaError", e, nb::arg("code") = e.code(), nb::arg("call") = e.call(),
          nb::arg("source") = e.source(), nb::arg("line") = e.line());
  } catch (const Error& e) {
    raise("Dsfp4Error", e);
  }
}

}  // namespace

void bind_errors(nb::module_&) { nb::register_exception_translator(&translate); }

}  // namespace dsfp4::bindings
