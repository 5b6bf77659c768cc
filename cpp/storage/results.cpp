// What becomes of the result of a read: the second half of RequestQueue.
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "storage/request_queue.h"

namespace dsfp4::storage {
namespace {

constexpr int kMaxInterrupts = 1000;  // in a row
constexpr int kMaxAgain = 1000;       // EAGAIN in a row, a millisecond apart
constexpr int kMaxNoMemory = 100;     // ENOMEM in a row, a millisecond apart
constexpr int kMaxIoErrors = 3;       // EIO in a row
constexpr int kMaxShort = 8;          // short reads without progress in a row
constexpr std::chrono::milliseconds kRetryDelay{1};
constexpr std::uint32_t kBlockMask = static_cast<std::uint32_t>(kBlockBytes) - 1;

}  // namespace

std::optional<int> RequestQueue::prepare(Job& job) noexcept {
  const Piece& piece = job.piece;
  job.call = {piece.file, files_.descriptor(piece.file, job.direct), piece.offset + job.done,
              job.buffer + job.done, piece.bytes - job.done};
  return system_.before_read(job.call);
}

bool RequestQueue::settle(Job& job, int result, bool was_made) noexcept {
  if (was_made) result = system_.after_read(job.call, result);
  {
    const Lock lock(mutex_);
    ++stats_.reads;
    if (result > 0) stats_.bytes_read += static_cast<std::uint64_t>(result);
  }
  if (!job.request->stopping.load()) {
    const Next next = result > 0 ? advance(job, result) : retry(job, -result);
    if (next == Next::kRead) return true;
    if (next == Next::kLater) return false;
  }
  Lock lock(mutex_);
  if (result > 0) pace_.spend(job.begun, job.piece.bytes);
  retire(lock, job);
  return false;
}

// Bytes have come.
RequestQueue::Next RequestQueue::advance(Job& job, int result) noexcept {
  const Piece& piece = job.piece;
  const std::uint32_t arrived = job.done + static_cast<std::uint32_t>(result);
  if (arrived < piece.needed) {
    // A direct read goes on at a block's start, so part of a block is read again.
    const std::uint32_t done = job.direct ? arrived & ~kBlockMask : arrived;
    if (done == job.done) return came_short(job);
    job.done = done;
    job.attempts = 0;
    return Next::kRead;
  }
  copy_out(job);
  if (pace_.limits()) return hold(job);
  const Lock lock(mutex_);
  count_useful(job);
  return Next::kOver;
}

void RequestQueue::count_useful(const Job& job) noexcept {
  const std::uint64_t useful = job.piece.useful;
  job.request->bytes_done.fetch_add(useful);
  stats_.bytes_useful += useful;
  if (job.staging >= 0) stats_.bytes_copied += useful;
  if (job.speculative) stats_.bytes_speculative += useful;
}

void RequestQueue::copy_out(const Job& job) noexcept {
  if (job.staging < 0) return;
  const Piece& piece = job.piece;
  for (std::uint32_t i = 0; i < piece.fragments; ++i) {
    const Fragment& fragment = job.request->fragments[piece.first_fragment + i];
    std::memcpy(fragment.destination, job.buffer + (fragment.offset - piece.offset),
                fragment.bytes);
  }
}

// Nothing has come, with `error` (0: the end of the file).
RequestQueue::Next RequestQueue::retry(Job& job, int error) noexcept {
  const int attempt = ++job.attempts;
  switch (error) {
    case 0:
      --job.attempts;  // counted by came_short()
      return came_short(job);
    case EINTR:
      if (attempt <= kMaxInterrupts) return Next::kRead;
      break;
    case EAGAIN:
      if (attempt <= kMaxAgain) return wait_and_retry(job);
      break;
    case ENOMEM:
      if (attempt <= kMaxNoMemory) return wait_and_retry(job);
      break;
    case EIO:
      if (attempt <= kMaxIoErrors) return wait_and_retry(job);
      break;
    case EINVAL:
    case EOPNOTSUPP:
      if (!job.direct) break;
      files_.refuse_direct(job.piece.file);
      job.direct = false;
      job.done = 0;
      return Next::kRead;
    default:
      break;
  }
  return fail(job, error, "the read failed");
}

RequestQueue::Next RequestQueue::wait_and_retry(Job& job) noexcept {
  const Lock lock(mutex_);
  ++stats_.retries;
  job.due = system_.now() + kRetryDelay;
  job.started.store(0);
  job.warned = false;
  retries_.push_back(number(job));  // has room for all jobs
  work_.notify_one();
  return Next::kLater;
}

// The file ended, or the system gave less than a block: look which.
RequestQueue::Next RequestQueue::came_short(Job& job) noexcept {
  const Piece& piece = job.piece;
  std::uint64_t size = 0;
  if (!files_.size_now(piece.file, size)) {
    return fail(job, errno, "its size cannot be read");
  }
  if (size >= piece.offset + piece.needed) {
    if (++job.attempts <= kMaxShort) return Next::kRead;
    return fail(job, 0, "the read keeps coming short");
  }
  ReadResult result;
  try {
    for (const Extent& extent : job.request->extents) {
      if (extent.file != piece.file || extent.offset + extent.bytes <= size) continue;
      if (extent.bytes == 0) continue;
      result = files_.truncated(extent);
      break;
    }
  } catch (...) {  // NOLINT(bugprone-empty-catch): no memory for the words: the file must do
    result = {};
  }
  return fail(job, std::move(result));
}

RequestQueue::Next RequestQueue::fail(Job& job, int error, const char* problem) noexcept {
  ReadResult result;
  const std::uint64_t at = std::max(job.piece.offset + job.done, job.piece.first_needed);
  result.offset = static_cast<std::int64_t>(at);
  result.error_number = error;
  try {
    result.file = files_.path(job.piece.file);
    result.problem = problem;
  } catch (...) {  // NOLINT(bugprone-empty-catch): no memory for the words: the numbers must do
  }
  return fail(job, std::move(result));
}

RequestQueue::Next RequestQueue::fail(Job& job, ReadResult&& result) noexcept {
  const Lock lock(mutex_);
  RequestState& request = *job.request;
  if (request.completing || request.result.status == ReadStatus::kFailed) return Next::kOver;
  request.result = std::move(result);
  request.result.status = ReadStatus::kFailed;
  request.stopping.store(true);
  drop_pending(request);
  give_.notify_one();
  return Next::kOver;
}

}  // namespace dsfp4::storage
