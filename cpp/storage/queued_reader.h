// A Reader in front of a RequestQueue; what reads is in the classes derived from it.
#pragma once

#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "storage/reader.h"
#include "storage/request_queue.h"

namespace dsfp4::storage {

class QueuedReader : public Reader {
 public:
  explicit QueuedReader(std::shared_ptr<RequestQueue> queue) : queue_(std::move(queue)) {}
  ~QueuedReader() override { stop(); }

  ReadTicket submit(ReadRequest request) override {
    return ReadTicket(queue_->submit(std::move(request)));
  }
  void promote(const ReadTicket& ticket) noexcept override {
    queue_->promote(ticket.shared_state());
  }
  void cancel(const ReadTicket& ticket) noexcept override { queue_->cancel(ticket.shared_state()); }
  ReadResult wait(const ReadTicket& ticket) override { return queue_->wait(ticket.state()); }
  bool wait_for(const ReadTicket& ticket, std::chrono::milliseconds most) override {
    return queue_->wait_for(ticket.state(), most);
  }
  ReaderStats stats() const override { return queue_->stats(); }
  std::uint64_t staging_bytes() const noexcept override { return queue_->staging().total_bytes(); }

 protected:
  // Threads share the queue, so that those of abandoned reads may outlive the reader.
  void stop() noexcept {
    queue_->shut_down();
    const bool abandoned = queue_->has_jobs();
    for (std::thread& thread : threads_) abandoned ? thread.detach() : thread.join();
    threads_.clear();
  }

  std::shared_ptr<RequestQueue> queue_;
  std::vector<std::thread> threads_;
};

}  // namespace dsfp4::storage
