// Tensors that no role took: known not to be needed, or an error. A scale, a rotation or a low-rank
// matrix that is passed over gives wrong answers and no sign of it.
#pragma once

#include "checkpoint/catalogue.h"
#include "checkpoint/config.h"
#include "checkpoint/layout.h"

namespace dsfp4::checkpoint {

/// Decoding needs none of these: MTP layers, scales of activations and of the KV cache, weight
/// scales beside a BF16 or F32 weight, rotary_emb.inv_freq, vision parts, adapters in files of
/// their own. Throws UnsupportedError that names any other tensor that `layout` does not use, and
/// CheckpointError for one of a layer beyond num_hidden_layers that is no MTP layer, or that lies
/// in a shard that is not there.
void check_leftovers(const Catalogue& catalogue, const ModelConfig& config,
                     const ModelLayout& layout);

}  // namespace dsfp4::checkpoint
