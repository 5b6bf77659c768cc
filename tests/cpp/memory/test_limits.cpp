#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include <gtest/gtest.h>

#include "memory/limits.h"

namespace dsfp4::memory {
namespace {

// A machine of 1000 MB, 900 of them free, whose /proc and /sys are files here.
class Limits : public testing::Test {
 protected:
  static constexpr std::uint64_t kMega = 1'000'000;

  Limits() {
    std::string name = std::filesystem::temp_directory_path() / "dsfp4-limits-XXXXXX";
    root_ = ::mkdtemp(name.data());
    write("proc/meminfo", "MemTotal: 976562 kB\nMemFree: 1 kB\nMemAvailable: 878906 kB\n");
    write("proc/self/status", "Name: x\nVmRSS: 1000 kB\n");
  }
  ~Limits() override { std::filesystem::remove_all(root_); }

  void write(const std::filesystem::path& file, const std::string& text) const {
    std::filesystem::create_directories((root_ / file).parent_path());
    std::ofstream(root_ / file) << text;
  }
  static std::string mega(std::uint64_t count) { return std::to_string(count * kMega) + "\n"; }

  // A group of version 2: `limit` and `used` MB, of which `active` and `inactive` are page cache.
  void group(const std::string& path, const std::string& limit, std::uint64_t used,
             std::uint64_t active = 0, std::uint64_t inactive = 0) const {
    const std::filesystem::path folder = std::filesystem::path("sys/fs/cgroup") / path;
    write(folder / "memory.max", limit);
    write(folder / "memory.current", mega(used));
    write(folder / "memory.stat", "anon 5\ninactive_anon 7\nactive_file " + mega(active) +
                                      "inactive_file " + mega(inactive));
  }
  MachineMemory now() const { return machine_memory_of({root_ / "proc", root_ / "sys"}); }

  std::filesystem::path root_;
};

TEST_F(Limits, WithoutGroupsTheMachineCounts) {
  EXPECT_EQ(now().total, 976562u * 1024);
  EXPECT_EQ(now().available, 878906u * 1024);
  EXPECT_EQ(now().process, 1000u * 1024);
  write("proc/self/cgroup", "0::/user/own\n");
  group("user/own", "max\n", 100);
  EXPECT_EQ(now().total, 976562u * 1024);
  EXPECT_EQ(now().available, 878906u * 1024);
}

TEST_F(Limits, ItsOwnGroup) {
  write("proc/self/cgroup", "0::/user/own\n");
  group("user/own", mega(400), 100);
  EXPECT_EQ(now().total, 400 * kMega);
  EXPECT_EQ(now().available, 300 * kMega);
  group("user/own", mega(400), 500);
  EXPECT_EQ(now().available, 0u);
}

// The parent's limit is larger than the group's own, but nothing is left of it.
TEST_F(Limits, AParentThatSiblingsHaveFilled) {
  write("proc/self/cgroup", "0::/user/own/deep\n");
  group("user/own/deep", "max\n", 50);
  group("user/own", mega(400), 50);
  group("user", mega(600), 580);
  EXPECT_EQ(now().total, 400 * kMega);
  EXPECT_EQ(now().available, 20 * kMega);
}

TEST_F(Limits, MemoryHighIsALimit) {
  write("proc/self/cgroup", "0::/own\n");
  group("own", "max\n", 100);
  write("sys/fs/cgroup/own/memory.high", mega(250));
  EXPECT_EQ(now().total, 250 * kMega);
  EXPECT_EQ(now().available, 150 * kMega);
  write("sys/fs/cgroup/own/memory.high", "max\n");
  group("own", mega(300), 100);
  EXPECT_EQ(now().total, 300 * kMega);
}

TEST_F(Limits, PageCacheIsNotUsedUp) {
  write("proc/self/cgroup", "0::/own\n");
  group("own", mega(400), 390, 200, 100);
  EXPECT_EQ(now().available, 310 * kMega);
}

// A container sees its own group as the root, and perhaps a path that is not there.
TEST_F(Limits, AGroupThatSeesItselfAsTheRoot) {
  group("", mega(400), 100);
  for (const char* path : {"/", "/../elsewhere", "/docker/123"}) {
    write("proc/self/cgroup", std::string("0::") + path + "\n");
    EXPECT_EQ(now().available, 300 * kMega) << path;
  }
}

TEST_F(Limits, VersionOne) {
  write("proc/self/cgroup", "12:cpu,memory:/a/b\n3:pids:/c\n");
  const std::string groups = "sys/fs/cgroup/memory/";
  const auto group = [&](const std::string& path, std::uint64_t limit, std::uint64_t used) {
    write(groups + path + "/memory.limit_in_bytes", std::to_string(limit) + "\n");
    write(groups + path + "/memory.usage_in_bytes", mega(used));
    write(groups + path + "/memory.stat", "inactive_file 1\nactive_file 1\ntotal_inactive_file " +
                                              mega(30) + "total_active_file " + mega(40));
  };
  group("", 9223372036854771712u, 900);  // as it writes that there is none
  group("a", 500 * kMega, 490);
  group("a/b", 400 * kMega, 100);
  EXPECT_EQ(now().total, 400 * kMega);
  EXPECT_EQ(now().available, 80 * kMega);
}

TEST_F(Limits, TheMachineIsPlausible) {
  const MachineMemory machine = machine_memory();
  EXPECT_GT(machine.total, std::uint64_t{1} << 28);
  EXPECT_LE(machine.available, machine.total);
  EXPECT_GT(machine.process, std::uint64_t{1} << 20);
  EXPECT_LT(machine.process, machine.total);
}

TEST_F(Limits, TheDefaultLeavesRoom) {
  constexpr std::uint64_t kGb = 1'000'000'000;
  EXPECT_EQ(default_ram_limit({100 * kGb, 80 * kGb, kGb}), 79 * kGb);  // at most 2 GB
  EXPECT_EQ(default_ram_limit({10 * kGb, 4 * kGb, kGb}), 45 * kGb / 10);
  EXPECT_EQ(default_ram_limit({10 * kGb, 0, 0}), 0u);
}

}  // namespace
}  // namespace dsfp4::memory
