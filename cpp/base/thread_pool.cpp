#include "base/thread_pool.h"

#include <algorithm>
#include <string>
#include <system_error>

#include "base/thread_team.h"
#include "dsfp4/error.h"

namespace dsfp4 {
namespace {

// The process's team: alive as long as a pool is. A child of fork() makes its own.
std::shared_ptr<ThreadTeam> shared_team() {
  static std::mutex mutex;
  static std::weak_ptr<ThreadTeam> current;
  const std::lock_guard lock(mutex);
  std::shared_ptr<ThreadTeam> team = current.lock();
  if (team == nullptr || !team->has_its_threads()) current = team = std::make_shared<ThreadTeam>();
  return team;
}

}  // namespace

ThreadPool::ThreadPool(int threads) : threads_(threads) {
  if (threads < 1) throw ParameterError("threads", "must be at least 1");
  if (threads > ThreadTeam::kMostWorkers + 1) {
    throw ParameterError("threads",
                         "must be at most " + std::to_string(ThreadTeam::kMostWorkers + 1));
  }
  team_ = shared_team();
  try {
    team_->grow(threads - 1);
  } catch (const std::system_error&) {
    throw ParameterError("threads", "the system starts no more than " +
                                        std::to_string(team_->workers() + 1) + " of " +
                                        std::to_string(threads) + " threads; ask for fewer");
  }
}

void ThreadPool::run(std::int64_t count, std::int64_t grain, const Range& range) {
  if (count <= 0) return;
  grain = std::max<std::int64_t>(grain, 1);
  if (threads_ == 1 || count <= grain || ThreadTeam::inside_body()) {
    range.call(range.body, 0, count);
    return;
  }
  team_->run(threads_ - 1, count, grain, range);
}

}  // namespace dsfp4
