#include <algorithm>
#include <atomic>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <stdexcept>
#include <string>
#include <thread>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "storage/reader.h"

namespace {

using Pread = std::function<ssize_t(int file, void* buffer, std::size_t bytes, off_t offset)>;

// What the reader's pread(2) does while a test sets it; else it is the system's.
Pread injected_pread;

}  // namespace

// The linker sends pread here (--wrap), and __real_pread to the system's.
extern "C" ssize_t __real_pread(int file, void* buffer, std::size_t bytes, off_t offset);
extern "C" ssize_t __wrap_pread(int file, void* buffer, std::size_t bytes, off_t offset) {
  return injected_pread ? injected_pread(file, buffer, bytes, offset)
                        : __real_pread(file, buffer, bytes, offset);
}

namespace dsfp4::storage {
namespace {

namespace fs = std::filesystem;

class PreadReader : public testing::Test {
 protected:
  PreadReader()
      : folder_(fs::temp_directory_path() / ("dsfp4-reader-" + std::to_string(getpid()))) {
    fs::create_directories(folder_);
  }
  ~PreadReader() override {
    injected_pread = nullptr;
    fs::remove_all(folder_);
  }

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
    EXPECT_NE(std::string(error.what())
                  .find("truncated: the file has 100 bytes, the extent needs bytes 60 to 110"),
              std::string::npos)
        << error.what();
  }
}

// The message speaks of the whole extent, though only a later piece of it ran into the end.
TEST_F(PreadReader, TruncationInALaterPieceNamesTheExtent) {
  constexpr std::size_t kBytes = (std::size_t{9} << 20);
  const auto reader = make_pread_reader({write("a", kBytes, 1)}, 3);
  std::vector<std::byte> buffer(kBytes);
  const std::vector<Extent> extents = {{0, 10, buffer.size(), buffer.data()}};
  try {
    reader->read(extents, {});
    FAIL();
  } catch (const IoError& error) {
    EXPECT_EQ(error.offset(), 10);
    EXPECT_EQ(error.error_number(), 0);
    EXPECT_NE(std::string(error.what())
                  .find("the file has 9437184 bytes, the extent needs bytes "
                        "10 to 9437194"),
              std::string::npos)
        << error.what();
  }
}

TEST_F(PreadReader, ShortReadsAreResumedAndInterruptionsRetried) {
  constexpr std::size_t kBytes = (std::size_t{5} << 20) + 3;
  const auto reader = make_pread_reader({write("a", kBytes, 1)}, 2);
  std::vector<std::byte> buffer(kBytes);
  const std::vector<Extent> extents = {{0, 0, buffer.size(), buffer.data()}};
  std::atomic<int> calls = 0;
  injected_pread = [&](int file, void* to, std::size_t bytes, off_t offset) -> ssize_t {
    const int call = calls++;
    if (call % 3 != 0) {
      errno = call % 3 == 1 ? EINTR : EAGAIN;
      return -1;
    }
    return __real_pread(file, to, std::min<std::size_t>(bytes, 100'003), offset);
  };
  std::uint64_t last = 0;
  reader->read(extents, [&](std::uint64_t done) { last = done; });
  expect_bytes(buffer, 0, 1);
  EXPECT_EQ(last, kBytes);
  EXPECT_GE(calls, 3 * 50);
}

TEST_F(PreadReader, EagainIsNotRetriedForever) {
  const auto reader = make_pread_reader({write("a", 10, 1)}, 1);
  std::byte buffer{};
  const std::vector<Extent> extents = {{0, 7, 1, &buffer}};
  int calls = 0;
  injected_pread = [&](int, void*, std::size_t, off_t) -> ssize_t {
    ++calls;
    errno = EAGAIN;
    return -1;
  };
  try {
    reader->read(extents, {});
    FAIL();
  } catch (const IoError& error) {
    EXPECT_EQ(error.error_number(), EAGAIN);
    EXPECT_EQ(error.offset(), 7);
  }
  EXPECT_GT(calls, 10);
}

TEST_F(PreadReader, TheFirstErrorWinsAndTheOthersStop) {
  constexpr std::size_t kPieces = 64;  // of 4 MiB; all read into the same bytes
  constexpr std::size_t kPiece = std::size_t{4} << 20;
  const auto path = write("a", 1, 1);
  const auto reader = make_pread_reader({path}, 4);
  std::vector<std::byte> buffer(kPiece);
  std::vector<Extent> extents;
  for (std::size_t i = 0; i < kPieces; ++i)
    extents.push_back({0, i * kPiece, kPiece, buffer.data()});
  std::atomic<int> calls = 0;
  injected_pread = [&](int, void*, std::size_t, off_t) -> ssize_t {
    ++calls;
    errno = EIO;
    return -1;
  };
  try {
    reader->read(extents, [](std::uint64_t) { FAIL() << "nothing was read"; });
    FAIL();
  } catch (const IoError& error) {
    EXPECT_EQ(error.error_number(), EIO);
    EXPECT_EQ(error.file(), path.string());
  }
  EXPECT_LE(calls, 4);  // one for each thread
}

TEST_F(PreadReader, ServesSeveralCallersAtOnceAndClosesItsFiles) {
  const auto open_files = [] {
    return std::distance(fs::directory_iterator("/proc/self/fd"), fs::directory_iterator{});
  };
  const auto before = open_files();
  constexpr std::size_t kBytes = std::size_t{1} << 20;
  auto reader = make_pread_reader({write("a", kBytes, 1), write("b", kBytes, 2)}, 2);
  EXPECT_EQ(open_files(), before + 2);
  std::vector<std::vector<std::byte>> buffers(4, std::vector<std::byte>(kBytes - 1));
  {
    std::vector<std::jthread> callers;
    for (std::uint32_t i = 0; i < 4; ++i) {
      callers.emplace_back([&, i] {
        const std::vector<Extent> extents = {{i % 2, 1, kBytes - 1, buffers[i].data()}};
        reader->read(extents, {});
      });
    }
  }
  for (std::uint32_t i = 0; i < 4; ++i) expect_bytes(buffers[i], 1, i % 2 + 1);
  reader.reset();
  EXPECT_EQ(open_files(), before);
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
