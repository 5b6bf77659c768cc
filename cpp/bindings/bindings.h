// One function a domain, each adding its part to the module.
#pragma once

#include <nanobind/nanobind.h>

namespace dsfp4::bindings {

void bind_errors(nanobind::module_& m);
void bind_exit(nanobind::module_& m);
void bind_log(nanobind::module_& m);
void bind_format(nanobind::module_& m);
void bind_checkpoint(nanobind::module_& m);
void bind_ops(nanobind::module_& m);
void bind_cuda_ops(nanobind::module_& m);
void bind_bench(nanobind::module_& m);
void bind_model(nanobind::module_& m);
void bind_residency(nanobind::module_& m);
void bind_storage(nanobind::module_& m);

}  // namespace dsfp4::bindings
