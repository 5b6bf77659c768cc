// The user's say in the formats of dense weights.
#pragma once

#include <vector>

#include "dsfp4/model.h"
#include "engine/placement.h"
#include "residency/dense_formats.h"
#include "residency/plan.h"

namespace dsfp4::engine {

/// The formats that a plan may choose from, for memory of a GPU or of the processor. Throws
/// ParameterError for a role or a format that there is not.
std::vector<residency::DenseFormats> formats_to_choose(const LoadOptions& options, bool on_gpu);

/// Says in one sentence what the plan converts unasked.
void log_conversion(const residency::Plan& plan, const WeightSizes& sizes);

}  // namespace dsfp4::engine
