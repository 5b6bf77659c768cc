#include <filesystem>
#include <string>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include <gtest/gtest.h>

#include "base/files.h"
#include "checkpoint/tiny_checkpoint.h"
#include "dsfp4/error.h"
#include "engine/kept_rates.h"

namespace dsfp4::engine {
namespace {

namespace fs = std::filesystem;

constexpr Rates kRates{1.5e9, 9e10, 5.5e10, 5.4e10, 8e10, 5e10};

class KeptRatesFile : public ::testing::Test {
 protected:
  dsfp4::testing::ScratchFolder folder_;
  const KeptRates kept_{folder_.path() / "deep" / "er", "a machine"};
};

TEST_F(KeptRatesFile, ComesBackToItsMachineOnly) {
  EXPECT_FALSE(kept_.load());
  kept_.save(kRates);
  EXPECT_EQ(kept_.load(), kRates);
  const KeptRates other(kept_.path().parent_path(), "another machine");
  EXPECT_FALSE(other.load());
  fs::rename(kept_.path(), other.path());  // as if both had the same hash
  EXPECT_FALSE(other.load());
}

TEST_F(KeptRatesFile, ADamagedFileIsIgnoredAndReplaced) {
  kept_.save(kRates);
  const std::string whole = read_whole_file(kept_.path());
  for (std::size_t length = 0; length < whole.size(); ++length) {
    dsfp4::testing::write_file(kept_.path(), whole.substr(0, length));
    EXPECT_FALSE(kept_.load()) << length;
  }
  for (const char* const value : {"-1", "nan", "inf", "1e16", "x", "", "1 "}) {
    std::string text = whole;
    text.replace(text.find("1500000000"), 10, value);
    dsfp4::testing::write_file(kept_.path(), text);
    EXPECT_FALSE(kept_.load()) << value;
  }
  dsfp4::testing::write_file(kept_.path(), whole + "more\n");
  EXPECT_FALSE(kept_.load());
  kept_.save(kRates);
  EXPECT_EQ(kept_.load(), kRates);
}

TEST_F(KeptRatesFile, AFileThatCannotBeWrittenIsNamed) {
  dsfp4::testing::write_file(folder_.path() / "deep", "no folder");
  EXPECT_THROW(kept_.save(kRates), IoError);
}

class MachineLine : public ::testing::Test {
 protected:
  MachineLine() {
    struct stat status {};
    EXPECT_EQ(::stat(folder_.path().c_str(), &status), 0);
    number_ = std::to_string(major(status.st_dev)) + ":" + std::to_string(minor(status.st_dev));
    put("proc/cpuinfo", "processor : 0\nmodel name\t: Some  CPU @ 3 GHz\ncores : 2\n");
  }
  void put(const fs::path& path, const std::string& text) {
    fs::create_directories((folder_.path() / path).parent_path());
    dsfp4::testing::write_file(folder_.path() / path, text);
  }
  std::string line() {
    return machine_line(2, "", folder_.path(), "pread",
                        {folder_.path() / "proc", folder_.path() / "sys"});
  }

  dsfp4::testing::ScratchFolder folder_;
  std::string number_;
};

TEST_F(MachineLine, NamesWhatRatesDependOn) {
  EXPECT_EQ(line(), "Some CPU @ 3 GHz | 2 threads | no GPU | " + number_ + " | pread");
}

TEST_F(MachineLine, ADiskIsKnownByItsSerialNumber) {
  const fs::path devices = folder_.path() / "sys" / "devices";
  fs::create_directories(devices / "disk" / "part");
  fs::create_directories(folder_.path() / "sys/dev/block");
  put("sys/devices/disk/device/model", "FAST SSD   \n");
  put("sys/devices/disk/device/serial", "S 123\n");
  const std::string right = "Some CPU @ 3 GHz | 2 threads | no GPU | FAST SSD S 123 | pread";
  const fs::path block = folder_.path() / "sys/dev/block" / number_;
  for (const char* const device : {"disk", "disk/part"}) {
    fs::remove(block);
    fs::create_directory_symlink(devices / device, block);
    EXPECT_EQ(line(), right) << device;
  }
}

TEST_F(MachineLine, WhatTheSystemDoesNotSayIsUnknown) {
  EXPECT_EQ(machine_line(1, "A GPU\n", folder_.path() / "absent", "io_uring",
                         {folder_.path() / "no", folder_.path() / "no"}),
            "unknown processor | 1 threads | A GPU | unknown disk | io_uring");
}

}  // namespace
}  // namespace dsfp4::engine
