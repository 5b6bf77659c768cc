"""Writes chat.json.gz: what transformers makes of strings and conversations.

    python tests/golden/make_chat_golden.py R1 V3.1 V4

takes folders with the tokenizer.json and tokenizer_config.json of DeepSeek-R1, V3.1 and V4. Needs
transformers; the tests do not. The tests take V4's tokenizer.json from PyPI; the others differ from
it in their added tokens alone, which are written here. The templates stay in their packages.
"""

import argparse
import gzip
import json
import sys
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fixtures.real_tokenizers import COUNT, GOLDEN, digest_of, string_digests
from fixtures.texts import conversations

_CONVERSATIONS = 200


def load(folder: Path, config: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Return Hugging Face's tokenizer of `folder`."""
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token=config["bos_token"]["content"],
        eos_token=config["eos_token"]["content"],
        clean_up_tokenization_spaces=False,
    )


def golden(folder: Path, v4_model: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of one model."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    for part in ("vocab", "merges"):
        assert content["model"][part] == v4_model[part], f"{folder}: {part} differs from V4's"
    theirs = load(folder, config)
    markup = [token["content"] for token in content["added_tokens"]]

    def encode(text: str) -> list[int]:
        return theirs.encode(text, add_special_tokens=False)

    names = ("add_bos_token", "bos_token", "eos_token")
    entry = {
        "added_tokens": content["added_tokens"],
        "config": {name: config[name] for name in names if name in config},
        "strings": string_digests(encode, markup, COUNT),
    }
    if "chat_template" in config:
        entry["conversations"] = [
            digest_of(
                encode(
                    theirs.apply_chat_template(
                        talk["messages"],
                        **{key: talk[key] for key in talk.keys() - {"messages"}},
                        chat_template=config["chat_template"],
                        tokenize=False,
                        add_generation_prompt=True,
                    )
                )
            )
            for talk in conversations(_CONVERSATIONS)
        ]
    return entry


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("r1", "v31", "v4"):
        parser.add_argument(name, type=Path)
    folders = vars(parser.parse_args())
    model = json.loads((folders["v4"] / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    entries = {name: golden(folder, model) for name, folder in folders.items()}
    text = json.dumps(entries, ensure_ascii=False, sort_keys=True)
    GOLDEN.write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main()
