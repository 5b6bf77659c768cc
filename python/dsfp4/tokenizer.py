"""The checkpoint's own byte-level tokenizer: text to ids, and ids to text as they arrive."""

import codecs
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from dsfp4.errors import CheckpointError, ParameterError, UnsupportedError
from dsfp4.jsonfile import read_json, read_optional_json


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


class Tokenizer:
    """Reads tokenizer.json and tokenizer_config.json of the checkpoint in `folder`.

    Raises IoError or CheckpointError for files that are absent or malformed, and UnsupportedError
    for a tokenizer that is not byte-level.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        vocabulary = read_json(path)
        if (vocabulary.get("decoder") or {}).get("type") != "ByteLevel":
            raise UnsupportedError(f"'{path}' is not a byte-level tokenizer as DeepSeek's are")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"'{path}' is malformed: {error}", file=str(path)) from error
        self._special = {
            id for id, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        }
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

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a raw prompt, with the begin id in front if the checkpoint wants it."""
        ids = self.encode(text)
        return [self.bos_id, *ids] if self.add_bos_token and self.bos_id is not None else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, without special tokens; broken UTF-8 becomes U+FFFD."""
        return "".join(self.decode_pieces(ids))

    def decode_pieces(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of `ids` piece by piece, never half a character.

        The pieces joined are the text of all ids together.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for id in ids:
            if piece := decoder.decode(self._bytes(id)):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest

    def _bytes(self, id: int) -> bytes:
        # Ids beyond the vocabulary are padding of the embedding matrix; they have no text.
        token = None if id in self._special else self._tokenizer.id_to_token(id)
        if token is None:
            return b""
        try:
            return bytes(_ALPHABET[character] for character in token)
        except KeyError:
            return bytes(token.encode())  # an added token, which is not spelt in the alphabet


def _token_text(token: Any) -> str | None:
    """Return a token of tokenizer_config.json, where it is a string or an object with `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
