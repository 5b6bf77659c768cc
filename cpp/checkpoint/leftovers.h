// Tensors that no role took: known not to be needed, or an error. A scale, a rotation or a low-rank
// matrix that is passed over gives wrong answers and no sign of it.
#pragma once

#include <string>
#include <vector>

#include "checkpoint/catalogue.h"
#include "checkpoint/config.h"
#include "checkpoint/layout.h"
#include "checkpoint/shard_index.h"

namespace dsfp4::checkpoint {

/// Decoding needs none of these: MTP layers, scales of activations and of the KV cache, weight
/// scales beside a BF16 or F32 weight, rotary_emb.inv_freq, vision parts, adapters in files of
/// their own. Throws UnsupportedError that names any other tensor that `layout` does not use, and
/// CheckpointError for one of a layer beyond num_hidden_layers that is no MTP layer, or that lies
/// in a shard that is not there.
void check_leftovers(const Catalogue& catalogue, const ModelConfig& config,
                     const ModelLayout& layout);

/// The shards, sorted, that hold a tensor which decoding may need, by the names in the index alone:
/// it tells what to download before any shard is there. A shard of nothing but MTP layers is none.
/// Throws the errors above for a name that no checkpoint that is run here has.
std::vector<std::string> needed_shards(const ShardIndex& index, const ModelConfig& config);

}  // namespace dsfp4::checkpoint
