#include "ops/backend.h"

namespace dsfp4::ops {

std::size_t kv_value_bytes(KvFormat format) {
  return format == KvFormat::kBf16 ? sizeof(std::uint16_t) : sizeof(float);
}

}  // namespace dsfp4::ops
