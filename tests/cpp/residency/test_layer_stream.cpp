#include <algorithm>
#include <atomic>
#include <cerrno>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "ops/device.h"
#include "residency/layer_stream.h"
#include "storage/faults.h"
#include "storage/reader_fixture.h"

namespace dsfp4::residency {
namespace {

constexpr std::size_t kLayerBytes = 30'000;
constexpr std::size_t kFirstByte = 77;
constexpr std::int64_t kLayers[] = {1, 3, 4, 8};

class LayerStreamTest : public storage::ReaderTest {
 protected:
  LayerStreamTest() : views_(std::size(kLayers)), path_(files_.write("weights", 200'000, 1)) {}

  LayerStream& make(std::size_t buffers, LayerStream::Check check = {}, Trace* trace = nullptr) {
    storage::ReaderOptions reading = options();
    if (stalls_) {
      reading.system = &*stalls_;
      reading.depth = 64;
    }
    reader_ = storage::make_reader({path_}, reading);
    std::vector<StreamedLayer> layers;
    for (std::size_t i = 0; i < std::size(kLayers); ++i) {
      StreamedLayer layer;
      layer.layer = kLayers[i];
      const std::uint64_t offset = kFirstByte + i * kLayerBytes;
      layer.from.files.parts = {{0, offset, kLayerBytes, offset % storage::kBlockBytes}};
      layer.from.files.slot_bytes = memory::PhasedLayout::most(kLayerBytes);
      layer.from.matrices = {
          {nullptr, &views_[i], {offset % storage::kBlockBytes, MatrixPlace::kNone}}};
      layers.push_back(layer);
    }
    stream_ = std::make_unique<LayerStream>(std::move(layers), buffers, *reader_, std::move(check),
                                            trace);
    return *stream_;
  }
  ~LayerStreamTest() override {
    stream_.reset();
    reader_.reset();
    if (stalls_) stalls_->wait_for_threads();
  }

  // Enters the layer and says whether its weights are there.
  bool is_right(std::int64_t layer) {
    LayerStream::Use use(stream_.get(), layer);
    while (!use.enter()) {
    }
    const auto i = static_cast<std::size_t>(std::ranges::find(kLayers, layer) - kLayers);
    return storage::ReaderFiles::same(ops::host_device().on_host(views_[i].data), kLayerBytes,
                                      kFirstByte + i * kLayerBytes, 1);
  }
  bool step() {
    bool right = true;
    for (std::int64_t layer = 0; layer < 10; ++layer) {
      if (std::ranges::find(kLayers, layer) == std::end(kLayers)) {
        LayerStream::Use use(stream_.get(), layer);  // not a streamed one
        EXPECT_TRUE(use.enter());
      } else {
        right = is_right(layer) && right;
      }
    }
    return right;
  }

  std::atomic<bool> broken_ = false;  // layer 4; asked as long as something is read ahead
  std::optional<storage::FaultAt> stalls_;
  std::unique_ptr<storage::Reader> reader_;
  std::vector<ops::WeightView> views_;
  std::filesystem::path path_;
  std::unique_ptr<LayerStream> stream_;
};

TEST_P(LayerStreamTest, EachLayerIsReadOnceAStepIntoFewBuffers) {
  for (const std::size_t buffers : {2u, 3u, 4u, 9u}) {
    LayerStream& stream = make(buffers);
    for (int i = 0; i < 5; ++i) EXPECT_TRUE(step()) << buffers;
    EXPECT_EQ(stream.stats().bytes, 5 * std::size(kLayers) * kLayerBytes);
    stream_.reset();  // what was read ahead is given up
    EXPECT_LE(reader_->stats().bytes_useful, (5 * std::size(kLayers) + buffers) * kLayerBytes);
  }
}

TEST_P(LayerStreamTest, ABrokenStepIsFollowedByAWholeOne) {
  LayerStream& stream = make(3);
  EXPECT_TRUE(is_right(1));
  EXPECT_TRUE(is_right(3));
  EXPECT_TRUE(step());
  EXPECT_THROW(
      {
        LayerStream::Use use(&stream, 1);
        while (!use.enter()) {
        }
        throw Error("within the layer");
      },
      Error);
  EXPECT_TRUE(step());
}

TEST_P(LayerStreamTest, AFailedReadNamesTheLayerAndTheNextStepIsWhole) {
  system_.before = [&](storage::ReadCall& call) -> std::optional<int> {
    const std::uint64_t bad = kFirstByte + 2 * kLayerBytes + 9000;  // of layer 4
    const bool covers = call.offset <= bad && bad < call.offset + call.bytes;
    return broken_ && covers ? std::optional(-EIO) : std::nullopt;
  };
  make(2);
  EXPECT_TRUE(step());
  broken_ = true;
  EXPECT_TRUE(is_right(1));
  EXPECT_TRUE(is_right(3));
  try {
    // The layer may have been read ahead before it broke: then the next step meets it.
    for (int i = 0; i < 2; ++i) step();
    FAIL();
  } catch (const IoError& error) {
    EXPECT_NE(std::string(error.what()).find("layer 4"), std::string::npos) << error.what();
    EXPECT_EQ(error.error_number(), EIO);
    EXPECT_EQ(error.file(), path_.string());
  }
  broken_ = false;
  EXPECT_TRUE(step());
  EXPECT_TRUE(step());
}

TEST_P(LayerStreamTest, ReadsThatAreNeverAnsweredHoldTheirBuffersAndAreNamed) {
  if (GetParam() == storage::ReaderKind::kUring)
    GTEST_SKIP() << "io_uring takes a read of a pipe back";
  stalls_.emplace(storage::Fault::kStallForever, 0, path_.string(), 1000);
  make(2);
  std::string problem;
  for (int i = 0; i < 3; ++i) {  // the second may have found a buffer whose read had not begun
    try {
      is_right(1);
      FAIL();
    } catch (const IoError& error) {
      problem = error.what();
      EXPECT_EQ(error.error_number(), ETIMEDOUT);
      EXPECT_EQ(error.file(), path_.string());
      EXPECT_GE(error.offset(), 0);
    }
  }
  EXPECT_NE(problem.find("layer 1 has no buffer"), std::string::npos) << problem;
  stalls_->hang_up();
  const auto step_at_last = [&] {
    for (;;) {
      try {
        return step();
      } catch (const IoError&) {
        std::this_thread::yield();
      }
    }
  };
  EXPECT_TRUE(step_at_last());
}

TEST_P(LayerStreamTest, AWaitCanBeLeftAndTheStreamGoesWithoutIt) {
  if (GetParam() == storage::ReaderKind::kUring) GTEST_SKIP() << "its reads cannot be held up";
  std::atomic<bool> held = true;
  system_.before = [&](storage::ReadCall&) -> std::optional<int> {
    held.wait(true);
    return std::nullopt;
  };
  LayerStream& stream = make(2);
  for (int i = 0; i < 2; ++i) {
    LayerStream::Use use(&stream, 1);
    EXPECT_FALSE(use.enter());
    EXPECT_FALSE(use.enter());
  }
  stream_.reset();  // the reads are not over
  EXPECT_GT(reader_->stats().in_flight, 0u);
  held = false;
  held.notify_all();
  reader_.reset();
}

// As steps that take turns do: neither takes the other's layer away, nor needs it to go on.
TEST_P(LayerStreamTest, ALayerThatIsWaitedForIsNotGivenUpForAnother) {
  if (GetParam() == storage::ReaderKind::kUring) GTEST_SKIP() << "its reads cannot be held up";
  std::atomic<bool> held = true;
  std::atomic<int> reads_of_the_first = 0;
  system_.before = [&](storage::ReadCall& call) -> std::optional<int> {
    if (call.offset <= kFirstByte && kFirstByte < call.offset + call.bytes) ++reads_of_the_first;
    held.wait(true);
    return std::nullopt;
  };
  LayerStream& stream = make(2);
  {
    LayerStream::Use first(&stream, 1);
    LayerStream::Use second(&stream, 4);
    EXPECT_FALSE(first.enter());
    EXPECT_FALSE(second.enter());
    held = false;
    held.notify_all();
    while (!first.enter()) {
    }
    EXPECT_EQ(reads_of_the_first, 1);
  }
  held = true;
  {
    LayerStream::Use waiting(&stream, 8);
    EXPECT_FALSE(waiting.enter());
    held = false;
    held.notify_all();
    EXPECT_TRUE(step());
  }
  stream_.reset();
  reader_.reset();
}

TEST_P(LayerStreamTest, WhatTheCheckRefusesIsReadAgain) {
  int refusals = 1;
  make(2, [&](const StreamedLayer& layer, const std::byte*) {
    if (layer.layer == 3 && refusals-- > 0) throw CheckpointError("file", "tensor", 1, "is wrong");
  });
  EXPECT_TRUE(is_right(1));
  EXPECT_THROW(is_right(3), CheckpointError);
  EXPECT_TRUE(is_right(3));
  EXPECT_TRUE(step());
}

INSTANTIATE_TEST_SUITE_P(Kinds, LayerStreamTest,
                         testing::Values(storage::ReaderKind::kUring, storage::ReaderKind::kPread),
                         storage::kind_name);

}  // namespace
}  // namespace dsfp4::residency
