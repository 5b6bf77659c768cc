#include "checkpoint/fields.h"

#include <array>
#include <charconv>
#include <string>
#include <utility>

#include "dsfp4/error.h"

namespace dsfp4::checkpoint {
namespace {

std::string number_text(double value) {
  std::array<char, 32> text;
  const auto end =
      std::to_chars(text.data(), text.data() + text.size(), value, std::chars_format::general, 6);
  return {text.data(), end.ptr};
}

}  // namespace

Fields::Fields(const JsonValue& object, std::string file, std::string name)
    : object_(&object), file_(std::move(file)), name_(std::move(name)) {
  if (object.object() == nullptr) {
    throw CheckpointError(file_, name_, static_cast<std::int64_t>(object.at),
                          "is " + describe(object) + "; it must be an object");
  }
}

std::string Fields::full_name(std::string_view name) const {
  return name_.empty() ? std::string(name) : name_ + "." + std::string(name);
}

const JsonValue* Fields::find(std::string_view name) const {
  const JsonValue* value = object_->find(name);
  return value == nullptr || value->is_null() ? nullptr : value;
}

bool Fields::is_null(std::string_view name) const {
  const JsonValue* value = object_->find(name);
  return value != nullptr && value->is_null();
}

std::optional<Fields> Fields::object(std::string_view name) const {
  const JsonValue* value = find(name);
  if (value == nullptr) return std::nullopt;
  return Fields(*value, file_, full_name(name));
}

std::int64_t Fields::integer(std::string_view name, std::int64_t min, std::int64_t max,
                             std::optional<std::int64_t> missing) const {
  const JsonValue* value = find(name);
  if (value == nullptr && missing) return *missing;
  const auto* integer = value == nullptr ? nullptr : std::get_if<std::int64_t>(&value->data);
  if (integer != nullptr && *integer >= min && *integer <= max) return *integer;
  fail(name, "must be an integer from " + std::to_string(min) + " to " + std::to_string(max));
}

double Fields::number(std::string_view name, double min, double max,
                      std::optional<double> missing) const {
  const JsonValue* value = find(name);
  if (value == nullptr && missing) return *missing;
  if (value != nullptr) {
    double number = min - 1.0;
    if (const auto* real = std::get_if<double>(&value->data)) number = *real;
    if (const auto* integer = std::get_if<std::int64_t>(&value->data)) {
      number = static_cast<double>(*integer);
    }
    if (number >= min && number <= max) return number;
  }
  fail(name, "must be a number from " + number_text(min) + " to " + number_text(max));
}

bool Fields::boolean(std::string_view name, bool missing) const {
  const JsonValue* value = find(name);
  if (value == nullptr) return missing;
  if (const bool* flag = std::get_if<bool>(&value->data)) return *flag;
  fail(name, "must be true or false");
}

std::string Fields::text(std::string_view name, std::optional<std::string> missing) const {
  const JsonValue* value = find(name);
  if (value == nullptr && missing) return *std::move(missing);
  const auto* text = value == nullptr ? nullptr : std::get_if<std::string>(&value->data);
  if (text != nullptr) return *text;
  fail(name, "must be a string");
}

void Fields::fail(std::string_view name, const std::string& problem) const {
  const JsonValue* value = object_->find(name);
  if (value == nullptr) {
    throw CheckpointError(file_, full_name(name), -1, "is missing; it " + problem);
  }
  throw CheckpointError(file_, full_name(name), static_cast<std::int64_t>(value->at),
                        "is " + describe(*value) + "; it " + problem);
}

void Fields::unsupported(std::string_view name, const std::string& supported) const {
  const JsonValue* value = object_->find(name);
  throw UnsupportedError(file_ + ": '" + full_name(name) + "' is " +
                         (value == nullptr ? "missing" : describe(*value)) + "; " + supported);
}

}  // namespace dsfp4::checkpoint
