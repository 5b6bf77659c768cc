#include "ops/backend.h"

namespace dsfp4::ops {

std::size_t kv_value_bytes(KvFormat format) {
  switch (format) {
    case KvFormat::kF32:
      return 4;
    case KvFormat::kBf16:
      return 2;
    case KvFormat::kFp8:
      return 1;
  }
  return 0;
}

}  // namespace dsfp4::ops
