// A program as it was compiled before its library was upgraded: prints the ids that continue a
// prompt, one a line, and fails where the library touched memory beyond the program's structs.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <new>
#include <string>
#include <vector>

#include "dsfp4/model.h"

namespace {

constexpr unsigned char kPoison = 0xA5;  // 8 of them are no pointer that could be followed

// A struct of the program with bytes around it that belong to others.
template <typename Struct>
struct Guarded {
  template <typename Make>
  explicit Guarded(Make make) : value(make()) {
    std::memset(before, kPoison, sizeof(before));
    std::memset(after, kPoison, sizeof(after));
  }
  bool intact() const {
    for (const unsigned char* guard : {before, after}) {
      for (std::size_t i = 0; i < sizeof(before); ++i) {
        if (guard[i] != kPoison) return false;
      }
    }
    return true;
  }

  unsigned char before[256];
  Struct value;
  unsigned char after[256];
};

int run(const char* folder, const char* max_tokens, const std::vector<std::int32_t>& prompt) {
  const Guarded<dsfp4::LoadOptions> load([] {
    dsfp4::LoadOptions options;
    options.device = "cpu";
    options.reader = "pread";
    return options;
  });
  const Guarded<dsfp4::GenerateOptions> generate([&] {
    dsfp4::GenerateOptions options;
    options.max_tokens = std::stoll(max_tokens);
    return options;
  });
  const Guarded<dsfp4::ForwardOptions> forward(
      [] { return dsfp4::ForwardOptions{.decode = true}; });

  dsfp4::Model model = dsfp4::Model::load(folder, load.value);
  std::vector<float> logits(prompt.size() * static_cast<std::size_t>(model.vocab_size()));
  model.forward(prompt, logits, forward.value);
  // Whatever is written beyond the struct that comes back is written where `after` is set later, so
  // the guards are set first and the struct is filled in place a second time.
  Guarded<dsfp4::ModelStats> stats([&] { return model.stats(); });
  Guarded<dsfp4::GenerationResult> result(
      [&] { return model.generate(prompt, generate.value, [](std::int32_t) { return true; }); });
  new (&stats.value) dsfp4::ModelStats(model.stats());
  result.value.~GenerationResult();
  new (&result.value) dsfp4::GenerationResult(model.generate(prompt, generate.value));

  for (const std::int32_t id : result.value.tokens) std::printf("%d\n", id);
  if (!load.intact() || !generate.intact() || !forward.intact() || !stats.intact() ||
      !result.intact()) {
    std::fputs("the library wrote beyond a struct of the program\n", stderr);
    return 1;
  }
  if (stats.value.reserved_bytes < model.weight_bytes() || logits[0] == 0.0f ||
      result.value.prompt_tokens != static_cast<std::int64_t>(prompt.size())) {
    std::fputs("the library did not fill a struct of the program\n", stderr);
    return 1;
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) return 2;
  std::vector<std::int32_t> prompt;
  for (int i = 3; i < argc; ++i) prompt.push_back(std::stoi(argv[i]));
  try {
    return run(argv[1], argv[2], prompt);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
