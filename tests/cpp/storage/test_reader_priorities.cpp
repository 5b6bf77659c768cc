// Demand before speculation: order, bounds, promotion and cancellation. Reads are held by a gate.
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "storage/reader_fixture.h"

namespace dsfp4::storage {
namespace {

constexpr std::size_t kFile = 1'024'000;  // 250 blocks

class ReaderPriorities : public ReaderTest {
 protected:
  void SetUp() override {
    ReaderTest::SetUp();
    if (IsSkipped()) return;
    system_.before = [this](ReadCall& call) -> std::optional<int> {
      while (gate_closed_) std::this_thread::yield();
      const std::lock_guard lock(mutex_);
      order_.push_back(call.offset / kBlockBytes + (call.file == 0 ? 0 : 1000));
      return std::nullopt;
    };
  }
  std::unique_ptr<Reader> reader(int depth) {
    ReaderOptions one = options();
    one.depth = depth;
    one.speculative_bytes = 4 * kBlockBytes;
    return make_reader({files_.write("a", kFile, 1), files_.write("b", kFile, 2)}, one);
  }
  ReadRequest request(std::uint32_t file, Priority priority, std::vector<std::byte>& buffer) {
    buffer.resize(kFile);
    ReadRequest request;
    request.extents = {{file, 0, kFile, buffer.data()}};
    request.priority = priority;
    return request;
  }
  std::size_t count(std::uint64_t base) {
    const std::lock_guard lock(mutex_);
    return static_cast<std::size_t>(
        std::ranges::count_if(order_, [&](auto at) { return at / 1000 == base; }));
  }

  std::atomic<bool> gate_closed_ = false;
  std::mutex mutex_;
  std::vector<std::uint64_t> order_;  // guarded by mutex_
};

TEST_P(ReaderPriorities, DemandOvertakesSpeculation) {
  const auto reader = this->reader(4);
  std::vector<std::byte> guess;
  std::vector<std::byte> need;
  const ReadTicket speculative = reader->submit(request(0, Priority::kSpeculative, guess));
  while (count(0) < 10) std::this_thread::yield();
  const ReadTicket demand = reader->submit(request(1, Priority::kDemand, need));
  const std::size_t begun = count(0);
  EXPECT_EQ(reader->wait(demand).status, ReadStatus::kDone);
  EXPECT_EQ(reader->wait(speculative).status, ReadStatus::kDone);
  EXPECT_TRUE(files_.same(need.data(), kFile, 0, 2));
  EXPECT_TRUE(files_.same(guess.data(), kFile, 0, 1));
  EXPECT_EQ(reader->stats().speculative_beside_demand, 0u);
  EXPECT_LE(reader->stats().peak_speculative_in_flight_bytes, 4 * kBlockBytes);
  // From the first demanded read to the last, at most the speculative ones come between that were
  // taken before the demand came.
  std::size_t between = 0;
  bool in_demand = false;
  std::size_t left = 250;
  for (const std::uint64_t at : order_) {
    in_demand = in_demand || at >= 1000;
    if (at >= 1000) --left;
    if (at < 1000 && in_demand && left > 0) ++between;
  }
  EXPECT_LE(between, 4u) << begun;
}

TEST_P(ReaderPriorities, PromotionReadsNothingTwice) {
  const auto reader = this->reader(4);
  std::vector<std::byte> guess;
  std::vector<std::byte> other;
  gate_closed_ = true;
  const ReadTicket first = reader->submit(request(0, Priority::kSpeculative, other));
  const ReadTicket second = reader->submit(request(1, Priority::kSpeculative, guess));
  reader->promote(second);
  reader->promote(second);  // once more changes nothing
  gate_closed_ = false;
  EXPECT_EQ(reader->wait(second).status, ReadStatus::kDone);
  EXPECT_LT(count(0), 250u);  // it was overtaken
  EXPECT_EQ(reader->wait(first).status, ReadStatus::kDone);
  reader->promote(second);  // too late, harmless
  EXPECT_EQ(count(0), 250u);
  EXPECT_EQ(count(1), 250u);
  EXPECT_TRUE(files_.same(guess.data(), kFile, 0, 2));
}

// Its retries wait for demand, and demand for the room that they take.
TEST_P(ReaderPriorities, FailingSpeculationMakesWayForDemand) {
  const auto counted = system_.before;
  system_.before = [&](ReadCall& call) -> std::optional<int> {
    counted(call);
    if (call.file == 0) return -EIO;
    return std::nullopt;
  };
  for (int round = 0; round < 20; ++round) {
    const auto reader = this->reader(2);
    std::vector<std::byte> guess;
    std::vector<std::byte> need;
    const std::size_t before = count(0);
    const ReadTicket speculative = reader->submit(request(0, Priority::kSpeculative, guess));
    while (count(0) < before + 2) std::this_thread::yield();
    const ReadTicket demand = reader->submit(request(1, Priority::kDemand, need));
    ASSERT_TRUE(reader->wait_for(demand, std::chrono::seconds(60))) << "round " << round;
    EXPECT_EQ(demand.status(), ReadStatus::kDone);
    EXPECT_EQ(reader->wait(speculative).status, ReadStatus::kFailed);
  }
}

TEST_P(ReaderPriorities, CancellingDropsWhatIsNotYetRead) {
  const auto reader = this->reader(2);
  std::vector<std::byte> guess;
  std::vector<std::byte> next;
  int calls = 0;
  ReadRequest cancelled = request(0, Priority::kSpeculative, guess);
  cancelled.on_complete = [&](const ReadResult& result) {
    EXPECT_EQ(result.status, ReadStatus::kCancelled);
    ++calls;
  };
  gate_closed_ = true;
  const ReadTicket ticket = reader->submit(std::move(cancelled));
  reader->cancel(ticket);
  reader->cancel(ticket);
  gate_closed_ = false;
  EXPECT_EQ(reader->wait(ticket).status, ReadStatus::kCancelled);
  EXPECT_TRUE(ticket.quiet());
  EXPECT_EQ(calls, 1);
  EXPECT_LT(count(0), 250u);
  const std::size_t begun = count(0);
  EXPECT_EQ(reader->wait(reader->submit(request(1, Priority::kSpeculative, next))).status,
            ReadStatus::kDone);
  EXPECT_EQ(count(0), begun);
  reader->cancel(ticket);  // too late, harmless
}

TEST_P(ReaderPriorities, DestructionCancelsAndAnswersEverything) {
  auto reader = this->reader(2);
  std::vector<std::vector<std::byte>> buffers(6);
  std::atomic<int> answers = 0;
  std::vector<ReadTicket> tickets;
  for (std::uint32_t i = 0; i < 6; ++i) {
    ReadRequest one =
        request(i % 2, i % 3 == 0 ? Priority::kDemand : Priority::kSpeculative, buffers[i]);
    one.on_complete = [&](const ReadResult&) { ++answers; };
    tickets.push_back(reader->submit(std::move(one)));
  }
  reader.reset();
  EXPECT_EQ(answers, 6);
  for (const ReadTicket& ticket : tickets) EXPECT_TRUE(ticket.quiet());
}

// Two devices: each has a queue of its own, so a busy one does not keep the other from its work.
TEST_P(ReaderPriorities, TwoDevicesAreReadFromAtOnce) {
  system_.alter_status = [this](int descriptor, struct stat& status) {
    const auto link = std::filesystem::read_symlink("/proc/self/fd/" + std::to_string(descriptor));
    if (link.filename() == "b") ++status.st_dev;
  };
  const auto reader = this->reader(3);
  std::vector<std::byte> first;
  std::vector<std::byte> second;
  ReadRequest both = request(0, Priority::kDemand, first);
  second.resize(kFile);
  both.extents.push_back({1, 0, kFile, second.data()});
  EXPECT_EQ(reader->wait(reader->submit(std::move(both))).status, ReadStatus::kDone);
  EXPECT_TRUE(files_.same(first.data(), kFile, 0, 1));
  EXPECT_TRUE(files_.same(second.data(), kFile, 0, 2));
  const std::lock_guard lock(mutex_);
  std::size_t early = 0;  // of the second file among the first half of all reads
  for (std::size_t i = 0; i < 250; ++i) early += order_[i] >= 1000 ? 1 : 0;
  EXPECT_GT(early, 60u);
}

// Many threads submit, promote and cancel at random; everything is answered once and right.
TEST_P(ReaderPriorities, Storm) {
  const auto reader = this->reader(8);
  std::atomic<int> answers = 0;
  {
    std::vector<std::jthread> callers;
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
          ReadRequest one;
          one.extents = {{random(2), offset, buffer.size(), buffer.data()}};
          one.priority = random(2) == 0 ? Priority::kDemand : Priority::kSpeculative;
          one.on_complete = [&](const ReadResult&) { ++answers; };
          const std::uint32_t file = one.extents[0].file;
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
  EXPECT_EQ(reader->stats().speculative_beside_demand, 0u);
  EXPECT_EQ(reader->stats().in_flight, 0u);
}

INSTANTIATE_TEST_SUITE_P(Kinds, ReaderPriorities,
                         testing::Values(ReaderKind::kUring, ReaderKind::kPread), kind_name);

}  // namespace
}  // namespace dsfp4::storage
