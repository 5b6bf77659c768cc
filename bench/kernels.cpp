// Speed of the CPU backend's matrix products and expert kernels, one line a measurement, beside
// the read bandwidth of the same threads in the same run.
//
//   dsfp4_bench_kernels [--isa NAME] [--threads N] [--seconds S] [--only WORD] [--formats a,b]
//                       [--clock wall|cpu]
//
// Weights are random bytes over buffers that one measurement after the other walks through, so
// that no cache holds them (58 experts: 1.4 GB in NVFP4). `floor` is bytes / bandwidth / seconds.
// `--clock cpu` counts the time that this process was given, over the threads: a rough figure on a
// machine that has other work.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "base/thread_pool.h"
#include "ops/cpu/cpu_backend.h"

namespace {

using dsfp4::format::WeightFormat;
using dsfp4::format::WeightView;
using dsfp4::ops::ExpertTask;
using dsfp4::ops::ExpertView;

constexpr std::int64_t kHidden = 7168;
constexpr std::int64_t kIntermediate = 2048;

struct Options {
  std::string isa;
  std::string only;
  std::string formats = "nvfp4,mxfp4,fp8,bf16";
  int threads = dsfp4::available_cores();
  double seconds = 1.5;
  bool cpu_clock = false;
};

double wall_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double cpu_seconds() {
  timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

/// Median seconds of a run; at least 3 runs, about options.seconds in all, after one to warm up.
double median_seconds(const Options& options, const std::function<void()>& run) {
  const auto clock = [&] {
    return options.cpu_clock ? cpu_seconds() / options.threads : wall_seconds();
  };
  std::vector<double> times;
  run();
  const double start = wall_seconds();
  while (times.size() < 3 || wall_seconds() - start < options.seconds) {
    const double before = clock();
    run();
    times.push_back(clock() - before);
  }
  std::nth_element(times.begin(), times.begin() + static_cast<long>(times.size() / 2), times.end());
  return times[times.size() / 2];
}

/// A weight of random codes, none of them NaN, with unremarkable scales.
class RandomWeight {
 public:
  RandomWeight(WeightFormat format, std::int64_t rows, std::int64_t cols, std::uint64_t seed)
      : data_(dsfp4::format::data_bytes(format, rows, cols) + 1),
        scales_(dsfp4::format::scale_bytes(format, rows, cols) + 1) {
    std::mt19937_64 bits(seed);
    for (std::size_t i = 0; i + 8 <= data_.size(); i += 8) {
      std::uint64_t word = bits();
      if (format == WeightFormat::kFp8Block) word &= 0xb7b7b7b7b7b7b7b7u;
      if (format == WeightFormat::kBF16) word = (word & 0x807f807f807f807fu) | 0x3c003c003c003c00u;
      std::memcpy(data_.data() + i, &word, 8);
    }
    if (format == WeightFormat::kFp8Block) {
      const float scale = 0.01f;
      for (std::size_t i = 1; i + 4 <= scales_.size(); i += 4) {
        std::memcpy(scales_.data() + i, &scale, 4);
      }
    } else {
      const unsigned base = format == WeightFormat::kNvfp4 ? 0x30 : 118;
      for (std::byte& scale : scales_) scale = static_cast<std::byte>(base + bits() % 8);
    }
    // One byte in: files give no better alignment.
    view_ = {format, rows, cols, data_.data() + 1, scales_.data() + 1, 0.01f};
  }
  const WeightView& view() const { return view_; }

 private:
  std::vector<std::byte> data_, scales_;
  WeightView view_;
};

std::size_t bytes_of(const WeightView& w) {
  return dsfp4::format::data_bytes(w.format, w.rows, w.cols) +
         dsfp4::format::scale_bytes(w.format, w.rows, w.cols);
}

struct Expert {
  Expert(WeightFormat format, std::uint64_t seed)
      : gate(format, kIntermediate, kHidden, seed),
        up(format, kIntermediate, kHidden, seed + 1),
        down(format, kHidden, kIntermediate, seed + 2),
        view{gate.view(), up.view(), down.view()} {}
  Expert(const Expert&) = delete;
  Expert& operator=(const Expert&) = delete;
  std::size_t bytes() const {
    return bytes_of(gate.view()) + bytes_of(up.view()) + bytes_of(down.view());
  }
  RandomWeight gate, up, down;
  ExpertView view;
};

std::vector<float> random_floats(std::int64_t count) {
  std::mt19937 bits(7);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& v : values) v = normal(bits);
  return values;
}

class Bench {
 public:
  explicit Bench(const Options& options)
      : options_(options),
        isa_(dsfp4::ops::cpu::isa_named(options.isa)),
        backend_(options.threads, isa_),
        pool_(options.threads) {
    bandwidth_ = measure_bandwidth();
    std::printf("isa %s, %d threads, read bandwidth %.1f GB/s\n", std::string(isa_.name).c_str(),
                options_.threads, bandwidth_ * 1e-9);
    std::printf("%-34s %11s %9s %9s %7s\n", "what", "ms", "GB/s", "GFLOP/s", "floor");
  }

  void run() {
    for (const WeightFormat format : {WeightFormat::kNvfp4, WeightFormat::kMxfp4,
                                      WeightFormat::kFp8Block, WeightFormat::kBF16}) {
      const std::string name(dsfp4::format::weight_format_name(format));
      if (("," + options_.formats + ",").find("," + name + ",") == std::string::npos) continue;
      layers(format, name);
      matrices(format, name);
    }
  }

 private:
  // Up to 16 tokens are taken for a decode step, more for a prompt.
  static dsfp4::ops::Phase phase_of(std::int64_t tokens) {
    return tokens <= 16 ? dsfp4::ops::Phase::kDecode : dsfp4::ops::Phase::kPrefill;
  }
  bool wanted(const std::string& what) const {
    return what.find(options_.only) != std::string::npos;
  }

  void report(const std::string& what, double seconds, std::size_t bytes, double flop) const {
    std::printf("%-34s %11.3f %9.2f %9.1f %7.3f\n", what.c_str(), seconds * 1e3,
                static_cast<double>(bytes) / seconds * 1e-9, flop / seconds * 1e-9,
                static_cast<double>(bytes) / bandwidth_ / seconds);
    std::fflush(stdout);
  }

  double measure_bandwidth() {
    constexpr std::int64_t kWords = std::int64_t{64} << 20;  // 512 MiB
    constexpr std::int64_t kGrain = 1 << 16;
    const std::vector<std::uint64_t> words(kWords, 3);
    std::vector<std::uint64_t> sums(kWords / kGrain);
    const double seconds = median_seconds(options_, [&] {
      pool_.parallel_for(kWords, kGrain, [&](std::int64_t begin, std::int64_t end) {
        std::uint64_t sum[8] = {};
        for (std::int64_t i = begin; i < end; i += 8) {
          for (int k = 0; k < 8; ++k) sum[k] += words[static_cast<std::size_t>(i + k)];
        }
        sums[static_cast<std::size_t>(begin / kGrain)] =
            std::accumulate(sum, sum + 8, std::uint64_t{0});
      });
    });
    if (std::accumulate(sums.begin(), sums.end(), std::uint64_t{0}) != 3 * kWords) std::abort();
    return kWords * 8.0 / seconds;
  }

  // `pairs` (token, slot) pairs over `used` experts, which move through all of them run by run.
  void layer(const std::string& what, std::int64_t tokens, std::int64_t top_k, std::size_t used) {
    if (!wanted(what)) return;
    const std::int64_t pairs = tokens * top_k;
    const auto phase = phase_of(tokens);
    const auto x = random_floats(tokens * kHidden);
    std::vector<float> hidden(static_cast<std::size_t>(pairs * kIntermediate));
    std::vector<float> out(static_cast<std::size_t>(pairs * kHidden));
    std::vector<std::int32_t> order(static_cast<std::size_t>(pairs));
    std::iota(order.begin(), order.end(), 0);
    std::size_t next = 0;
    const double seconds = median_seconds(options_, [&] {
      std::vector<ExpertTask> tasks;
      std::size_t done = 0;
      for (std::size_t e = 0; e < used; ++e) {
        const std::size_t end = order.size() * (e + 1) / used;
        tasks.push_back({&experts_[next++ % experts_.size()]->view,
                         std::span(order).subspan(done, end - done)});
        done = end;
      }
      backend_.begin_step(phase);
      backend_.experts(tasks, top_k, {x.data(), tokens, kHidden, kHidden},
                       {hidden.data(), pairs, kIntermediate, kIntermediate},
                       {out.data(), pairs, kHidden, kHidden});
    });
    report(what, seconds, used * experts_.front()->bytes(),
           static_cast<double>(pairs) * 6.0 * kHidden * kIntermediate);
  }

  void layers(WeightFormat format, const std::string& name) {
    if (!wanted("layer " + name + " 1 8 64 128")) return;
    const std::size_t count = format == WeightFormat::kBF16 ? 16 : 58;
    experts_.clear();
    for (std::size_t i = 0; i < count; ++i) {
      experts_.push_back(std::make_unique<Expert>(format, 3 * i));
    }
    layer("layer " + name + " 1 token, 8 experts", 1, 8, 8);
    if (count >= 58) layer("layer " + name + " 8 tokens, 58 experts", 8, 8, 58);
    layer("layer " + name + " 4 an expert", 8, 4, 8);
    layer("layer " + name + " 16 an expert", 32, 8, 16);
    layer("layer " + name + " 128 an expert", 128, 8, 8);
    experts_.clear();
  }

  void matrices(WeightFormat format, const std::string& name) {
    if (!wanted("matrix " + name)) return;
    constexpr std::int64_t kRows = 7168;
    std::vector<std::unique_ptr<RandomWeight>> weights;
    const int count = format == WeightFormat::kBF16 ? 5 : 16;
    for (int i = 0; i < count; ++i) {
      weights.push_back(
          std::make_unique<RandomWeight>(format, kRows, kHidden, static_cast<std::uint64_t>(i)));
    }
    std::size_t next = 0;
    for (const std::int64_t tokens : {1, 2, 4, 6, 8, 16, 64, 512}) {
      const std::string what = "matrix " + name + " " + std::to_string(tokens) + " tokens";
      if (!wanted(what)) continue;
      const auto x = random_floats(tokens * kHidden);
      std::vector<float> y(static_cast<std::size_t>(tokens * kRows));
      const double seconds = median_seconds(options_, [&] {
        backend_.begin_step(phase_of(tokens));
        backend_.linear(weights[next++ % weights.size()]->view(),
                        {x.data(), tokens, kHidden, kHidden}, {y.data(), tokens, kRows, kRows},
                        dsfp4::ops::Inputs::kBf16);
      });
      report(what, seconds, bytes_of(weights[0]->view()),
             2.0 * static_cast<double>(tokens) * kRows * kHidden);
    }
  }

  Options options_;
  const dsfp4::ops::cpu::Isa& isa_;
  dsfp4::ops::cpu::CpuBackend backend_;
  dsfp4::ThreadPool pool_;
  double bandwidth_ = 0.0;
  std::vector<std::unique_ptr<Expert>> experts_;
};

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i];
    const std::string value = argv[i + 1];
    if (name == "--isa") options.isa = value;
    if (name == "--threads") options.threads = std::stoi(value);
    if (name == "--seconds") options.seconds = std::stod(value);
    if (name == "--only") options.only = value;
    if (name == "--formats") options.formats = value;
    if (name == "--clock") options.cpu_clock = value == "cpu";
  }
  return options;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    Bench(parse(argc, argv)).run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "dsfp4_bench_kernels: %s\n", error.what());
    return 1;
  }
  return 0;
}
