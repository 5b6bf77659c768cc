// JSON from files that nobody vouches for: read as events, or as a small tree.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace dsfp4::checkpoint {

/// null, a boolean, an integer that fits, any other number, a string (valid during the event).
using JsonScalar = std::variant<std::monostate, bool, std::int64_t, double, std::string_view>;

/// What is known of a text before it is parsed.
struct JsonOutline {
  std::size_t bytes = 0;
  std::size_t objects = 0;  // '{' outside strings
  std::size_t strings = 0;
};

/// Receives a document's events in order; `at` is the byte offset in the file of the token's first
/// byte. Names and strings are the parser's: a handler copies what it keeps, and refuses a document
/// by throwing.
class JsonHandler {
 public:
  virtual ~JsonHandler() = default;
  virtual void begin_document(const JsonOutline& /*outline*/) {}
  virtual void begin_object(std::size_t at) = 0;
  virtual void key(std::string_view name, std::size_t at) = 0;
  virtual void end_object(std::size_t at) = 0;
  virtual void begin_array(std::size_t at) = 0;
  virtual void end_array(std::size_t at) = 0;
  virtual void scalar(const JsonScalar& value, std::size_t at) = 0;
};

/// Parses all of `text`, which lies at byte `base` of `file`. Throws CheckpointError, with the
/// byte, for what is not a JSON object (ill-formed UTF-8 included), nests deeper than 64 levels, or
/// holds a string longer than 1 MiB, a number longer than 1024 bytes, or over 8 MiB of numbers and
/// of strings with escapes or beyond ASCII, which take long to read. Duplicate keys are for the
/// handler to refuse.
void parse_json(std::string_view text, const std::string& file, std::size_t base,
                JsonHandler& handler);

struct JsonMember;

/// A value of a tree; `at` is its byte offset in the file.
struct JsonValue {
  using Array = std::vector<JsonValue>;
  using Object = std::vector<JsonMember>;  // sorted by name
  std::variant<std::monostate, bool, std::int64_t, double, std::string, Array, Object> data;
  std::size_t at = 0;

  bool is_null() const { return std::holds_alternative<std::monostate>(data); }
  const Object* object() const { return std::get_if<Object>(&data); }
  const Array* array() const { return std::get_if<Array>(&data); }
  /// The member of that name; null if there is none or if this is not an object.
  const JsonValue* find(std::string_view name) const;
};

struct JsonMember {
  std::string name;
  JsonValue value;
  std::size_t at = 0;  // of the name
};

/// The value in words, for messages: 3, "abc" (shortened), "a list", ...
std::string describe(const JsonValue& value);

/// Builds trees. Throws CheckpointError for duplicate keys and for more than 2^18 values.
class JsonTreeBuilder : public JsonHandler {
 public:
  explicit JsonTreeBuilder(std::string file) : file_(std::move(file)) {}

  void begin_object(std::size_t at) override;
  void key(std::string_view name, std::size_t at) override;
  void end_object(std::size_t at) override;
  void begin_array(std::size_t at) override;
  void end_array(std::size_t at) override;
  void scalar(const JsonScalar& value, std::size_t at) override;

  /// Once the events of one whole value have come. Another may follow: the limit is for all.
  JsonValue take() { return std::exchange(root_, {}); }

 private:
  JsonValue& add(JsonValue value);

  std::string file_;
  JsonValue root_;
  std::vector<JsonValue*> open_;  // a container's parent does not grow while it is open
  std::size_t values_ = 0;
};

/// The tree of a file's whole text.
JsonValue parse_json_tree(std::string_view text, const std::string& file);

}  // namespace dsfp4::checkpoint
