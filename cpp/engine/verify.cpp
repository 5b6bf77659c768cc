#include "engine/verify.h"

#include <algorithm>
#include <memory>
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

// A multiple of every element's size.
constexpr std::uint64_t kMostPieceBytes = std::uint64_t{4} << 20;

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

class Verifier {
 public:
  using Progress = std::function<void(std::uint64_t, std::uint64_t)>;

  Verifier(const Catalogue& catalogue, const Progress& progress, const Poll& poll,
           const storage::ReaderOptions& reading)
      : catalogue_(catalogue),
        progress_(progress),
        poll_(poll),
        reader_(storage::make_reader(catalogue.files(), reading)),
        hashes_(TensorHashes::read(catalogue.folder())),
        order_(catalogue.tensors().size()),
        results_(order_.size()) {
    std::iota(order_.begin(), order_.end(), std::size_t{0});
    std::sort(order_.begin(), order_.end(), [&](std::size_t a, std::size_t b) {
      const TensorInfo &x = catalogue.tensors()[a], &y = catalogue.tensors()[b];
      return std::pair(x.file, x.offset) < std::pair(y.file, y.offset);
    });
    for (const TensorInfo& tensor : catalogue.tensors()) {
      total_ += tensor.bytes;
      piece_bytes_ = std::max(piece_bytes_, std::min(tensor.bytes, kMostPieceBytes));
    }
  }

  // Reading is left to the reader, and the threads are taken for as long as one round of pieces
  // takes: a model that computes beside this waits no longer than that.
  void run(int threads) {
    ThreadPool pool(threads);
    std::vector<Lane> lanes(std::min(static_cast<std::size_t>(threads), order_.size()));
    for (Lane& lane : lanes) read_next(lane);
    for (std::uint64_t done = 0; std::ranges::any_of(lanes, &Lane::reads);) {
      for (Lane& lane : lanes) {
        lane.there = std::exchange(lane.coming, {});
        if (!lane.there.read) continue;
        reader_->wait(lane.there.read, poll_).throw_if_failed();
        done += lane.there.bytes;
        read_next(lane);
      }
      pool.parallel_for(static_cast<std::int64_t>(lanes.size()), 1,
                        [&](std::int64_t begin, std::int64_t end) {
                          for (std::int64_t i = begin; i < end; ++i) {
                            examine(lanes[static_cast<std::size_t>(i)]);
                          }
                        });
      if (progress_) progress_(done, total_);
    }
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

  // So many bytes of a tensor, from `at` on.
  struct Piece {
    std::size_t tensor = 0;
    std::uint64_t at = 0;
    std::uint64_t bytes = 0;
    std::shared_ptr<std::byte[]> buffer;
    storage::ReadTicket read;
  };
  // One tensor after another, piece by piece: the next is read while this one is looked at.
  struct Lane {
    Piece coming;
    Piece there;
    std::shared_ptr<std::byte[]> spare;
    std::unique_ptr<checkpoint::Xxh3> hash;  // of the tensor so far
    bool reads() const { return static_cast<bool>(coming.read); }
  };

  // Asks for what comes after `lane.there`.
  void read_next(Lane& lane) {
    Piece next;
    next.tensor = lane.there.tensor;
    next.at = lane.there.at + lane.there.bytes;
    if (!lane.there.read || next.at == tensor(next.tensor).bytes) {
      if (next_tensor_ == order_.size()) return;
      next.tensor = next_tensor_++;
      next.at = 0;
    }
    const TensorInfo& from = tensor(next.tensor);
    next.bytes = std::min(piece_bytes_, from.bytes - next.at);
    next.buffer = std::exchange(lane.spare, nullptr);
    if (!next.buffer) next.buffer = std::make_shared_for_overwrite<std::byte[]>(piece_bytes_);
    storage::ReadRequest request;
    request.extents = {{from.file, from.offset + next.at, next.bytes, next.buffer.get()}};
    request.owner = next.buffer;
    next.read = reader_->submit(std::move(request));
    lane.coming = std::move(next);
  }

  void examine(Lane& lane) {
    Piece& piece = lane.there;
    if (!piece.read) return;
    const TensorInfo& from = tensor(piece.tensor);
    Result& result = results_[piece.tensor];
    if (piece.at == 0) lane.hash = std::make_unique<checkpoint::Xxh3>();
    lane.hash->update({piece.buffer.get(), piece.bytes});
    format::find_nonfinite(from.dtype, {piece.buffer.get(), piece.bytes}, piece.at,
                           result.nonfinite);
    if (piece.at + piece.bytes == from.bytes) result.hash = lane.hash->digest();
    lane.spare = std::move(piece.buffer);
  }

  const Catalogue& catalogue_;
  const Progress& progress_;
  const Poll& poll_;
  std::unique_ptr<storage::Reader> reader_;
  std::optional<TensorHashes> hashes_;
  std::vector<std::size_t> order_;  // of the catalogue's tensors, as they lie in the files
  std::vector<Result> results_;     // in that order
  std::size_t next_tensor_ = 0;     // that no lane has taken
  std::uint64_t total_ = 0;
  std::uint64_t piece_bytes_ = 1;
};

}  // namespace

VerifyReport verify(const std::filesystem::path& folder, int threads, bool write,
                    const std::function<void(std::uint64_t, std::uint64_t)>& progress,
                    const Poll& poll, const storage::ReaderOptions& reading) {
  ask(poll);
  const checkpoint::ModelConfig config = checkpoint::read_config(folder);
  const Catalogue catalogue = Catalogue::open(folder);
  checkpoint::resolve_layout(catalogue, config);  // files may be sound and yet not be run
  storage::ReaderOptions expecting = reading;
  expecting.expected = catalogue.identities();
  Verifier verifier(catalogue, progress, poll, expecting);
  verifier.run(threads);
  VerifyReport report = verifier.report();
  if (write && report.problems.empty()) {
    checkpoint::write_tensor_hashes(catalogue.folder(), verifier.hashes());
    report.wrote = true;
  }
  return report;
}

}  // namespace dsfp4::engine
