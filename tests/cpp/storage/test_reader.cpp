#include <algorithm>
#include <array>
#include <cerrno>
#include <fcntl.h>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "storage/reader_fixture.h"

namespace dsfp4::storage {
namespace {

class ReaderBasics : public ReaderTest {};

TEST_P(ReaderBasics, ReadsExtentsOfSeveralFilesInPieces) {
  constexpr std::size_t kLarge = (std::size_t{3} << 20) + 17;
  const auto reader = make_reader({files_.write("a", kLarge, 1), files_.write("b", 1000, 2)},
                                  options(std::uint64_t{64} << 10));
  std::vector<std::byte> whole(kLarge - 5);
  std::vector<std::byte> part(100);
  std::vector<std::byte> nothing(1, std::byte{7});
  const std::vector<Extent> extents = {
      {0, 5, whole.size(), whole.data()}, {1, 900, 100, part.data()}, {1, 1000, 0, nothing.data()}};
  std::vector<std::uint64_t> progress;
  reader->read(extents, nullptr, [&](std::uint64_t done) { progress.push_back(done); });
  EXPECT_TRUE(files_.same(whole.data(), whole.size(), 5, 1));
  EXPECT_TRUE(files_.same(part.data(), part.size(), 900, 2));
  EXPECT_EQ(nothing[0], std::byte{7});
  EXPECT_TRUE(std::is_sorted(progress.begin(), progress.end()));
  EXPECT_EQ(progress.back(), whole.size() + part.size());
  EXPECT_EQ(reader->stats().bytes_useful, whole.size() + part.size());
  EXPECT_EQ(reader->stats().in_flight, 0u);
}

// Every offset and phase within a block, with and without slack: the right bytes, nowhere else.
TEST_P(ReaderBasics, EveryPhaseReadsTheRightBytesAndNothingAround) {
  constexpr std::size_t kFile = 300'001;
  const auto reader = make_reader({files_.write("a", kFile, 3)}, options(std::uint64_t{16} << 10));
  for (const std::size_t offset : {0, 1, 511, 512, 4095, 4096, 4097, 70'000}) {
    for (const std::size_t bytes : {1, 17, 4096, 8191, 70'000, 120'000, 230'001}) {
      for (const std::size_t shift : {0, 1, 64, 4095}) {  // from the file's phase
        PhasedBuffer buffer(bytes, offset + shift);
        const std::vector<Extent> extents = {{0, offset, bytes, buffer.data()}};
        reader->read(extents, nullptr);
        ASSERT_TRUE(files_.same(buffer.data(), bytes, offset, 3)) << offset << " " << shift;
        ASSERT_TRUE(buffer.surroundings_untouched()) << offset << " " << bytes << " " << shift;
      }
    }
  }
}

TEST_P(ReaderBasics, SlackLetsAWholeReadLandInPlace) {
  constexpr std::size_t kFile = 300'001;
  const auto reader = make_reader({files_.write("a", kFile, 3)}, options(std::uint64_t{16} << 10));
  PhasedBuffer buffer(kFile - 100, 100);
  const std::vector<Extent> extents = {{0, 100, kFile - 100, buffer.data(), true}};
  reader->read(extents, nullptr);
  EXPECT_TRUE(files_.same(buffer.data(), buffer.size(), 100, 3));
  EXPECT_EQ(reader->stats().bytes_copied, 0u);
}

// As of 90,000 scalars that follow one another in a file: blocks are read once, not 90,000 times.
TEST_P(ReaderBasics, SmallNeighboursShareReads) {
  constexpr std::size_t kCount = 5000;
  const auto reader = make_reader({files_.write("a", kCount * 4, 1)}, options());
  std::vector<std::array<std::byte, 64>> places(kCount);
  std::vector<Extent> extents;
  for (std::size_t i = 0; i < kCount; ++i) extents.push_back({0, i * 4, 4, places[i].data()});
  std::reverse(extents.begin(), extents.end());  // the order is the reader's business
  reader->read(extents, nullptr);
  for (std::size_t i = 0; i < kCount; ++i) {
    ASSERT_TRUE(files_.same(places[i].data(), 4, i * 4, 1));
  }
  EXPECT_EQ(reader->stats().reads, (kCount * 4 + kBlockBytes - 1) / kBlockBytes);
}

TEST_P(ReaderBasics, TruncatedFileIsAnErrorThatSaysSo) {
  const auto path = files_.write("a", 100, 1);
  const auto reader = make_reader({path}, options());
  std::vector<std::byte> buffer(50);
  const std::vector<Extent> extents = {{0, 60, 50, buffer.data()}};
  try {
    reader->read(extents, nullptr);
    FAIL();
  } catch (const IoError& error) {
    EXPECT_EQ(error.file(), path.string());
    EXPECT_EQ(error.offset(), 60);
    EXPECT_EQ(error.error_number(), 0);
    EXPECT_NE(std::string(error.what())
                  .find("truncated: the file has 100 bytes, the extent needs bytes 60 to 110"),
              std::string::npos)
        << error.what();
  }
}

// The message speaks of the whole extent, though only a later piece of it ran into the end.
TEST_P(ReaderBasics, TruncationInALaterPieceNamesTheExtent) {
  constexpr std::size_t kBytes = std::size_t{1} << 20;
  const auto reader = make_reader({files_.write("a", kBytes, 1)}, options(std::uint64_t{64} << 10));
  PhasedBuffer buffer(kBytes, 10);
  for (const bool slack : {false, true}) {
    const std::vector<Extent> extents = {{0, 10, buffer.size(), buffer.data(), slack}};
    try {
      reader->read(extents, nullptr);
      FAIL();
    } catch (const IoError& error) {
      EXPECT_EQ(error.offset(), 10);
      EXPECT_NE(std::string(error.what())
                    .find("the file has 1048576 bytes, the extent needs bytes 10 to 1048586"),
                std::string::npos)
          << error.what();
    }
  }
}

TEST_P(ReaderBasics, ServesSeveralCallersAtOnceAndClosesItsFiles) {
  const auto before = ReaderFiles::open_descriptors();
  constexpr std::size_t kBytes = std::size_t{1} << 20;
  auto reader = make_reader({files_.write("a", kBytes, 1), files_.write("b", kBytes, 2)},
                            options(std::uint64_t{64} << 10));
  EXPECT_GE(ReaderFiles::open_descriptors(), before + 2);
  std::vector<std::vector<std::byte>> buffers(4, std::vector<std::byte>(kBytes - 1));
  {
    std::vector<std::jthread> callers;
    for (std::uint32_t i = 0; i < 4; ++i) {
      callers.emplace_back([&, i] {
        const std::vector<Extent> extents = {{i % 2, 1, kBytes - 1, buffers[i].data()}};
        for (int again = 0; again < 5; ++again) reader->read(extents, nullptr);
      });
    }
  }
  for (std::uint32_t i = 0; i < 4; ++i) {
    EXPECT_TRUE(files_.same(buffers[i].data(), kBytes - 1, 1, i % 2 + 1));
  }
  reader.reset();
  EXPECT_EQ(ReaderFiles::open_descriptors(), before);
}

TEST_P(ReaderBasics, CallbackComesOnceAndBeforeWaitReturns) {
  const auto reader = make_reader({files_.write("a", 100'000, 1)}, options());
  for (const std::size_t bytes : {0, 100'000}) {
    std::vector<std::byte> buffer(bytes + 1);
    int calls = 0;
    ReadRequest request;
    request.extents = {{0, 0, bytes, buffer.data()}};
    request.on_complete = [&](const ReadResult& result) {
      EXPECT_EQ(result.status, ReadStatus::kDone);
      ++calls;
    };
    const ReadTicket ticket = reader->submit(std::move(request));
    EXPECT_EQ(reader->wait(ticket).status, ReadStatus::kDone);
    EXPECT_EQ(calls, 1);
    EXPECT_EQ(ticket.bytes_done(), bytes);
  }
}

TEST_P(ReaderBasics, OwnerLivesUntilTheRequestIsQuiet) {
  const auto reader = make_reader({files_.write("a", 100'000, 1)}, options());
  auto owner = std::make_shared<std::vector<std::byte>>(100'000);
  const std::weak_ptr<void> watched = owner;
  ReadRequest request;
  request.extents = {{0, 0, owner->size(), owner->data()}};
  request.owner = std::move(owner);
  const ReadTicket ticket = reader->submit(std::move(request));
  reader->wait(ticket);
  while (!ticket.quiet()) std::this_thread::yield();
  while (!watched.expired()) std::this_thread::yield();
}

TEST_P(ReaderBasics, MissingFileIsAnErrorAndLeavesNothingOpen) {
  const auto before = ReaderFiles::open_descriptors();
  const auto present = files_.write("a", 10, 1);
  try {
    make_reader({present, files_.folder() / "absent"}, options());
    FAIL();
  } catch (const IoError& error) {
    EXPECT_EQ(error.error_number(), ENOENT);
  }
  EXPECT_EQ(ReaderFiles::open_descriptors(), before);
}

TEST_P(ReaderBasics, AFileThatIsNotTheExpectedOneIsRefused) {
  const auto path = files_.write("a", 10'000, 1);
  struct stat status {};
  ASSERT_EQ(::stat(path.c_str(), &status), 0);
  ReaderOptions expecting = options();
  expecting.expected = {FileIdentity::of(status)};
  EXPECT_NO_THROW(make_reader({path}, expecting));
  std::filesystem::copy_file(path, path.string() + ".new");
  std::filesystem::rename(path.string() + ".new", path);
  try {
    make_reader({path}, expecting);
    FAIL();
  } catch (const IoError& error) {
    EXPECT_EQ(error.file(), path.string());
    EXPECT_NE(std::string(error.what()).find("replaced or changed"), std::string::npos);
  }
  EXPECT_THROW(make_reader({path, path}, expecting), ParameterError);
}

TEST_P(ReaderBasics, RefusedReadNamesErrno) {
  ReaderOptions plain = options();
  plain.direct = false;  // a folder opens but does not read
  const auto reader = make_reader({files_.folder()}, plain);
  std::byte buffer{};
  const std::vector<Extent> extents = {{0, 0, 1, &buffer}};
  try {
    reader->read(extents, nullptr);
    FAIL();
  } catch (const IoError& error) {
    EXPECT_EQ(error.error_number(), EISDIR);
  }
}

TEST_P(ReaderBasics, ExceptionOfProgressEndsTheReadAndTheReaderLivesOn) {
  const auto reader = make_reader({files_.write("a", std::size_t{1} << 20, 1)}, options());
  std::vector<std::byte> buffer(std::size_t{1} << 20);
  const std::vector<Extent> extents = {{0, 0, buffer.size(), buffer.data()}};
  EXPECT_THROW(
      reader->read(extents, nullptr, [](std::uint64_t) { throw std::runtime_error("enough"); }),
      std::runtime_error);
  reader->read(extents, nullptr);
  EXPECT_TRUE(files_.same(buffer.data(), buffer.size(), 0, 1));
}

TEST_P(ReaderBasics, PollIsCalledAlsoWhereNothingIsToWaitFor) {
  const auto reader = make_reader({files_.write("a", 1000, 1)}, options());
  std::byte byte{};
  const std::vector<Extent> extents = {{0, 0, 1, &byte}};
  int polls = 0;
  reader->read(extents, nullptr, {}, [&] { ++polls; });
  EXPECT_GE(polls, 1);
}

// Starts so many threads and no more.
class FewThreads final : public FaultSystem {
 public:
  explicit FewThreads(int threads) : left_(threads) {}
  std::thread start(std::function<void()> body) override {
    if (left_-- <= 0) {
      throw std::system_error(EAGAIN, std::generic_category());
    }
    return System::start(std::move(body));
  }

 private:
  int left_;
};

TEST_P(ReaderBasics, ASystemThatStartsNoThreadsIsAnErrorThatSaysWhatToDo) {
  const auto before = ReaderFiles::open_descriptors();
  const auto path = files_.write("a", 20'000, 1);
  // Not even the watcher; nobody who reads, or gives back what is held to a rate; nobody who reads.
  for (const int threads : {0, 1, 2}) {
    FewThreads system(threads);
    ReaderOptions few = options();
    few.system = &system;
    few.bytes_per_second = threads == 0 ? 0 : kSlowestRate;
    try {
      make_reader({path}, few);
      FAIL() << threads;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find("ulimit -u"), std::string::npos) << error.what();
    }
  }
  EXPECT_EQ(ReaderFiles::open_descriptors(), before);
  FewThreads system(3);
  ReaderOptions few = options();
  few.system = &system;
  const auto reader = make_reader({path}, few);
  std::vector<std::byte> buffer(20'000);
  const std::vector<Extent> extents = {{0, 0, buffer.size(), buffer.data()}};
  reader->read(extents, nullptr);
  EXPECT_TRUE(files_.same(buffer.data(), buffer.size(), 0, 1));
  if (GetParam() == ReaderKind::kPread) {
    EXPECT_NE(log().find("gave 2 of 8 threads"), std::string::npos) << log();
  }
}

TEST_P(ReaderBasics, BadArguments) {
  const auto with = [&](auto change) {
    ReaderOptions bad = options();
    change(bad);
    return bad;
  };
  EXPECT_THROW(make_reader({}, with([](auto& o) { o.depth = 0; })), ParameterError);
  EXPECT_THROW(make_reader({}, with([](auto& o) { o.depth = 1025; })), ParameterError);
  EXPECT_THROW(make_reader({}, with([](auto& o) { o.piece_bytes = 0; })), ParameterError);
  EXPECT_THROW(make_reader({}, with([](auto& o) { o.piece_bytes = 1000; })), ParameterError);
  const auto reader = make_reader({files_.write("a", 10, 1)}, options());
  std::byte buffer{};
  for (const Extent& extent : std::vector<Extent>{{1, 0, 1, &buffer},
                                                  {0, 0, 1, nullptr},
                                                  {0, std::uint64_t{1} << 63, 1, &buffer},
                                                  {0, 5, (std::uint64_t{1} << 63) - 1, &buffer}}) {
    EXPECT_THROW(reader->read({&extent, 1}, nullptr), ParameterError);
  }
}

TEST_P(ReaderBasics, WithoutDirectReadsItSaysSoOnceAndReadsOn) {
  ReaderOptions refusing = options();
  system_.before = [](ReadCall& call) -> std::optional<int> {
    const bool direct = (::fcntl(call.descriptor, F_GETFL) & O_DIRECT) != 0;
    return direct ? std::optional(-EINVAL) : std::nullopt;
  };
  const auto reader =
      make_reader({files_.write("a", 100'000, 1), files_.write("b", 100'000, 2)}, refusing);
  std::vector<std::byte> a(100'000);
  std::vector<std::byte> b(100'000);
  const std::vector<Extent> extents = {{0, 0, a.size(), a.data()}, {1, 0, b.size(), b.data()}};
  reader->read(extents, nullptr);
  EXPECT_TRUE(files_.same(a.data(), a.size(), 0, 1));
  EXPECT_TRUE(files_.same(b.data(), b.size(), 0, 2));
  EXPECT_EQ(log().find("no direct reads"), log().rfind("no direct reads")) << log();
  EXPECT_NE(log().find("no direct reads"), std::string::npos);
}

INSTANTIATE_TEST_SUITE_P(Kinds, ReaderBasics,
                         testing::Values(ReaderKind::kUring, ReaderKind::kPread), kind_name);

}  // namespace
}  // namespace dsfp4::storage
