// The GIL around the library's work, and the end of the interpreter.
//
// A thread that asks for the GIL while the interpreter goes is ended on the spot, also in the
// middle of C++ frames, which aborts the process. So calls are counted: at exit, before the
// interpreter goes, a handler asks those of other threads to leave and waits until they have. Such
// threads, and those that begin a call later, then sleep until the process ends: even to raise an
// error would run Python. Threads of the library no longer call it.
#pragma once

#include <exception>

#include <nanobind/nanobind.h>

#include "dsfp4/model.h"

namespace dsfp4::bindings {

namespace nb = nanobind;

/// A call that is counted while it lives, made and destroyed with the GIL. Once the interpreter is
/// ending it throws Error in the thread that ends it, and in a callback of a call that still runs.
class CountedCall {
 public:
  CountedCall();
  ~CountedCall();
  CountedCall(const CountedCall&) = delete;
  CountedCall& operator=(const CountedCall&) = delete;
};

/// Releases the GIL around work of the library; use this, not nb::gil_scoped_release.
class ReleasedGil {
  CountedCall call_;  // outlives the wait for the GIL
  nb::gil_scoped_release released_;
};

/// Destroys `owner`'s object without the GIL: it may join threads that want to log.
template <typename Owner>
void destroy_without_gil(Owner& owner) noexcept;

/// Calls `call` with the GIL from a thread of the library; leaves it out once the interpreter is
/// ending.
template <typename Call>
void call_python(const Call& call);

/// A KeepGoing for a call of this thread: raises what Python's signal handlers raise (Ctrl-C), and
/// is false once the interpreter is ending. Takes the GIL only on the main thread, where handlers
/// run, and at most every 20 ms.
KeepGoing keep_going();

// ---- the templates ----

/// False: the interpreter is ending.
bool begin_call() noexcept;
void end_call() noexcept;

template <typename Owner>
void destroy_without_gil(Owner& owner) noexcept {
  if (!begin_call()) {  // nobody else runs Python any more
    owner.reset();
    return;
  }
  {
    const nb::gil_scoped_release released;
    owner.reset();
  }
  end_call();
}

template <typename Call>
void call_python(const Call& call) {
  if (!begin_call()) return;
  struct End {
    ~End() { end_call(); }
  } end;
  const nb::gil_scoped_acquire gil;
  call();
}

}  // namespace dsfp4::bindings
