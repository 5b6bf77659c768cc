"""Errors keep their facts on every way: out of the core, through signals, into pickles and back."""

import copy
import ctypes
import functools
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dsfp4
from dsfp4 import DeepseekInference, _core, errors
from dsfp4.chat import ChatPrompt
from dsfp4.evaluate import evaluate
from dsfp4.quantize.source import Source
from dsfp4.sampling import Sampling
from dsfp4.stream import TextStream
from dsfp4.text import Piece, Text

FACTS: dict[str, dict[str, Any]] = {
    "CancelledError": {},
    "CheckpointError": {"file": "a", "tensor": "b", "offset": 7},
    "ContextLengthError": {"requested": 9, "limit": 8},
    "CudaError": {"code": 2, "call": "cudaMalloc", "source": "plugin.cu", "line": 3},
    "Dsfp4Error": {},
    "HubError": {"repository": "org/name", "status": 404},
    "IoError": {"file": "a", "offset": 5, "errno": 28},
    "MemoryLimitError": {"needed": 3, "available": 2},
    "ParameterError": {"parameter": "ids"},
    "UnsupportedError": {},
}

WAYS: list[Callable[[Any], Any]] = [
    copy.copy,
    copy.deepcopy,
    *(
        lambda value, protocol=protocol: pickle.loads(pickle.dumps(value, protocol))
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)
    ),
]
EVERY_WAY = pytest.mark.parametrize("way", WAYS)


def test_every_error_has_its_facts_here() -> None:
    assert sorted(FACTS) == errors.__all__


@EVERY_WAY
@pytest.mark.parametrize("name", errors.__all__)
def test_errors_are_copied_with_their_facts(name: str, way: Callable[[Any], Any]) -> None:
    error = getattr(errors, name)("a sentence", **FACTS[name])
    error.more = "noted by the caller"
    back = way(error)
    assert type(back) is type(error)
    assert (str(back), back.args, back.more) == ("a sentence", ("a sentence",), error.more)
    assert {fact: getattr(back, fact) for fact in FACTS[name]} == FACTS[name]


@EVERY_WAY
def test_results_are_copied_whole(demo: DeepseekInference, way: Callable[[Any], Any]) -> None:
    piece = way(Piece("x", "reasoning"))
    assert (piece, piece.kind, type(piece)) == ("x", "reasoning", Piece)

    text = demo.generate("And", 3, 0, raw=True, logprobs=2)
    back = way(text)
    assert (type(back), back) == (Text, text)
    for name, value in vars(text).items():
        if name != "logprobs":
            assert getattr(back, name) == value, name
    assert [facts(item) for item in back.logprobs] == [facts(item) for item in text.logprobs]
    assert len(back.logprobs) == 3

    result = demo.model.generate([1, 2], max_tokens=3, logprobs=1, stop_ids=[])
    back = way(result)
    for name in ("tokens", "finish_reason", "prompt_tokens", "prefill_seconds", "decode_seconds"):
        assert getattr(back, name) == getattr(result, name), name
    assert [facts(item) for item in back.logprobs] == [facts(item) for item in result.logprobs]
    assert back.finish_reason == "length"

    for plain in (Sampling(0.5), ChatPrompt("x", [1], False), evaluate(demo, ["a b c"])):
        assert way(plain) == plain


def facts(item: Any) -> tuple[Any, ...]:
    return item.id, item.logprob, item.top


@EVERY_WAY
def test_what_runs_is_not_copied(demo: DeepseekInference, way: Callable[[Any], Any]) -> None:
    with TextStream(lambda put: Text()) as stream:
        for one in (demo, demo.model, stream):
            with pytest.raises(TypeError, match=f"a {type(one).__name__} cannot be copied"):
                way(one)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff\xfe")
    folder.mkdir()
    (folder / "config.json").write_text("{")
    with pytest.raises(errors.CheckpointError) as error:
        _core.read_config(folder)
    assert error.value.file == str(folder / "config.json")
    assert str(folder) in str(error.value)


@pytest.fixture
def ctrl_c() -> Iterator[Callable[..., Any]]:
    """A callback after which Ctrl-C is pending: no Python code runs that would notice it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield functools.partial(getattr(ctypes.PyDLL(None), "raise"), int(signal.SIGINT))
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_before_an_error_comes_out_as_itself(
    demo_model: Path, tmp_path: Path, ctrl_c: Callable[..., Any]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(demo_model, folder)
    with Source(folder) as source:
        scales = [tensor for tensor in source.tensors if tensor.name.endswith(".weight_scale")]
    for tensor in scales:
        with open(tensor.file, "r+b") as file:
            file.seek(tensor.offset)
            file.write(b"\x7f")  # NaN
    with pytest.raises(errors.CheckpointError):
        dsfp4.Model(folder, progress=lambda done, total: None)
    with pytest.raises(KeyboardInterrupt):
        dsfp4.Model(folder, progress=ctrl_c)
