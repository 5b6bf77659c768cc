"""Every numeric parameter with values that no caller should give.

Each call works as documented, or raises a Dsfp4Error or TypeError that names the parameter.
"""

from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsfp4 import DeepseekInference, Model, ops
from dsfp4.errors import (
    CheckpointError,
    ContextLengthError,
    Dsfp4Error,
    IoError,
    MemoryLimitError,
    ParameterError,
)
from dsfp4.ops import formats
from dsfp4.quantize import quantize

NAN, INFINITY = float("nan"), float("inf")

HOSTILE: list[Any] = [
    *(-1, -(2**31), -(2**63), -(2**63) - 1, -(10**30), 2**31 - 1, 2**31, 2**32, 2**63 - 1),
    *(2**63, 2**64 - 1, 2**64, 10**30, 10**400, -0.5, -1.0, 1.5, 1e308, -1e308, 5e-324),
    *(NAN, -NAN, INFINITY, -INFINITY, 1j, True, False, "", "1", "nan", b"1", None, [], [1], {}, ()),
    *(np.int64(-1), np.uint64(2**64 - 1), np.float32("nan"), np.bool_(True), np.array([1, 2])),
    *(Decimal(1), object(), lambda: 1),
]
# Without addresses, so that every process that runs the tests knows them by the same names.
IDS = [f"{type(value).__name__}-{str(value)[:24].partition(' at 0x')[0]}" for value in HOSTILE]
hostile = pytest.mark.parametrize("value", HOSTILE, ids=IDS)


def names(error: BaseException, parameter: str) -> bool:
    """Whether an error says which parameter is at fault."""
    return isinstance(error, (Dsfp4Error, TypeError)) and parameter in str(error)


def check(parameter: str, call: Callable[[], Any], accepted: Callable[[Any], bool], value: Any):
    """Call; it must work for accepted values, and for those only."""
    try:
        result = call()
    except Exception as error:
        assert names(error, parameter), f"{type(error).__name__}: {error}"
        assert not accepted(value), f"{value!r} should be accepted: {error}"
        return None
    assert accepted(value), f"{value!r} should be refused"
    return result


def whole(low: int, high: int) -> Callable[[Any], bool]:
    def accepted(value: Any) -> bool:
        is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        return is_integer and low <= value <= high

    return accepted


def real(low: float, high: float, *, open_low: bool = False) -> Callable[[Any], bool]:
    def accepted(value: Any) -> bool:
        number = isinstance(value, (int, float, np.integer, np.floating))
        if not number or isinstance(value, bool):
            return False
        return bool((value > low if open_low else value >= low) and value <= high)

    return accepted


@pytest.fixture(scope="module")
def model() -> Model:
    return Model("demo", threads=1, max_context=64)


# --- Model ----------------------------------------------------------------------------------------


@hostile
def test_model_threads(value: Any) -> None:
    if whole(17, 1024)(value):
        pytest.skip("a large team tests nothing more")
    check("threads", lambda: Model("demo", threads=value, max_context=1), whole(0, 1024), value)


@hostile
def test_model_max_context(value: Any) -> None:
    call = lambda: Model("demo", threads=1, max_context=value)  # noqa: E731
    check("max_context", call, whole(0, 4096), value)


GENERATE = {
    "max_tokens": whole(1, 2**31 - 1),
    "temperature": real(0, 100),
    "top_k": whole(0, 2**31 - 1),
    "top_p": real(0, 1, open_low=True),
    "min_p": real(0, 1),
    "repetition_penalty": real(0, 100, open_low=True),
    "logprobs": whole(0, 20),
    "seed": whole(0, 2**64 - 1),
}


@pytest.mark.parametrize("parameter", GENERATE)
@hostile
def test_model_generate(model: Model, parameter: str, value: Any) -> None:
    options = {"max_tokens": 2, "temperature": 1.0, parameter: value}
    result = check(parameter, lambda: model.generate([2], **options), GENERATE[parameter], value)
    if result is not None:
        assert all(0 <= token < 4096 for token in result.tokens)


@hostile
def test_model_logit_bias_value(model: Model, value: Any) -> None:
    def accepted(bias: Any) -> bool:
        return real(-INFINITY, 3.4e38)(bias) or (type(bias) is float and -1e308 >= bias)

    call = lambda: model.generate([2], max_tokens=1, logit_bias={7: value})  # noqa: E731
    check("logit_bias", call, accepted, value)


@pytest.mark.parametrize("parameter", ["ids", "stop_ids", "logit_bias", "experts"])
@hostile
def test_token_ids(model: Model, parameter: str, value: Any) -> None:
    if parameter == "logit_bias" and getattr(value, "__hash__", None) is None:
        pytest.skip("no mapping has such a key")
    calls: dict[str, Callable[[], Any]] = {
        "ids": lambda: model.forward([2, value]),
        "stop_ids": lambda: model.generate([2], max_tokens=1, stop_ids=[3, value]),
        "logit_bias": lambda: model.generate([2], max_tokens=1, logit_bias={value: 1.0}),
        "experts": lambda: model.forward([2], experts=[[[value] * 4]] * 7),
    }
    # NumPy makes integers of a list that holds True among integers.
    bools = parameter in ("ids", "stop_ids") and isinstance(value, (bool, np.bool_))
    check(parameter, calls[parameter], lambda v: whole(0, 4095)(v) or bools, value)


@pytest.mark.parametrize("parameter", ["ids", "prompt", "stop_ids", "logit_bias"])
@hostile
def test_what_should_be_a_sequence(demo: DeepseekInference, parameter: str, value: Any) -> None:
    model = demo.model
    calls: dict[str, Callable[[], Any]] = {
        "ids": lambda: model.forward(value),
        "prompt": lambda: demo.generate(value, max_tokens=1),
        "stop_ids": lambda: model.generate([2], max_tokens=1, stop_ids=value),
        "logit_bias": lambda: model.generate([2], max_tokens=1, logit_bias=value),
    }

    def accepted(v: Any) -> bool:
        if parameter == "logit_bias":
            return v is None or v == {}
        if isinstance(v, str):
            return parameter == "prompt"
        empty = isinstance(v, (list, tuple)) and len(v) == 0
        one = isinstance(v, np.ndarray) or (isinstance(v, list) and len(v) == 1)
        return bool(one or (parameter == "stop_ids" and (empty or v is None)))

    if parameter == "logit_bias" and isinstance(value, np.ndarray):
        pytest.skip("comparing it means nothing")
    check(parameter, calls[parameter], accepted, value)


@pytest.mark.parametrize("id", [-1, 4096, 2**31 - 1, 2**31, 2**63, 2**64])
def test_ids_out_of_range(model: Model, id: int) -> None:
    with pytest.raises(ParameterError, match="ids"):
        model.forward([2, id])
    with pytest.raises(ParameterError, match=r"ids|prompt"):
        model.generate([2, id], max_tokens=1)


@pytest.mark.parametrize("count", [65, 10**6])
def test_enormous_prompts(model: Model, demo: DeepseekInference, count: int) -> None:
    for call in (
        lambda: model.forward([2] * count),
        lambda: model.generate(np.full(count, 2), max_tokens=1),
    ):
        with pytest.raises(ContextLengthError) as caught:
            call()
        assert caught.value.limit == 64
        assert caught.value.requested >= count
    if count > demo.model.max_context:
        with pytest.raises(ContextLengthError):
            demo.generate([2] * count, max_tokens=1)


def test_empty_prompts(model: Model, demo: DeepseekInference) -> None:
    for call in (lambda: model.forward([]), lambda: model.generate([], max_tokens=1)):
        with pytest.raises(ParameterError, match="at least one"):
            call()
    with pytest.raises(ParameterError, match="prompt"):
        demo.generate([], max_tokens=1)


# --- DeepseekInference ----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("parameter", GENERATE)
@hostile
def test_inference_generate(
    demo: DeepseekInference, parameter: str, value: Any, stream: bool
) -> None:
    if parameter == "max_tokens" and whole(3, 2**31 - 1)(value):
        pytest.skip("as long as the context")

    def call() -> Any:
        options: dict[str, Any] = {"max_tokens": 2, "seed": 1, parameter: value}
        text = demo.generate([2], **options, stream=stream)
        return "".join(text)

    def accepted(v: Any) -> bool:
        recommended = parameter in ("temperature", "top_k", "top_p", "seed")
        return GENERATE[parameter](v) or (v is None and recommended)

    check(parameter, call, accepted, value)


@hostile
def test_decode(demo: DeepseekInference, value: Any) -> None:
    check("ids", lambda: demo.tokenizer.decode([0, value]), whole(0, 2**31 - 1), value)


@pytest.mark.parametrize("parameter", ["threads", "max_context"])
@pytest.mark.parametrize("value", [-1, 2**31, 2**63, NAN, INFINITY, 1.5, "1", None, True, []])
def test_inference_construction(parameter: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=parameter):
        DeepseekInference("demo", **{parameter: value})


@pytest.mark.parametrize("parameter", ["device", "kv_cache_dtype"])
@pytest.mark.parametrize("value", ["", "gpu", "a\0b", None, 1, [], b"cpu", "x" * 100000])
def test_names(parameter: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=parameter):
        Model("demo", **{parameter: value})


# --- ops ------------------------------------------------------------------------------------------

X = np.ones((1, 4), np.float32)
WEIGHT = ops.Weight.f32(np.ones((4, 4), np.float32))
FLOAT32_MAX = float(np.finfo(np.float32).max)
FINITE = real(-FLOAT32_MAX, FLOAT32_MAX)


def _boxed(value: Any) -> Any:
    """An array that holds the value itself, whatever that is."""
    array = np.empty(1, object)
    array[0] = value
    return array


def _route(**changes: Any) -> Any:
    spec = {"experts": 8, "top_k": 2, "groups": 2, "kept_groups": 1, **changes}
    return ops.route(ops.RouterSpec(**spec), np.arange(8, dtype=np.float32)[None])


def _attention(**changes: Any) -> Any:
    widths = {"kv_lora_rank": 4, "qk_nope_head_dim": 2, "qk_rope_head_dim": 2, "v_head_dim": 2}
    fields = {"heads": 1, **widths, "softmax_scale": 0.5, **changes}
    rows, threads = fields.pop("rows", 1), fields.pop("threads", 1)
    shape = ops.MlaShape(**fields)
    weight = ops.Weight.f32(np.ones((4, 4), np.float32))
    q, latents = np.ones((1, 4), np.float32), [np.ones((2, 6), np.float32)]
    return ops.mla_attention(shape, weight, q, latents, [rows], threads=threads)


def _nvfp4_weight(global_scale: Any) -> Any:
    codes, scales, _ = formats.quantize_nvfp4(np.ones((2, 16), np.float32))
    weight = ops.Weight.nvfp4(codes, scales, global_scale)
    return ops.linear(weight, np.ones((1, 16), np.float32))


def _dequantize(global_scale: Any) -> Any:
    codes, scales, _ = formats.quantize_nvfp4(np.ones((2, 16), np.float32))
    return formats.dequantize_nvfp4(codes, scales, global_scale)


def _sample(**options: Any) -> Any:
    return ops.sample(np.zeros(4, np.float32), **options)


EXACTLY: Callable[[int], Callable[[Any], bool]] = lambda n: whole(n, n)  # noqa: E731
OPS: dict[str, tuple[str, Callable[[Any], Any], Callable[[Any], bool]]] = {
    "linear": ("threads", lambda v: ops.linear(WEIGHT, X, threads=v), whole(1, 1024)),
    "moe": (
        "threads",
        lambda v: ops.moe([(WEIGHT, WEIGHT, WEIGHT)], X, [[0]], [[1.0]], threads=v),
        whole(1, 1024),
    ),
    "rms_norm": ("eps", lambda v: ops.rms_norm(X, np.ones(4), v), FINITE),
    "rope": ("heads", lambda v: ops.rope(X, v, np.ones((1, 4))), EXACTLY(1)),
    "embed": ("ids", lambda v: ops.embed(WEIGHT, _boxed(v)), whole(0, 3)),
    "nvfp4_weight": ("global_scale", _nvfp4_weight, FINITE),
    "route_experts": ("experts", lambda v: _route(experts=v), EXACTLY(8)),
    "route_top_k": ("top_k", lambda v: _route(top_k=v), whole(1, 4)),
    "route_groups": ("groups", lambda v: _route(groups=v), whole(1, 8)),
    "route_kept_groups": ("kept_groups", lambda v: _route(kept_groups=v), whole(1, 2)),
    "route_scaling": ("scaling_factor", lambda v: _route(scaling_factor=v), FINITE),
    "mla_rows": ("rows", lambda v: _attention(rows=v), EXACTLY(1)),
    "mla_threads": ("threads", lambda v: _attention(threads=v), whole(1, 1024)),
    "mla_scale": ("softmax_scale", lambda v: _attention(softmax_scale=v), FINITE),
    "sample_count": ("count", lambda v: _sample(count=v), whole(0, 2**20)),
    "sample_prompt": ("prompt", lambda v: _sample(prompt=[v, 1]), whole(0, 3)),
    **{
        f"sample_{name}": (name, lambda v, name=name: _sample(**{name: v}), GENERATE[name])
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    },
    "nvfp4_global_scale": ("amax", formats.nvfp4_global_scale, real(0, FLOAT32_MAX)),
    "quantize_nvfp4": (
        "global_scale",
        lambda v: formats.quantize_nvfp4(np.ones((1, 16)), v),
        lambda v: v is None or (real(0, FLOAT32_MAX, open_low=True)(v) and np.float32(v) > 0),
    ),
    "dequantize_nvfp4": ("global_scale", _dequantize, FINITE),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("case", OPS)
@hostile
def test_ops(case: str, value: Any) -> None:
    parameter, call, accepted = OPS[case]
    if case == "sample_prompt" and isinstance(value, (bool, np.bool_)):
        pytest.skip("NumPy makes integers of a list that holds True among integers")
    check(parameter, lambda: call(value), accepted, value)


WIDTHS = ("heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@pytest.mark.parametrize("parameter", WIDTHS)
@hostile
def test_mla_widths(parameter: str, value: Any) -> None:
    fields = {**dict.fromkeys(WIDTHS, 2), "softmax_scale": 1.0, parameter: value}
    check(parameter, lambda: ops.MlaShape(**fields), whole(1, 2**20), value)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "function",
    [formats.decode_e2m1, formats.decode_e4m3, formats.decode_e8m0, formats.decode_bf16],
)
@hostile
def test_codes(function: Callable[[Any], Any], value: Any) -> None:
    most = 65535 if function is formats.decode_bf16 else 255
    for argument in (_boxed(value), value):
        try:
            function(argument)
        except Exception as error:
            assert names(error, "codes"), f"{type(error).__name__}: {error}"
            assert not (argument is value and whole(0, most)(value))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "function", [formats.encode_e2m1, formats.encode_e4m3, formats.encode_bf16]
)
@hostile
def test_values(function: Callable[[Any], Any], value: Any) -> None:
    for argument in (value, [value], [[1.0], value]):
        try:
            function(argument)
        except Exception as error:
            assert isinstance(error, ParameterError), f"{type(error).__name__}: {error}"
            assert "value" in str(error)


# --- quantize -------------------------------------------------------------------------------------


@hostile
def test_quantize_threads(tmp_path: Path, value: Any) -> None:
    call = lambda: quantize("demo", tmp_path / "out", threads=value)  # noqa: E731
    with pytest.raises(Dsfp4Error) as caught:  # the demo is in FP4 already
        call()
    if whole(0, 1024)(value):
        assert not isinstance(caught.value, ParameterError)
    else:
        assert names(caught.value, "threads")


def test_errors_are_of_one_family() -> None:
    for kind in (CheckpointError, ContextLengthError, IoError, MemoryLimitError, ParameterError):
        assert issubclass(kind, Dsfp4Error)
