#include "storage/measure.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <random>
#include <string>
#include <sys/resource.h>
#include <system_error>
#include <utility>

#include "dsfp4/error.h"

namespace dsfp4::storage {
namespace {

double cpu_seconds() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) * 1e-6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

// The blocks of all files, whole ones only, in one row.
class Blocks {
 public:
  Blocks(const std::vector<std::filesystem::path>& files, std::uint64_t block) : block_(block) {
    for (const auto& file : files) {
      std::error_code error;
      const std::uintmax_t bytes = std::filesystem::file_size(file, error);
      if (error) throw IoError(file.string(), -1, error.value(), "its size cannot be read");
      count_ += bytes / block;
      ends_.push_back(count_);
    }
    if (count_ < 64) {
      throw ParameterError("path", "the files hold " + std::to_string(count_) + " blocks of " +
                                       std::to_string(block) + " bytes; 64 are needed to measure");
    }
  }
  std::uint64_t count() const { return count_; }
  Extent extent(std::uint64_t number, std::byte* destination) const {
    const auto file = std::ranges::upper_bound(ends_, number) - ends_.begin();
    const std::uint64_t first = file == 0 ? 0 : ends_[static_cast<std::size_t>(file - 1)];
    return {static_cast<std::uint32_t>(file), (number - first) * block_, block_, destination};
  }

 private:
  std::uint64_t block_;
  std::uint64_t count_ = 0;
  std::vector<std::uint64_t> ends_;
};

// Destinations that come back when their reads are done. They own themselves while one has stalled.
class Buffers {
 public:
  Buffers(std::size_t count, std::uint64_t bytes) : memory_((count * bytes) + kBlockBytes) {
    const auto start = reinterpret_cast<std::uintptr_t>(memory_.data());
    std::byte* first = memory_.data() + (kBlockBytes - start % kBlockBytes) % kBlockBytes;
    for (std::size_t i = 0; i < count; ++i) free_.push_back(first + i * bytes);
  }
  std::byte* take() {
    std::unique_lock lock(mutex_);
    came_back_.wait(lock, [this] { return !free_.empty(); });
    std::byte* buffer = free_.back();
    free_.pop_back();
    return buffer;
  }
  void give_back(std::byte* buffer) {
    const std::lock_guard lock(mutex_);
    free_.push_back(buffer);  // had room for it before
    came_back_.notify_one();
  }

 private:
  std::vector<std::byte> memory_;
  std::mutex mutex_;
  std::condition_variable came_back_;
  std::vector<std::byte*> free_;
};

}  // namespace

RawRate measure_raw_rate(const std::vector<std::filesystem::path>& files,
                         const ReaderOptions& options, double seconds, std::uint64_t seed) {
  if (!(seconds > 0.0)) throw ParameterError("seconds", "must be over 0");
  const std::uint64_t block = options.piece_bytes;
  const Blocks blocks(files, block);
  // Somewhat more than are with the system, so that it always has as many as it may.
  const auto buffers =
      std::make_shared<Buffers>(static_cast<std::size_t>(options.depth) * 3 / 2 + 4, block);
  std::mt19937_64 random(seed);
  std::mutex mutex;
  ReadResult failure;                               // guarded by mutex
  const auto reader = make_reader(files, options);  // ends before what its callbacks use
  RawRate rate;
  rate.reader = reader->name();

  const auto submit = [&] {
    std::byte* buffer = buffers->take();
    ReadRequest request;
    request.owner = buffers;
    request.extents = {blocks.extent(random() % blocks.count(), buffer)};
    request.on_complete = [&, buffer](const ReadResult& result) {
      if (result.status == ReadStatus::kFailed) {
        const std::lock_guard lock(mutex);
        failure = result;
      }
      buffers->give_back(buffer);
    };
    return reader->submit(std::move(request));
  };
  const auto ended = [&] {
    const std::lock_guard lock(mutex);
    return failure.status == ReadStatus::kFailed;
  };

  const auto now = [] { return std::chrono::steady_clock::now(); };
  const auto fill = now() + std::chrono::milliseconds(200);  // the queue fills before it counts
  while (now() < fill && !ended()) submit();
  const std::uint64_t before = reader->stats().bytes_read;
  const double cpu_before = cpu_seconds();
  const auto start = now();
  const std::chrono::duration<double> length(seconds);
  while (now() - start < length && !ended()) submit();
  rate.bytes = reader->stats().bytes_read - before;
  rate.seconds = std::chrono::duration<double>(now() - start).count();
  rate.cpu_seconds = cpu_seconds() - cpu_before;
  failure.throw_if_failed();
  return rate;
}

DemandLatency measure_demand_beside_speculation(const std::vector<std::filesystem::path>& files,
                                                const ReaderOptions& options,
                                                std::uint64_t expert_bytes, int experts, int rounds,
                                                std::uint64_t seed) {
  if (experts < 1 || rounds < 1) throw ParameterError("rounds", "and experts must be at least 1");
  const Blocks blocks(files, expert_bytes);
  const auto count = static_cast<std::size_t>(experts);
  const auto buffers = std::make_shared<Buffers>(2 * count, expert_bytes);
  std::vector<std::byte*> places;
  std::vector<std::byte*> guesses;
  for (std::size_t i = 0; i < count; ++i) {
    places.push_back(buffers->take());
    guesses.push_back(buffers->take());
  }
  std::mt19937_64 random(seed);
  const auto reader = make_reader(files, options);
  const auto submit = [&](const std::vector<std::byte*>& to, Priority priority) {
    ReadRequest request;
    for (std::byte* place : to) {
      request.extents.push_back(blocks.extent(random() % blocks.count(), place));
    }
    request.priority = priority;
    request.owner = buffers;
    return reader->submit(std::move(request));
  };
  const auto demand = [&] {
    const auto start = std::chrono::steady_clock::now();
    reader->wait(submit(places, Priority::kDemand)).throw_if_failed();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };

  DemandLatency latency;
  demand();  // the first one pays for what is new
  for (int round = 0; round < rounds; ++round) {
    latency.idle_seconds.push_back(demand());
    const ReadTicket guess = submit(guesses, Priority::kSpeculative);
    bool over = false;  // it may fail before it has read so much
    while (!over && guess.bytes_done() < expert_bytes / 4) {
      over = reader->wait_for(guess, std::chrono::milliseconds(1));
    }
    if (over) reader->wait(guess).throw_if_failed();
    latency.beside_seconds.push_back(demand());
    reader->wait(guess).throw_if_failed();
  }
  latency.stats = reader->stats();
  return latency;
}

}  // namespace dsfp4::storage
