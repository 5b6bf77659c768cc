#include "engine/loader.h"

#include <span>
#include <stdexcept>
#include <utility>

#include "checkpoint/catalogue.h"
#include "checkpoint/layout.h"
#include "engine/weight_convert.h"
#include "memory/arena.h"
#include "storage/reader.h"

namespace dsfp4::engine {
namespace {

using checkpoint::Catalogue;
using checkpoint::TensorInfo;
using memory::Arena;
using Groups = std::span<const Placement::Group* const>;

// Adds a group's reads into a slot, and what is to be checked there.
void add_group(const Placement::Group& group, std::byte* slot,
               std::vector<storage::Extent>& extents, std::vector<ReadTensor>& tensors) {
  const std::vector<storage::Extent> reads = group.from.files.extents(slot);
  extents.insert(extents.end(), reads.begin(), reads.end());
  for (const residency::FileMatrix& matrix : group.from.matrices) {
    const bool converted = matrix.view->format != matrix.source->format;
    add_tensors(*matrix.source, matrix.published_in(slot), group.finite || converted, tensors);
  }
}

// Brings a group from a slot of RAM to its places.
void upload_group(const Placement::Group& group, const std::byte* slot, ops::Device& device,
                  ThreadPool& pool, const Poll& poll) {
  auto to = group.to.begin();
  for (const residency::FileMatrix& matrix : group.from.matrices) {
    const format::WeightView from = matrix.published_in(slot);
    if (to->format != from.format) {
      matrix.view->global_scale = convert(from, *to, device, pool, poll);
    } else {
      device.upload(from.data, to->data, matrix.source->data->bytes);
      if (from.scales != nullptr) {
        device.upload(from.scales, to->scales, matrix.source->scales->bytes);
      }
    }
    ++to;
  }
}

// Reads what goes to memory that the host cannot touch, or is converted, by way of a buffer: some
// groups at a time, which are checked there.
template <typename Read>
void read_through_host(Groups groups, std::size_t buffer_bytes, ops::Device& device,
                       WeightCheck& check, ThreadPool& pool, const Poll& poll, const Read& read) {
  const auto buffer = std::make_shared<Arena>(buffer_bytes, "the weights on their way");
  while (!groups.empty()) {
    std::vector<storage::Extent> extents;
    std::vector<ReadTensor> tensors;
    std::vector<std::byte*> slots;
    buffer->release(0);
    for (const Placement::Group* group : groups) {
      const std::size_t bytes = group->from.files.slot_bytes;
      if (buffer->used() + bytes > buffer->size()) break;
      slots.push_back(memory::on_host(memory::host_memory(), buffer->take(bytes)));
      add_group(*group, slots.back(), extents, tensors);
    }
    if (slots.empty()) throw std::logic_error("the buffer of weights on their way is too small");
    read(extents, buffer);
    check.check(tensors, poll);
    for (std::size_t i = 0; i < slots.size(); ++i) {
      ops::Device& memory = groups[i]->staged ? ops::host_device() : device;
      upload_group(*groups[i], slots[i], memory, pool, poll);
    }
    groups = groups.subspan(slots.size());
  }
}

// FNV-1a over what the headers say: tells checkpoints apart, not bytes.
std::uint64_t fingerprint(const Catalogue& catalogue) {
  std::uint64_t hash = 0xcbf29ce484222325;
  const auto mix = [&](std::uint64_t value) {
    for (int i = 0; i < 8; ++i) hash = (hash ^ (value >> (8 * i) & 0xFF)) * 0x100000001b3;
  };
  for (const TensorInfo& tensor : catalogue.tensors()) {
    for (const char c : tensor.name) mix(static_cast<unsigned char>(c));
    mix(tensor.file);
    mix(tensor.offset);
    mix(tensor.bytes);
  }
  return hash;
}

}  // namespace

LoadedWeights load_weights(const std::filesystem::path& folder,
                           const checkpoint::ModelConfig& config, ops::Device& device,
                           const LoadWeightsOptions& options) {
  LoadedWeights loaded;
  loaded.check = std::make_unique<WeightCheck>(Catalogue::open(folder), options.threads);
  WeightCheck& check = *loaded.check;
  const Catalogue& catalogue = check.catalogue();
  loaded.layout =
      std::make_unique<checkpoint::ModelLayout>(checkpoint::resolve_layout(catalogue, config));
  storage::ReaderOptions reading = options.reader;
  reading.expected = catalogue.identities();
  loaded.reader = storage::make_reader(catalogue.files(), reading);

  Placement placement(catalogue, *loaded.layout, loaded.weights);
  loaded.sizes = placement.sizes(device.host_visible(), options.formats, options.threads);
  loaded.sizes.staging = loaded.reader->staging_bytes();
  residency::Plan plan;
  plan.formats = options.formats.front();
  if (options.plan) plan = options.plan(loaded.sizes);
  const Placement::Arenas arenas = placement.take(plan, device);
  loaded.weight_bytes = placement.weight_bytes();
  loaded.arena = arenas.device;
  loaded.host_arena = arenas.host;
  loaded.staging_arena = arenas.staging;
  loaded.staged = placement.staged_layers();

  std::uint64_t total = placement.loaded_bytes();
  for (const storage::Extent& extent : placement.staged()) total += extent.bytes;
  std::uint64_t before = 0;
  const auto read = [&](const std::vector<storage::Extent>& extents,
                        const std::shared_ptr<void>& owner) {
    loaded.reader->read(
        extents, owner,
        [&](std::uint64_t done) {
          if (options.progress) options.progress(before + done, total);
        },
        options.poll);
    for (const storage::Extent& extent : extents) before += extent.bytes;
  };
  std::vector<storage::Extent> extents = placement.staged();
  std::vector<ReadTensor> tensors;
  std::vector<const Placement::Group*> uploaded;
  for (const Placement::Group* group : placement.loaded()) {
    if (group->slot != nullptr) {
      add_group(*group, group->slot, extents, tensors);
    } else {
      uploaded.push_back(group);
    }
  }
  if (!uploaded.empty()) {
    ThreadPool pool(options.threads);
    read_through_host(uploaded, loaded.sizes.load_buffer, device, check, pool, options.poll, read);
  }
  using Owners = std::pair<Placement::Arenas, std::shared_ptr<void>>;
  read(extents, std::make_shared<Owners>(arenas, placement.staging()));
  check.check(tensors, options.poll);
  check.check(placement.staged_tensors());
  placement.convert_staged(device);

  loaded.images = placement.images();
  loaded.streamed = placement.streamed();
  if (loaded.images.empty() && loaded.streamed.empty()) {  // nobody reads later
    loaded.reader.reset();
    loaded.layout.reset();
    loaded.check.reset();
  } else {
    loaded.fingerprint = fingerprint(catalogue);
  }
  return loaded;
}

}  // namespace dsfp4::engine
