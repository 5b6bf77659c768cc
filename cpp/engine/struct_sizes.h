// Structs of the public API as a program has them, which may have been compiled with older headers:
// include/dsfp4/api.h says how they carry their size.
#pragma once

#include "dsfp4/model.h"

namespace dsfp4 {

/// The fields that `given` has, by its struct_bytes; those that it lacks have their defaults.
/// Throws ParameterError for a struct_bytes that is larger than this library's struct, or that ends
/// inside a field.
LoadOptions complete(const LoadOptions& given);
GenerateOptions complete(const GenerateOptions& given);
ForwardOptions complete(const ForwardOptions& given);

/// Moves the fields that `to` has, by its struct_bytes; those that this library does not know stay
/// as they are. Throws ParameterError for a struct_bytes that ends inside a field.
void hand_over(ModelStats&& from, ModelStats& to);
void hand_over(GenerationResult&& from, GenerationResult& to);

}  // namespace dsfp4
