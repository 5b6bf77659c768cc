"""dsfp4.Model: what it accepts, what it refuses, and the shapes of what it returns."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsfp4
from dsfp4.errors import IoError, MemoryLimitError, ParameterError


@pytest.fixture(scope="module")
def model() -> Iterator[dsfp4.Model]:
    yield dsfp4.Model("demo", max_context=256)


def test_properties(model: dsfp4.Model) -> None:
    assert model.config["n_routed_experts"] == 32
    assert model.max_context == 256
    assert model.device == "cpu"
    assert model.weight_bytes > 10_000_000


def test_progress_ends_with_everything(demo_model: Path) -> None:
    calls: list[tuple[int, int]] = []
    dsfp4.Model(demo_model, progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1] > 10_000_000


def test_forward_shapes(model: dsfp4.Model) -> None:
    ids = [0, 5, 6, 7, 8]
    logits, experts = model.forward(ids, return_experts=True)
    assert (logits.shape, logits.dtype) == ((5, 4096), np.float32)
    assert (experts.shape, experts.dtype) == ((7, 5, 4), np.int32)
    assert np.array_equal(model.forward(np.array(ids), experts=experts), logits)


@pytest.mark.parametrize("decode", [False, True])
def test_forward_in_windows(model: dsfp4.Model, decode: bool) -> None:
    ids = list(range(200))
    windows: list[tuple[int, Any]] = []
    model.forward_windows(ids, lambda *window: windows.append(window), decode=decode)
    firsts, rows = zip(*windows, strict=True)
    assert all(0 < len(part) <= 32 for part in rows)
    assert list(firsts) == np.cumsum([0, *map(len, rows[:-1])]).tolist()
    assert np.array_equal(np.concatenate(rows), model.forward(ids, decode=decode))


def test_forward_in_windows_ends_where_the_callback_raises(model: dsfp4.Model) -> None:
    calls = []

    def stop(first: int, logits: Any) -> None:
        calls.append(first)
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        model.forward_windows(range(200), stop)
    assert calls == [0]


def test_results_that_do_not_fit_are_refused_with_the_number(
    demo_model: Path, tmp_path: Path
) -> None:
    tokens = 16384
    for path in demo_model.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((demo_model / "config.json").read_text())
    config["max_position_embeddings"] = tokens
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(MemoryLimitError) as refusal:
        dsfp4.Model(tmp_path, max_context=tokens, ram_limit=0.01, warm_start=False)
    model = dsfp4.Model(
        tmp_path,
        max_context=tokens,
        ram_limit=refusal.value.needed / 1e9 + 0.01,
        warm_start=False,
    )
    ids = np.zeros(tokens, np.int64)
    with pytest.raises(MemoryLimitError, match="forward_windows") as error:
        model.forward(ids)
    assert error.value.needed >= tokens * 4096 * 4 > error.value.available
    assert model.forward(ids[:8]).shape == (8, 4096)


def test_a_context_that_nobody_chose_is_no_reason_to_refuse(
    demo_model: Path, tmp_path: Path
) -> None:
    for path in demo_model.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((demo_model / "config.json").read_text())
    config["max_position_embeddings"] = 1 << 20
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(MemoryLimitError) as refusal:
        dsfp4.Model(tmp_path, ram_limit=0.01, warm_start=False)
    needed = refusal.value.needed / 1e9
    model = dsfp4.Model(tmp_path, ram_limit=needed + 0.01, warm_start=False)
    assert 4096 <= model.max_context < 1 << 20
    model.forward(np.zeros(8, np.int64))


@pytest.mark.parametrize("ids", [(1, 2), [1, 2], np.array([1, 2], np.uint16)])
def test_ids_of_any_integer_type(model: dsfp4.Model, ids: Any) -> None:
    assert np.array_equal(model.forward(ids), model.forward(np.array([1, 2], np.int32)))


BAD_IDS = [
    [[1, 2]],
    [1.0, 2.0],
    [True],
    ["a"],
    [[1], [1, 2]],
    [1, -1],
    [2**31],
    [2**63],
    [2**70],
    [4096],
    7,
    [],
    None,
]


@pytest.mark.parametrize("ids", BAD_IDS, ids=repr)
def test_bad_ids_are_refused(model: dsfp4.Model, ids: Any) -> None:
    with pytest.raises(ParameterError, match="ids") as error:
        model.forward(ids)
    assert error.value.parameter == "ids"


@pytest.mark.parametrize(
    "experts",
    [
        np.zeros((7, 2), np.int32),
        np.zeros((7, 2, 4)),
        np.zeros((7, 3, 4), np.int32),
        np.full((7, 2, 4), 32),
        np.full((7, 2, 4), -1),
        np.full((7, 2, 4), 2**32),
    ],
    ids=["2-D", "float", "shape", "too large", "negative", "wraps to 0"],
)
def test_bad_experts_are_refused(model: dsfp4.Model, experts: Any) -> None:
    with pytest.raises(ParameterError, match="experts") as error:
        model.forward([1, 2], experts=experts)
    assert "experts" in error.value.parameter


NUMBERS = ["max_tokens", "temperature", "top_k", "top_p", "seed"]


@pytest.mark.parametrize("value", [-1, 2**64, float("nan"), "1", True, None], ids=repr)
@pytest.mark.parametrize("name", NUMBERS)
def test_bad_numbers_are_refused(model: dsfp4.Model, name: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=name) as error:
        model.generate([1, 2], **{"max_tokens": 2, name: value})
    assert error.value.parameter == name


@pytest.mark.parametrize("value", [0.5, -1, 10**6, "4"], ids=repr)
@pytest.mark.parametrize("name", ["threads", "max_context"])
def test_bad_load_options_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=name) as error:
        dsfp4.Model("demo", **{name: value})
    assert error.value.parameter == name


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ParameterError, match="device"):
        dsfp4.Model("demo", device="tpu")


def test_generate_reports_each_token_and_can_be_cancelled(model: dsfp4.Model) -> None:
    seen: list[int] = []
    result = model.generate(
        [0, 5], max_tokens=5, stop_ids=[], on_token=lambda id: not seen.append(id)
    )
    assert seen == result.tokens
    assert (len(seen), result.finish_reason, result.prompt_tokens) == (5, "length", 2)
    cancelled = model.generate([0, 5], max_tokens=5, stop_ids=[], on_token=lambda _: False)
    assert cancelled.finish_reason == "cancelled"


def test_a_stop_id_ends_the_answer_and_is_not_in_it(model: dsfp4.Model) -> None:
    tokens = model.generate([0, 5], max_tokens=5, stop_ids=[]).tokens
    stop = tokens[2]
    stopped = model.generate([0, 5], max_tokens=5, stop_ids=[stop])
    assert stopped.finish_reason == "stop"
    assert stopped.tokens == tokens[: tokens.index(stop)]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(IoError, match="nowhere") as error:
        dsfp4.Model(tmp_path / "nowhere")
    assert error.value.file == str(tmp_path / "nowhere")
