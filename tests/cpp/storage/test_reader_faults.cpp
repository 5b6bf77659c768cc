// Every read of a request fails once, in every way, with both readers.
#include <cerrno>
#include <cstdlib>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "storage/faults.h"

namespace dsfp4::storage {
namespace {

constexpr std::size_t kFile = 200'000;
constexpr int kReads = 100;  // at least so many reads of a request

class ReaderFaults : public ReaderTest {
 protected:
  // Extents of all kinds: in place with and without slack, staged, small ones that share reads.
  std::vector<Extent> extents(PhasedBuffer& whole, PhasedBuffer& moved, PhasedBuffer& small) {
    std::vector<Extent> all = {{0, 100, whole.size(), whole.data(), true},
                               {1, 7, moved.size(), moved.data()}};
    for (std::size_t i = 0; i < 10; ++i)
      all.push_back({1, 190'000 + i * 20, 4, small.data() + i * 4});
    return all;
  }

  // Reads everything through a reader with `fault` at read `at`; says whether that was reached.
  bool inject(Fault fault, std::int64_t at, std::int64_t* reads = nullptr) {
    const auto a = files_.write("a", kFile, 1);
    const auto b = files_.write("b", kFile, 2);
    const auto descriptors = ReaderFiles::open_descriptors();
    PhasedBuffer whole(kFile - 300, 100);
    PhasedBuffer moved(180'000, 8);
    PhasedBuffer small(40, 0);
    const auto right = [&] {
      bool same = files_.same(whole.data(), whole.size(), 100, 1) &&
                  files_.same(moved.data(), moved.size(), 7, 2);
      for (std::size_t i = 0; i < 10; ++i) {
        same = same && files_.same(small.data() + i * 4, 4, 190'000 + i * 20, 2);
      }
      return same;
    };
    FaultAt system(fault, at, a.string());
    {
      ReaderOptions faulty = options();
      faulty.system = &system;
      faulty.log = [&](std::string_view line) {
        if (line.find("waiting on") != line.npos && fault == Fault::kStallThenGoesOn) {
          system.hang_up();
        }
      };
      const auto reader = make_reader({a, b}, faulty);
      ReadRequest request;
      request.extents = extents(whole, moved, small);
      const ReadTicket ticket = reader->submit(std::move(request));
      const ReadResult result = reader->wait(ticket);
      if (reads != nullptr) *reads = system.reads();
      const bool reached = system.injected();
      EXPECT_EQ(result.status,
                reached && !must_succeed(fault) ? ReadStatus::kFailed : ReadStatus::kDone)
          << static_cast<int>(fault) << " at " << at << ": " << result.problem;
      if (result.status == ReadStatus::kDone) {
        EXPECT_TRUE(right()) << static_cast<int>(fault) << " at " << at;
      } else {
        EXPECT_TRUE(result.file == a.string() || result.file == b.string()) << result.file;
        EXPECT_THROW(result.throw_if_failed(), IoError);
      }
      system.hang_up();
      while (!ticket.quiet()) std::this_thread::yield();
      EXPECT_EQ(reader->stats().in_flight, 0u);
      EXPECT_EQ(reader->stats().in_flight_bytes, 0u);
      if (fault == Fault::kReplaced ||
          must_succeed(fault)) {  // the next request on the same reader
        const std::vector<Extent> again = extents(whole, moved, small);
        reader->read(again, nullptr);
        EXPECT_TRUE(right()) << "the next request";
      }
    }
    const auto pipe = fault == Fault::kStallThenGoesOn || fault == Fault::kStallForever ? 1 : 0;
    EXPECT_EQ(ReaderFiles::open_descriptors(), descriptors + pipe) << static_cast<int>(fault);
    return system.injected();
  }
};

TEST_P(ReaderFaults, EveryReadFailsInEveryWay) {
  std::int64_t reads = 0;
  inject(Fault::kNone, 0, &reads);
  ASSERT_GE(reads, 90);
  // All of them, 12 faults x about 100 reads x 2 readers, in the full tier; a prime step else.
  const std::int64_t step = std::getenv("DSFP4_FULL") != nullptr ? 1 : 7;
  std::int64_t injections = 0;
  for (const Fault fault : kAllFaults) {
    for (std::int64_t at = 0; at < reads && !HasFailure(); at += step) {
      injections += inject(fault, at) ? 1 : 0;
    }
  }
  EXPECT_GE(injections, reads / step * 11);  // a last read may not come about after another failed
  RecordProperty("injections", static_cast<int>(injections));
}

TEST_P(ReaderFaults, ErrorsThatStayAreGivenUpAndNamed) {
  const auto path = files_.write("a", 20'000, 1);
  for (const int error : {EIO, EAGAIN, ENOMEM, EINTR, EACCES}) {
    FaultSystem system;
    std::atomic<int> calls = 0;
    system.before = [&](ReadCall& call) -> std::optional<int> {
      if (call.offset != 4096) return std::nullopt;
      ++calls;
      return -error;
    };
    ReaderOptions faulty = options();
    faulty.system = &system;
    const auto reader = make_reader({path}, faulty);
    PhasedBuffer buffer(20'000, 0);
    const std::vector<Extent> extents = {{0, 0, buffer.size(), buffer.data()}};
    try {
      reader->read(extents, nullptr);
      FAIL() << error;
    } catch (const IoError& caught) {
      EXPECT_EQ(caught.error_number(), error);
      EXPECT_EQ(caught.offset(), 4096);
      EXPECT_EQ(caught.file(), path.string());
    }
    EXPECT_EQ(calls > 1, error != EACCES);  // that one is not worth another try
    EXPECT_LE(calls, 1001);
    system.before = nullptr;
    reader->read(extents, nullptr);
    EXPECT_TRUE(files_.same(buffer.data(), buffer.size(), 0, 1));
  }
}

// A failed request stops reading, and leaves another one alone.
TEST_P(ReaderFaults, OnlyTheRequestAtFaultFails) {
  system_.before = [](ReadCall& call) {
    return call.file == 0 ? std::optional(-EACCES) : std::nullopt;
  };
  const auto reader =
      make_reader({files_.write("a", 1'000'000, 1), files_.write("b", 300'000, 2)}, options());
  std::vector<std::byte> a(1'000'000);
  std::vector<std::byte> b(300'000);
  ReadRequest bad;
  bad.extents = {{0, 0, a.size(), a.data()}};
  ReadRequest good;
  good.extents = {{1, 0, b.size(), b.data()}};
  const ReadTicket first = reader->submit(std::move(bad));
  const ReadTicket second = reader->submit(std::move(good));
  EXPECT_EQ(reader->wait(first).status, ReadStatus::kFailed);
  EXPECT_EQ(reader->wait(second).status, ReadStatus::kDone);
  EXPECT_TRUE(files_.same(b.data(), b.size(), 0, 2));
  EXPECT_LT(reader->stats().reads, 74 + 30u);  // b's 74, and of a's 245 not many
}

// Nobody waits for ever where reads that are never answered hold all that reads are made with.
TEST_P(ReaderFaults, ADemandThatCannotBeginFailsToo) {
  const auto path = files_.write("a", 20'000, 1);
  FaultAt system(Fault::kStallForever, 0, path.string(), 2);
  {
    ReaderOptions faulty = options();
    faulty.system = &system;
    faulty.depth = 2;
    const auto reader = make_reader({path}, faulty);
    const auto owner = std::make_shared<PhasedBuffer>(20'000, 0);
    const auto submit = [&] {
      ReadRequest request;
      request.extents = {{0, 0, owner->size(), owner->data()}};
      request.owner = owner;
      return reader->submit(std::move(request));
    };
    // The first takes one job or both, so the third finds none.
    ReadResult result;
    for (int i = 0; i < 3; ++i) {
      const ReadTicket ticket = submit();
      const bool starves = i == 2 && GetParam() == ReaderKind::kPread;
      if (starves) {
        EXPECT_FALSE(reader->wait_for(ticket, std::chrono::milliseconds(50)));
        system.stopped(std::chrono::hours(1));
        system.wait_for_a_look();
        EXPECT_EQ(ticket.status(), ReadStatus::kPending);
      }
      while (!reader->wait_for(ticket, std::chrono::milliseconds(5))) {
        system.clock_offset_ms += 30'000;
      }
      system.hold_clock();
      result = reader->wait(ticket);
      // io_uring can take a read of a pipe back.
      if (i > 0 && GetParam() == ReaderKind::kUring) continue;
      EXPECT_EQ(result.status, ReadStatus::kFailed);
      EXPECT_EQ(result.error_number, ETIMEDOUT);
      EXPECT_EQ(result.file, path.string());
    }
    if (GetParam() == ReaderKind::kPread) {
      EXPECT_NE(result.problem.find("keeps every new one"), std::string::npos) << result.problem;
    }
    system.hang_up();
    EXPECT_EQ(reader->wait(submit()).status, ReadStatus::kDone);
    EXPECT_TRUE(files_.same(owner->data(), owner->size(), 0, 1));
  }
  system.wait_for_threads();
}

TEST_P(ReaderFaults, AStalledReadIsWarnedAboutOnceThenGivenUpAndItsOwnerKept) {
  const auto path = files_.write("a", 20'000, 1);
  // The thread of the abandoned read closes the files, perhaps while the process ends already:
  // its system is never destroyed, though still reachable.
  static auto& kept = *new std::vector<std::unique_ptr<FaultAt>>;
  kept.push_back(std::make_unique<FaultAt>(Fault::kStallForever, 2, path.string()));
  FaultAt& system = *kept.back();
  ReaderOptions faulty = options();
  faulty.system = &system;
  auto owner = std::make_shared<PhasedBuffer>(20'000, 0);
  const std::weak_ptr<void> watched = owner;
  auto reader = make_reader({path}, faulty);
  ReadRequest request;
  request.extents = {{0, 0, owner->size(), owner->data()}};
  request.owner = std::move(owner);
  const ReadTicket ticket = reader->submit(std::move(request));
  const ReadResult result = reader->wait(ticket);
  EXPECT_EQ(result.status, ReadStatus::kFailed);
  EXPECT_EQ(result.error_number, ETIMEDOUT);
  EXPECT_EQ(result.file, path.string());
  if (GetParam() == ReaderKind::kPread) {  // io_uring can take a read of a pipe back
    EXPECT_FALSE(ticket.quiet());
    EXPECT_FALSE(watched.expired());
  }
  reader.reset();  // does not wait for what may never come back
  system.hang_up();
  while (!watched.expired()) std::this_thread::yield();
  EXPECT_TRUE(ticket.quiet());
}

// Ctrl-Z, a frozen container: the watcher was stopped as well as the reads.
TEST_P(ReaderFaults, ReadsOfAProcessThatWasStoppedAreNotGivenUp) {
  std::atomic<bool> held = true;
  system_.before = [&](ReadCall&) -> std::optional<int> {
    while (held) std::this_thread::yield();
    return std::nullopt;
  };
  const auto reader = make_reader({files_.write("a", 20'000, 1)}, options());
  std::vector<std::byte> buffer(20'000);
  ReadRequest request;
  request.extents = {{0, 0, buffer.size(), buffer.data()}};
  const ReadTicket ticket = reader->submit(std::move(request));
  system_.wait_for_a_look();
  system_.stopped(std::chrono::hours(1));
  system_.wait_for_a_look();
  EXPECT_EQ(ticket.status(), ReadStatus::kPending);
  EXPECT_EQ(log(), "");
  held = false;
  EXPECT_EQ(reader->wait(ticket).status, ReadStatus::kDone);
  EXPECT_TRUE(files_.same(buffer.data(), buffer.size(), 0, 1));
}

TEST_P(ReaderFaults, AStalledDiskIsWarnedAboutOnceAndItsRecoveryTold) {
  const auto path = files_.write("a", 200'000, 1);
  FaultAt system(Fault::kStallThenGoesOn, 0, path.string(), 8);
  ReaderOptions faulty = options();
  faulty.system = &system;
  faulty.stall_limit = std::chrono::hours(1);
  const auto reader = make_reader({path}, faulty);
  std::vector<std::byte> buffer(200'000);
  ReadRequest request;
  request.extents = {{0, 0, buffer.size(), buffer.data()}};
  const ReadTicket ticket = reader->submit(std::move(request));
  while (reader->stats().stalls < 8) std::this_thread::yield();
  system.wait_for_a_look();
  const auto lines = [&](const char* words) {
    const std::string text = log();
    int count = 0;
    for (std::size_t at = text.find(words); at != text.npos; at = text.find(words, at + 1)) ++count;
    return count;
  };
  EXPECT_EQ(lines("waiting on"), 1) << log();
  EXPECT_EQ(lines("are over"), 0) << log();
  system.hold_clock();
  system.hang_up();
  EXPECT_EQ(reader->wait(ticket).status, ReadStatus::kDone);
  while (lines("are over") == 0) std::this_thread::yield();
  EXPECT_EQ(lines("\n"), 2) << log();
}

// A caller may leave a read that does not come back, and then the reader: neither waits for it.
TEST_P(ReaderFaults, AStalledReadIsLeftByWhatPollThrows) {
  const auto path = files_.write("a", 20'000, 1);
  static auto& kept =
      *new std::vector<std::unique_ptr<FaultAt>>;  // its thread may outlive the test
  kept.push_back(std::make_unique<FaultAt>(Fault::kStallForever, 0, path.string()));
  FaultAt& system = *kept.back();
  ReaderOptions faulty = options();
  faulty.system = &system;
  faulty.stall_limit = std::chrono::hours(1);
  auto reader = make_reader({path}, faulty);
  auto owner = std::make_shared<PhasedBuffer>(20'000, 0);
  const std::weak_ptr<void> watched = owner;
  const std::vector<Extent> extents = {{0, 0, owner->size(), owner->data()}};
  EXPECT_THROW(reader->read(extents, std::move(owner), {},
                            [&] {
                              if (system.injected()) throw std::runtime_error("enough");
                            }),
               std::runtime_error);
  EXPECT_FALSE(watched.expired());
  reader.reset();
  if (GetParam() == ReaderKind::kPread) {  // io_uring takes it back
    EXPECT_FALSE(watched.expired());
  }
  system.hang_up();
  while (!watched.expired()) std::this_thread::yield();
}

TEST_P(ReaderFaults, WhereIoUringIsForbiddenPreadTakesOverAndSaysSo) {
  system_.uring_error = EPERM;
  ReaderOptions automatic = options();
  automatic.kind = ReaderKind::kAutomatic;
  const auto path = files_.write("a", 20'000, 1);
  const auto reader = make_reader({path}, automatic);
  EXPECT_STREQ(reader->name(), "pread");
  EXPECT_NE(log().find("io_uring cannot be used here"), std::string::npos) << log();
  std::vector<std::byte> buffer(20'000);
  const std::vector<Extent> extents = {{0, 0, buffer.size(), buffer.data()}};
  reader->read(extents, nullptr);
  EXPECT_TRUE(files_.same(buffer.data(), buffer.size(), 0, 1));
  automatic.kind = ReaderKind::kUring;
  EXPECT_THROW(make_reader({path}, automatic), UnsupportedError);
}

INSTANTIATE_TEST_SUITE_P(Kinds, ReaderFaults,
                         testing::Values(ReaderKind::kUring, ReaderKind::kPread), kind_name);

}  // namespace
}  // namespace dsfp4::storage
