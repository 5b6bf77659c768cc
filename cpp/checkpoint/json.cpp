#include "checkpoint/json.h"

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <limits>
#include <utility>

#include <nlohmann/json.hpp>

#include "dsfp4/error.h"

namespace dsfp4::checkpoint {
namespace {

constexpr std::size_t kMaxDepth = 64;
constexpr std::size_t kMaxTokenBytes = std::size_t{1} << 20;
constexpr std::size_t kMaxValues = std::size_t{1} << 18;

[[noreturn]] void fail(const std::string& file, std::size_t at, const std::string& problem) {
  throw CheckpointError(file, "", static_cast<std::int64_t>(at), problem);
}

bool is_space(char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r'; }

// One past the end of the string, number or literal that begins at `i`.
std::size_t token_end(std::string_view text, std::size_t i) {
  if (text[i] == '"') {
    for (++i; i < text.size() && text[i] != '"'; ++i) {
      if (text[i] == '\\') ++i;
    }
    return std::min(i + 1, text.size());
  }
  while (i < text.size() && !is_space(text[i]) &&
         std::string_view(",:[]{}\"").find(text[i]) == std::string_view::npos) {
    ++i;
  }
  return i;
}

// A cheap first pass that bounds what the parser can be made to hold.
JsonOutline outline_json(std::string_view text, const std::string& file, std::size_t base) {
  const auto first = std::find_if_not(text.begin(), text.end(), is_space);
  if (first == text.end() || *first != '{') {
    fail(file, base + static_cast<std::size_t>(first - text.begin()),
         "is not valid JSON: an object, '{', must begin here");
  }
  if (const std::size_t nul = text.find('\0'); nul != std::string_view::npos) {
    fail(file, base + nul, "is not valid JSON: it holds a NUL byte");
  }
  JsonOutline outline{text.size(), 0, 0};
  std::size_t depth = 0;
  for (std::size_t i = 0; i < text.size();) {
    const char c = text[i];
    if (c == '{' || c == '[') {
      if (c == '{') ++outline.objects;
      if (++depth > kMaxDepth) {
        fail(file, base + i, "nests deeper than " + std::to_string(kMaxDepth) + " levels");
      }
    } else if ((c == '}' || c == ']') && depth > 0) {
      --depth;
    } else if (!is_space(c) && c != ',' && c != ':' && c != '}' && c != ']') {
      const std::size_t end = token_end(text, i);
      if (c == '"') ++outline.strings;
      if (end - i > kMaxTokenBytes) {
        fail(file, base + i,
             "holds a string or number of more than " + std::to_string(kMaxTokenBytes) + " bytes");
      }
      i = end;
      continue;
    }
    ++i;
  }
  return outline;
}

// Walks a text and keeps count in a place that outlives the parser's own copies of it.
class CountingIterator {
 public:
  using iterator_category = std::input_iterator_tag;
  using value_type = char;
  using difference_type = std::ptrdiff_t;
  using pointer = const char*;
  using reference = const char&;

  CountingIterator(const char* here, std::size_t* consumed) : here_(here), consumed_(consumed) {}
  reference operator*() const { return *here_; }
  CountingIterator& operator++() {
    ++here_;
    ++*consumed_;
    return *this;
  }
  CountingIterator operator++(int) {
    CountingIterator before = *this;
    ++*this;
    return before;
  }
  bool operator==(const CountingIterator& other) const { return here_ == other.here_; }
  bool operator!=(const CountingIterator& other) const { return here_ != other.here_; }

 private:
  const char* here_;
  std::size_t* consumed_;
};

// nlohmann's message without its prefix and without the text that it read.
std::string plain_message(const nlohmann::detail::exception& error) {
  constexpr int kNumberOverflow = 406;
  if (error.id == kNumberOverflow) return "holds a number that is too large";
  std::string message = error.what();
  if (const std::size_t read = message.find("; last read"); read != std::string::npos) {
    message.erase(read);
  }
  if (const std::size_t prefix = message.find(": "); prefix != std::string::npos) {
    message.erase(0, prefix + 2);
  }
  return "is not valid JSON: " + message;
}

// nlohmann's events with the offsets that it does not give. Between two tokens there are only
// spaces, commas and colons, so a token's first byte is found from the end of the one before it.
class SaxAdapter : public nlohmann::json_sax<nlohmann::json> {
 public:
  SaxAdapter(std::string_view text, const std::string& file, std::size_t base, JsonHandler& handler)
      : text_(text), file_(file), base_(base), handler_(handler) {}

  std::size_t* consumed() { return &consumed_; }

  bool null() override { return scalar({}); }
  bool boolean(bool value) override { return scalar(value); }
  bool number_integer(number_integer_t value) override { return scalar(std::int64_t{value}); }
  bool number_unsigned(number_unsigned_t value) override {
    if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
      return scalar(static_cast<double>(value));
    }
    return scalar(static_cast<std::int64_t>(value));
  }
  bool number_float(number_float_t value, const string_t&) override { return scalar(value); }
  bool string(string_t& value) override { return scalar(std::move(value)); }
  bool binary(binary_t&) override { return false; }  // no such thing in a text
  bool start_object(std::size_t) override {
    handler_.begin_object(next_token());
    return true;
  }
  bool key(string_t& name) override {
    const std::size_t at = next_token();
    handler_.key(std::move(name), at);
    return true;
  }
  bool end_object() override {
    handler_.end_object(next_token());
    return true;
  }
  bool start_array(std::size_t) override {
    handler_.begin_array(next_token());
    return true;
  }
  bool end_array() override {
    handler_.end_array(next_token());
    return true;
  }
  bool parse_error(std::size_t, const std::string&,
                   const nlohmann::detail::exception& error) override {
    fail(file_, base_ + (consumed_ == 0 ? 0 : consumed_ - 1), plain_message(error));
  }

 private:
  bool scalar(JsonScalar value) {
    handler_.scalar(std::move(value), next_token());
    return true;
  }

  std::size_t next_token() {
    std::size_t at = end_;
    while (is_space(text_[at]) || text_[at] == ',' || text_[at] == ':') ++at;
    const bool bracket = std::string_view("[]{}").find(text_[at]) != std::string_view::npos;
    end_ = bracket ? at + 1 : token_end(text_, at);
    return base_ + at;
  }

  std::string_view text_;
  const std::string& file_;
  std::size_t base_;
  JsonHandler& handler_;
  std::size_t consumed_ = 0;
  std::size_t end_ = 0;
};

}  // namespace

void parse_json(std::string_view text, const std::string& file, std::size_t base,
                JsonHandler& handler) {
  handler.begin_document(outline_json(text, file, base));
  SaxAdapter adapter(text, file, base, handler);
  const CountingIterator begin(text.data(), adapter.consumed());
  const CountingIterator end(text.data() + text.size(), adapter.consumed());
  nlohmann::json::sax_parse(begin, end, &adapter);
}

const JsonValue* JsonValue::find(std::string_view name) const {
  const Object* members = object();
  if (members == nullptr) return nullptr;
  const auto found = std::lower_bound(
      members->begin(), members->end(), name,
      [](const JsonMember& member, std::string_view wanted) { return member.name < wanted; });
  return found != members->end() && found->name == name ? &found->value : nullptr;
}

std::string describe(const JsonValue& value) {
  constexpr std::size_t kShown = 60;
  if (value.is_null()) return "null";
  if (const bool* flag = std::get_if<bool>(&value.data)) return *flag ? "true" : "false";
  if (const auto* integer = std::get_if<std::int64_t>(&value.data)) return std::to_string(*integer);
  if (const double* number = std::get_if<double>(&value.data)) {
    return nlohmann::json(*number).dump();
  }
  if (const auto* text = std::get_if<std::string>(&value.data)) {
    return text->size() <= kShown ? "'" + *text + "'"
                                  : "a string of " + std::to_string(text->size()) + " bytes";
  }
  return value.array() != nullptr ? "a list" : "an object";
}

JsonValue& JsonTreeBuilder::add(JsonValue value) {
  if (++values_ > kMaxValues) {
    fail(file_, value.at, "holds more than " + std::to_string(kMaxValues) + " values");
  }
  if (open_.empty()) {
    root_ = std::move(value);
    return root_;
  }
  if (auto* array = std::get_if<JsonValue::Array>(&open_.back()->data)) {
    return array->emplace_back(std::move(value));
  }
  JsonMember& member = std::get<JsonValue::Object>(open_.back()->data).back();
  member.value = std::move(value);
  return member.value;
}

void JsonTreeBuilder::begin_object(std::size_t at) {
  open_.push_back(&add({JsonValue::Object(), at}));
}

void JsonTreeBuilder::key(std::string name, std::size_t at) {
  std::get<JsonValue::Object>(open_.back()->data).push_back({std::move(name), {}, at});
}

void JsonTreeBuilder::end_object(std::size_t) {
  auto& members = std::get<JsonValue::Object>(open_.back()->data);
  std::stable_sort(members.begin(), members.end(),
                   [](const JsonMember& a, const JsonMember& b) { return a.name < b.name; });
  const auto twice =
      std::adjacent_find(members.begin(), members.end(),
                         [](const JsonMember& a, const JsonMember& b) { return a.name == b.name; });
  if (twice != members.end()) {
    throw CheckpointError(file_, twice->name, static_cast<std::int64_t>(std::next(twice)->at),
                          "this key is there twice");
  }
  open_.pop_back();
}

void JsonTreeBuilder::begin_array(std::size_t at) {
  open_.push_back(&add({JsonValue::Array(), at}));
}

void JsonTreeBuilder::end_array(std::size_t) { open_.pop_back(); }

void JsonTreeBuilder::scalar(JsonScalar value, std::size_t at) {
  std::visit([&](auto& held) { add({std::move(held), at}); }, value);
}

JsonValue parse_json_tree(std::string_view text, const std::string& file) {
  JsonTreeBuilder builder(file);
  parse_json(text, file, 0, builder);
  return builder.take();
}

}  // namespace dsfp4::checkpoint
