"""How well a model predicts a text, and how far another one's predictions are from its own."""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsfp4.errors import Dsfp4Error, ParameterError
from dsfp4.files import read_file
from dsfp4.inference import DeepseekInference

Array = npt.NDArray[Any]

_GZIP_MAGIC = b"\x1f\x8b"
_MOST_BYTES = 1 << 30  # of a file of text, also once it is unpacked
_PART = 1 << 20  # bytes unpacked at a time


@dataclass
class Sums:
    """Sums over predicted tokens: of -log p in nats, of KL divergences in nats, of equal tops."""

    tokens: int = 0
    nll: float = 0.0
    other_nll: float = 0.0
    divergence: float = 0.0
    agreed: int = 0

    def add(self, other: "Sums") -> None:
        """Add the sums of other tokens."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def as_dict(self, compared: bool) -> dict[str, float]:
        """Return the means, with perplexities; those of a comparison only if there was one."""
        count = max(self.tokens, 1)
        result = {
            "tokens": self.tokens,
            "nats_per_token": self.nll / count,
            "perplexity": float(np.exp(self.nll / count)),
        }
        if compared:
            result |= {
                "against_nats_per_token": self.other_nll / count,
                "against_perplexity": float(np.exp(self.other_nll / count)),
                "perplexity_ratio": float(np.exp((self.nll - self.other_nll) / count)),
                "kl_divergence": self.divergence / count,
                "top1_agreement": self.agreed / count,
            }
        return result


@dataclass
class Evaluation:
    """Sums over all tokens, and over those at positions [2^i, 2^(i + 1)) of their windows.

    The first token of a window has nothing before it and is not predicted.
    """

    documents: int = 0
    compared: bool = False
    total: Sums = field(default_factory=Sums)
    by_position: list[Sums] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as JSON's types."""
        return {
            "documents": self.documents,
            **self.total.as_dict(self.compared),
            "by_position": [
                {"from": 2**i, "to": 2 ** (i + 1) - 1, **sums.as_dict(self.compared)}
                for i, sums in enumerate(self.by_position)
                if sums.tokens
            ],
        }


def read_documents(path: str | Path) -> list[str]:
    """Return the texts of a file: those of a *.jsonl's lines, or one, the whole of any other.

    A line of JSON is an object whose "text" is a string. Either may be compressed with gzip. Raises
    IoError, and ParameterError (of `file`) that names the line at fault, or for over 1 GiB of text.
    """
    path = Path(path)
    data = read_file(path, _MOST_BYTES, _malformed)
    if data.startswith(_GZIP_MAGIC):
        data = _unpacked(data, path)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _malformed(f"'{path}' is not UTF-8 text at byte {error.start}") from error
    if not path.name.removesuffix(".gz").endswith(".jsonl"):
        return [text]
    lines = text.split("\n")  # not splitlines(): JSON strings may hold other separators
    return [
        _text_of(line, f"line {number} of '{path}'")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def evaluate(
    model: DeepseekInference,
    documents: Iterable[str],
    *,
    against: DeepseekInference | None = None,
    first: int = 0,
    window: int = 1024,
    progress: Callable[[int, int], object] | None = None,
) -> Evaluation:
    """Predict each token of `documents` from those before it in its window.

    Documents are cut into windows of `window` tokens, each with the begin token in front where the
    checkpoint wants one; with `first`, only so many tokens of each document count. `against` is the
    model that is compared with: the divergence is KL(against || model), the mean over tokens of
    sum p_against * log(p_against / p_model). `progress` is called with tokens done and in all.
    Memory: the logits of some rows, and with `against` its logits of one window. Raises Dsfp4Error
    if the two do not have the same tokenizer, ParameterError if nothing is left to predict,
    MemoryLimitError if a window's logits do not fit.
    """
    result = Evaluation(compared=against is not None)
    texts = list(documents)
    windows = [part for text in texts for part in _windows(model, text, first, window)]
    if against is not None:
        others = [part for text in texts for part in _windows(against, text, first, window)]
        if (
            others != windows
            or model.model.config["vocab_size"] != (against.model.config["vocab_size"])
        ):
            raise Dsfp4Error("the two models have different tokenizers; they cannot be compared")
    result.documents = len(texts)
    total = sum(len(ids) - 1 for ids in windows)
    if total == 0:
        raise ParameterError("the file has no token to predict; give some text", parameter="file")
    for ids in windows:
        _add_window(result, model, against, ids)
        if progress is not None:
            progress(result.total.tokens, total)
    return result


def compare_rows(logits: Array, targets: Array, others: Array | None = None) -> dict[str, Array]:
    """Return for each row of logits [tokens, vocab]: its -log p of `targets`, and the comparison.

    That is `other_nll`, `divergence` KL(others || logits) and `agreed`, whether the likeliest
    tokens are the same. In nats.
    """
    rows = np.arange(len(targets))
    logs = _log_softmax(logits)
    result = {"nll": -logs[rows, targets]}
    if others is not None:
        other_logs = _log_softmax(others)
        result["other_nll"] = -other_logs[rows, targets]
        result["divergence"] = (np.exp(other_logs) * (other_logs - logs)).sum(axis=1)
        result["agreed"] = others.argmax(axis=1) == logits.argmax(axis=1)
    return result


def _add_window(
    result: Evaluation,
    model: DeepseekInference,
    against: DeepseekInference | None,
    ids: Sequence[int],
) -> None:
    given, targets = ids[:-1], np.asarray(ids[1:])
    # One of the two is held whole: they run one after the other, and may be the same model.
    others = None if against is None else against.model.forward(given)

    def add(first: int, logits: Array) -> None:
        part = slice(first, first + len(logits))
        values = compare_rows(logits, targets[part], None if others is None else others[part])
        for row in range(len(logits)):
            sums = Sums(1, *(values[name][row].item() for name in values))
            bucket = (first + row + 1).bit_length() - 1
            while len(result.by_position) <= bucket:
                result.by_position.append(Sums())
            result.by_position[bucket].add(sums)
            result.total.add(sums)

    model.model.forward_windows(given, add)


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _windows(model: DeepseekInference, text: str, first: int, window: int) -> Iterator[list[int]]:
    tokenizer = model.tokenizer
    bos = tokenizer.bos_id
    begin = [bos] if tokenizer.add_bos_token and bos is not None else []
    rest = tokenizer.encode(text)
    if first:
        rest = rest[: max(first - len(begin), 0)]
    step = min(window, model.model.max_context) - len(begin)
    for at in range(0, len(rest), step):
        part = begin + rest[at : at + step]
        if len(part) > 1:
            yield part


def _unpacked(data: bytes, path: Path) -> bytes:
    unpacked = bytearray()
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            while part := file.read(_PART):
                unpacked += part
                if len(unpacked) > _MOST_BYTES:
                    raise _malformed(
                        f"'{path}' unpacks to more than {_MOST_BYTES} bytes, which is the limit"
                    )
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _malformed(f"'{path}' is not sound gzip data: {error}") from error
    return bytes(unpacked)


def _text_of(line: str, name: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _malformed(f"{name} is not JSON: {error}") from error
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise _malformed(f'{name} is not an object with a string "text"')
    return text


def _malformed(problem: str) -> ParameterError:
    return ParameterError(problem, parameter="file")
