"""The checkpoint's own byte-level tokenizer: text to ids, and ids to text as they arrive."""

import codecs
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from dsfp4._checks import check_integer
from dsfp4.errors import CheckpointError, ParameterError, UnsupportedError
from dsfp4.files import read_checkpoint_file
from dsfp4.jsonfile import parse_json, read_json, read_optional_json


def _byte_alphabet() -> dict[str, int]:
    """Map each character of a byte-level vocabulary to its byte.

    Printable Latin-1 characters stand for themselves; the other 68 bytes are numbered from 256.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet


_ALPHABET = _byte_alphabet()

# Around the model's thoughts and its tool calls. They are part of the text, also where they are
# marked as special.
THINK_START = "<think>"
THINK_END = "</think>"
CALLS_BEGIN = "<｜tool▁calls▁begin｜>"
CALLS_END = "<｜tool▁calls▁end｜>"
CALL_BEGIN = "<｜tool▁call▁begin｜>"
CALL_END = "<｜tool▁call▁end｜>"
CALL_SEPARATOR = "<｜tool▁sep｜>"
_TEXT = (THINK_START, THINK_END, CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, CALL_SEPARATOR)


class Tokenizer:
    """Reads tokenizer.json and tokenizer_config.json of the checkpoint in `folder`.

    `markup` are the texts of the added tokens, which become one id each wherever they occur in
    encode()'s text. Raises IoError or CheckpointError for files that are absent or malformed, and
    UnsupportedError for a tokenizer that is not byte-level.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        data = read_checkpoint_file(path)
        vocabulary = parse_json(data, path)
        if (vocabulary.get("decoder") or {}).get("type") != "ByteLevel":
            raise UnsupportedError(f"'{path}' is not a byte-level tokenizer as DeepSeek's are")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"'{path}' is malformed: {error}", file=str(path)) from error
        if _normalizes(vocabulary.get("normalizer")):
            raise UnsupportedError(f"'{path}' has a normalizer, which DeepSeek's have not")
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = frozenset(added)
        self.markup = [token.content for token in added.values()]
        self._special = {
            id for id, token in added.items() if token.special and token.content not in _TEXT
        }
        self._path = path
        self._plain_tokenizer: tokenizers.Tokenizer | None = None
        config_path = folder / "tokenizer_config.json"
        config = read_optional_json(config_path)
        self.bos_token = _token_text(config.get("bos_token"))
        self.eos_token = _token_text(config.get("eos_token"))
        self.bos_id = self._tokenizer.token_to_id(self.bos_token) if self.bos_token else None
        self.add_bos_token = bool(config.get("add_bos_token", False))
        if self.add_bos_token and self.bos_id is None:
            raise CheckpointError(
                f"'{config_path}' sets add_bos_token, but its bos_token is not in '{path}'",
                file=str(config_path),
            )

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, nothing added."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ParameterError(
                f"the text is not valid Unicode at character {error.start}", parameter="prompt"
            ) from error
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Return the ids of `text` where markup in it is plain text: none is an added token's."""
        ids = self.encode(text)
        if self._added.isdisjoint(ids):
            return ids
        if self._plain_tokenizer is None:
            self._plain_tokenizer = _without_added_tokens(read_json(self._path))
        plain: list[int] = self._plain_tokenizer.encode(text, add_special_tokens=False).ids
        return plain

    def encode_disguised(self, text: str, show: Callable[[str], str]) -> list[int]:
        """Return the ids of `text`, in which markup counts; what lies between is shown, then plain.

        See markup.py for what is disguised and why.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids: list[int] = []
        done = 0
        for id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if id in self._added:
                ids += self.encode_plain(show(text[done:start]))
                ids.append(id)
                done = end
        return ids + self.encode_plain(show(text[done:]))

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a raw prompt, with the begin id in front if the checkpoint wants it."""
        ids = self.encode(text)
        return [self.bos_id, *ids] if self.add_bos_token and self.bos_id is not None else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, without special tokens; broken UTF-8 becomes U+FFFD."""
        return "".join(self.decode_pieces(ids))

    def decode_pieces(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of `ids` piece by piece, never half a character.

        The pieces joined are the text of all ids together. Raises ParameterError for what is no id.
        """
        decoder = self.decoder()
        for id in ids:
            if piece := decoder.push(check_integer("ids", id)):
                yield piece
        if rest := decoder.finish():
            yield rest

    def decoder(self) -> "PieceDecoder":
        """Return a decoder for the ids of one text."""
        return PieceDecoder(self._bytes)

    def _bytes(self, id: int) -> bytes:
        # Ids beyond the vocabulary are padding of the embedding matrix; they have no text.
        token = None if id in self._special else self._tokenizer.id_to_token(id)
        if token is None:
            return b""
        try:
            return bytes(_ALPHABET[character] for character in token)
        except KeyError:
            return bytes(token.encode())  # an added token, which is not spelt in the alphabet


class PieceDecoder:
    """Turns the ids of one text into characters, each as soon as its last byte is there."""

    def __init__(self, to_bytes: Callable[[int], bytes]) -> None:
        self._to_bytes = to_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """Return the characters that `id` completes."""
        return self._decoder.decode(self._to_bytes(id))

    def finish(self) -> str:
        """Return U+FFFD if the text ended within a character."""
        return self._decoder.decode(b"", final=True)


def _normalizes(normalizer: Any) -> bool:
    """Tell whether `normalizer`, of tokenizer.json, changes any text."""
    return bool(normalizer) and not (
        normalizer.get("type") == "Sequence" and not normalizer.get("normalizers")
    )


def _without_added_tokens(vocabulary: dict[str, Any]) -> tokenizers.Tokenizer:
    """Return the tokenizer of a tokenizer.json that knows no added token and cannot spell one."""
    added = {token["content"] for token in vocabulary["added_tokens"]}
    model = vocabulary["model"]
    model["vocab"] = {text: id for text, id in model["vocab"].items() if text not in added}
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    model["merges"] = [pair for pair in pairs if added.isdisjoint([*pair, "".join(pair)])]
    return tokenizers.Tokenizer.from_str(
        json.dumps(vocabulary | {"added_tokens": [], "post_processor": None})
    )


def _token_text(token: Any) -> str | None:
    """Return a token of tokenizer_config.json, where it is a string or an object with `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
