#include "residency/device_trace.h"

#include <algorithm>
#include <exception>
#include <utility>

#include "base/log.h"

namespace dsfp4::residency {

std::unique_ptr<DeviceTrace> DeviceTrace::make(Trace* trace, ops::Device& device,
                                               const Experts& experts) {
  if (trace == nullptr || device.host_visible()) return nullptr;
  return std::make_unique<DeviceTrace>(*trace, device, experts);
}

DeviceTrace::DeviceTrace(Trace& trace, ops::Device& device, const Experts& experts,
                         std::size_t spans)
    : trace_(trace),
      device_(device),
      experts_(experts),
      ops_(make_line(ops::Queue::kCompute, Trace::Track::kDevice, spans)),
      copies_(make_line(ops::Queue::kUpload, Trace::Track::kCopies, spans)) {}

DeviceTrace::Line DeviceTrace::make_line(ops::Queue queue, Trace::Track track, std::size_t spans) {
  Line line{.queue = queue, .track = track, .ring = {}};
  line.ring.resize(spans);
  for (Span& span : line.ring) {
    span.begin = device_.make_timed_event();
    span.end = device_.make_timed_event();
  }
  return line;
}

DeviceTrace::~DeviceTrace() {
  try {
    poll();
  } catch (const std::exception& error) {  // the device has failed: its last spans are not known
    log(LogLevel::kInfo, error.what());
  }
  if (left_out_ == 0) return;
  log(LogLevel::kWarning, std::to_string(left_out_) +
                              " spans of the device are missing in the trace: too many were under "
                              "way at once");
}

void DeviceTrace::begin(Line& line) {
  line.begun = false;
  poll();
  if (line.under_way == line.ring.size()) {
    ++left_out_;
    return;
  }
  device_.record(line.queue, line.ring[(line.first + line.under_way) % line.ring.size()].begin);
  line.begun = true;
}

void DeviceTrace::end(Line& line, std::string name, std::uint64_t bytes) {
  if (!std::exchange(line.begun, false)) return;
  Span& span = line.ring[(line.first + line.under_way) % line.ring.size()];
  device_.record(line.queue, span.end);
  span.name = std::move(name);
  span.bytes = bytes;
  ++line.under_way;
}

void DeviceTrace::end_copy(ExpertKey key, std::uint64_t bytes) {
  const auto number = static_cast<std::int64_t>(key);
  end_copy("layer " + std::to_string(experts_.first_layer + number / experts_.per_layer) +
               " expert " + std::to_string(number % experts_.per_layer),
           bytes);
}

void DeviceTrace::poll() {
  try {
    write_ended(ops_);
    write_ended(copies_);
  } catch (...) {
    ops_.under_way = copies_.under_way = 0;
    throw;
  }
}

void DeviceTrace::write_ended(Line& line) {
  for (; line.under_way > 0; --line.under_way, line.first = (line.first + 1) % line.ring.size()) {
    const Span& span = line.ring[line.first];
    if (!device_.passed(span.end)) return;
    // Clocks are compared anew now and then: no span may begin before the last has ended.
    const auto start = std::max(line.last, device_.time_of(span.begin));
    line.last = std::max(start, device_.time_of(span.end));
    trace_.span(line.track, span.name, start, line.last, span.bytes);
  }
}

}  // namespace dsfp4::residency
