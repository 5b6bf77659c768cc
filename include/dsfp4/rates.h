// The speed of a machine's wires, as experts cross them.
#pragma once

#include "dsfp4/api.h"

namespace dsfp4 {
inline namespace DSFP4_ABI_NAMESPACE {

/// Bytes a second; 0: not known. Without a GPU only the first two are ever known.
struct Rates {
  double ssd = 0.0;           // read from the checkpoint's files at random places
  double host_experts = 0.0;  // of experts in RAM that the processor computes with, for one token
  double copy_in = 0.0;       // from RAM to VRAM
  double copy_out = 0.0;      // and back
  /// The processor's and the copies' to VRAM, while both are at work.
  double both_host_experts = 0.0;
  double both_copy_in = 0.0;

  bool operator==(const Rates&) const = default;
};

}  // namespace DSFP4_ABI_NAMESPACE
}  // namespace dsfp4
