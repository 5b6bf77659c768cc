// What hf_quant_config.json and config.json's quantization_config say of the formats. The formats
// themselves are recognised from the tensors (layout.h); here only what they cannot show is
// checked.
#pragma once

#include <filesystem>

#include "checkpoint/fields.h"

namespace dsfp4::checkpoint {

/// Both may be missing. Throws CheckpointError for a malformed one and UnsupportedError for what
/// changes the arithmetic and is not supported: methods and algorithms of other formats, FP8 tiles
/// other than 128x128, NVFP4 groups other than 16, zero points, rotations, SVDQuant, sparse
/// formats; and for a key that is not known, unless its value is null, false, 0 or empty.
void check_quantization(const std::filesystem::path& folder, const Fields& config);

}  // namespace dsfp4::checkpoint
