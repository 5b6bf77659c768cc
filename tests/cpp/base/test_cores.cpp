#include <cmath>
#include <limits>
#include <sched.h>
#include <string>
#include <thread>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>

#include "base/cores.h"
#include "base/fake_system.h"

namespace dsfp4 {
namespace {

Cores many(double quota) {
  Cores cores;
  for (int i = 0; i < 64; ++i) cores.physical.push_back(i);
  cores.quota = quota;
  return cores;
}

TEST(Cores, AreInTheMaskAndOneForEachSetOfSiblings) {
  const Cores cores = find_cores();
  ASSERT_FALSE(cores.physical.empty());
  cpu_set_t mask;
  ASSERT_EQ(sched_getaffinity(0, sizeof(mask), &mask), 0);
  for (const int core : cores.physical) EXPECT_TRUE(CPU_ISSET(core, &mask));
  EXPECT_EQ(available_cores(), cores.threads());
  EXPECT_LE(cores.threads(), static_cast<int>(cores.physical.size()));
  // Within a mask of one processor that processor is the core, whichever sibling it is.
  std::thread([&] {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cores.physical.back(), &one);
    ASSERT_EQ(sched_setaffinity(0, sizeof(one), &one), 0);
    EXPECT_EQ(find_cores().physical, std::vector<int>{cores.physical.back()});
  }).join();
}

TEST(Cores, TheQuotaBoundsThreads) {
  EXPECT_EQ(many(std::numeric_limits<double>::infinity()).threads(), 64);
  EXPECT_EQ(many(2.0).threads(), 2);
  EXPECT_EQ(many(2.0).spinners(), 2);
  EXPECT_EQ(many(2.5).threads(), 3);
  EXPECT_EQ(many(2.5).spinners(), 2);
  EXPECT_EQ(many(0.3).threads(), 1);
  EXPECT_EQ(many(0.3).spinners(), 1);
  EXPECT_EQ(many(100.0).threads(), 64);
  Cores unknown;
  EXPECT_GE(unknown.threads(), 1);
  unknown.quota = 1.0;
  EXPECT_EQ(unknown.threads(), 1);
}

TEST(Cores, TheSmallestQuotaOfAllGroupsAboveCounts) {
  const FakeSystem system;
  EXPECT_TRUE(std::isinf(find_cores(system.roots()).quota));
  system.write("proc/self/cgroup", "0::/pod/app\n");
  system.write("sys/fs/cgroup/pod/app/cpu.max", "max 100000\n");
  EXPECT_TRUE(std::isinf(find_cores(system.roots()).quota));
  system.write("sys/fs/cgroup/pod/app/cpu.max", "400000 100000\n");
  EXPECT_EQ(find_cores(system.roots()).quota, 4.0);
  system.write("sys/fs/cgroup/pod/cpu.max", "75000 50000\n");
  EXPECT_EQ(find_cores(system.roots()).quota, 1.5);
  EXPECT_LE(find_cores(system.roots()).threads(), 2);
}

TEST(Cores, AContainerSeesItsGroupAsTheRoot) {
  const FakeSystem system;
  system.write("proc/self/cgroup", "0::/../../docker/0123\n");
  system.write("sys/fs/cgroup/cpu.max", "200000 100000\n");
  EXPECT_EQ(find_cores(system.roots()).quota, 2.0);
}

TEST(Cores, QuotasOfVersionOneCount) {
  const FakeSystem system;
  system.write("proc/self/cgroup", "7:cpu,cpuacct:/docker/0123\n");
  system.write("sys/fs/cgroup/cpu/docker/0123/cpu.cfs_quota_us", "-1\n");
  system.write("sys/fs/cgroup/cpu/docker/0123/cpu.cfs_period_us", "100000\n");
  EXPECT_TRUE(std::isinf(find_cores(system.roots()).quota));
  system.write("sys/fs/cgroup/cpu/docker/cpu.cfs_quota_us", "250000\n");
  system.write("sys/fs/cgroup/cpu/docker/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(find_cores(system.roots()).quota, 2.5);
}

TEST(Cores, KnowsAMaskThatLeavesProcessorsOut) {
  const FakeSystem system;
  EXPECT_FALSE(find_cores(system.roots()).all) << "nobody says what is online";
  std::string mine;
  for (const int core : find_cores(system.roots()).physical) {  // without /sys all are cores
    if (!mine.empty()) mine += ',';
    mine += std::to_string(core);
  }
  system.write("sys/devices/system/cpu/online", mine + "\n");
  EXPECT_TRUE(find_cores(system.roots()).all);
  system.write("sys/devices/system/cpu/online", "0-" + std::to_string(CPU_SETSIZE - 1) + "\n");
  EXPECT_FALSE(find_cores(system.roots()).all);
}

TEST(PinMark, OneAtATimeHasIt) {
  const std::string name = "dsfp4-test-" + std::to_string(getpid());
  {
    const PinMark first(name);
    EXPECT_EQ(first.state(), PinMark::State::kOurs);
    EXPECT_EQ(PinMark(name).state(), PinMark::State::kTaken);
  }
  EXPECT_EQ(PinMark(name).state(), PinMark::State::kOurs);
  EXPECT_EQ(PinMark(std::string(200, 'x')).state(), PinMark::State::kUnknown);
}

}  // namespace
}  // namespace dsfp4
