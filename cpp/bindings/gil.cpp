#include "bindings/gil.h"

#include <atomic>
#include <chrono>
#include <pthread.h>
#include <thread>
#include <unistd.h>

#include "bindings/bindings.h"
#include "dsfp4/error.h"

namespace dsfp4::bindings {
namespace {

constexpr std::chrono::milliseconds kSignalPeriod{20};
constexpr std::chrono::milliseconds kExitPeriod{2};
// A callback in Python that never returns must not hold the exit for ever.
constexpr std::chrono::seconds kExitLimit{10};

std::atomic<int> calls{0};
std::atomic<bool> ending{false};
std::atomic<unsigned long> ending_thread{0};
thread_local int depth = 0;                 // calls of this thread, one in a callback of another
std::atomic<unsigned long> main_thread{0};  // as threading.main_thread().ident

// A daemon's thread outside of any other call of it.
bool may_sleep() noexcept { return depth == 0 && PyThread_get_thread_ident() != ending_thread; }

[[noreturn]] void sleep_for_good() noexcept {
  PyEval_SaveThread();
  for (;;) ::pause();
}

// Runs in the thread that ends the interpreter, with the GIL, after those that are not daemons.
void wait_for_calls() {
  ending_thread = PyThread_get_thread_ident();
  ending = true;
  const nb::gil_scoped_release released;  // those that leave need it
  const auto limit = std::chrono::steady_clock::now() + kExitLimit;
  while (calls > 0 && std::chrono::steady_clock::now() < limit) {
    std::this_thread::sleep_for(kExitPeriod);
  }
}

}  // namespace

bool begin_call() noexcept {
  ++calls;  // first, so that the handler sees either the call or its refusal
  if (!ending) return true;
  --calls;
  return false;
}

void end_call() noexcept { --calls; }

CountedCall::CountedCall() {
  if (!begin_call()) {
    if (may_sleep()) sleep_for_good();
    throw Error("the interpreter is ending: no call can begin any more");
  }
  ++depth;
}

CountedCall::~CountedCall() {
  --depth;
  end_call();
  if (ending && may_sleep()) sleep_for_good();
}

KeepGoing keep_going() {
  using Clock = std::chrono::steady_clock;
  const bool main = PyThread_get_thread_ident() == main_thread;
  return [main, next = Clock::now()]() mutable {
    if (ending) return false;
    if (!main || Clock::now() < next) return true;
    const nb::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
    next = Clock::now() + kSignalPeriod;
    return true;
  };
}

void bind_exit(nb::module_&) {
  const nb::object thread = nb::module_::import_("threading").attr("main_thread")();
  main_thread = nb::cast<unsigned long>(thread.attr("ident"));
  nb::module_::import_("atexit").attr("register")(nb::cpp_function(&wait_for_calls));
  // In a child there is one thread, the main one from now on, and no other's call.
  ::pthread_atfork(nullptr, nullptr, [] {
    calls = 0;
    main_thread = PyThread_get_thread_ident();
  });
}

}  // namespace dsfp4::bindings
