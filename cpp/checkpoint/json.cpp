#include "checkpoint/json.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <iterator>
#include <limits>
#include <type_traits>
#include <utility>

#include <nlohmann/json.hpp>

#include "checkpoint/name_order.h"
#include "dsfp4/error.h"

namespace dsfp4::checkpoint {
namespace {

constexpr std::size_t kMaxDepth = 64;
constexpr std::size_t kMaxStringBytes = std::size_t{1} << 20;
constexpr std::size_t kMaxNumberBytes = 1024;  // strtod takes its time over digits that say nothing
constexpr std::size_t kMaxSlowBytes = std::size_t{8} << 20;  // they take up to 30 ns a byte
constexpr std::size_t kMaxValues = std::size_t{1} << 18;

[[noreturn]] void fail(const std::string& file, std::size_t at, const std::string& problem) {
  throw CheckpointError(file, "", static_cast<std::int64_t>(at), problem);
}

bool is_space(char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r'; }

enum Kind : std::uint8_t { kOther, kSpace, kSeparator, kOpen, kClose, kQuote };

constexpr std::array<Kind, 256> kKinds = [] {
  std::array<Kind, 256> kinds{};
  for (const char c : {' ', '\t', '\n', '\r'}) kinds[static_cast<unsigned char>(c)] = kSpace;
  for (const char c : {',', ':'}) kinds[static_cast<unsigned char>(c)] = kSeparator;
  for (const char c : {'{', '['}) kinds[static_cast<unsigned char>(c)] = kOpen;
  for (const char c : {'}', ']'}) kinds[static_cast<unsigned char>(c)] = kClose;
  kinds['"'] = kQuote;
  return kinds;
}();

Kind kind_of(char c) { return kKinds[static_cast<unsigned char>(c)]; }

struct StringEnd {
  std::size_t end;  // one past the closing quote, or the text's end
  bool plain;       // closed, and nothing but printable ASCII without escapes
};

// Of the string whose opening quote is at `i`.
StringEnd string_end(std::string_view text, std::size_t i) {
  std::size_t end = std::min(text.find('"', i + 1), text.size());
  bool odd = end == text.size();
  for (const char c : text.substr(i + 1, end - i - 1)) odd |= c < ' ' || c > '~' || c == '\\';
  if (!odd) return {end + 1, true};
  for (end = i + 1; end < text.size() && text[end] != '"'; ++end) {
    if (text[end] == '\\') ++end;
  }
  return {std::min(end + 1, text.size()), false};
}

// One past the end of the number or literal that begins at `i`.
std::size_t word_end(std::string_view text, std::size_t i) {
  while (i < text.size() && kind_of(text[i]) == kOther) ++i;
  return i;
}

// One past the white space that begins at `i`.
std::size_t space_end(std::string_view text, std::size_t i) {
  while (i < text.size() && is_space(text[i])) ++i;
  return i;
}

std::string over(const std::string& what, std::size_t limit) {
  return "holds " + what + " of more than " + std::to_string(limit) + " bytes";
}

std::string too_slow() {
  return over("numbers, and strings with escapes or beyond ASCII,", kMaxSlowBytes) + " in all";
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
  std::size_t slow = 0;  // bytes of numbers, and of strings that are not plain
  for (std::size_t i = 0; i < text.size();) {
    const Kind kind = kind_of(text[i]);
    if (kind == kOpen) {
      if (text[i] == '{') ++outline.objects;
      if (++depth > kMaxDepth) {
        fail(file, base + i, "nests deeper than " + std::to_string(kMaxDepth) + " levels");
      }
    } else if (kind == kClose && depth > 0) {
      --depth;
    } else if (kind == kQuote) {
      const StringEnd string = string_end(text, i);
      const std::size_t bytes = string.end - i;
      ++outline.strings;
      if (bytes > kMaxStringBytes) fail(file, base + i, over("a string", kMaxStringBytes));
      if (!string.plain) slow += bytes;
      if (slow > kMaxSlowBytes) fail(file, base + i, too_slow());
      i = string.end;
      continue;
    } else if (kind == kOther) {
      const std::size_t end = word_end(text, i);
      if (end - i > kMaxNumberBytes) fail(file, base + i, over("a number", kMaxNumberBytes));
      slow += end - i;
      if (slow > kMaxSlowBytes) fail(file, base + i, too_slow());
      i = end;
      continue;
    }
    ++i;
  }
  return outline;
}

// Walks a text for nlohmann's parser, which takes some 8 ns a byte, and passes over what it need
// not see: the inside of plain strings and repeated white space. Where it is, all copies share.
class SkippingIterator {
 public:
  using iterator_category = std::input_iterator_tag;
  using value_type = char;
  using difference_type = std::ptrdiff_t;
  using pointer = const char*;
  using reference = const char&;

  struct Place {
    std::string_view text;
    std::size_t consumed = 0;
    std::size_t closing = 0;  // the closing quote of the string that is being read
  };

  explicit SkippingIterator(Place* place) : place_(place) {}  // null: the end
  reference operator*() const { return place_->text[place_->consumed]; }
  SkippingIterator& operator++() {
    Place& p = *place_;
    const std::size_t at = p.consumed++;
    const Kind kind = kind_of(p.text[at]);
    if (at < p.closing) return *this;
    if (kind == kQuote && at > p.closing) {
      const StringEnd string = string_end(p.text, at);
      p.closing = string.end - 1;
      if (string.plain) p.consumed = p.closing;
    } else if (kind == kSpace) {
      p.consumed = space_end(p.text, p.consumed);
    }
    return *this;
  }
  SkippingIterator operator++(int) {
    SkippingIterator before = *this;
    ++*this;
    return before;
  }
  bool operator==(const SkippingIterator& other) const { return at_end() == other.at_end(); }
  bool operator!=(const SkippingIterator& other) const { return !(*this == other); }

 private:
  bool at_end() const { return place_ == nullptr || place_->consumed >= place_->text.size(); }

  Place* place_;
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
// At an event the parser has read just its token, and where that is a number one byte more.
class SaxAdapter : public nlohmann::json_sax<nlohmann::json> {
 public:
  SaxAdapter(std::string_view text, const std::string& file, std::size_t base, JsonHandler& handler)
      : place_{text}, file_(file), base_(base), handler_(handler) {}

  SkippingIterator begin() { return SkippingIterator(&place_); }

  bool null() override { return scalar({}); }
  bool boolean(bool value) override { return scalar(value); }
  bool number_integer(number_integer_t value) override { return number(std::int64_t{value}); }
  bool number_unsigned(number_unsigned_t value) override {
    if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
      return number(static_cast<double>(value));
    }
    return number(static_cast<std::int64_t>(value));
  }
  bool number_float(number_float_t value, const string_t&) override { return number(value); }
  bool string(string_t& value) override {
    const std::size_t at = next_token();
    handler_.scalar(content(value, at), at);
    return true;
  }
  bool binary(binary_t&) override { return false; }  // no such thing in a text
  bool start_object(std::size_t) override {
    handler_.begin_object(next_token());
    return true;
  }
  bool key(string_t& name) override {
    const std::size_t at = next_token();
    handler_.key(content(name, at), at);
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
    fail(file_, base_ + (place_.consumed == 0 ? 0 : place_.consumed - 1), plain_message(error));
  }

 private:
  bool scalar(const JsonScalar& value) {
    handler_.scalar(value, next_token());
    return true;
  }

  // The parser has read one byte more, and perhaps passed over white space.
  bool number(const JsonScalar& value) {
    const std::size_t at = begin_of_next();
    end_ = word_end(place_.text, at);
    handler_.scalar(value, base_ + at);
    return true;
  }

  std::size_t begin_of_next() const {
    std::size_t at = end_;
    while (kind_of(place_.text[at]) == kSpace || kind_of(place_.text[at]) == kSeparator) ++at;
    return at;
  }

  std::size_t next_token() {
    const std::size_t at = begin_of_next();
    end_ = place_.consumed;
    return base_ + at;
  }

  // The parser saw nothing of a plain string.
  std::string_view content(const string_t& parsed, std::size_t at) const {
    if (!parsed.empty()) return parsed;
    const std::size_t begin = at - base_ + 1;
    return place_.text.substr(begin, end_ - 1 - begin);
  }

  SkippingIterator::Place place_;
  const std::string& file_;
  std::size_t base_;
  JsonHandler& handler_;
  std::size_t end_ = 0;
};

}  // namespace

void parse_json(std::string_view text, const std::string& file, std::size_t base,
                JsonHandler& handler) {
  handler.begin_document(outline_json(text, file, base));
  SaxAdapter adapter(text, file, base, handler);
  nlohmann::json::sax_parse(adapter.begin(), SkippingIterator(nullptr), &adapter);
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

void JsonTreeBuilder::key(std::string_view name, std::size_t at) {
  std::get<JsonValue::Object>(open_.back()->data).push_back({std::string(name), {}, at});
}

void JsonTreeBuilder::end_object(std::size_t) {
  auto& members = std::get<JsonValue::Object>(open_.back()->data);
  NameOrder names = order_names(
      members.size(), [&](std::size_t i) -> const std::string& { return members[i].name; });
  if (names.twice) {
    const JsonMember& second = members[names.order[*names.twice + 1]];
    throw CheckpointError(file_, second.name, static_cast<std::int64_t>(second.at),
                          "this key is there twice");
  }
  apply_order(std::move(names.order), members);
  open_.pop_back();
}

void JsonTreeBuilder::begin_array(std::size_t at) {
  open_.push_back(&add({JsonValue::Array(), at}));
}

void JsonTreeBuilder::end_array(std::size_t) { open_.pop_back(); }

void JsonTreeBuilder::scalar(const JsonScalar& value, std::size_t at) {
  std::visit(
      [&](auto held) {
        if constexpr (std::is_same_v<decltype(held), std::string_view>) {
          add({std::string(held), at});
        } else {
          add({held, at});
        }
      },
      value);
}

JsonValue parse_json_tree(std::string_view text, const std::string& file) {
  JsonTreeBuilder builder(file);
  parse_json(text, file, 0, builder);
  return builder.take();
}

}  // namespace dsfp4::checkpoint
