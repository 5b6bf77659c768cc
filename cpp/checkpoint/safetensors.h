// The header of a safetensors file: 8 bytes of length (little endian), then JSON, then the data.
// Source: the format's README, huggingface/safetensors.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "checkpoint/catalogue.h"
#include "checkpoint/file.h"

namespace dsfp4::checkpoint {

/// The longest header that is read, in bytes: in under a second. The format allows 100 MB; R1's
/// 187,000 tensors in NVFP4, the most of a model that is supported, take 25 MB in one file.
inline constexpr std::uint64_t kMaxHeaderBytes = std::uint64_t{32} << 20;

/// Appends the tensors of `file`, whose number is `file_number`, in the order of the header, and to
/// `by_name` their indices in `tensors` in the order of their names.
/// Throws CheckpointError, naming the tensor and the byte in the header, unless the tensors are
/// sound, differently named and cover the file's data exactly: no overlap, no hole, no end cut off.
/// Takes at most about four times the header's size in memory, the tensors included.
void read_safetensors_header(const InputFile& file, std::uint32_t file_number,
                             std::vector<TensorInfo>& tensors, std::vector<std::uint32_t>& by_name);

/// "[2, 3]"
std::string shape_text(const std::vector<std::int64_t>& shape);

}  // namespace dsfp4::checkpoint
