#include "format/nonfinite.h"

#include <cstring>

namespace dsfp4::format {
namespace {

// The bits that NaN and infinity have set, all of them, and no finite number has; 0 for integers.
std::uint64_t nonfinite_bits(DType dtype) {
  switch (dtype) {
    case DType::kF8E4M3:
      return 0x7F;
    case DType::kF8E5M2:
      return 0x7C;
    case DType::kF8E8M0:
      return 0xFF;
    case DType::kF16:
      return 0x7C00;
    case DType::kBF16:
      return 0x7F80;
    case DType::kF32:
      return 0x7F80'0000;
    case DType::kF64:
      return 0x7FF0'0000'0000'0000;
    default:
      return 0;
  }
}

template <typename Word>
void find(std::span<const std::byte> bytes, std::uint64_t at, std::uint64_t bits,
          Nonfinite& found) {
  const auto mask = static_cast<Word>(bits);
  std::uint64_t count = 0;
  for (std::size_t i = 0; i < bytes.size(); i += sizeof(Word)) {
    Word word{};
    std::memcpy(&word, bytes.data() + i, sizeof(Word));
    count += (word & mask) == mask ? 1 : 0;
  }
  if (count != 0 && found.count == 0) {
    for (std::size_t i = 0;; i += sizeof(Word)) {
      Word word{};
      std::memcpy(&word, bytes.data() + i, sizeof(Word));
      if ((word & mask) != mask) continue;
      found.first = at + i;
      break;
    }
  }
  found.count += count;
}

}  // namespace

void find_nonfinite(DType dtype, std::span<const std::byte> bytes, std::uint64_t at,
                    Nonfinite& found) {
  const std::uint64_t bits = nonfinite_bits(dtype);
  if (bits == 0) return;
  switch (dtype_size(dtype)) {
    case 1:
      return find<std::uint8_t>(bytes, at, bits, found);
    case 2:
      return find<std::uint16_t>(bytes, at, bits, found);
    case 4:
      return find<std::uint32_t>(bytes, at, bits, found);
    default:
      return find<std::uint64_t>(bytes, at, bits, found);
  }
}

}  // namespace dsfp4::format
