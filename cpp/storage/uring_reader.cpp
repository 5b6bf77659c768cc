// Reads with io_uring: one thread that submits, and takes completions in batches.
#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <string>

#include "dsfp4/error.h"
#include "storage/engines.h"
#include "storage/queued_reader.h"
#include "storage/uring.h"

namespace dsfp4::storage {
namespace {

class UringLoop {
 public:
  // Made by the thread that runs it.
  UringLoop(RequestQueue& queue, const Wakeup& wakeup)
      : queue_(queue),
        ring_(static_cast<unsigned>(queue.capacity()) + 1, wakeup),
        jobs_(queue.capacity()) {
    const FileSet& files = queue.files();
    std::vector<int> descriptors;
    for (std::uint32_t i = 0; i < files.size(); ++i) {
      descriptors.push_back(files.descriptor(i, false));
      descriptors.push_back(files.descriptor(i, true));  // -1, a gap, where there is none
    }
    files_registered_ = ring_.register_files(descriptors);
    const Staging& staging = queue.staging();
    buffers_registered_ =
        ring_.register_buffers(staging.buffer(0), staging.buffer_bytes(), staging.count());
  }

  std::size_t buffers_registered() const noexcept { return buffers_registered_; }

  void run() noexcept {
    while (!queue_.is_shut_down() || in_ring_ > 0) {
      std::optional<System::Clock::time_point> next_due;
      while (Job* job = queue_.try_take(next_due)) submit(*job);
      std::optional<System::Clock::duration> most;
      if (next_due) {
        most = std::max<System::Clock::duration>(*next_due - queue_.system().now(),
                                                 std::chrono::microseconds(100));
      }
      ring_.wait(most);
      const bool woken = ring_.completions([this](std::uint64_t id, int result) {
        Job& job = queue_.job(id);
        --in_ring_;
        jobs_[id] = {};
        if (queue_.settle(job, result, true)) submit(job);
      });
      if (woken) cancel_given_up();
    }
  }

 private:
  struct InRing {
    bool active = false;
    bool cancelled = false;
  };

  void submit(Job& job) noexcept {
    for (;;) {
      const std::optional<int> given = queue_.prepare(job);
      if (!given) break;
      if (!queue_.settle(job, *given, false)) return;
    }
    const ReadCall& call = job.call;
    Uring::Read read{
        call.descriptor, false, -1, call.buffer, static_cast<std::uint32_t>(call.bytes),
        call.offset};
    const bool own = call.descriptor == queue_.files().descriptor(call.file, job.direct);
    if (own && files_registered_) {
      read.descriptor = static_cast<int>(call.file) * 2 + (job.direct ? 1 : 0);
      read.registered_file = true;
    }
    if (job.staging >= 0 && static_cast<std::size_t>(job.staging) < buffers_registered_) {
      read.registered_buffer = job.staging;
    }
    const std::size_t id = queue_.number(job);
    jobs_[id] = {true, false};
    ++in_ring_;
    ring_.read(id, read);
  }

  void cancel_given_up() noexcept {
    for (std::size_t id = 0; id < jobs_.size(); ++id) {
      if (!jobs_[id].active || jobs_[id].cancelled || !queue_.is_given_up(queue_.job(id))) continue;
      jobs_[id].cancelled = true;
      ring_.cancel(id);
    }
  }

  RequestQueue& queue_;
  Uring ring_;
  std::vector<InRing> jobs_;
  std::size_t in_ring_ = 0;
  bool files_registered_ = false;
  std::size_t buffers_registered_ = 0;
};

// How the loop's start went, told by its thread. Unlike a promise, it allocates nothing.
class Start {
 public:
  void succeed(std::size_t buffers) { tell(buffers, nullptr); }
  void fail(std::exception_ptr error) { tell(0, std::move(error)); }
  /// The buffers that are registered; rethrows what went wrong.
  std::size_t wait() {
    std::unique_lock lock(mutex_);
    told_.wait(lock, [this] { return known_; });
    if (error_) std::rethrow_exception(error_);
    return buffers_;
  }

 private:
  void tell(std::size_t buffers, std::exception_ptr error) {
    const std::lock_guard lock(mutex_);
    buffers_ = buffers;
    error_ = std::move(error);
    known_ = true;
    told_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable told_;
  bool known_ = false;
  std::size_t buffers_ = 0;
  std::exception_ptr error_;
};

class UringReader final : public QueuedReader {
 public:
  explicit UringReader(std::shared_ptr<RequestQueue> queue) : QueuedReader(std::move(queue)) {
    const int refused = queue_->system().allow_uring();
    if (refused < 0) throw uring_not_permitted(-refused);
    auto wakeup = std::make_shared<Wakeup>();
    queue_->on_wake([wakeup] { wakeup->notify(); });
    auto start = std::make_shared<Start>();
    threads_.reserve(1);
    threads_.push_back(queue_->start_thread([queue = queue_, wakeup, start] {
      std::unique_ptr<UringLoop> loop;
      try {
        loop = std::make_unique<UringLoop>(*queue, *wakeup);
      } catch (...) {
        start->fail(std::current_exception());
        return;
      }
      start->succeed(loop->buffers_registered());
      loop->run();
    }));
    say_registered(start->wait());  // if it throws, the base class joins the thread
  }
  const char* name() const noexcept override { return "io_uring"; }

 private:
  void say_registered(std::size_t buffers) const {
    const ReaderOptions& options = queue_->options();
    if (buffers == queue_->staging().count() || !options.log) return;
    options.log("the limit of locked memory (ulimit -l) lets " + std::to_string(buffers) + " of " +
                std::to_string(queue_->staging().count()) +
                " staging buffers be registered with io_uring; reads through the others cost the "
                "processor a little more");
  }
};

}  // namespace

std::unique_ptr<Reader> make_uring_reader(const std::vector<std::filesystem::path>& files,
                                          const ReaderOptions& options) {
  return std::make_unique<UringReader>(std::make_shared<RequestQueue>(files, options));
}

}  // namespace dsfp4::storage
