#include "residency/layer_stream.h"

#include <algorithm>
#include <cerrno>
#include <string>
#include <thread>
#include <utility>

#include "base/log.h"
#include "base/poll.h"
#include "dsfp4/error.h"

namespace dsfp4::residency {
namespace {

/// Calls for other layers that a layer outlasts once it has come: more than steps that take turns.
constexpr int kKeptFor = 16;
constexpr std::chrono::milliseconds kLookAgain{1};

std::size_t largest_slot(const std::vector<StreamedLayer>& layers) {
  std::size_t bytes = 0;
  for (const StreamedLayer& layer : layers) {
    bytes = std::max<std::size_t>(bytes, layer.from.files.slot_bytes);
  }
  return bytes;
}

}  // namespace

LayerStream::LayerStream(std::vector<StreamedLayer> layers, std::size_t buffers,
                         storage::Reader& reader, Check check, Trace* trace)
    : layers_(std::move(layers)),
      reader_(reader),
      check_(std::move(check)),
      trace_(trace),
      buffers_(std::make_shared<memory::SlotPool>(buffers, largest_slot(layers_),
                                                  "the buffers of streamed layers")) {
  stalled_.reserve(buffers);
  begin_reads(layers_.size());
}

LayerStream::~LayerStream() {
  while (!ring_.empty()) drop_first();
}

// Fills the free buffers with what comes next, until `most` layers are in the ring.
void LayerStream::begin_reads(std::size_t most) {
  std::erase_if(stalled_, [&](const Reading& reading) {
    if (!reading.ticket.quiet()) return false;
    buffers_->release(reading.buffer);
    return true;
  });
  while (buffers_->free_count() > 0 && ring_.size() < most) {
    Reading reading{next_, buffers_->acquire(), 0, {}};
    const StreamedLayer& layer = layers_[next_];
    try {
      storage::ReadRequest request;
      request.priority = storage::Priority::kSpeculative;
      request.owner = buffers_;
      request.extents = layer.from.files.extents(buffers_->data(reading.buffer));
      if (trace_ != nullptr) {
        request.on_complete = [trace = trace_, number = layer.layer,
                               bytes = layer.from.files.bytes(),
                               start = Trace::Clock::now()](const storage::ReadResult&) {
          trace->span(Trace::Track::kReads, "layer " + std::to_string(number), start,
                      Trace::Clock::now(), bytes);
        };
      }
      ring_.push_back(reading);
      ring_.back().ticket = reader_.submit(std::move(request));
    } catch (...) {
      if (!ring_.empty() && ring_.back().buffer == reading.buffer) ring_.pop_back();
      buffers_->release(reading.buffer);
      throw;
    }
    next_ = (next_ + 1) % layers_.size();
  }
}

void LayerStream::drop_first() noexcept {
  const Reading first = ring_.front();
  ring_.pop_front();
  entered_ = false;
  reader_.cancel(first.ticket);
  if (first.ticket.quiet()) {
    buffers_->release(first.buffer);
  } else {
    stalled_.push_back(first);
  }
}

bool LayerStream::enter(std::int64_t layer) {
  const auto found = std::ranges::find(layers_, layer, &StreamedLayer::layer);
  if (found == layers_.end()) return true;
  const auto index = static_cast<std::size_t>(found - layers_.begin());
  // After a step that was broken off, another layer comes next than was expected.
  while (!ring_.empty() && ring_.front().index != index) {
    if (stays(ring_.front())) return false;
    drop_first();
  }
  if (ring_.empty()) next_ = index;
  const std::size_t most = ahead_ ? layers_.size() : 1;
  for (begin_reads(most); ring_.empty(); begin_reads(most)) {
    if (!wait_for_buffer(layer)) return false;
  }
  try {
    ring_.front().kept_for = kKeptFor;
    if (entered_) return true;
    if (!wait_for(ring_.front())) return false;
    const std::byte* const buffer = buffers_->data(ring_.front().buffer);
    found->from.point(buffer);
    if (check_) check_(*found, buffer);
  } catch (...) {
    drop_first();
    throw;
  }
  entered_ = true;
  stats_.bytes += found->from.files.bytes();
  return true;
}

// True while another step's layer is still to be left alone; if it is being read, after a wait.
bool LayerStream::stays(Reading& other) {
  if (other.kept_for == 0) return false;
  if (reader_.wait_for(other.ticket, kPollPeriod)) --other.kept_for;
  return true;
}

// Waits until one of the reads that were dropped while the system had them lets go of its buffer,
// for kLookAgain at most.
bool LayerStream::wait_for_buffer(std::int64_t layer) {
  bool hopeless = true;
  for (const Reading& dropped : stalled_) {
    if (dropped.ticket.quiet()) return true;
    if (dropped.ticket.status() != storage::ReadStatus::kFailed) hopeless = false;
  }
  const storage::ReadTicket& one = stalled_.front().ticket;
  if (!hopeless) {
    if (reader_.wait_for(one, kLookAgain)) std::this_thread::sleep_for(kLookAgain);
    return false;
  }
  const storage::ReadResult end = reader_.wait(one);
  throw IoError(end.file, end.offset, ETIMEDOUT,
                "layer " + std::to_string(layer) +
                    " has no buffer: the disk does not answer this read, nor those into the "
                    "other buffers");
}

bool LayerStream::wait_for(const Reading& reading) {
  const auto start = Trace::Clock::now();
  reader_.promote(reading.ticket);
  const bool over = reader_.wait_for(reading.ticket, kPollPeriod);
  const auto end = Trace::Clock::now();
  stats_.wait_seconds += std::chrono::duration<double>(end - start).count();
  const std::string name = "layer " + std::to_string(layers_[reading.index].layer);
  if (trace_ != nullptr) trace_->span(Trace::Track::kWaits, name, start, end);
  if (!over) return false;
  const storage::ReadResult result = reader_.wait(reading.ticket);
  if (result.status == storage::ReadStatus::kDone) return true;
  throw IoError(result.file, result.offset, result.error_number, name + ": " + result.problem);
}

void LayerStream::leave(std::int64_t layer) noexcept {
  if (ring_.empty() || layers_[ring_.front().index].layer != layer) return;
  ring_.front().kept_for = 0;
  if (!entered_) return;
  drop_first();
  try {
    if (ahead_) begin_reads(layers_.size());
  } catch (const std::exception& error) {  // enter() tries again, and throws
    log(LogLevel::kInfo, error.what());
  }
}

}  // namespace dsfp4::residency
