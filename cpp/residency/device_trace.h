// A device's part of a timeline: when its copies and ops ran, as spans on the host's clock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/trace.h"
#include "ops/device.h"
#include "residency/policy.h"

namespace dsfp4::residency {

/// Ops are spans of Track::kDevice, copies of weights of Track::kCopies; each begins when its queue
/// has come to it, and is written some time after its end. Nobody waits for a span: one for which
/// no event is free is left out, which is said at the end. Used by one thread at a time, not while
/// a segment is recorded. What the device throws comes out of all calls but the destructor; spans
/// under way are given up then.
class DeviceTrace {
 public:
  /// How keys are named.
  struct Experts {
    std::int64_t first_layer = 0;  // the model's number of the first MoE layer
    std::int64_t per_layer = 1;
  };
  /// Spans of a queue that may be under way.
  static constexpr std::size_t kSpans = 512;

  /// None where there is no trace, or no device but the processor.
  static std::unique_ptr<DeviceTrace> make(Trace* trace, ops::Device& device,
                                           const Experts& experts);
  /// The trace and the device must outlive this.
  DeviceTrace(Trace& trace, ops::Device& device, const Experts& experts,
              std::size_t spans = kSpans);
  /// Writes what has ended. Best after the device has been waited for.
  ~DeviceTrace();
  DeviceTrace(const DeviceTrace&) = delete;
  DeviceTrace& operator=(const DeviceTrace&) = delete;

  /// Around the calls that queue ops in kCompute, or copies of weights in kUpload. A begin() whose
  /// end() did not come is forgotten at the next one.
  void begin_ops() { begin(ops_); }
  void end_ops(std::string name) { end(ops_, std::move(name), 0); }
  void begin_copy() { begin(copies_); }
  void end_copy(std::string name, std::uint64_t bytes) { end(copies_, std::move(name), bytes); }
  void end_copy(ExpertKey key, std::uint64_t bytes);

  /// Writes the spans that have ended. The others call it, too.
  void poll();

 private:
  struct Span {
    ops::Event begin, end;
    std::string name;
    std::uint64_t bytes = 0;
  };
  /// Of one queue: a ring, in the order of their ends.
  struct Line {
    ops::Queue queue;
    Trace::Track track;
    std::vector<Span> ring;
    std::size_t first = 0;
    std::size_t under_way = 0;
    bool begun = false;               // the one behind those
    Trace::Clock::time_point last{};  // end of the last that was written
  };

  Line make_line(ops::Queue queue, Trace::Track track, std::size_t spans);
  void begin(Line& line);
  void end(Line& line, std::string name, std::uint64_t bytes);
  void write_ended(Line& line);

  Trace& trace_;
  ops::Device& device_;
  const Experts experts_;
  Line ops_, copies_;
  std::uint64_t left_out_ = 0;
};

}  // namespace dsfp4::residency
