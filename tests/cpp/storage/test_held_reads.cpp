// Reads held to a rate: on a clock that stands until a test puts it forward.
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "storage/reader_fixture.h"

namespace dsfp4::storage {
namespace {

constexpr std::uint64_t kRate = 4'096'000;  // a block takes a millisecond
constexpr std::size_t kFile = 1'024'000;    // 250 blocks
constexpr int kDepth = 8;

class StandingClock : public System {
 public:
  std::atomic<std::int64_t> milliseconds = 0;
  std::atomic<std::int64_t> reads = 0;
  std::atomic<std::uint64_t> bad_block = std::numeric_limits<std::uint64_t>::max();

  std::optional<int> before_read(ReadCall& call) override {
    ++reads;
    return call.offset / kBlockBytes == bad_block ? std::optional<int>(-ENXIO) : std::nullopt;
  }
  Clock::time_point now() override {
    return Clock::time_point(std::chrono::milliseconds(milliseconds.load()));
  }
  std::chrono::milliseconds watch_period() override { return std::chrono::milliseconds(1); }
};

class HeldReads : public ReaderTest {
 protected:
  std::unique_ptr<Reader> reader() {
    ReaderOptions slow = options();
    slow.depth = kDepth;
    slow.speculative_bytes = 4 * kBlockBytes;
    slow.bytes_per_second = kRate;
    slow.system = &clock_;
    return make_reader({files_.write("a", kFile, 1), files_.write("b", kFile, 2)}, slow);
  }
  ReadRequest request(std::uint32_t file, std::size_t blocks, Priority priority,
                      std::vector<std::byte>& buffer) {
    buffer.resize(blocks * kBlockBytes);
    ReadRequest request;
    request.extents = {{file, 0, buffer.size(), buffer.data()}};
    request.priority = priority;
    return request;
  }
  static std::uint64_t blocks_done(const ReadTicket& ticket) {
    return ticket.bytes_done() / kBlockBytes;
  }
  static void wait_until_held(const Reader& reader, std::uint64_t count) {
    while (reader.stats().held != count) std::this_thread::yield();
  }
  /// Puts the clock forward until the request is over.
  ReadResult let_run(Reader& reader, const ReadTicket& ticket) {
    do ++clock_.milliseconds;
    while (!reader.wait_for(ticket, std::chrono::milliseconds(1)));
    return reader.wait(ticket);
  }

  StandingClock clock_;
};

// All that the depth allows is read at once, and given back one after the other.
TEST_P(HeldReads, AreDeepAndComeAtTheRate) {
  const auto reader = this->reader();
  std::vector<std::byte> buffer;
  const ReadTicket ticket = reader->submit(request(0, 40, Priority::kDemand, buffer));
  for (std::uint64_t done = 0; done < 40; ++done) {
    wait_until_held(*reader, std::min<std::uint64_t>(kDepth, 40 - done));
    ASSERT_EQ(blocks_done(ticket), done);
    ASSERT_EQ(clock_.reads, std::min<std::int64_t>(40, static_cast<std::int64_t>(done) + kDepth));
    ++clock_.milliseconds;
    while (blocks_done(ticket) == done) std::this_thread::yield();
  }
  EXPECT_EQ(reader->wait(ticket).status, ReadStatus::kDone);
  EXPECT_TRUE(files_.same(buffer.data(), buffer.size(), 0, 1));
  EXPECT_EQ(reader->stats().held, 0u);
  EXPECT_EQ(reader->stats().bytes_useful, buffer.size());
  EXPECT_DOUBLE_EQ(reader->stats().busy_seconds, 0.040);
}

TEST_P(HeldReads, DemandComesBeforeSpeculation) {
  const auto reader = this->reader();
  std::vector<std::byte> guess;
  std::vector<std::byte> need;
  const ReadTicket speculative = reader->submit(request(0, 10, Priority::kSpeculative, guess));
  wait_until_held(*reader, 4);
  const ReadTicket demand = reader->submit(request(1, 4, Priority::kDemand, need));
  wait_until_held(*reader, 8);
  for (std::uint64_t done = 0; done < 4; ++done) {
    EXPECT_EQ(blocks_done(demand), done);
    EXPECT_EQ(blocks_done(speculative), 0u);
    ++clock_.milliseconds;
    while (blocks_done(demand) == done) std::this_thread::yield();
  }
  EXPECT_EQ(reader->wait(demand).status, ReadStatus::kDone);
  EXPECT_EQ(blocks_done(speculative), 0u);
  EXPECT_EQ(let_run(*reader, speculative).status, ReadStatus::kDone);
  EXPECT_TRUE(files_.same(guess.data(), guess.size(), 0, 1));
}

TEST_P(HeldReads, PromotionBringsThemForward) {
  const auto reader = this->reader();
  std::vector<std::byte> first;
  std::vector<std::byte> second;
  const ReadTicket other = reader->submit(request(0, 2, Priority::kSpeculative, first));
  wait_until_held(*reader, 2);
  const ReadTicket promoted = reader->submit(request(1, 2, Priority::kSpeculative, second));
  wait_until_held(*reader, 4);
  reader->promote(promoted);
  ++clock_.milliseconds;
  while (blocks_done(promoted) == 0) std::this_thread::yield();
  EXPECT_EQ(blocks_done(other), 0u);
  EXPECT_EQ(let_run(*reader, promoted).status, ReadStatus::kDone);
  EXPECT_EQ(let_run(*reader, other).status, ReadStatus::kDone);
}

TEST_P(HeldReads, AreCancelledAtOnceButTakeTheirTime) {
  const auto reader = this->reader();
  std::vector<std::byte> buffer;
  std::vector<std::byte> next;
  const ReadTicket ticket = reader->submit(request(0, 40, Priority::kDemand, buffer));
  wait_until_held(*reader, kDepth);
  reader->cancel(ticket);
  EXPECT_EQ(reader->wait(ticket).status, ReadStatus::kCancelled);  // on a clock that stands
  EXPECT_TRUE(ticket.quiet());
  EXPECT_EQ(clock_.reads, kDepth);
  EXPECT_EQ(ticket.bytes_done(), 0u);
  const ReadTicket later = reader->submit(request(1, 1, Priority::kDemand, next));
  wait_until_held(*reader, 1);
  clock_.milliseconds = kDepth;
  EXPECT_FALSE(reader->wait_for(later, std::chrono::milliseconds(5)));
  clock_.milliseconds = kDepth + 1;
  EXPECT_EQ(reader->wait(later).status, ReadStatus::kDone);
}

TEST_P(HeldReads, AreGivenUpWithTheReader) {
  auto reader = this->reader();
  std::vector<std::vector<std::byte>> buffers(4);
  std::vector<ReadTicket> tickets;
  std::atomic<int> cancelled = 0;
  for (std::uint32_t i = 0; i < 4; ++i) {
    ReadRequest one =
        request(i % 2, 3, i < 2 ? Priority::kSpeculative : Priority::kDemand, buffers[i]);
    one.on_complete = [&](const ReadResult& result) {
      if (result.status == ReadStatus::kCancelled) ++cancelled;
    };
    tickets.push_back(reader->submit(std::move(one)));
    constexpr std::uint64_t kHeld[] = {3, 4, 7, kDepth};  // no more than 4 may be speculative
    wait_until_held(*reader, kHeld[i]);
  }
  reader.reset();
  EXPECT_EQ(cancelled, 4);
  for (const ReadTicket& ticket : tickets) EXPECT_TRUE(ticket.quiet());
}

TEST_P(HeldReads, AnErrorIsNotHeldBack) {
  const auto reader = this->reader();
  clock_.bad_block = 5;
  std::vector<std::byte> buffer;
  const ReadTicket ticket = reader->submit(request(0, 8, Priority::kDemand, buffer));
  const ReadResult result = reader->wait(ticket);
  EXPECT_EQ(result.status, ReadStatus::kFailed);
  EXPECT_EQ(result.error_number, ENXIO);
  while (!ticket.quiet()) std::this_thread::yield();
  EXPECT_EQ(reader->stats().held, 0u);
}

TEST_P(HeldReads, AreNotTakenForStalled) {
  const auto reader = this->reader();
  std::vector<std::byte> buffer;
  const ReadTicket ticket = reader->submit(request(0, 8, Priority::kDemand, buffer));
  wait_until_held(*reader, 8);
  clock_.milliseconds += 1;
  while (blocks_done(ticket) == 0) std::this_thread::yield();
  clock_.milliseconds += 9'999'999;
  EXPECT_EQ(let_run(*reader, ticket).status, ReadStatus::kDone);
  EXPECT_EQ(reader->stats().stalls, 0u);
}

// On the real clock, many threads at once: everything is answered once and right.
TEST_P(HeldReads, Storm) {
  ReaderOptions fast = options();
  fast.bytes_per_second = 500'000'000;
  fast.system = nullptr;
  const auto reader = make_reader({files_.write("a", kFile, 1), files_.write("b", kFile, 2)}, fast);
  std::atomic<int> answers = 0;
  {
    std::vector<std::jthread> callers;
    callers.reserve(4);
    for (unsigned t = 0; t < 4; ++t) {
      callers.emplace_back([&, t] {
        unsigned state = t * 7919 + 1;
        const auto random = [&](unsigned most) {
          state = state * 1664525u + 1013904223u;
          return (state >> 8) % most;
        };
        for (int i = 0; i < 100; ++i) {
          const std::size_t offset = random(900'000);
          std::vector<std::byte> buffer(random(40'000) + 1);
          const std::uint32_t file = random(2);
          ReadRequest one;
          one.extents = {{file, offset, buffer.size(), buffer.data()}};
          one.priority = random(2) == 0 ? Priority::kDemand : Priority::kSpeculative;
          one.on_complete = [&](const ReadResult&) { ++answers; };
          const ReadTicket ticket = reader->submit(std::move(one));
          if (random(3) == 0) reader->promote(ticket);
          if (random(4) == 0) reader->cancel(ticket);
          if (reader->wait(ticket).status == ReadStatus::kDone) {
            ASSERT_TRUE(files_.same(buffer.data(), buffer.size(), offset, file + 1));
          }
          ASSERT_TRUE(ticket.quiet());
        }
      });
    }
  }
  EXPECT_EQ(answers, 400);
  EXPECT_EQ(reader->stats().held, 0u);
  EXPECT_EQ(reader->stats().in_flight, 0u);
}

TEST_P(HeldReads, ARateOutOfRangeIsRefused) {
  for (const std::uint64_t rate : {std::uint64_t{1}, kSlowestRate - 1, kFastestRate + 1}) {
    ReaderOptions bad = options();
    bad.bytes_per_second = rate;
    EXPECT_THROW(make_reader({}, bad), ParameterError) << rate;
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, HeldReads, testing::Values(ReaderKind::kUring, ReaderKind::kPread),
                         kind_name);

}  // namespace
}  // namespace dsfp4::storage
