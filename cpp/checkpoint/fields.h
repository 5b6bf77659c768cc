// Typed, range-checked access to the fields of a JSON object.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "checkpoint/json.h"

namespace dsfp4::checkpoint {

/// Views of `object`, which must outlive them. A field that is null counts as missing. Errors are
/// CheckpointErrors that name the file, the field (with the objects around it, as in
/// "rope_scaling.factor"), its byte and its value.
class Fields {
 public:
  /// Throws CheckpointError if `object` is no object.
  Fields(const JsonValue& object, std::string file, std::string name = "");

  const std::string& file() const noexcept { return file_; }
  /// "rope_scaling.factor" for "factor".
  std::string full_name(std::string_view name) const;

  /// All of them, those that are null too, sorted by name.
  const JsonValue::Object& members() const { return *object_->object(); }
  /// Null if it is missing or null.
  const JsonValue* find(std::string_view name) const;
  bool is_null(std::string_view name) const;  // given, as null
  std::optional<Fields> object(std::string_view name) const;

  /// An integer from `min` to `max`; without a default it must be there.
  std::int64_t integer(std::string_view name, std::int64_t min, std::int64_t max,
                       std::optional<std::int64_t> missing = {}) const;
  double number(std::string_view name, double min, double max,
                std::optional<double> missing = {}) const;
  bool boolean(std::string_view name, bool missing) const;
  std::string text(std::string_view name, std::optional<std::string> missing = {}) const;

  [[noreturn]] void fail(std::string_view name, const std::string& problem) const;
  /// Throws UnsupportedError: "<file>: <field> is <value>; <supported>".
  [[noreturn]] void unsupported(std::string_view name, const std::string& supported) const;

 private:
  const JsonValue* object_;
  std::string file_;
  std::string name_;
};

}  // namespace dsfp4::checkpoint
