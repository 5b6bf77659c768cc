#include "engine/verify.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <string_view>
#include <utility>

#include "base/thread_pool.h"
#include "checkpoint/catalogue.h"
#include "checkpoint/config.h"
#include "checkpoint/hashes.h"
#include "checkpoint/layout.h"
#include "format/nonfinite.h"
#include "storage/reader.h"

namespace dsfp4::engine {
namespace {

using checkpoint::Catalogue;
using checkpoint::TensorHashes;
using checkpoint::TensorInfo;
using format::Nonfinite;

constexpr std::uint64_t kPieceBytes = std::uint64_t{4} << 20;  // a multiple of every element's size

// weight_scale, weight_scale_2, weight_scale_inv, input_scale, k_scale, ...
bool is_scale(std::string_view tensor) {
  return tensor.substr(tensor.rfind('.') + 1).find("scale") != std::string_view::npos;
}

std::string describe(const Nonfinite& found, std::string_view tensor) {
  std::string text = std::to_string(found.count);
  text += is_scale(tensor) ? " scale" : " value";
  text += found.count == 1 ? " is NaN or infinite" : "s are NaN or infinite, this the first";
  return text;
}

storage::ReaderOptions reading(const Catalogue& catalogue) {
  storage::ReaderOptions options;
  options.expected = catalogue.identities();
  return options;
}

class Verifier {
 public:
  using Progress = std::function<void(std::uint64_t, std::uint64_t)>;

  Verifier(const Catalogue& catalogue, const Progress& progress)
      : catalogue_(catalogue),
        progress_(progress),
        reader_(storage::make_reader(catalogue.files(), reading(catalogue))),
        hashes_(TensorHashes::read(catalogue.folder())),
        order_(catalogue.tensors().size()),
        results_(order_.size()) {
    std::iota(order_.begin(), order_.end(), std::size_t{0});
    std::sort(order_.begin(), order_.end(), [&](std::size_t a, std::size_t b) {
      const TensorInfo &x = catalogue.tensors()[a], &y = catalogue.tensors()[b];
      return std::pair(x.file, x.offset) < std::pair(y.file, y.offset);
    });
    for (const TensorInfo& tensor : catalogue.tensors()) total_ += tensor.bytes;
  }

  void run(int threads) {
    ThreadPool pool(threads);
    pool.parallel_for(static_cast<std::int64_t>(order_.size()), 1,
                      [&](std::int64_t begin, std::int64_t end) {
                        for (std::int64_t i = begin; i < end; ++i) {
                          const auto at = static_cast<std::size_t>(i);
                          results_[at] = examine(tensor(at));
                        }
                      });
  }

  VerifyReport report() const {
    VerifyReport report;
    report.files = static_cast<std::int64_t>(catalogue_.files().size());
    report.tensors = static_cast<std::int64_t>(order_.size());
    report.bytes = total_;
    report.compared = hashes_.has_value();
    for (std::size_t i = 0; i < order_.size(); ++i) {
      const auto add = [&](std::uint64_t at, std::string problem) {
        report.problems.push_back({catalogue_.file_name(tensor(i)), tensor(i).name,
                                   static_cast<std::int64_t>(tensor(i).offset + at),
                                   std::move(problem)});
      };
      const Result& result = results_[i];
      if (result.nonfinite.count != 0) {
        add(result.nonfinite.first, describe(result.nonfinite, tensor(i).name));
      }
      if (!hashes_) continue;
      if (auto wrong = hashes_->problem(tensor(i).name, result.hash)) add(0, std::move(*wrong));
    }
    return report;
  }

  std::vector<checkpoint::TensorHash> hashes() const {
    std::vector<checkpoint::TensorHash> all;
    all.reserve(order_.size());
    for (std::size_t i = 0; i < order_.size(); ++i) {
      all.push_back({tensor(i).name, results_[i].hash});
    }
    return all;
  }

 private:
  struct Result {
    std::uint64_t hash = 0;
    Nonfinite nonfinite;
  };

  const TensorInfo& tensor(std::size_t i) const { return catalogue_.tensors()[order_[i]]; }

  Result examine(const TensorInfo& tensor) {
    const std::shared_ptr<std::byte[]> buffer =
        std::make_shared_for_overwrite<std::byte[]>(std::min(tensor.bytes, kPieceBytes));
    Result result;
    checkpoint::Xxh3 hash;
    for (std::uint64_t at = 0; at < tensor.bytes; at += kPieceBytes) {
      const std::uint64_t size = std::min(kPieceBytes, tensor.bytes - at);
      const storage::Extent extent{tensor.file, tensor.offset + at, size, buffer.get()};
      reader_->read({&extent, 1}, buffer);
      hash.update({buffer.get(), size});
      format::find_nonfinite(tensor.dtype, {buffer.get(), size}, at, result.nonfinite);
      const std::lock_guard lock(mutex_);
      done_ += size;
      if (progress_) progress_(done_, total_);
    }
    result.hash = hash.digest();
    return result;
  }

  const Catalogue& catalogue_;
  const Progress& progress_;
  std::unique_ptr<storage::Reader> reader_;
  std::optional<TensorHashes> hashes_;
  std::vector<std::size_t> order_;  // of the catalogue's tensors, as they lie in the files
  std::vector<Result> results_;     // in that order
  std::uint64_t total_ = 0;
  std::mutex mutex_;
  std::uint64_t done_ = 0;  // guarded by mutex_
};

}  // namespace

VerifyReport verify(const std::filesystem::path& folder, int threads, bool write,
                    const std::function<void(std::uint64_t, std::uint64_t)>& progress) {
  const checkpoint::ModelConfig config = checkpoint::read_config(folder);
  const Catalogue catalogue = Catalogue::open(folder);
  checkpoint::resolve_layout(catalogue, config);  // files may be sound and yet not be run
  Verifier verifier(catalogue, progress);
  verifier.run(threads);
  VerifyReport report = verifier.report();
  if (write && report.problems.empty()) {
    checkpoint::write_tensor_hashes(catalogue.folder(), verifier.hashes());
    report.wrote = true;
  }
  return report;
}

}  // namespace dsfp4::engine
