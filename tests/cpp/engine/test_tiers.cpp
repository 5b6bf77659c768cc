#include <future>
#include <string>
#include <string_view>

#include <gtest/gtest.h>

#include "checkpoint/tiny_checkpoint.h"
#include "dsfp4/error.h"
#include "dsfp4/log.h"
#include "engine/engine.h"
#include "engine/tiers.h"

namespace dsfp4::engine {
namespace {

// The file cannot be written, and that is said: at a moment when the next in line computes.
TEST(Tiers, WhatIsRememberedIsWrittenOutsideTheTurn) {
  const testing::ScratchFolder folder;
  testing::make_tiny_checkpoint(testing::TinyKind::kNvfp4).write(folder.path());
  testing::write_file(folder.path() / "file", "no folder");
  LoadOptions options;
  options.threads = 1;
  options.max_context = 16;
  options.strategy.cpu_cache_size = 0.0;
  options.warm_start_folder = (folder.path() / "file" / "deep").string();
  Engine engine(folder.path(), options);

  int said = 0;
  set_log_callback([&](LogLevel, std::string_view message) {
    if (message.find("not remembered") == message.npos) return;
    ++said;
    int patience = 200;
    const auto next = [&] { engine.set_memory_config({}, [&] { return --patience > 0; }); };
    EXPECT_NO_THROW(std::async(std::launch::async, next).get());
  });
  constexpr std::int32_t kPrompt[] = {5, 3, 9};
  GenerateOptions generate;
  generate.max_tokens = 2;
  for (int i = 0; i < 2; ++i) engine.generate(kPrompt, generate, {});
  set_log_callback({});
  EXPECT_EQ(said, 1);
}

}  // namespace
}  // namespace dsfp4::engine
