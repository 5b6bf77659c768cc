// Reads with pread(2) from a team of threads, each with one job at a time.
#include <string>

#include "dsfp4/error.h"
#include "storage/engines.h"
#include "storage/queued_reader.h"

namespace dsfp4::storage {
namespace {

void serve(RequestQueue& queue) noexcept {
  while (Job* job = queue.take()) {
    bool goes_on = true;
    while (goes_on) {
      const std::optional<int> given = queue.prepare(*job);
      const int result = given ? *given : static_cast<int>(queue.system().pread(job->call));
      goes_on = queue.settle(*job, result, !given);
    }
  }
}

class PreadReader final : public QueuedReader {
 public:
  explicit PreadReader(std::shared_ptr<RequestQueue> queue) : QueuedReader(std::move(queue)) {
    threads_.reserve(queue_->capacity());
    while (threads_.size() < queue_->capacity()) {
      try {
        threads_.push_back(queue_->start_thread([shared = queue_] { serve(*shared); }));
      } catch (const Error&) {
        if (threads_.empty()) throw;
        if (queue_->options().log) {
          queue_->options().log("the system gave " + std::to_string(threads_.size()) + " of " +
                                std::to_string(queue_->capacity()) +
                                " threads for reading; reads will be slower");
        }
        break;
      }
    }
  }
  const char* name() const noexcept override { return "pread"; }
};

}  // namespace

std::unique_ptr<Reader> make_pread_reader(const std::vector<std::filesystem::path>& files,
                                          const ReaderOptions& options) {
  return std::make_unique<PreadReader>(std::make_shared<RequestQueue>(files, options));
}

}  // namespace dsfp4::storage
