#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "storage/reader.h"

namespace dsfp4::storage {
namespace {

namespace fs = std::filesystem;

class PreadReader : public testing::Test {
 protected:
  PreadReader()
      : folder_(fs::temp_directory_path() / ("dsfp4-reader-" + std::to_string(getpid()))) {
    fs::create_directories(folder_);
  }
  ~PreadReader() override { fs::remove_all(folder_); }

  // A file of `bytes` bytes in which byte i depends on i and on `salt`.
  fs::path write(const std::string& name, std::size_t bytes, unsigned salt) {
    const fs::path path = folder_ / name;
    std::ofstream out(path, std::ios::binary);
    for (std::size_t i = 0; i < bytes; ++i) out.put(byte(i, salt));
    return path;
  }
  static char byte(std::size_t i, unsigned salt) {
    return static_cast<char>((i * 2654435761u + salt) >> 7);
  }
  static void expect_bytes(const std::vector<std::byte>& got, std::size_t offset, unsigned salt) {
    for (std::size_t i = 0; i < got.size(); ++i) {
      ASSERT_EQ(static_cast<char>(got[i]), byte(offset + i, salt)) << "byte " << offset + i;
    }
  }

  fs::path folder_;
};

TEST_F(PreadReader, ReadsExtentsOfSeveralFilesInPieces) {
  constexpr std::size_t kLarge = (std::size_t{9} << 20) + 17;  // more than two pieces
  const auto reader = make_pread_reader({write("a", kLarge, 1), write("b", 1000, 2)}, 3);
  std::vector<std::byte> whole(kLarge - 5);
  std::vector<std::byte> part(100);
  std::vector<std::byte> nothing(1, std::byte{7});
  const std::vector<Extent> extents = {
      {0, 5, whole.size(), whole.data()}, {1, 900, 100, part.data()}, {1, 1000, 0, nothing.data()}};
  std::vector<std::uint64_t> progress;
  reader->read(extents, [&](std::uint64_t done) { progress.push_back(done); });
  expect_bytes(whole, 5, 1);
  expect_bytes(part, 900, 2);
  EXPECT_EQ(nothing[0], std::byte{7});
  EXPECT_TRUE(std::is_sorted(progress.begin(), progress.end()));
  EXPECT_EQ(progress.back(), whole.size() + part.size());
}

TEST_F(PreadReader, TruncatedFileIsAnErrorThatSaysSo) {
  const auto path = write("a", 100, 1);
  const auto reader = make_pread_reader({path}, 2);
  std::vector<std::byte> buffer(50);
  const std::vector<Extent> extents = {{0, 60, 50, buffer.data()}};
  try {
    reader->read(extents, {});
    FAIL();
  } catch (const IoError& error) {
    EXPECT_EQ(error.file(), path.string());
    EXPECT_EQ(error.offset(), 60);
    EXPECT_NE(std::string(error.what()).find("the file has 100 bytes"), std::string::npos);
  }
}

TEST_F(PreadReader, MissingFileIsAnError) {
  try {
    make_pread_reader({folder_ / "absent"}, 1);
    FAIL();
  } catch (const IoError& error) {
    EXPECT_EQ(error.error_number(), ENOENT);
  }
}

TEST_F(PreadReader, RefusedReadNamesErrno) {
  const auto reader = make_pread_reader({folder_}, 1);  // a folder opens but does not read
  std::byte buffer{};
  const std::vector<Extent> extents = {{0, 0, 1, &buffer}};
  try {
    reader->read(extents, {});
    FAIL();
  } catch (const IoError& error) {
    EXPECT_EQ(error.error_number(), EISDIR);
  }
}

TEST_F(PreadReader, ExceptionOfProgressEndsTheReadAndTheReaderLivesOn) {
  const auto reader = make_pread_reader({write("a", std::size_t{20} << 20, 1)}, 4);
  std::vector<std::byte> buffer(std::size_t{20} << 20);
  const std::vector<Extent> extents = {{0, 0, buffer.size(), buffer.data()}};
  EXPECT_THROW(reader->read(extents, [](std::uint64_t) { throw std::runtime_error("enough"); }),
               std::runtime_error);
  reader->read(extents, {});
  expect_bytes(buffer, 0, 1);
}

TEST_F(PreadReader, BadArguments) {
  EXPECT_THROW(make_pread_reader({}, 0), ParameterError);
  const auto reader = make_pread_reader({}, 1);
  const std::vector<Extent> extents = {{0, 0, 1, nullptr}};
  EXPECT_THROW(reader->read(extents, {}), ParameterError);
}

}  // namespace
}  // namespace dsfp4::storage
