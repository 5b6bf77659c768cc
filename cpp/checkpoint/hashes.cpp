#include "checkpoint/hashes.h"

#include <algorithm>
#include <charconv>
#include <system_error>
#include <utility>

#include <nlohmann/json.hpp>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "base/files.h"
#include "checkpoint/file.h"
#include "checkpoint/json.h"
#include "checkpoint/name_order.h"
#include "dsfp4/error.h"

namespace dsfp4::checkpoint {
namespace {

constexpr std::string_view kAlgorithm = "xxh3-64";
constexpr std::size_t kDigits = 16;

std::string hex(std::uint64_t hash) {
  std::string text(kDigits, '0');
  for (std::size_t i = 0; i < kDigits; ++i)
    text[kDigits - 1 - i] = "0123456789abcdef"[hash >> 4 * i & 15];
  return text;
}

bool by_name(const TensorHash& a, const TensorHash& b) { return a.tensor < b.tensor; }

}  // namespace

class HashFileHandler : public JsonHandler {
 public:
  HashFileHandler(std::string file, TensorHashes& hashes)
      : file_(std::move(file)), hashes_(hashes) {}

  void begin_document(const JsonOutline& outline) override {
    hashes_.entries_.reserve(std::min(outline.strings / 2, kMaxHashes));
    hashes_.names_.reserve(outline.bytes);  // they are parts of the text, and escapes are longer
  }
  void begin_object(std::size_t at) override {
    if (depth_ == 2 || (depth_ == 1 && key_ != "tensors")) fail(at, kShape);
    ++depth_;
  }
  void key(std::string_view name, std::size_t at) override {
    key_ = name;
    if (depth_ == 2) return;
    bool& seen = key_ == "tensors" ? tensors_seen_ : algorithm_seen_;
    if (key_ != "tensors" && key_ != "algorithm") fail(at, kShape);
    if (std::exchange(seen, true)) fail(at, "this key is there twice");
  }
  void end_object(std::size_t /*at*/) override { --depth_; }
  void begin_array(std::size_t at) override { fail(at, kShape); }
  void end_array(std::size_t /*at*/) override {}

  void scalar(const JsonScalar& value, std::size_t at) override {
    const auto* text = std::get_if<std::string_view>(&value);
    if (text == nullptr || (depth_ == 1 && key_ == "tensors")) fail(at, kShape);
    if (depth_ == 2) {
      if (hashes_.entries_.size() == kMaxHashes) {
        fail(at, "the file has more than " + std::to_string(kMaxHashes) + " tensors");
      }
      hashes_.entries_.push_back({static_cast<std::uint32_t>(hashes_.names_.size()),
                                  static_cast<std::uint32_t>(key_.size()), parse(*text, at)});
      hashes_.names_ += key_;
    } else if (*text != kAlgorithm) {
      fail(at, "the algorithm must be \"xxh3-64\"");
    }
  }

  /// Once all is read.
  void finish() const {
    if (!tensors_seen_ || !algorithm_seen_) throw CheckpointError(file_, "", -1, kShape);
  }

 private:
  static constexpr const char* kShape =
      "a checksum file must be {\"algorithm\": \"xxh3-64\", \"tensors\": {name: 16 hexadecimal "
      "digits}}; delete it, and write it anew with `dsfp4 verify MODEL --write`";

  [[noreturn]] void fail(std::size_t at, const std::string& problem) const {
    throw CheckpointError(file_, key_, static_cast<std::int64_t>(at), problem);
  }

  std::uint64_t parse(std::string_view text, std::size_t at) const {
    std::uint64_t hash = 0;
    const char* begin = text.data();
    const char* end = begin + text.size();
    const auto [stop, error] = std::from_chars(begin, end, hash, 16);
    if (text.size() != kDigits || error != std::errc() || stop != end) fail(at, kShape);
    return hash;
  }

  std::string file_;
  TensorHashes& hashes_;
  std::size_t depth_ = 0;
  std::string key_;
  bool tensors_seen_ = false;
  bool algorithm_seen_ = false;
};

struct Xxh3::State {
  XXH3_state_t state;
};

Xxh3::Xxh3() : state_(std::make_unique<State>()) { XXH3_64bits_reset(&state_->state); }
Xxh3::~Xxh3() = default;

void Xxh3::update(std::span<const std::byte> bytes) {
  XXH3_64bits_update(&state_->state, bytes.data(), bytes.size());
}

std::uint64_t Xxh3::digest() const { return XXH3_64bits_digest(&state_->state); }

std::uint64_t Xxh3::of(std::span<const std::byte> bytes) {
  return XXH3_64bits(bytes.data(), bytes.size());
}

std::optional<TensorHashes> TensorHashes::read(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / kHashFile;
  const std::optional<std::string> text = read_file_if_exists(path, kMaxHashFileBytes);
  if (!text) return std::nullopt;
  TensorHashes hashes;
  HashFileHandler handler(path.string(), hashes);
  parse_json(*text, path.string(), 0, handler);
  handler.finish();
  NameOrder names = order_names(hashes.entries_.size(),
                                [&](std::size_t i) { return hashes.name(hashes.entries_[i]); });
  if (names.twice) {
    const Entry& second = hashes.entries_[names.order[*names.twice + 1]];
    throw CheckpointError(path.string(), std::string(hashes.name(second)), -1,
                          "this tensor is there twice");
  }
  apply_order(std::move(names.order), hashes.entries_);
  return hashes;
}

std::optional<std::uint64_t> TensorHashes::find(std::string_view tensor) const {
  const auto found = std::lower_bound(
      entries_.begin(), entries_.end(), tensor,
      [&](const Entry& entry, std::string_view wanted) { return name(entry) < wanted; });
  if (found == entries_.end() || name(*found) != tensor) return std::nullopt;
  return found->hash;
}

std::optional<std::string> TensorHashes::problem(std::string_view tensor,
                                                 std::uint64_t hash) const {
  const std::string file(kHashFile);
  const auto expected = find(tensor);
  if (!expected) {
    return "there is no checksum for this tensor in " + file + ", which is older than it; delete " +
           file + " and run `dsfp4 verify MODEL --write`";
  }
  if (*expected == hash) return std::nullopt;
  return "the bytes have the checksum " + hex(hash) + ", but " + file + " says " + hex(*expected) +
         ": they changed since it was written; get the file anew, or delete " + file +
         " if the change is meant";
}

void TensorHashes::check(const Catalogue& catalogue, const TensorInfo& tensor,
                         std::span<const std::byte> bytes) const {
  if (const auto wrong = problem(tensor.name, Xxh3::of(bytes))) {
    throw CheckpointError(catalogue.file_name(tensor), tensor.name,
                          static_cast<std::int64_t>(tensor.offset), *wrong);
  }
}

void write_tensor_hashes(const std::filesystem::path& folder, std::vector<TensorHash> hashes) {
  std::sort(hashes.begin(), hashes.end(), by_name);
  std::string text = "{\"algorithm\": \"" + std::string(kAlgorithm) + "\", \"tensors\": {";
  const char* separator = "\n";
  for (const TensorHash& entry : hashes) {
    text += separator + nlohmann::json(entry.tensor).dump() + ": \"" + hex(entry.hash) + '"';
    separator = ",\n";
  }
  replace_file(folder / kHashFile, text + "\n}}\n");
}

}  // namespace dsfp4::checkpoint
