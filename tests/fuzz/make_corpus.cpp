// Writes the fuzzer's first inputs, one for each file of a sound checkpoint, into a folder.
#include <cstdio>
#include <exception>
#include <filesystem>

#include "checkpoint/tiny_checkpoint.h"
#include "fuzz_input.h"

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fputs("usage: make_corpus FOLDER\n", stderr);
    return 2;
  }
  try {
    const std::filesystem::path folder = argv[1];
    std::filesystem::create_directories(folder);
    const auto sound = dsfp4::testing::make_tiny_checkpoint(dsfp4::testing::TinyKind::kNvfp4);
    for (std::size_t part = 0; part < std::size(dsfp4::fuzz::kFiles); ++part) {
      dsfp4::testing::write_file(folder / ("sound-" + std::to_string(part)),
                                 dsfp4::fuzz::seed_input(part, sound));
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "make_corpus: %s\n", error.what());
    return 1;
  }
  return 0;
}
