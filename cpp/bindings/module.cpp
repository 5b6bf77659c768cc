#include "bindings/bindings.h"

NB_MODULE(_core, m) {
  // A thread that sleeps as the interpreter ends keeps its objects, and its user is no bug hunter.
  nanobind::set_leak_warnings(false);
  m.doc() = "The C++ core of dsfp4. Use the dsfp4 package, not this module.";
  m.attr("__version__") = DSFP4_VERSION;
  dsfp4::bindings::bind_errors(m);
  dsfp4::bindings::bind_exit(m);
  dsfp4::bindings::bind_log(m);
  dsfp4::bindings::bind_format(m);
  dsfp4::bindings::bind_checkpoint(m);
  dsfp4::bindings::bind_ops(m);
  dsfp4::bindings::bind_cuda_ops(m);
  dsfp4::bindings::bind_bench(m);
  dsfp4::bindings::bind_machine(m);
  dsfp4::bindings::bind_model(m);
  dsfp4::bindings::bind_plan(m);
  dsfp4::bindings::bind_residency(m);
  dsfp4::bindings::bind_storage(m);
}
