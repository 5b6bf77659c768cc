// The process's compute threads: one team of worker threads, however many pools, models and
// requests there are. A ThreadPool is a handle that says how many of them its ranges may use.
//
// Cores: a team counts physical cores inside the affinity mask, one thread each
// (available_cores()). Workers are pinned, each to one physical core; the thread that calls
// parallel_for works too, and is left where the system puts it, because it is the caller's own.
// Workers beyond the cores are not pinned, and none is with DSFP4_PIN=0 in the environment, which
// is the right thing on a machine that other programs keep busy.
//
// NUMA: workers fill the cores in the order of the system's numbering, so a team smaller than a
// node stays on few nodes. Memory is placed where it is first touched and a piece of a range may
// run on any worker: weights are neither copied to each node nor bound to one. On a machine of
// several nodes, `numactl --interleave=all` gives every core the same share of each node's memory.
//
// Waiting: a thread that has nothing to do spins for some 50 microseconds, as the ops of a decode
// step follow each other that fast, then sleeps on a futex. Waking costs a system call only if
// somebody sleeps. Where there are more threads than cores nobody spins.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace dsfp4 {

class ThreadTeam;

class ThreadPool {
 public:
  /// Ranges of this pool run on up to `threads` >= 1 threads, the caller of parallel_for counted
  /// in. Throws ParameterError where the system does not start so many.
  explicit ThreadPool(int threads);

  int size() const noexcept { return threads_; }

  /// Runs `body(begin, end)` over [0, count) in pieces of at most `grain` >= 1 indices, and returns
  /// when all are done. Which thread takes which piece is left open, so a piece must not depend on
  /// another. The first exception of a body is rethrown here, after the others have stopped. Calls
  /// from several threads, of any pools, take turns in the order in which they came; a call from
  /// inside a body runs on the thread that makes it. No memory is allocated.
  template <typename Body>
  void parallel_for(std::int64_t count, std::int64_t grain, const Body& body) {
    run(count, grain, {&body, [](const void* context, std::int64_t begin, std::int64_t end) {
                         (*static_cast<const Body*>(context))(begin, end);
                       }});
  }

 private:
  friend class ThreadTeam;
  /// A body without its type, alive as long as the call.
  struct Range {
    const void* body;
    void (*call)(const void* body, std::int64_t begin, std::int64_t end);
  };

  void run(std::int64_t count, std::int64_t grain, const Range& range);

  int threads_;
  std::shared_ptr<ThreadTeam> team_;  // the same for all pools; ends with the last of them
};

/// The logical processors that this process may run on (its affinity mask), one for each physical
/// core: the lowest-numbered of its SMT siblings. In ascending order; empty if the system does not
/// say.
std::vector<int> physical_cores();

/// The physical cores that this process may run on, at least 1.
int available_cores();

}  // namespace dsfp4
