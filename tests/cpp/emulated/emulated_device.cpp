#include "emulated/emulated_device.h"

#include <cstring>
#include <utility>
#include <vector>

#include "dsfp4/error.h"
#include "ops/raw.h"

namespace dsfp4::ops::testing {
namespace {

// True where this is the one that a count running down was set for.
bool is_due(std::int64_t& count) { return count > 0 && --count == 0; }

constexpr Queue kAllQueues[] = {Queue::kCompute, Queue::kUpload, Queue::kDownload};

}  // namespace

// ---- markers

void EmulatedDevice::Marker::pass() {
  const std::lock_guard lock(mutex_);
  passed_ = true;
  passed_at_ = Clock::now();
  changed_.notify_all();
}

Device::Clock::time_point EmulatedDevice::Marker::passed_at() {
  const std::lock_guard lock(mutex_);
  if (!passed_) throw std::logic_error("time_of() an event that has not passed");
  return passed_at_;
}

bool EmulatedDevice::Marker::passed() {
  const std::lock_guard lock(mutex_);
  return passed_;
}

void EmulatedDevice::Marker::wait() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return passed_; });
}

// ---- queues

EmulatedDevice::EmulatedDevice(const EmulatedOptions& options)
    : memory_(options.memory_limit),
      staging_(options.staging_limit, options.pinned_limit),
      copy_bytes_per_second_(options.copy_bytes_per_second) {
  for (Line& line : lines_) line.worker = std::thread([this, &line] { work(line); });
}

EmulatedDevice::~EmulatedDevice() {
  for (Line& line : lines_) {
    const std::lock_guard lock(line.mutex);
    line.held = false;
    line.ends = true;
    line.changed.notify_all();
  }
  for (Line& line : lines_) line.worker.join();
}

void EmulatedDevice::work(Line& line) {
  for (;;) {
    Item item;
    {
      std::unique_lock lock(line.mutex);
      line.changed.wait(lock, [&] { return !line.held && (line.ends || !line.items.empty()); });
      if (line.items.empty()) return;
      item = std::move(line.items.front());
      line.items.pop_front();
    }
    if (item.always || !failed_.load()) item.run();
  }
}

void EmulatedDevice::push(Line& line, Item item) {
  const std::lock_guard lock(line.mutex);
  line.items.push_back(std::move(item));
  line.changed.notify_all();
}

std::shared_ptr<EmulatedDevice::Marker> EmulatedDevice::mark(Queue queue) {
  auto marker = std::make_shared<Marker>();
  push(line(queue), {[marker] { marker->pass(); }, true});
  return marker;
}

void EmulatedDevice::push_op(const char* name, Work work) {
  Line& compute = line(Queue::kCompute);
  const std::lock_guard lock(compute.mutex);
  const bool fails = is_due(compute.op_fails_in);
  compute.items.push_back({[this, name, fails, work = std::move(work)] {
    if (fails) return fail(true, std::string(name) + " failed, as ordered");
    try {
      work(EmulatedMemory::Access(memory_));
      ops_.fetch_add(1);
    } catch (const std::exception& error) {
      fail(false, std::string(name) + ": " + error.what());
    }
  }});
  compute.changed.notify_all();
}

void EmulatedDevice::push_copy(Queue queue, const char* name, std::size_t bytes, Work copy) {
  refuse_in_recording(name, queue);
  Line& to = line(queue);
  const std::lock_guard lock(to.mutex);
  const bool fails = is_due(to.copy_fails_in);
  std::chrono::duration<double> time = to.all_late;
  if (is_due(to.copy_is_late_in)) time += to.late;
  if (queue != Queue::kCompute && copy_bytes_per_second_ > 0.0) {
    time += std::chrono::duration<double>(static_cast<double>(bytes) / copy_bytes_per_second_);
  }
  to.items.push_back({[this, &to, name, bytes, fails, time, copy = std::move(copy)] {
    if (time.count() > 0.0) std::this_thread::sleep_for(time);
    if (fails) return fail(true, std::string(name) + " failed, as ordered");
    try {
      copy(EmulatedMemory::Access(memory_));
      to.copies.fetch_add(1);
      to.copied_bytes.fetch_add(static_cast<std::int64_t>(bytes));
    } catch (const std::exception& error) {
      fail(false, std::string(name) + ": " + error.what());
    }
  }});
  to.changed.notify_all();
}

// ---- copies

void EmulatedDevice::push_staged(Queue queue, const char* name, const void* staged,
                                 std::size_t bytes, Work copy) {
  bool pinned = false;
  {
    const EmulatedStaging::Access staging(staging_);
    staging.require(staged, bytes);
    pinned = staging.pinned(staged, bytes);
  }
  push_copy(queue, name, bytes, [=, this, copy = std::move(copy)](const auto& memory) {
    const EmulatedStaging::Access staging(staging_);
    staging.require(staged, bytes);
    copy(memory);
  });
  if (pinned) return;
  unpinned_.fetch_add(1);
  mark(queue)->wait();
}

void EmulatedDevice::upload(const void* from, DevicePtr<void> to, std::size_t bytes) {
  const auto* first = static_cast<const std::byte*>(from);
  auto kept = std::make_shared<const std::vector<std::byte>>(first, first + bytes);
  push_copy(Queue::kCompute, "upload", bytes, [=](const EmulatedMemory::Access& memory) {
    if (bytes > 0) std::memcpy(memory.bytes(unwrap(to), bytes), kept->data(), bytes);
  });
}

void EmulatedDevice::download(DevicePtr<const void> from, void* to, std::size_t bytes) {
  push_copy(Queue::kCompute, "download", bytes, [=](const EmulatedMemory::Access& memory) {
    if (bytes > 0) std::memcpy(to, memory.bytes(unwrap(from), bytes), bytes);
  });
  wait_for_ops("download()");
}

void EmulatedDevice::copy_in(Queue queue, const void* staged, DevicePtr<void> to,
                             std::size_t bytes) {
  push_staged(queue, "copy_in", staged, bytes, [=](const EmulatedMemory::Access& memory) {
    if (bytes > 0) std::memcpy(memory.bytes(unwrap(to), bytes), staged, bytes);
  });
}

void EmulatedDevice::copy_out(Queue queue, DevicePtr<const void> from, void* staged,
                              std::size_t bytes) {
  push_staged(queue, "copy_out", staged, bytes, [=](const EmulatedMemory::Access& memory) {
    if (bytes > 0) std::memcpy(staged, memory.bytes(unwrap(from), bytes), bytes);
  });
}

// ---- events

Event EmulatedDevice::make_event() {
  const std::lock_guard lock(events_mutex_);
  void* handle = reinterpret_cast<void*>(next_event_++);
  events_.emplace(handle, nullptr);
  return Event(*this, handle);
}

Event EmulatedDevice::make_timed_event() {
  Event event = make_event();
  const std::lock_guard lock(events_mutex_);
  timed_events_.insert(event.handle());
  return event;
}

Device::Clock::time_point EmulatedDevice::time_of(const Event& event) {
  refuse_in_recording("time_of()");
  const std::shared_ptr<Marker> marker = marker_of(event);
  if (marker == nullptr) throw std::logic_error("time_of() an event that was never recorded");
  {
    const std::lock_guard lock(events_mutex_);
    if (!timed_events_.contains(event.handle())) throw std::logic_error("the event is not timed");
  }
  return marker->passed_at();
}

void EmulatedDevice::free_event(void* handle) noexcept {
  const std::lock_guard lock(events_mutex_);
  timed_events_.erase(handle);
  events_.erase(handle);
}

std::shared_ptr<EmulatedDevice::Marker> EmulatedDevice::marker_of(const Event& event) {
  if (event.handle() == nullptr) return nullptr;
  const std::lock_guard lock(events_mutex_);
  const auto found = events_.find(event.handle());
  if (found == events_.end()) throw std::logic_error("an event of another device");
  return found->second;
}

void EmulatedDevice::record(Queue queue, const Event& event) {
  refuse_in_recording("record()", queue);
  const std::lock_guard lock(events_mutex_);
  const auto found = events_.find(event.handle());
  if (found == events_.end()) throw std::logic_error("record() of an event that was not made here");
  found->second = mark(queue);
}

void EmulatedDevice::wait(Queue queue, const Event& event) {
  refuse_in_recording("wait()", queue);
  const std::shared_ptr<Marker> marker = marker_of(event);
  if (marker != nullptr) push(line(queue), {[marker] { marker->wait(); }, true});
}

bool EmulatedDevice::passed(const Event& event) {
  const std::shared_ptr<Marker> marker = marker_of(event);
  const bool passed = marker == nullptr || marker->passed();
  throw_error();
  return passed;
}

void EmulatedDevice::wait_for(const Event& event) {
  refuse_in_recording("wait_for()");
  host_waits_.fetch_add(1);
  const std::shared_ptr<Marker> marker = marker_of(event);
  if (marker != nullptr) marker->wait();
  throw_error();
}

void EmulatedDevice::wait_for_ops(const char* what) {
  refuse_in_recording(what);
  host_waits_.fetch_add(1);
  mark(Queue::kCompute)->wait();
  throw_error();
}

void EmulatedDevice::synchronize() {
  refuse_in_recording("synchronize()");
  host_waits_.fetch_add(1);
  for (const Queue queue : kAllQueues) mark(queue)->wait();
  throw_error();
}

// ---- errors

void EmulatedDevice::fail(bool ordered, const std::string& problem) {
  const std::lock_guard lock(error_mutex_);
  if (failed_.load()) return;
  ordered_ = ordered;
  problem_ = problem;
  failed_.store(true);
}

void EmulatedDevice::throw_error() const {
  if (!failed_.load()) return;
  const std::lock_guard lock(error_mutex_);
  if (ordered_) throw CudaError("emulated device: " + problem_);
  throw std::logic_error(problem_);
}

void EmulatedDevice::clear_error() {
  for (const Queue queue : kAllQueues) mark(queue)->wait();
  failed_.store(false);
}

// ---- what tests order

void EmulatedDevice::hold(Queue queue) {
  const std::lock_guard lock(line(queue).mutex);
  line(queue).held = true;
}

void EmulatedDevice::let_go(Queue queue) {
  const std::lock_guard lock(line(queue).mutex);
  line(queue).held = false;
  line(queue).changed.notify_all();
}

void EmulatedDevice::run_empty() noexcept {
  for (const Queue queue : kAllQueues) let_go(queue);
  for (const Queue queue : kAllQueues) mark(queue)->wait();
}

void EmulatedDevice::delay_copies(Queue queue, std::chrono::milliseconds delay) {
  const std::lock_guard lock(line(queue).mutex);
  line(queue).all_late = delay;
}

void EmulatedDevice::delay_copy(Queue queue, std::int64_t n, std::chrono::milliseconds delay) {
  const std::lock_guard lock(line(queue).mutex);
  line(queue).copy_is_late_in = n;
  line(queue).late = delay;
}

void EmulatedDevice::fail_copy(Queue queue, std::int64_t n) {
  const std::lock_guard lock(line(queue).mutex);
  line(queue).copy_fails_in = n;
}

void EmulatedDevice::fail_op(std::int64_t n) {
  const std::lock_guard lock(line(Queue::kCompute).mutex);
  line(Queue::kCompute).op_fails_in = n;
}

EmulatedCounts EmulatedDevice::counts() const {
  EmulatedCounts counts;
  {
    const std::lock_guard lock(events_mutex_);
    counts.timed_events = static_cast<std::int64_t>(timed_events_.size());
  }
  counts.ops = ops_.load();
  for (std::size_t i = 0; i < kQueues; ++i) {
    counts.copies[i] = lines_[i].copies.load();
    counts.copied_bytes[i] = lines_[i].copied_bytes.load();
  }
  counts.bodies = bodies_.load();
  counts.replayed = replayed_.load();
  counts.host_waits = host_waits_.load();
  counts.unpinned = unpinned_.load();
  return counts;
}

// ---- recording

void EmulatedDevice::begin_recording() { recording_.store(std::this_thread::get_id()); }

void EmulatedDevice::end_recording() noexcept { recording_.store({}); }

void EmulatedDevice::refuse_in_recording(const char* what, std::optional<Queue> queue) const {
  const std::thread::id recording = recording_.load();
  if (recording == std::thread::id()) return;
  if (recording == std::this_thread::get_id() || queue == Queue::kCompute) {
    throw CudaError(std::string(what) + " while a segment is recorded");
  }
}

}  // namespace dsfp4::ops::testing
