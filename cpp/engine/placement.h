// Which bytes of a checkpoint's files become which weights, and where they go.
//
// In memory that the processor can touch, weights lie as in an expert's slot or a streamed layer's
// buffer: group by group, each in its files' order, so that direct reads land in place. In other
// memory each matrix begins at an arena's boundary. The plan may keep the embedding in RAM where
// the rest is in other memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "checkpoint/catalogue.h"
#include "checkpoint/layout.h"
#include "engine/weight_check.h"
#include "memory/arena.h"
#include "model/weights.h"
#include "ops/device.h"
#include "residency/device_layers.h"
#include "residency/file_image.h"
#include "residency/layer_stream.h"
#include "residency/plan.h"

namespace dsfp4::engine {

/// Bytes that there are to load, from the headers alone.
struct WeightSizes {
  std::size_t dense_bytes = 0;   // of an arena that holds everything but the routed experts
  std::size_t expert_bytes = 0;  // and of the routed experts in it
  /// Of dense_bytes, the embedding, and the same laid out as in the files; 0 if it is the head,
  /// too.
  std::size_t embedding_bytes = 0;
  std::size_t embedding_host_bytes = 0;
  std::size_t slot_bytes = 0;         // of one routed expert in an ExpertStore; 0 if there are none
  std::size_t device_slot_bytes = 0;  // of one with each matrix's data and scales in an arena
  std::size_t experts = 0;            // in all layers
  /// Of dense_bytes, what goes where a layer is streamed, and the size of a buffer for one.
  std::vector<std::uint64_t> layer_bytes;
  std::size_t layer_slot_bytes = 0;
  /// The formats that all this is of, and what else there is to choose from.
  residency::DenseFormats formats;
  std::vector<residency::ModelBytes::Converted> converted;
  std::uint64_t conversion = 0;   // RAM that converting takes; 0: nothing is ever converted
  std::uint64_t staging = 0;      // of the reader
  std::uint64_t load_buffer = 0;  // RAM that all pass through to memory that the host cannot touch
  ops::WidestWeights widest;
  std::vector<ops::ExpertView> layer_experts;  // of the last layer, without data
};

class Placement {
 public:
  /// Gives `weights` the layers and the shapes of `layout`. All must outlive the placement.
  Placement(const checkpoint::Catalogue& catalogue, const checkpoint::ModelLayout& layout,
            model::ModelWeights& weights);

  using WeightPlace = format::WeightViewOf<DevicePtr<std::byte>>;

  /// Matrices that go, and lie, together: an expert, what is streamed of a layer, or one alone.
  struct Group {
    residency::FileGroup from;
    std::int64_t layer = -1;  // the model's; -1: of none, or always in memory
    bool expert = false;
    bool finite = false;  // each value decides for a whole layer
    // Its destination is one of these.
    std::byte* slot = nullptr;         // in memory that the processor can touch, as in the files
    std::vector<WeightPlace> to = {};  // of each matrix, perhaps in another format
    bool staged = false;               // that is in RAM, and views point to a layer's buffer
  };

  /// All but `staging`, for memory that the host may touch or not, in the first of `formats`, of
  /// which there is at least one; of the others those that take less.
  WeightSizes sizes(bool host_visible, std::span<const residency::DenseFormats> formats,
                    int threads) const;
  /// Of the matrices that are no routed experts: their part, and what it takes in these formats.
  struct DenseShare {
    std::string_view role;   // as dense_role_name() says, or "embedding" or "router"
    std::int64_t layer = 0;  // where it may be streamed, else -1
    format::WeightFormat format = format::WeightFormat::kF32;
    std::uint64_t bytes = 0;
  };
  std::vector<DenseShare> dense_shares(const residency::DenseFormats& formats) const;
  /// Everything in the device's memory but experts, in these formats, and of each layer's group.
  residency::ModelBytes::Converted dense_in(const residency::DenseFormats& formats,
                                            bool as_in_files) const;
  /// Of the matrices, as they are stored; after take(), as they lie in memory.
  std::uint64_t weight_bytes() const noexcept { return weight_bytes_; }

  /// Of the device's memory, and of RAM: null unless the plan has the embedding there; and of
  /// staging memory, if layers are streamed from there.
  struct Arenas {
    std::shared_ptr<memory::Arena> device, host, staging;
  };
  /// Takes the memory of what the plan does not leave in the files, and points the weights there.
  Arenas take(const residency::Plan& plan, ops::Device& device);
  /// The groups that take() found a place for.
  const std::vector<const Group*>& loaded() const noexcept { return loaded_; }
  /// The bytes that loaded() reads.
  std::uint64_t loaded_bytes() const noexcept;

  /// Norms, biases and scales, which are converted: their bytes, and where they are read to.
  const std::vector<storage::Extent>& staged() const noexcept { return staged_; }
  std::vector<ReadTensor> staged_tensors() const;
  std::shared_ptr<void> staging() const noexcept { return staging_; }
  /// Once these are read and checked. Throws CheckpointError for a scale that is none.
  void convert_staged(ops::Device& device);

  /// Of one routed expert of the last layer as it is read; 0 if there are none.
  std::uint64_t expert_read_bytes() const noexcept;
  /// Experts and layers that stay in the files, for those who read them later.
  std::vector<residency::ExpertImage> images() const;
  std::vector<residency::StreamedLayer> streamed() const;
  /// Layers that take() has put into staging memory.
  const std::vector<residency::StagedLayer>& staged_layers() const noexcept { return layers_; }

 private:
  struct Vector {
    const checkpoint::TensorInfo* tensor;
    DeviceSpan<const float>* view;
    DevicePtr<float> values;
    std::size_t staged;
  };
  struct Scale {
    const checkpoint::TensorInfo* tensor;
    float* value;
    bool reciprocal;
    std::size_t staged;
  };

  void add_layer(std::int64_t number, const checkpoint::LayerSource& source,
                 model::LayerWeights& weights);
  /// A group of what is present of `matrices`; its views get their shapes and scales.
  Group& add(std::vector<residency::FileMatrix> matrices);
  void add(const checkpoint::TensorInfo* vector, DeviceSpan<const float>& view);
  void add(const checkpoint::TensorInfo* scalar, float& value, bool reciprocal = false);
  std::size_t read_later(const checkpoint::TensorInfo& tensor);
  const std::byte* bytes_at(std::size_t staged) const { return (*staging_)[staged].data(); }
  bool tied() const { return layout_.lm_head.data == layout_.embed_tokens.data; }
  bool is_embedding(const Group& group) const { return &group == &groups_.front(); }
  bool stays_in_files(const Group& group) const;
  bool is_streamed(const Group& group) const;
  static void take_slot(Group& group, memory::Arena& arena, memory::MemorySource& source);
  void take_matrices(Group& group, memory::Arena& arena);
  void take_staged_layers(Arenas& arenas, ops::Device& device);

  const checkpoint::Catalogue& catalogue_;
  const checkpoint::ModelLayout& layout_;
  model::ModelWeights& weights_;
  residency::Plan plan_;
  std::vector<Group> groups_;
  std::vector<const Group*> loaded_;
  std::vector<residency::StagedLayer> layers_;
  std::uint64_t weight_bytes_ = 0;
  std::vector<storage::Extent> staged_;
  std::vector<const checkpoint::TensorInfo*> staged_tensors_;  // as staged_
  using Staging = std::vector<std::vector<std::byte>>;
  std::shared_ptr<Staging> staging_ = std::make_shared<Staging>();
  std::vector<Vector> vectors_;
  std::vector<Scale> scales_;
};

}  // namespace dsfp4::engine
