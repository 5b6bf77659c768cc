#include "checkpoint/absence.h"

#include <algorithm>
#include <array>
#include <optional>
#include <system_error>

namespace dsfp4::checkpoint {
namespace {

namespace fs = std::filesystem;

// The Hub's client writes the first; browsers and downloaders the others.
constexpr std::array<std::string_view, 4> kPartEndings = {".incomplete", ".part", ".crdownload",
                                                          ".aria2"};

// A file of `folder` that is a part of a download of the file `name`; of any file if that is empty.
std::optional<fs::path> find_part(const fs::path& folder, std::string_view name) {
  std::error_code error;
  fs::directory_iterator entry(folder, error);
  for (; !error && entry != fs::directory_iterator(); entry.increment(error)) {
    const std::string file = entry->path().filename().string();
    const auto ends = [&](std::string_view ending) { return file.ends_with(ending); };
    if (file.starts_with(name) && std::ranges::any_of(kPartEndings, ends)) return entry->path();
  }
  return std::nullopt;
}

// Beside the file, or where `hf download --local-dir` keeps it; in the Hub's cache parts have no
// names.
std::optional<fs::path> find_part_of(const fs::path& folder, std::string_view name) {
  if (auto part = find_part(folder, name)) return part;
  if (auto part = find_part(folder / ".cache" / "huggingface" / "download", name)) return part;
  if (folder.parent_path().filename() != "snapshots") return std::nullopt;
  return find_part(folder.parent_path().parent_path() / "blobs", "");
}

}  // namespace

std::string describe_absence(const fs::path& path) {
  std::error_code error;
  const fs::path target = fs::read_symlink(path, error);
  if (!error) {
    return "is a link to '" + target.string() +
           "', which is not there: its download has stopped, or the file was moved; download it "
           "again";
  }
  const auto part = find_part_of(path.parent_path(), path.filename().string());
  if (!part) return "";
  return "is not there: its download has not ended, as '" + part->string() +
         "' is there; start the download again";
}

std::string describe_unfinished(const fs::path& folder) {
  const auto part = find_part_of(folder, "");
  if (!part) return "";
  return ": the download has not ended, as '" + part->string() +
         "' is there; start the download again";
}

std::string describe_lfs_pointer(std::string_view begin, std::uint64_t file_bytes) {
  constexpr std::string_view kFirstLine = "version https://git-lfs.github.com/spec/";
  constexpr std::string_view kSize = "\nsize ";
  if (file_bytes > kMostLfsPointer || !begin.starts_with(kFirstLine)) return "";
  std::string size;
  if (const std::size_t at = begin.find(kSize); at != begin.npos) {
    const std::string_view digits = begin.substr(at + kSize.size());
    size =
        " of " + std::string(digits.substr(0, digits.find_first_not_of("0123456789"))) + " bytes";
  }
  return "is a Git LFS pointer in the place of a file" + size +
         "; run `git lfs pull` in its folder, or download the file";
}

}  // namespace dsfp4::checkpoint
