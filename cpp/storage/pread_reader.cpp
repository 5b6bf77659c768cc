#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <exception>
#include <fcntl.h>
#include <mutex>
#include <string>
#include <sys/stat.h>
#include <system_error>
#include <thread>
#include <unistd.h>
#include <utility>

#include "dsfp4/error.h"
#include "storage/reader.h"

namespace dsfp4::storage {
namespace {

constexpr std::uint64_t kPieceBytes = std::uint64_t{4} << 20;
constexpr int kMaxRetries = 1000;  // of EAGAIN in a row
constexpr std::chrono::milliseconds kRetryDelay{1};

class File {
 public:
  explicit File(const std::filesystem::path& path)
      : path_(path.string()), descriptor_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (descriptor_ < 0) throw IoError(path_, -1, errno, "cannot be opened");
  }
  ~File() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }
  File(File&& other) noexcept
      : path_(std::move(other.path_)), descriptor_(std::exchange(other.descriptor_, -1)) {}
  File& operator=(File&&) = delete;

  /// Reads bytes [begin, begin + bytes) of `extent`.
  void read(const Extent& extent, std::uint64_t begin, std::uint64_t bytes) const {
    int retries = 0;
    const std::uint64_t end = begin + bytes;
    for (std::uint64_t at = begin; at < end;) {
      const auto offset = static_cast<std::int64_t>(extent.offset + at);
      const ssize_t got = ::pread(descriptor_, extent.destination + at, end - at, offset);
      if (got > 0) {
        at += static_cast<std::uint64_t>(got);
        retries = 0;
      } else if (got == 0) {
        throw truncated(extent);
      } else if (errno == EAGAIN && ++retries < kMaxRetries) {
        std::this_thread::sleep_for(kRetryDelay);
      } else if (errno != EINTR) {
        throw IoError(path_, offset, errno, "the read failed");
      }
    }
  }

 private:
  IoError truncated(const Extent& extent) const {
    struct stat status {};
    if (::fstat(descriptor_, &status) != 0) {
      return {path_, static_cast<std::int64_t>(extent.offset), errno, "its size cannot be read"};
    }
    return {path_, static_cast<std::int64_t>(extent.offset), 0,
            "truncated: the file has " + std::to_string(status.st_size) +
                " bytes, the extent needs bytes " + std::to_string(extent.offset) + " to " +
                std::to_string(extent.offset + extent.bytes)};
  }

  std::string path_;
  int descriptor_;
};

// One read(): the pieces that its threads take one by one.
class Work {
 public:
  Work(const std::vector<File>& files, std::span<const Extent> extents,
       const ReadProgress& progress)
      : files_(files), progress_(progress) {
    for (const Extent& extent : extents) {
      for (std::uint64_t at = 0; at < extent.bytes; at += kPieceBytes) {
        pieces_.push_back({&extent, at, std::min(kPieceBytes, extent.bytes - at)});
      }
    }
  }

  std::size_t pieces() const { return pieces_.size(); }

  // Reads until no piece is left or one has failed. Does not throw, as it is a thread's whole work.
  void run() noexcept {
    for (;;) {
      const std::size_t i = next_.fetch_add(1, std::memory_order_relaxed);
      if (i >= pieces_.size()) return;
      try {
        const Piece& piece = pieces_[i];
        files_[piece.extent->file].read(*piece.extent, piece.begin, piece.bytes);
        report(piece.bytes);
      } catch (...) {
        fail(std::current_exception());
      }
    }
  }

  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  struct Piece {
    const Extent* extent;
    std::uint64_t begin;  // from the start of the extent
    std::uint64_t bytes;
  };

  void report(std::uint64_t bytes) {
    const std::lock_guard lock(mutex_);
    done_ += bytes;
    if (progress_ && !error_) progress_(done_);
  }

  void fail(std::exception_ptr error) {
    const std::lock_guard lock(mutex_);
    if (!error_) error_ = std::move(error);
    next_.store(pieces_.size(), std::memory_order_relaxed);
  }

  const std::vector<File>& files_;
  const ReadProgress& progress_;
  std::vector<Piece> pieces_;
  std::atomic<std::size_t> next_{0};
  std::mutex mutex_;
  std::uint64_t done_ = 0;    // guarded by mutex_
  std::exception_ptr error_;  // guarded by mutex_
};

class PreadReader final : public Reader {
 public:
  PreadReader(const std::vector<std::filesystem::path>& files, int threads) : threads_(threads) {
    if (threads < 1) {
      throw ParameterError("threads", "must be at least 1, not " + std::to_string(threads));
    }
    files_.reserve(files.size());
    for (const auto& path : files) files_.emplace_back(path);
  }

  void read(std::span<const Extent> extents, const ReadProgress& progress) override {
    for (const Extent& extent : extents) {
      if (extent.file >= files_.size()) {
        throw ParameterError("extents", "file number " + std::to_string(extent.file) +
                                            " is not one of the " + std::to_string(files_.size()) +
                                            " files");
      }
    }
    Work work(files_, extents, progress);
    {
      std::vector<std::jthread> team;
      while (team.size() + 1 < std::min(static_cast<std::size_t>(threads_), work.pieces())) {
        try {
          team.emplace_back([&work] { work.run(); });
        } catch (const std::system_error&) {
          break;  // the system has no more threads: those there are read everything
        }
      }
      work.run();
    }
    work.rethrow();
  }

 private:
  std::vector<File> files_;
  int threads_;
};

}  // namespace

std::unique_ptr<Reader> make_pread_reader(const std::vector<std::filesystem::path>& files,
                                          int threads) {
  return std::make_unique<PreadReader>(files, threads);
}

}  // namespace dsfp4::storage
