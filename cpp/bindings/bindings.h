// One function a domain, each adding its part to the module.
#pragma once

#include <string>

#include <nanobind/nanobind.h>

#include "checkpoint/config.h"

namespace dsfp4::bindings {

/// Names of files, and text that holds some, as Python's os.fsdecode spells them: they need not be
/// UTF-8.
inline nanobind::str file_text(const std::string& bytes) {
  return nanobind::steal<nanobind::str>(
      PyUnicode_DecodeFSDefaultAndSize(bytes.data(), static_cast<Py_ssize_t>(bytes.size())));
}

/// config.json's fields by their own names.
nanobind::dict config_dict(const checkpoint::ModelConfig& config);

void bind_errors(nanobind::module_& m);
void bind_exit(nanobind::module_& m);
void bind_log(nanobind::module_& m);
void bind_format(nanobind::module_& m);
void bind_checkpoint(nanobind::module_& m);
void bind_ops(nanobind::module_& m);
void bind_cuda_ops(nanobind::module_& m);
void bind_bench(nanobind::module_& m);
void bind_machine(nanobind::module_& m);
void bind_model(nanobind::module_& m);
void bind_plan(nanobind::module_& m);
void bind_residency(nanobind::module_& m);
void bind_storage(nanobind::module_& m);

}  // namespace dsfp4::bindings
