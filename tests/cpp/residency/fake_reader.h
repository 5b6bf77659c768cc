// A reader whose reads complete when the test says so.
#pragma once

#include <cerrno>
#include <memory>
#include <utility>
#include <vector>

#include "storage/reader.h"
#include "storage/request_queue.h"

namespace dsfp4::residency {

class FakeReader final : public storage::Reader {
 public:
  struct Read {
    storage::ReadRequest request;
    std::shared_ptr<storage::RequestState> state;
    bool over = false;
  };

  storage::ReadTicket submit(storage::ReadRequest request) override {
    auto state = std::make_shared<storage::RequestState>();
    reads.push_back({std::move(request), state, false});
    return storage::ReadTicket(state);
  }
  void promote(const storage::ReadTicket& ticket) noexcept override {
    find(ticket).request.priority = storage::Priority::kDemand;
  }
  void cancel(const storage::ReadTicket& ticket) noexcept override {
    cancelled.push_back(ticket.shared_state());
  }
  storage::ReadResult wait(const storage::ReadTicket&) override { return {}; }
  bool wait_for(const storage::ReadTicket&, std::chrono::milliseconds) override { return true; }
  storage::ReaderStats stats() const override { return {}; }
  const char* name() const noexcept override { return "fake"; }
  std::uint64_t staging_bytes() const noexcept override { return 0; }

  /// Completes read number `i`: fills its destinations from `contents` or, where that is empty,
  /// with each byte's file offset, the low byte of it. With ETIMEDOUT it fails, but stays with the
  /// system until let_go().
  void complete(std::size_t i, storage::ReadStatus status = storage::ReadStatus::kDone,
                int error_number = EIO) {
    Read& read = reads.at(i);
    read.over = true;
    storage::ReadResult result;
    result.status = status;
    if (status == storage::ReadStatus::kFailed) {
      result.file = "model.safetensors";
      result.offset = 77;
      result.error_number = error_number;
      result.problem = "the read failed";
    }
    if (status == storage::ReadStatus::kDone) {
      for (const storage::Extent& extent : read.request.extents) {
        for (std::uint64_t b = 0; b < extent.bytes; ++b) {
          const std::uint64_t at = extent.offset + b;
          extent.destination[b] = contents.empty() ? static_cast<std::byte>(at) : contents.at(at);
        }
      }
    }
    read.state->status = status;
    read.state->quiet = result.error_number != ETIMEDOUT;
    read.request.on_complete(result);
  }
  void let_go(std::size_t i) { reads.at(i).state->quiet = true; }
  /// Those that were cancelled complete so.
  void complete_cancelled() {
    for (const auto& state : std::exchange(cancelled, {})) {
      for (std::size_t i = 0; i < reads.size(); ++i) {
        if (reads[i].state == state && !reads[i].over) {
          complete(i, storage::ReadStatus::kCancelled);
        }
      }
    }
  }
  std::size_t open() const {
    std::size_t count = 0;
    for (const Read& read : reads) count += read.over ? 0 : 1;
    return count;
  }

  std::vector<std::byte> contents;  // of the file
  std::vector<Read> reads;
  std::vector<std::shared_ptr<storage::RequestState>> cancelled;

 private:
  Read& find(const storage::ReadTicket& ticket) {
    for (Read& read : reads) {
      if (read.state == ticket.shared_state()) return read;
    }
    std::abort();
  }
};

}  // namespace dsfp4::residency
