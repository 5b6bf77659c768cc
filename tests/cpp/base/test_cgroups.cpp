#include <filesystem>
#include <vector>

#include <gtest/gtest.h>

#include "base/cgroups.h"
#include "base/fake_system.h"

namespace dsfp4 {
namespace {

using Paths = std::vector<std::filesystem::path>;

TEST(ControlGroups, AreTheOwnOneAndAllAbove) {
  const FakeSystem system;
  system.write("proc/self/cgroup", "5:memory:/m\n4:cpuacct,cpu:/a/b\n0::/user/slice/app\n");
  const auto root = system.roots().sys / "fs/cgroup";
  EXPECT_EQ(control_groups(system.roots(), ""),
            (Paths{root / "user/slice/app", root / "user/slice", root / "user", root}));
  EXPECT_EQ(control_groups(system.roots(), "cpu"),
            (Paths{root / "cpu/a/b", root / "cpu/a", root / "cpu"}));
  EXPECT_EQ(control_groups(system.roots(), "memory"), (Paths{root / "memory/m", root / "memory"}));
}

TEST(ControlGroups, AreTheRootAloneWhereNothingIsSaid) {
  const FakeSystem system;
  const auto root = system.roots().sys / "fs/cgroup";
  EXPECT_EQ(control_groups(system.roots(), "").back(), root);
  EXPECT_EQ(control_groups(system.roots(), "").size(), 1U);
  system.write("proc/self/cgroup", "no colons\n0::/\n3:cpuset:/x\n");
  EXPECT_EQ(control_groups(system.roots(), "").size(), 1U);
  EXPECT_EQ(control_groups(system.roots(), "cpu").size(), 1U) << "cpuset is not cpu";
}

}  // namespace
}  // namespace dsfp4
