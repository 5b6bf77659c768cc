"""Device "cuda": what it says where there is no GPU, and the golden vectors where there is one."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsfp4
from dsfp4 import _core
from dsfp4.cli import main
from dsfp4.errors import CudaError, MemoryLimitError, ParameterError
from dsfp4.model import resolve_device
from fixtures.cases import CASES
from fixtures.golden_vectors import (
    Golden,
    GoldenText,
    chosen_otherwise,
    compare_free,
    load_demo_drawn,
    load_demo_golden,
    load_golden,
    relative_error,
)

PROBLEM = _core.cuda_problem()
if PROBLEM and os.environ.get("DSFP4_REQUIRE_CUDA"):
    raise RuntimeError(PROBLEM)
with_gpu = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))
without_gpu = pytest.mark.skipif(PROBLEM is None, reason="there is a GPU")

DEMO = Path(str(files("dsfp4"))) / "demo_model"
CLOSE_CALL = 1e-2
PHASES = pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])


@without_gpu
def test_without_a_gpu_one_clear_sentence() -> None:
    with pytest.raises(CudaError) as caught:
        dsfp4.Model("demo", device="cuda")
    assert str(caught.value) == PROBLEM
    assert caught.value.code == 0
    assert "device 'cuda' needs" in PROBLEM
    assert "device 'cpu'" in PROBLEM


@without_gpu
def test_without_a_gpu_the_benchmark_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--device", "cuda"]) != 0
    assert str(PROBLEM) in capsys.readouterr().err


@without_gpu
def test_without_a_gpu_auto_is_the_cpu() -> None:
    assert resolve_device("auto") == "cpu"


def test_a_missing_plugin_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if PROBLEM is None:
        pytest.skip("the plugin is loaded already")
    monkeypatch.setenv("DSFP4_CUDA_PLUGIN", str(tmp_path / "not-there.so"))
    problem = _core.cuda_problem() or ""
    assert "not-there.so, which is not there" in problem
    assert "pip install -Ccmake.define.DSFP4_CUDA=ON" in problem
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setenv("DSFP4_CUDA_PLUGIN", str(broken))
    assert "cannot be loaded" in (_core.cuda_problem() or "")


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf"), "1", True])
def test_memory_limit_is_checked(limit: Any) -> None:
    with pytest.raises(ParameterError, match="memory_limit"):
        dsfp4.Model("demo", device="cuda", memory_limit=limit)


def test_memory_limit_needs_a_gpu() -> None:
    with pytest.raises(ParameterError, match="memory_limit"):
        dsfp4.Model("demo", device="cpu", memory_limit=1)


# --- with a GPU -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=CASES if PROBLEM is None else [])
def golden(request: pytest.FixtureRequest, random_checkpoint: Callable[[str], Path]) -> Golden:
    return load_golden(request.param, random_checkpoint(request.param))


@pytest.fixture(scope="module")
def cuda(golden: Golden, random_checkpoint: Callable[[str], Path]) -> Iterator[Any]:
    yield dsfp4.Model(str(random_checkpoint(golden.name)), device="cuda", max_context=256)


@with_gpu
@PHASES
def test_forced(cuda: Any, golden: Golden, decode: bool) -> None:
    logits, experts = cuda.forward(
        golden.ids, experts=golden.experts, return_experts=True, decode=decode
    )
    assert relative_error(logits, golden.logits) <= 2 * golden.bf16_error
    assert not np.any(chosen_otherwise(experts, golden) & (golden.margin >= CLOSE_CALL))


@pytest.fixture(scope="module")
def texts() -> list[GoldenText]:
    return load_demo_golden(DEMO)


@pytest.fixture(scope="module")
def demo_on_gpu() -> Iterator[Any]:
    yield dsfp4.Model("demo", device="cuda")


@with_gpu
@PHASES
def test_demo_forced(demo_on_gpu: Any, texts: list[GoldenText], decode: bool) -> None:
    for text in texts:
        logits, experts = demo_on_gpu.forward(
            text.ids, experts=text.experts, return_experts=True, decode=decode
        )
        error = relative_error(logits[text.positions], text.logits)
        assert error <= 2 * text.bf16_error, text.name
        assert not np.any(chosen_otherwise(experts, text) & (text.margin >= CLOSE_CALL)), text.name


@with_gpu
@PHASES
def test_demo_free(demo_on_gpu: Any, texts: list[GoldenText], decode: bool) -> None:
    drawn = load_demo_drawn(DEMO)
    agreement, perplexity = compare_free(
        lambda ids: demo_on_gpu.forward(ids, decode=decode), [*texts, *drawn]
    )
    assert agreement >= 0.99
    assert abs(perplexity) <= 0.005


# A decode step is recorded and replayed, so that its kernels begin early; not where it is asked
# which experts it chose.
@with_gpu
def test_replayed_steps_are_the_same(demo_on_gpu: Any, texts: list[GoldenText]) -> None:
    for text in texts:
        replayed = demo_on_gpu.forward(text.ids, decode=True)
        launched, _ = demo_on_gpu.forward(text.ids, decode=True, return_experts=True)
        np.testing.assert_array_equal(replayed, launched)


@with_gpu
def test_generates_the_same_text_each_time(demo_on_gpu: Any) -> None:
    first = demo_on_gpu.generate([1, 2, 3], max_tokens=40, stop_ids=[]).tokens
    assert len(first) == 40
    assert demo_on_gpu.generate([1, 2, 3], max_tokens=40, stop_ids=[]).tokens == first
    # What was generated, fed as a prompt, gives the same next token almost everywhere.
    logits = demo_on_gpu.forward([1, 2, 3, *first[:-1]])
    assert np.mean(logits[2:].argmax(axis=1) == np.array(first)) >= 0.9


@with_gpu
def test_memory_limit_is_refused_with_the_numbers() -> None:
    with pytest.raises(MemoryLimitError) as caught:
        dsfp4.Model("demo", device="cuda", memory_limit=0.3)
    assert caught.value.needed > 0
    assert "VRAM" in str(caught.value)


def _used_bytes() -> float:
    """VRAM in use on the whole device."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    return float(subprocess.run(query, check=True, capture_output=True, text=True).stdout) * 2**20


@with_gpu
def test_memory_limit_is_never_exceeded() -> None:
    program = """
import sys, dsfp4
model = dsfp4.Model("demo", device="cuda", memory_limit=float(sys.argv[1]))
model.generate(list(range(1, 400)), max_tokens=20, stop_ids=[])
print("ready", flush=True)
sys.stdin.read()
"""
    before = _used_bytes()
    limit = 2.0
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(limit)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        taken = _used_bytes() - before
    finally:
        process.communicate("")
    assert 0 < taken <= limit * 1e9


REFUSED = """
import ctypes, json, logging, mmap, resource, sys
import dsfp4

most = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
limit = 65536 if most == resource.RLIM_INFINITY else min(65536, most)
resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
cuda = ctypes.CDLL("libcuda.so.1")
context = ctypes.c_void_p()
pages = mmap.mmap(-1, 1 << 20)
address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(pages)))
assert cuda.cuInit(0) == 0
assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
assert cuda.cuCtxSetCurrent(context) == 0
if cuda.cuMemHostRegister_v2(address, ctypes.c_size_t(1 << 20), 0) == 0:
    print(json.dumps(None))
    sys.exit()
warnings = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: warnings.append(record.getMessage())
logging.getLogger("dsfp4").addHandler(handler)
model = dsfp4.Model("demo", device="cuda", max_experts=7, cpu_cache_size=0.0005, cpu_share=0.0)
tokens = model.generate([1, 2, 3], max_tokens=30, temperature=0.0, stop_ids=[]).tokens
print(json.dumps([list(tokens), warnings]))
"""


@with_gpu
def test_memory_that_cannot_be_pinned_makes_no_difference_but_in_speed() -> None:
    output = subprocess.run(
        [sys.executable, "-c", REFUSED], check=True, capture_output=True, text=True
    ).stdout
    result = json.loads(output)
    if result is None:
        pytest.skip("the driver pins beyond ulimit -l, or this process is privileged")
    tokens, warnings = result
    model = dsfp4.Model("demo", device="cuda", max_experts=7, cpu_cache_size=0.0005, cpu_share=0.0)
    right = model.generate([1, 2, 3], max_tokens=30, temperature=0.0, stop_ids=[]).tokens
    assert tokens == list(right)
    assert len([text for text in warnings if "refused to pin" in text]) == 1


# Settings of the tiers: GB of RAM for cached experts, experts that stay in VRAM.
CACHES = (0.0, 0.0005, 0.001, 0.002, 1.0)
IN_VRAM = (0, 7, 20, 50)


@with_gpu
def test_no_placement_changes_a_bit_where_the_gpu_computes_everything() -> None:
    ids = np.arange(40) * 37 % 1000
    right: tuple[Any, ...] | None = None
    for setting, (cache, experts) in enumerate(itertools.product(CACHES, IN_VRAM)):
        model = dsfp4.Model(
            "demo",
            device="cuda",
            cpu_cache_size=cache,
            max_experts=experts,
            prefetch_layers=setting % 3,
            cpu_share=0.0,
        )
        for _ in range(2):
            assert model.stats()["tiered"]
            says = (
                model.forward(ids).tobytes(),
                model.forward(ids, decode=True).tobytes(),
                model.generate(ids[:5], max_tokens=30, temperature=0.0, stop_ids=[]).tokens,
            )
            assert right is None or says == right
            right = says
        experts_now = (experts + 13) % 60  # what is in VRAM stays or goes back to RAM
        model.set_memory_strategy({"max_experts": experts_now})
        assert (
            model.generate(ids[:5], max_tokens=30, temperature=0.0, stop_ids=[]).tokens == says[2]
        )


@with_gpu
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0, None])
@PHASES
def test_experts_beside_a_gpu_agree_with_the_oracle(share: float | None, decode: bool) -> None:
    model = dsfp4.Model("demo", device="cuda", max_experts=10, cpu_share=share)
    for golden in load_demo_golden(DEMO)[:2]:
        forced = model.forward(golden.ids, experts=golden.experts, decode=decode)
        error = relative_error(forced[golden.positions], golden.logits)
        assert error <= 2 * golden.bf16_error, golden.name
    stats = model.stats()
    assert stats["tiered"]
    if decode:
        assert (stats["cpu_bytes"] > 0) == (share != 0.0)
