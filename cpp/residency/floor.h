// The time that a decode step takes at least, from bytes and rates alone.
#pragma once

#include <cstdint>
#include <optional>

#include "dsfp4/rates.h"
#include "residency/plan.h"

namespace dsfp4::residency {

/// The shares of a token's chosen experts that lie there, 0 to 1 together; where a model is not
/// loaded whole, the others are in the files.
struct HitRates {
  double vram = 0.0;
  double ram = 0.0;
};

/// Seconds for one token: those of the slowest wire, as if all were at work all the time.
/// `routed_bytes` are those of the token's experts in all layers. What lies in the model's memory
/// is not counted, nor are dense weights there: the truth is higher. None where a rate that the
/// plan needs is not known.
std::optional<double> least_decode_seconds(const Plan& plan, const ModelBytes& model,
                                           std::uint64_t routed_bytes, const HitRates& hits,
                                           const Rates& rates);

}  // namespace dsfp4::residency
