// What the fuzzer's inputs mean; the corpus is written in the same terms.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

#include "checkpoint/tiny_checkpoint.h"

namespace dsfp4::fuzz {

inline constexpr const char* kFiles[] = {
    "config.json",
    "generation_config.json",
    "hf_quant_config.json",
    "model.safetensors.index.json",
    "model-00002-of-00002.safetensors",  // as it stands
    "model-00002-of-00002.safetensors",  // the header alone; length and data are added
};
inline constexpr std::size_t kWholeShard = 4;
inline constexpr std::size_t kHeader = 5;

struct Input {
  std::string file;   // its name
  std::string bytes;  // what is put there
  std::string sound;  // what belongs there
};

inline std::string sound_bytes(std::size_t part, const testing::TinyCheckpoint& sound) {
  const testing::JsonNode* const trees[] = {&sound.config, &sound.generation, &sound.quantization,
                                            &sound.index};
  return part < kWholeShard ? trees[part]->write()
                            : testing::TinyCheckpoint::file_of(sound.shards.at(1));
}

inline Input take_apart(std::string_view input, const testing::TinyCheckpoint& sound) {
  const std::size_t part = input.empty() ? 0 : static_cast<unsigned char>(input[0]) % 6;
  Input result{kFiles[part], std::string(input.substr(input.empty() ? 0 : 1)),
               sound_bytes(part, sound)};
  if (part != kHeader || result.bytes.size() < 2) return result;
  const auto low = static_cast<unsigned char>(result.bytes[0]);
  const auto high = static_cast<unsigned char>(result.bytes[1]);
  const std::string header = result.bytes.substr(2);
  result.bytes.clear();
  for (int i = 0; i < 8; ++i) result.bytes += static_cast<char>(header.size() >> (8 * i));
  result.bytes += header + std::string(low + 256u * high, '\x01');
  return result;
}

/// The sound file in the fuzzer's terms.
inline std::string seed_input(std::size_t part, const testing::TinyCheckpoint& sound) {
  std::string input(1, static_cast<char>(part));
  if (part != kHeader) return input + sound_bytes(part, sound);
  const testing::TinyShard& shard = sound.shards.at(1);
  input += static_cast<char>(shard.data.size() & 0xff);
  input += static_cast<char>(shard.data.size() >> 8);
  return input + shard.header.write();
}

}  // namespace dsfp4::fuzz
