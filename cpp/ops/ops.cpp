#include "ops/ops.h"

#include <algorithm>
#include <stdexcept>

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

std::int64_t added_pairs(std::int64_t rows, std::int64_t top_k) {
  constexpr std::int64_t kEnough = 1024;  // that a call's beginning and end cost little
  return std::min(rows * top_k, std::max(rows, kEnough));
}

void Ops::routed_experts(std::span<const ExpertView> /*experts*/, const Routing& /*routing*/,
                         std::int64_t /*top_k*/, ConstMatrix /*x*/, Matrix /*hidden*/,
                         Matrix /*routed*/, Matrix /*y*/, const ExpertView* /*shared*/) {
  throw std::logic_error("routed_experts() of a backend that has none");
}

}  // namespace dsfp4::ops
