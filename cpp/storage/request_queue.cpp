#include "storage/request_queue.h"

#include <algorithm>
#include <limits>
#include <string>
#include <system_error>
#include <utility>

#include "dsfp4/error.h"

namespace dsfp4::storage {
namespace {

constexpr std::size_t kMaxStagingBuffers = 64;

std::size_t index(Priority priority) { return static_cast<std::size_t>(priority); }

ReaderOptions checked(const ReaderOptions& options) {
  if (options.depth < 1 || options.depth > 1024) {
    throw ParameterError("depth", "must be 1 to 1024, not " + std::to_string(options.depth));
  }
  if (options.piece_bytes == 0 || options.piece_bytes % kBlockBytes != 0 ||
      options.piece_bytes > std::uint64_t{1} << 30) {
    throw ParameterError("piece_bytes", "must be a multiple of " + std::to_string(kBlockBytes) +
                                            " up to 2^30, not " +
                                            std::to_string(options.piece_bytes));
  }
  if (options.bytes_per_second != 0 &&
      (options.bytes_per_second < kSlowestRate || options.bytes_per_second > kFastestRate)) {
    throw ParameterError("bytes_per_second", "must be 0 or 10^6 to 10^12, not " +
                                                 std::to_string(options.bytes_per_second));
  }
  return options;
}

std::size_t staging_buffers(const ReaderOptions& options) noexcept {
  return std::min(static_cast<std::size_t>(options.depth), kMaxStagingBuffers);
}

}  // namespace

std::uint64_t staging_bytes(const ReaderOptions& options) noexcept {
  return staging_buffers(options) * options.piece_bytes;
}

RequestQueue::RequestQueue(const std::vector<std::filesystem::path>& paths,
                           const ReaderOptions& options)
    : options_(checked(options)),
      system_(options.system != nullptr ? *options.system : System::real()),
      files_(paths, options, system_),
      staging_(staging_buffers(options), options.piece_bytes),
      jobs_(static_cast<std::size_t>(options.depth) * files_.lanes()),
      lanes_(files_.lanes()),
      pace_(options_.bytes_per_second) {
  free_jobs_.reserve(jobs_.size());
  retries_.reserve(jobs_.size());
  for (std::size_t i = jobs_.size(); i > 0; --i) free_jobs_.push_back(i - 1);
  watcher_ = start_thread([this] { watch(); });
  if (pace_.limits()) start_giving_back();
}

std::thread RequestQueue::start_thread(std::function<void()> body) {
  try {
    return system_.start(std::move(body));
  } catch (const std::system_error& error) {
    throw Error(std::string("the system starts no thread for reading (") + error.code().message() +
                "): end other programs, or raise the limit of processes (ulimit -u, or pids.max of "
                "the container)");
  }
}

RequestQueue::~RequestQueue() { shut_down(); }

void RequestQueue::check(const ReadRequest& request) const {
  constexpr auto kMost = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  for (const Extent& extent : request.extents) {
    if (extent.file >= files_.size()) {
      throw ParameterError("extents", "file number " + std::to_string(extent.file) +
                                          " is not one of the " + std::to_string(files_.size()) +
                                          " files");
    }
    if (extent.offset > kMost || extent.bytes > kMost - extent.offset) {
      throw ParameterError("extents", std::to_string(extent.bytes) + " bytes at " +
                                          std::to_string(extent.offset) + " end beyond 2^63 - 1");
    }
    if (extent.destination == nullptr && extent.bytes > 0) {
      throw ParameterError(
          "extents", "an extent of " + std::to_string(extent.bytes) + " bytes has no destination");
    }
  }
}

std::shared_ptr<RequestState> RequestQueue::submit(ReadRequest asked) {
  check(asked);
  auto request = std::make_shared<RequestState>();
  std::vector<bool> direct;
  direct.reserve(asked.extents.size());
  for (const Extent& extent : asked.extents) {
    direct.push_back(files_.direct(extent.file));
    request->files.push_back(extent.file);
  }
  std::ranges::sort(request->files);
  const auto repeated = std::ranges::unique(request->files);
  request->files.erase(repeated.begin(), repeated.end());

  Plan plan = plan_pieces(asked.extents, direct, options_.piece_bytes);
  std::vector<std::list<Line>> lines(lanes_.size());
  for (const Piece& piece : plan.pieces) {
    std::list<Line>& line = lines[files_.lane(piece.file)];
    if (line.empty()) line.push_back({request, {}, 0});
    line.front().pieces.push_back(piece);
  }
  request->pending = plan.pieces.size();
  request->fragments = std::move(plan.fragments);
  request->extents = std::move(asked.extents);
  request->on_complete = std::move(asked.on_complete);
  request->owner = std::move(asked.owner);
  request->priority = asked.priority;

  Lock lock(mutex_);  // from here on nothing throws
  if (request->priority == Priority::kDemand) ++open_demands_;
  for (std::size_t i = 0; i < lines.size(); ++i) {
    auto& queued = lanes_[i].lines[index(request->priority)];
    queued.splice(queued.end(), lines[i]);
  }
  if (request->pending == 0) {
    end_if_over(lock, request);
  } else {
    lock.unlock();
    wake();
  }
  return request;
}

void RequestQueue::promote(const std::shared_ptr<RequestState>& request) noexcept {
  {
    const Lock lock(mutex_);
    if (request->completing || request->priority == Priority::kDemand) return;
    request->priority = Priority::kDemand;
    ++open_demands_;
    for (Lane& lane : lanes_) {
      auto& from = lane.lines[index(Priority::kSpeculative)];
      auto& to = lane.lines[index(Priority::kDemand)];
      for (auto line = from.begin(); line != from.end();) {
        const auto next = std::next(line);
        if (line->request == request) to.splice(to.end(), from, line);
        line = next;
      }
    }
    for (Job& job : jobs_) {
      if (job.request != request || !job.speculative) continue;
      job.speculative = false;
      lanes_[job.lane].speculative_bytes -= job.piece.bytes;
    }
  }
  wake();
}

void RequestQueue::cancel(const std::shared_ptr<RequestState>& request) noexcept {
  {
    Lock lock(mutex_);
    if (request->completing || request->cancelled) return;
    request->cancelled = true;
    request->stopping.store(true);
    drop_pending(*request);
    end_if_over(lock, request);
  }
  wake();  // its retries are over too
}

ReadResult RequestQueue::wait(RequestState& request) {
  Lock lock(mutex_);
  finished_.wait(lock, [&] { return request.status.load() != ReadStatus::kPending; });
  return request.result;
}

bool RequestQueue::wait_for(RequestState& request, std::chrono::milliseconds most) {
  Lock lock(mutex_);
  return finished_.wait_for(lock, most,
                            [&] { return request.status.load() != ReadStatus::kPending; });
}

ReaderStats RequestQueue::stats() const {
  const Lock lock(mutex_);
  ReaderStats stats = stats_;
  if (stats.in_flight > 0) {
    stats.busy_seconds += std::chrono::duration<double>(system_.now() - busy_start_).count();
  }
  return stats;
}

// ---- ends ----

void RequestQueue::drop_pending(RequestState& request) noexcept {
  if (request.pending == 0) return;
  for (Lane& lane : lanes_) {
    lane.lines[index(request.priority)].remove_if(
        [&](const Line& line) { return line.request.get() == &request; });
  }
  request.pending = 0;
}

void RequestQueue::end_if_over(Lock& lock, const std::shared_ptr<RequestState>& request) noexcept {
  if (request->pending > 0 || request->in_flight > 0) return;
  if (request->completing) {
    if (request->status.load() != ReadStatus::kPending) become_quiet(lock, request);
    return;  // else the thread that completes it will see
  }
  if (request->result.status == ReadStatus::kFailed) {
    end(lock, request, ReadStatus::kFailed);
  } else if (request->cancelled) {
    end(lock, request, ReadStatus::kCancelled);
  } else {
    end(lock, request, ReadStatus::kDone);
  }
}

// The callback comes first: whoever has waited may destroy what it uses.
void RequestQueue::end(Lock& lock, const std::shared_ptr<RequestState>& request,
                       ReadStatus status) noexcept {
  request->completing = true;
  request->stopping.store(true);
  std::function<void(const ReadResult&)> on_complete = std::move(request->on_complete);
  request->on_complete = nullptr;
  lock.unlock();
  if (status == ReadStatus::kDone) {
    for (const std::uint32_t file : request->files) {
      if (files_.unchanged(file, request->result)) continue;
      status = ReadStatus::kFailed;
      break;
    }
  }
  request->result.status = status;
  if (on_complete) on_complete(request->result);
  on_complete = nullptr;
  lock.lock();
  request->status.store(status);
  bool demand_is_over = false;
  if (request->priority == Priority::kDemand) demand_is_over = --open_demands_ == 0;
  finished_.notify_all();
  give_.notify_one();
  if (demand_is_over) work_.notify_one();  // speculation may go on
  if (request->in_flight == 0) become_quiet(lock, request);
}

void RequestQueue::become_quiet(Lock& lock, const std::shared_ptr<RequestState>& request) noexcept {
  request->quiet.store(true);
  std::shared_ptr<void> owner = std::move(request->owner);
  finished_.notify_all();
  lock.unlock();
  owner.reset();
  lock.lock();
}

void RequestQueue::shut_down() noexcept {
  if (shut_down_.load()) return;
  std::vector<std::shared_ptr<RequestState>> none;
  Lock lock(mutex_);
  for (;;) {  // cancelling gives up the lock, so each time anew
    std::shared_ptr<RequestState> open;
    for (const Lane& lane : lanes_) {
      for (const auto& lines : lane.lines) {
        if (!lines.empty()) open = lines.front().request;
      }
    }
    for (const Job& job : jobs_) {
      if (job.request && !job.request->cancelled && !job.request->completing) open = job.request;
    }
    if (!open) break;
    lock.unlock();
    cancel(open);
    lock.lock();
  }
  leaving_ = true;
  leaving_since_ = system_.now();
  watch_.notify_all();
  finished_.wait(lock, [&] { return only_abandoned(); });
  shut_down_.store(true);
  work_.notify_all();
  watch_.notify_all();
  give_.notify_all();
  lock.unlock();
  if (wake_) wake_();
  watcher_.join();
  if (giver_.joinable()) giver_.join();
}

// ---- taking ----

void RequestQueue::wake() noexcept {
  work_.notify_one();  // whoever takes a job wakes the next
  give_.notify_one();
  if (wake_) wake_();
}

Job* RequestQueue::try_take(std::optional<System::Clock::time_point>& next_due) noexcept {
  Lock lock(mutex_);
  return take_locked(lock, next_due);
}

Job* RequestQueue::take() noexcept {
  Lock lock(mutex_);
  for (;;) {
    if (shut_down_.load()) return nullptr;
    std::optional<System::Clock::time_point> next_due;
    if (Job* job = take_locked(lock, next_due)) {
      work_.notify_one();
      return job;
    }
    if (next_due) {
      const auto due = std::chrono::ceil<std::chrono::milliseconds>(*next_due - system_.now());
      work_.wait_for(lock, std::max(due, std::chrono::milliseconds(1)));
    } else {
      work_.wait(lock);
    }
  }
}

Job* RequestQueue::take_locked(Lock& lock,
                               std::optional<System::Clock::time_point>& next_due) noexcept {
  next_due.reset();
  if (!retries_.empty()) {
    if (Job* job = take_retry(lock, system_.now(), open_demands_ > 0, next_due)) return job;
  }
  if (Job* job = take_from_lanes(Priority::kDemand)) return job;
  if (open_demands_ == 0) return take_from_lanes(Priority::kSpeculative);
  if (retries_.empty() || !only_speculation_in_flight()) return nullptr;
  return take_retry(lock, system_.now(), false, next_due);
}

// Retries of speculation, which wait for demand, may hold what demand waits for.
bool RequestQueue::only_speculation_in_flight() const noexcept {
  return std::ranges::all_of(
      jobs_, [](const Job& job) { return !job.request || job.speculative || job.given_up; });
}

Job* RequestQueue::take_from_lanes(Priority priority) noexcept {
  if (free_jobs_.empty()) return nullptr;
  for (std::size_t i = 0; i < lanes_.size(); ++i) {
    Lane& lane = lanes_[(next_lane_ + i) % lanes_.size()];
    if (Job* job = take_from(lane, priority)) {
      next_lane_ = (next_lane_ + i + 1) % lanes_.size();
      return job;
    }
  }
  return nullptr;
}

// With `hold`, those of speculation wait for demand like any other speculative read.
Job* RequestQueue::take_retry(Lock& lock, System::Clock::time_point now, bool hold,
                              std::optional<System::Clock::time_point>& next_due) noexcept {
  bool retired = false;
  for (std::size_t i = 0; i < retries_.size();) {
    Job& job = jobs_[retries_[i]];
    const bool over = job.request->stopping.load();
    const bool held = hold && job.speculative;
    if (!over && (held || job.due > now)) {
      if (!held && (!next_due || job.due < *next_due)) next_due = job.due;
      ++i;
      continue;
    }
    retries_[i] = retries_.back();
    retries_.pop_back();
    if (!over) {
      job.started.store(now.time_since_epoch().count());
      return &job;
    }
    retire(lock, job);
    i = 0;  // the lock was given up in between
    retired = true;
  }
  if (retired) next_due = now;  // and what came meanwhile has found nobody to wake
  return nullptr;
}

Job* RequestQueue::take_from(Lane& lane, Priority priority) noexcept {
  auto& lines = lane.lines[index(priority)];
  if (lines.empty() || lane.in_flight >= static_cast<std::size_t>(options_.depth)) return nullptr;
  Line& line = lines.front();
  const Piece& piece = line.pieces[line.next];
  if (priority == Priority::kSpeculative && lane.speculative_bytes > 0 &&
      lane.speculative_bytes + piece.bytes > options_.speculative_bytes) {
    return nullptr;
  }
  int staging = -1;
  if (piece.destination == nullptr) {
    staging = staging_.take();
    if (staging < 0) return nullptr;
  }
  Job& job = jobs_[free_jobs_.back()];
  free_jobs_.pop_back();
  start(job, lane, line, staging);
  if (line.next == line.pieces.size()) lines.pop_front();
  return &job;
}

void RequestQueue::start(Job& job, Lane& lane, Line& line, int staging) noexcept {
  const auto now = system_.now();
  job.request = line.request;
  job.piece = line.pieces[line.next++];
  job.buffer = staging >= 0 ? staging_.buffer(staging) : job.piece.destination;
  job.staging = staging;
  job.lane = static_cast<std::size_t>(&lane - lanes_.data());
  job.speculative = line.request->priority == Priority::kSpeculative;
  job.warned = false;
  job.given_up = false;
  job.begun = now;
  job.started.store(now.time_since_epoch().count());
  job.direct = files_.direct(job.piece.file);
  job.done = 0;
  job.attempts = 0;
  --job.request->pending;
  ++job.request->in_flight;
  ++lane.in_flight;
  if (job.speculative) {
    lane.speculative_bytes += job.piece.bytes;
    if (open_demands_ > 0) ++stats_.speculative_beside_demand;
    stats_.peak_speculative_in_flight_bytes =
        std::max(stats_.peak_speculative_in_flight_bytes, lane.speculative_bytes);
  }
  if (stats_.in_flight++ == 0) {
    busy_start_ = now;
    watch_.notify_one();
  }
  stats_.in_flight_bytes += job.piece.bytes;
}

void RequestQueue::retire(Lock& lock, Job& job) noexcept {
  const std::shared_ptr<RequestState> request = std::move(job.request);
  job.request = nullptr;
  job.started.store(0);
  if (job.staging >= 0) staging_.give_back(job.staging);
  Lane& lane = lanes_[job.lane];
  --lane.in_flight;
  if (job.speculative) lane.speculative_bytes -= job.piece.bytes;
  stats_.in_flight_bytes -= job.piece.bytes;
  if (--stats_.in_flight == 0) {
    stats_.busy_seconds += std::chrono::duration<double>(system_.now() - busy_start_).count();
  }
  free_jobs_.push_back(number(job));
  --request->in_flight;
  work_.notify_one();
  if (request->completing) finished_.notify_all();  // shut_down() looks at each such job
  end_if_over(lock, request);
}

}  // namespace dsfp4::storage
