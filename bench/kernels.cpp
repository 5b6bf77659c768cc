// The CPU backend's matrix products and experts at R1's shapes, beside the rate at which the same
// threads read memory in the same run. For machines without Python and for trying a kernel out;
// `dsfp4 bench kernels` measures more and the same way.
//
//   dsfp4_bench_kernels [--isa NAME] [--threads N] [--runs N] [--formats a,b] [--tokens n,m]
//
// Medians of `runs`; operands rotate through 1.6 GB. `floor` is bytes / read rate / time.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "base/cores.h"
#include "ops/cpu/cpu_backend.h"
#include "ops/measure/kernel_bench.h"

namespace {

using dsfp4::format::WeightFormat;
using dsfp4::ops::measure::KernelBench;
using dsfp4::ops::measure::Seconds;

constexpr std::int64_t kHidden = 7168;
constexpr std::int64_t kIntermediate = 2048;
constexpr std::int64_t kAttended = 128 * 128;  // columns of o_proj
constexpr std::int32_t kExperts = 256;
constexpr std::int64_t kTopK = 8;
constexpr double kRotation = 1.6e9;

struct Options {
  std::string isa;
  int threads = dsfp4::available_cores();
  int runs = 11;
  std::string formats = "nvfp4,mxfp4,fp8,bf16";
  std::vector<std::int64_t> tokens = {1, 8};
};

double median(Seconds seconds) {
  std::sort(seconds.begin(), seconds.end());
  return seconds[seconds.size() / 2];
}

double bytes_of(WeightFormat format, std::int64_t rows, std::int64_t cols) {
  return static_cast<double>(dsfp4::format::data_bytes(format, rows, cols) +
                             dsfp4::format::scale_bytes(format, rows, cols));
}

/// The experts of every run and token, numbered so that no two runs share any; and how many a run
/// has.
std::pair<std::vector<std::int32_t>, std::int32_t> choices(std::int64_t tokens, int runs) {
  std::mt19937 bits(0);
  std::vector<std::int32_t> all(kExperts);
  std::iota(all.begin(), all.end(), 0);
  std::vector<std::int32_t> number(kExperts, -1);
  std::vector<std::int32_t> pattern;
  std::int32_t distinct = 0;
  for (std::int64_t t = 0; t < tokens; ++t) {
    std::shuffle(all.begin(), all.end(), bits);
    for (std::int64_t k = 0; k < kTopK; ++k) {
      std::int32_t& n = number[static_cast<std::size_t>(all[static_cast<std::size_t>(k)])];
      if (n < 0) n = distinct++;
      pattern.push_back(n);
    }
  }
  std::vector<std::int32_t> chosen;
  for (int run = 0; run < runs; ++run) {
    for (const std::int32_t e : pattern) chosen.push_back(e + run * distinct);
  }
  return {chosen, distinct};
}

void measure(const Options& options) {
  const auto& isa = dsfp4::ops::cpu::isa_named(options.isa);
  KernelBench bench(std::make_unique<dsfp4::ops::cpu::CpuBackend>(options.threads, isa),
                    options.threads);
  const double rate = kRotation / median(bench.read_memory(static_cast<std::size_t>(kRotation), 5));
  std::printf("isa %s, %d threads, memory read at %.1f GB/s\n%-8s %-6s %6s %10s %7s %9s %6s\n",
              bench.isa().c_str(), options.threads, rate * 1e-9, "what", "format", "tokens", "ms",
              "GB/s", "GFLOP/s", "floor");
  const auto report = [&](const char* what, const std::string& format, std::int64_t tokens,
                          const Seconds& seconds, double bytes, double flop) {
    const double s = median(seconds);
    std::printf("%-8s %-6s %6ld %10.3f %7.1f %9.1f %6.2f\n", what, format.c_str(),
                static_cast<long>(tokens), s * 1e3, bytes / s * 1e-9, flop / s * 1e-9,
                bytes / rate / s);
    std::fflush(stdout);
  };
  for (const WeightFormat format :
       {WeightFormat::kNvfp4, WeightFormat::kMxfp4, WeightFormat::kFp8Block, WeightFormat::kBF16}) {
    const std::string name(dsfp4::format::weight_format_name(format));
    if (("," + options.formats + ",").find("," + name + ",") == std::string::npos) continue;
    const double matrix = bytes_of(format, kHidden, kAttended);
    const double expert =
        2 * bytes_of(format, kIntermediate, kHidden) + bytes_of(format, kHidden, kIntermediate);
    for (const std::int64_t tokens : options.tokens) {
      report("matrix", name, tokens,
             bench.linear(format, kHidden, kAttended, tokens,
                          static_cast<std::int64_t>(kRotation / matrix) + 1, options.runs),
             matrix, 2.0 * static_cast<double>(tokens * kHidden * kAttended));
      const auto [chosen, distinct] = choices(tokens, options.runs + 1);
      report("experts", name, tokens,
             bench.experts(format, kHidden, kIntermediate,
                           static_cast<std::int64_t>(kRotation / expert) + 1, tokens, kTopK, chosen,
                           options.runs),
             expert * distinct,
             6.0 * static_cast<double>(tokens * kTopK * kHidden * kIntermediate));
    }
  }
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i];
    const std::string value = argv[i + 1];
    if (name == "--isa") options.isa = value;
    if (name == "--threads") options.threads = std::stoi(value);
    if (name == "--runs") options.runs = std::stoi(value);
    if (name == "--formats") options.formats = value;
    if (name == "--tokens") {
      options.tokens.clear();
      std::istringstream list(value);
      for (std::string n; std::getline(list, n, ',');) options.tokens.push_back(std::stol(n));
    }
  }
  return options;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    measure(parse(argc, argv));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "dsfp4_bench_kernels: %s\n", error.what());
    return 1;
  }
  return 0;
}
