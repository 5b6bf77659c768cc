// The process's compute threads: one team of worker threads, however many pools, models and
// requests there are. A ThreadPool is a handle that says how many of them its ranges may use.
//
// Cores: by default a team has a thread for each physical core inside the affinity mask, fewer
// under a CPU quota (available_cores()). Workers are pinned, each to one physical core, where this
// process has the machine to itself: the mask covers all processors, no control group sets a quota,
// and no other process of dsfp4 has said that it pins (PinMark). DSFP4_PIN=0 and 1 in the
// environment decide otherwise. The thread that calls parallel_for works too, and is left where the
// system puts it, because it is the caller's own; so are workers beyond the cores.
//
// NUMA: workers fill the cores in the order of the system's numbering, so a team smaller than a
// node stays on few nodes. Memory is placed where it is first touched and a piece of a range may
// run on any worker: weights are neither copied to each node nor bound to one. On a machine of
// several nodes, `numactl --interleave=all` gives every core the same share of each node's memory.
//
// Waiting: a thread that has nothing to do spins for some 50 microseconds, as the ops of a decode
// step follow each other that fast, then sleeps on a futex. Waking costs a system call only if
// somebody sleeps. Nobody spins where the team and its callers are more threads than the cores or
// the quota have room for, or where another process of dsfp4 has pinned its own.
//
// Fork: the child has no workers. Pools made there have a new team; those that were copied are not
// for use.
#pragma once

#include <cstdint>
#include <memory>

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

  /// A body without its type, alive as long as the call.
  struct Range {
    const void* body;
    void (*call)(const void* body, std::int64_t begin, std::int64_t end);
  };

 private:
  void run(std::int64_t count, std::int64_t grain, const Range& range);

  int threads_;
  std::shared_ptr<ThreadTeam> team_;  // the same for all pools; ends with the last of them
};

}  // namespace dsfp4
