#include "engine/kept_rates.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <functional>
#include <string>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <utility>

#include "base/files.h"
#include "base/log.h"
#include "dsfp4/error.h"
#include "ops/cuda_plugin.h"

namespace dsfp4::engine {
namespace {

// The number changes with what the lines mean.
constexpr std::string_view kTitle = "dsfp4 rates 1";
constexpr double kMost = 1e15;  // bytes a second

using Field = std::pair<std::string_view, double Rates::*>;
constexpr std::array<Field, 6> kFields{{{"ssd", &Rates::ssd},
                                        {"host_experts", &Rates::host_experts},
                                        {"copy_in", &Rates::copy_in},
                                        {"copy_out", &Rates::copy_out},
                                        {"both_host_experts", &Rates::both_host_experts},
                                        {"both_copy_in", &Rates::both_copy_in}}};

// The words of a text that may have any blanks and line ends, one blank between them.
std::string words(std::string_view text) {
  std::string out;
  for (const char c : text) {
    const bool blank = static_cast<unsigned char>(c) <= ' ';
    if (!blank) out += c;
    if (blank && !out.empty() && out.back() != ' ') out += ' ';
  }
  if (!out.empty() && out.back() == ' ') out.pop_back();
  return out;
}

std::string processor(const SystemRoots& roots) {
  const std::string text = read_whole_file(roots.proc / "cpuinfo");
  const std::size_t name = text.find("model name");
  const std::size_t colon = text.find(':', name);
  if (name == text.npos || colon == text.npos) return "unknown processor";
  return words(std::string_view(text).substr(colon + 1, text.find('\n', colon) - colon - 1));
}

// Its model and serial number; where the system does not say these, the number of its file system.
std::string disk(const std::filesystem::path& file, const SystemRoots& roots) {
  struct stat status {};
  if (::stat(file.c_str(), &status) != 0) return "unknown disk";
  std::string number =
      std::to_string(major(status.st_dev)) + ":" + std::to_string(minor(status.st_dev));
  const std::filesystem::path block = roots.sys / "dev" / "block" / number;
  for (const char* const device : {"device", "../device"}) {  // a whole disk, a partition
    const std::string serial = words(read_whole_file(block / device / "serial"));
    if (!serial.empty()) return words(read_whole_file(block / device / "model")) + " " + serial;
  }
  return number;
}

// Takes the next line off, if it ends.
std::optional<std::string_view> take_line(std::string_view& text) {
  const std::size_t end = text.find('\n');
  if (end == text.npos) return std::nullopt;
  const std::string_view line = text.substr(0, end);
  text.remove_prefix(end + 1);
  return line;
}

std::optional<double> parse(std::string_view line, std::string_view name) {
  if (!line.starts_with(name) || line.substr(name.size(), 1) != " ") return std::nullopt;
  line.remove_prefix(name.size() + 1);
  double value = 0.0;
  const auto [end, error] = std::from_chars(line.data(), line.data() + line.size(), value);
  if (error != std::errc() || end != line.data() + line.size()) return std::nullopt;
  if (!(value >= 0.0 && value <= kMost)) return std::nullopt;
  return value;
}

std::optional<Rates> parse(std::string_view text, const std::string& machine) {
  if (take_line(text) != kTitle || take_line(text) != machine) return std::nullopt;
  Rates rates;
  for (const auto& [name, field] : kFields) {
    const std::optional<std::string_view> line = take_line(text);
    const std::optional<double> value = line ? parse(*line, name) : std::nullopt;
    if (!value) return std::nullopt;
    rates.*field = *value;
  }
  return text.empty() ? std::optional(rates) : std::nullopt;
}

Wires wires_of(const Computers& computers, const LoadedWeights& loaded,
               const residency::Plan& plan) {
  const bool on_gpu = computers.host != nullptr;
  const model::ModelSpec& spec = computers.spec;
  return {.host = on_gpu ? *computers.host : computers.ops,
          .gpu = on_gpu ? &computers.ops.device() : nullptr,
          .reader = *loaded.reader,
          .images = loaded.images,
          .slots = plan.slots,
          .slot_bytes = loaded.sizes.slot_bytes,
          .device_slots = plan.device_slots,
          .device_slot_bytes = loaded.sizes.device_slot_bytes,
          .top_k = spec.router.top_k,
          .hidden_size = spec.hidden_size,
          .moe_intermediate_size = spec.moe_intermediate_size};
}

std::string gpu_name(const Computers& computers, const LoadOptions& options) {
  if (computers.host == nullptr) return {};
  return options.device == "cuda" ? ops::cuda_device(0).name : std::string(computers.ops.name());
}

std::string decimals(double value) {
  std::array<char, 32> text{};
  const auto end =
      std::to_chars(text.data(), text.data() + text.size(), value, std::chars_format::fixed, 2);
  return {text.data(), end.ptr};
}

// The rates, some of them 0 after an error, which is said.
Rates measured(const Wires& wires, const RateLimits& limits, const Poll& poll) {
  const auto start = std::chrono::steady_clock::now();
  Rates rates;
  std::string problem;
  try {
    measure_rates(wires, limits, poll, rates);
  } catch (const IoError& error) {
    problem = error.what();
  } catch (const CudaError& error) {
    problem = error.what();
  } catch (const MemoryLimitError& error) {
    problem = error.what();
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::string said = "rates measured in " + decimals(seconds.count()) + " s, GB/s:";
  for (const auto& [name, field] : kFields) {
    if (rates.*field <= 0.0) continue;
    said += ' ';
    said.append(name) += ' ' + decimals(rates.*field * 1e-9);
  }
  if (!problem.empty()) said += "; the others are unknown: " + problem;
  log(LogLevel::kInfo, said);
  return rates;
}

void keep(const Rates& rates, const KeptRates& kept) {
  try {
    kept.save(rates);
  } catch (const IoError& error) {
    log(LogLevel::kInfo, std::string("the rates are not kept: ") + error.what());
  }
}

}  // namespace

std::string machine_line(int threads, std::string_view gpu, const std::filesystem::path& file,
                         std::string_view reader, const SystemRoots& roots) {
  return processor(roots) + " | " + std::to_string(threads) + " threads | " +
         (gpu.empty() ? "no GPU" : words(gpu)) + " | " + disk(file, roots) + " | " +
         std::string(reader);
}

// A hash that the next library computes differently costs one measurement.
KeptRates::KeptRates(const std::filesystem::path& folder, std::string machine)
    : path_(folder / (std::to_string(std::hash<std::string>()(machine)) + ".rates")),
      machine_(std::move(machine)) {}

std::optional<Rates> KeptRates::load() const {
  const std::string text = read_whole_file(path_);
  if (text.empty()) return std::nullopt;
  const std::optional<Rates> rates = parse(text, machine_);
  if (!rates) {
    log(LogLevel::kInfo, "the file of rates '" + path_.string() +
                             "' is damaged or of another machine, so it is not used");
  }
  return rates;
}

void KeptRates::save(const Rates& rates) const {
  std::string text = std::string(kTitle) + "\n" + machine_ + "\n";
  for (const auto& [name, field] : kFields) {
    text += std::string(name) + " " + std::to_string(std::llround(rates.*field)) + "\n";
  }
  make_folder(path_.parent_path());
  replace_file(path_, text);
}

Rates known_rates(const Computers& computers, const LoadedWeights& loaded,
                  const residency::Plan& plan, const LoadOptions& options, int threads,
                  const RateLimits& limits, const Poll& poll) {
  if (!plan.tiered || options.warm_start_folder.empty()) return {};
  const Wires wires = wires_of(computers, loaded, plan);
  const KeptRates kept(
      options.warm_start_folder,
      machine_line(threads, gpu_name(computers, options), loaded.check->catalogue().files().front(),
                   std::string(wires.reader.name()) +
                       (options.direct_reads ? "" : ", through the page cache") + ", experts of " +
                       std::to_string(wires.images.empty() ? 0 : wires.images[0].files.bytes()) +
                       " bytes"));
  std::optional<Rates> rates = kept.load();
  if (!rates && are_measurable(wires, limits)) {
    rates = measured(wires, limits, poll);
    // The last one is known if all are.
    const bool whole = rates->host_experts > 0.0 && (!wires.gpu || rates->copy_out > 0.0);
    if (whole && options.ssd_rate == 0) keep(*rates, kept);
  }
  if (!rates) return {};
  if (options.ssd_rate > 0) {
    rates->ssd = std::min(rates->ssd, static_cast<double>(options.ssd_rate));
  }
  return *rates;
}

}  // namespace dsfp4::engine
