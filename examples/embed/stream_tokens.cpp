// Loads a checkpoint and streams the token ids that continue a prompt, one a line.
#include <cstdint>
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "dsfp4/error.h"
#include "dsfp4/log.h"
#include "dsfp4/model.h"

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fputs("usage: stream_tokens CHECKPOINT_FOLDER MAX_TOKENS PROMPT_ID...\n", stderr);
    return 2;
  }
  dsfp4::set_log_callback([](dsfp4::LogLevel level, std::string_view message) {
    if (level < dsfp4::LogLevel::kWarning) return;
    std::fprintf(stderr, "dsfp4: %.*s\n", static_cast<int>(message.size()), message.data());
  });
  try {
    dsfp4::GenerateOptions options;
    options.max_tokens = std::stoll(argv[2]);
    std::vector<std::int32_t> prompt;
    for (int i = 3; i < argc; ++i) prompt.push_back(std::stoi(argv[i]));

    dsfp4::Model model = dsfp4::Model::load(argv[1]);
    std::fprintf(stderr, "%.1f MB of weights on %s\n",
                 static_cast<double>(model.weight_bytes()) * 1e-6, model.device().c_str());
    const auto result = model.generate(prompt, options, [](std::int32_t id) {
      std::printf("%d\n", id);
      return std::fflush(stdout) == 0;  // false cancels
    });
    std::fprintf(stderr, "%zu tokens after %lld\n", result.tokens.size(),
                 static_cast<long long>(result.prompt_tokens));
  } catch (const dsfp4::CheckpointError& error) {  // what it knows is in members, too
    std::fprintf(stderr, "bad checkpoint, see %s: %s\n", error.file().c_str(), error.what());
    return 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
