#include <atomic>
#include <cstdlib>
#include <limits>
#include <optional>
#include <string>
#include <unistd.h>

#include <gtest/gtest.h>

#include "base/thread_pool.h"
#include "base/thread_team.h"

namespace dsfp4 {
namespace {

/// DSFP4_PIN as a test wants it, or not set.
class PinVariable {
 public:
  explicit PinVariable(const char* value) {
    if (const char* now = std::getenv("DSFP4_PIN")) before_ = now;
    set(value);
  }
  ~PinVariable() { set(before_ ? before_->c_str() : nullptr); }
  PinVariable(const PinVariable&) = delete;
  PinVariable& operator=(const PinVariable&) = delete;

 private:
  static void set(const char* value) {
    value == nullptr ? unsetenv("DSFP4_PIN") : setenv("DSFP4_PIN", value, 1);
  }
  std::optional<std::string> before_;
};

Cores machine(int cores, bool all, double quota) {
  Cores found;
  for (int i = 0; i < cores; ++i) found.physical.push_back(i);
  found.all = all;
  found.quota = quota;
  return found;
}

constexpr double kNoQuota = std::numeric_limits<double>::infinity();

// Of this test's process alone.
std::string mark_name() { return "dsfp4-test-" + std::to_string(getpid()); }

bool pins(const Cores& cores) {
  ThreadTeam team(cores, mark_name());
  team.grow(1);
  return team.pins();
}

TEST(ThreadTeam, PinsOnlyWhereItHasTheMachineToItself) {
  const PinVariable unset(nullptr);
  EXPECT_FALSE(pins(machine(8, false, kNoQuota))) << "a mask";
  EXPECT_FALSE(pins(machine(8, true, 4.0))) << "a quota";
  EXPECT_TRUE(pins(machine(8, true, kNoQuota)));
  const PinMark mark(mark_name());  // as another process would have it
  ASSERT_EQ(mark.state(), PinMark::State::kOurs);
  EXPECT_FALSE(pins(machine(8, true, kNoQuota))) << "another process";
}

TEST(ThreadTeam, TheVariableDecidesOtherwise) {
  const PinVariable on("1");
  EXPECT_TRUE(pins(machine(8, false, 4.0)));
  const PinVariable off("0");
  EXPECT_FALSE(pins(machine(8, true, kNoQuota)));
}

bool spins(ThreadTeam& team, int workers) {
  ThreadPool::Range range{nullptr, [](const void*, std::int64_t, std::int64_t) {}};
  team.run(workers, 100, 1, range);
  return team.spins();
}

TEST(ThreadTeam, SpinsOnlyWhereThreadsHaveCores) {
  ThreadTeam enough(machine(4, true, kNoQuota), mark_name());
  enough.grow(3);
  EXPECT_TRUE(spins(enough, 3));
  enough.grow(4);
  EXPECT_FALSE(spins(enough, 1)) << "workers of a larger pool wake for each range, too";
}

TEST(ThreadTeam, DoesNotSpinBeyondTheQuota) {
  ThreadTeam limited(machine(64, true, 2.5), mark_name());
  limited.grow(1);
  EXPECT_TRUE(spins(limited, 1));
  limited.grow(2);
  EXPECT_FALSE(spins(limited, 2));
}

TEST(ThreadTeam, DoesNotSpinBesideAnotherProcess) {
  const PinMark mark(mark_name());
  ThreadTeam team(machine(64, true, kNoQuota), mark_name());
  team.grow(1);
  EXPECT_FALSE(spins(team, 1));
}

}  // namespace
}  // namespace dsfp4
