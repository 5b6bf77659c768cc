// The dense weights of layers that do not fit into RAM: read again for every step, each layer while
// the ones before it are computed.
//
// A few buffers of the size of a layer go round. The layer that is entered is in one of them, the
// next ones are on their way into the others, and after the last layer comes the first again, for
// the next step. A layer that is waited for is a demand; reads ahead of it are behind every demand,
// so that they fill the time in which the disk would idle.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "base/counter.h"
#include "base/trace.h"
#include "format/weight.h"
#include "memory/slot_pool.h"
#include "residency/dense_layers.h"
#include "residency/file_image.h"
#include "storage/reader.h"

namespace dsfp4::residency {

/// The part of one layer that is read; the views point to it while the layer is entered.
struct StreamedLayer {
  std::int64_t layer = 0;  // the model's number
  FileGroup from;
};

struct LayerStreamStats {
  Counter<std::uint64_t> bytes;  // of layers that were entered
  Counter<double> wait_seconds;
};

/// Not safe to use from several threads at once, but for stats().
class LayerStream final : public DenseLayers {
 public:
  /// Called once a layer has been read and its views point to it; what it throws leaves enter().
  using Check = std::function<void(const StreamedLayer& layer, const std::byte* buffer)>;

  /// `layers`: ascending, at least one. `buffers` >= 2. Views and reader must outlive the stream;
  /// `trace` may be null. Throws MemoryLimitError. Reading begins at once.
  LayerStream(std::vector<StreamedLayer> layers, std::size_t buffers, storage::Reader& reader,
              Check check, Trace* trace);
  /// Cancels what is under way and waits for nothing: the reader keeps the buffers.
  ~LayerStream() override;

  /// Throws IoError that names the layer, and what Check throws.
  /// A layer that is waited for is not given up for another one until it has come, and is then left
  /// for the next few calls to whoever waits, so that steps that take turns all get on.
  bool enter(std::int64_t layer) override;
  void leave(std::int64_t layer) noexcept override;

  /// Between steps only. False: a layer's read begins when it is entered.
  void read_ahead(bool on) noexcept { ahead_ = on; }

  const LayerStreamStats& stats() const noexcept { return stats_; }
  std::size_t layers() const noexcept { return layers_.size(); }

 private:
  struct Reading {
    std::size_t index = 0;  // into layers_
    int buffer = -1;
    int kept_for = 0;  // so many calls for other layers, as somebody waits for it
    storage::ReadTicket ticket;
  };

  void begin_reads(std::size_t most);
  bool stays(Reading& other);
  bool wait_for(const Reading& reading);
  bool wait_for_buffer(std::int64_t layer);
  /// Cancels the first one's read. Its buffer is free at once or, with the system still, later.
  void drop_first() noexcept;

  std::vector<StreamedLayer> layers_;
  storage::Reader& reader_;
  Check check_;
  Trace* trace_;
  std::shared_ptr<memory::SlotPool> buffers_;
  std::deque<Reading> ring_;      // what is entered or comes next, in order
  std::vector<Reading> stalled_;  // dropped, but still with the system
  std::size_t next_ = 0;          // index of the layer to be read after those
  bool entered_ = false;          // the first of the ring is in use
  bool ahead_ = true;
  LayerStreamStats stats_;
};

}  // namespace dsfp4::residency
