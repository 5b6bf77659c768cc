"""Single operations of a layer. Matrices are float32 [tokens, width] unless said otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsfp4 import _core
from dsfp4._arrays import as_input, as_output, parameter_error
from dsfp4._checks import check_integer, check_integers, check_real, check_text
from dsfp4.model import bias_pairs

__all__ = [
    "MlaShape",
    "RouterSpec",
    "Weight",
    "embed",
    "linear",
    "mla_attention",
    "moe",
    "rms_norm",
    "rope",
    "route",
    "sample",
    "silu_mul",
]

Floats = NDArray[np.float32]

_MOST_DRAWS = 2**20


@lru_cache(maxsize=8)
def _cached_backend(name: str, threads: int) -> Any:
    return _core.Backend(name, threads)


def _backend(name: str, threads: int) -> Any:
    return _cached_backend(check_text("backend", name), check_integer("threads", threads))


def _floats(values: Any, name: str) -> Floats:
    return as_input(values, np.float32, name)


class MlaShape(_core.MlaShape):
    """The widths of latent attention. Each is 1 to 2^20; raises ParameterError for others."""

    def __init__(
        self,
        heads: int,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        softmax_scale: float,
    ) -> None:
        super().__init__(
            check_integer("heads", heads),
            check_integer("kv_lora_rank", kv_lora_rank),
            check_integer("qk_nope_head_dim", qk_nope_head_dim),
            check_integer("qk_rope_head_dim", qk_rope_head_dim),
            check_integer("v_head_dim", v_head_dim),
            check_real("softmax_scale", softmax_scale, float32=True),
        )


def _bytes(values: Any) -> NDArray[np.uint8]:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


class Weight:
    """A weight matrix [out features, in features] in its stored format."""

    def __init__(self, core: Any) -> None:
        """Wraps a core weight; use the class methods below."""
        self._core = core

    @property
    def shape(self) -> tuple[int, int]:
        """(out features, in features)."""
        return self._core.rows, self._core.cols

    @property
    def format(self) -> str:
        """'f32', 'bf16', 'fp8', 'nvfp4' or 'mxfp4'."""
        return str(self._core.format)

    @classmethod
    def _make(
        cls,
        name: str,
        shape: tuple[int, ...],
        data: NDArray[Any],
        scales: NDArray[Any] | None = None,
        global_scale: float = 1.0,
    ) -> Weight:
        if len(shape) != 2:
            raise parameter_error("shape", f"a weight has two dimensions, not {len(shape)}")
        scales = np.zeros(0, np.uint8) if scales is None else scales
        global_scale = check_real("global_scale", global_scale, float32=True)
        return cls(_core.Weight.make(name, *shape, _bytes(data), _bytes(scales), global_scale))

    @classmethod
    def f32(cls, values: Any) -> Weight:
        """From float32 [out, in]."""
        values = _floats(values, "values")
        return cls._make("f32", values.shape, values)

    @classmethod
    def bf16(cls, codes: NDArray[np.uint16]) -> Weight:
        """From BF16 codes, uint16 [out, in]."""
        return cls._make("bf16", codes.shape, codes)

    @classmethod
    def fp8(cls, codes: NDArray[np.uint8], scale_inv: NDArray[np.float32]) -> Weight:
        """From E4M3 codes [out, in] and multipliers [ceil(out/128), ceil(in/128)]."""
        return cls._make("fp8", codes.shape, codes, scale_inv)

    @classmethod
    def nvfp4(
        cls, packed: NDArray[np.uint8], scales: NDArray[np.uint8], global_scale: float
    ) -> Weight:
        """From packed E2M1 [out, in/2], E4M3 scales [out, in/16] and the global scale."""
        shape = (packed.shape[0], 2 * packed.shape[1])
        return cls._make("nvfp4", shape, packed, scales, global_scale)

    @classmethod
    def mxfp4(cls, packed: NDArray[np.uint8], scales: NDArray[np.uint8]) -> Weight:
        """From packed E2M1 [out, in/2] and E8M0 scales [out, in/32]."""
        return cls._make("mxfp4", (packed.shape[0], 2 * packed.shape[1]), packed, scales)


class RouterSpec:
    """How a family chooses experts.

    ``scoring`` is 'softmax' (V2) or 'sigmoid' (V3); ``group_score`` is 'max' (V2) or 'top2' (V3).
    """

    def __init__(
        self,
        experts: int,
        top_k: int,
        groups: int = 1,
        kept_groups: int = 1,
        scoring: str = "softmax",
        group_score: str = "max",
        normalize: bool = False,
        scaling_factor: float = 1.0,
    ) -> None:
        """Raises ParameterError for names that are not known and numbers out of range."""
        self._core = _core.RouterSpec.make(
            check_integer("experts", experts),
            check_integer("top_k", top_k),
            check_integer("groups", groups),
            check_integer("kept_groups", kept_groups),
            check_text("scoring", scoring),
            check_text("group_score", group_score),
            normalize,
            check_real("scaling_factor", scaling_factor, float32=True),
        )


def linear(
    weight: Weight,
    x: Any,
    backend: str = "reference",
    *,
    exact_inputs: bool = False,
    threads: int = 1,
) -> Floats:
    """x W^T: x [tokens, in] -> [tokens, out].

    Backends other than ``reference`` round x to BF16 unless ``exact_inputs`` (the router).
    """
    core = _backend(backend, threads)
    return as_output(core.linear(weight._core, _floats(x, "x"), exact_inputs))


def embed(table: Weight, ids: Any, backend: str = "reference") -> Floats:
    """Rows ``ids`` of an f32 or bf16 table [vocab, hidden]."""
    return as_output(_backend(backend, 1).embed(table._core, as_input(ids, np.int32, "ids")))


def rms_norm(x: Any, weight: Any, eps: float, backend: str = "reference") -> Floats:
    """x / sqrt(mean(x^2) + eps) * weight, row by row."""
    core = _backend(backend, 1)
    checked_eps = check_real("eps", eps, float32=True)
    return as_output(core.rms_norm(_floats(x, "x"), _floats(weight, "weight"), checked_eps))


def silu_mul(gate: Any, up: Any, backend: str = "reference") -> Floats:
    """silu(gate) * up."""
    return as_output(_backend(backend, 1).silu_mul(_floats(gate, "gate"), _floats(up, "up")))


def rope(x: Any, heads: int, cos_sin: Any, backend: str = "reference") -> Floats:
    """Rotates adjacent pairs of every head: x [tokens, heads * dim].

    Row t of ``cos_sin`` [tokens, dim] is [cos 0, sin 0, cos 1, sin 1, ...].
    """
    core = _backend(backend, 1)
    checked_heads = check_integer("heads", heads)
    return as_output(core.rope(_floats(x, "x"), checked_heads, _floats(cos_sin, "cos_sin")))


def route(
    spec: RouterSpec,
    logits: Any,
    bias: Any = (),
    experts: Any = (),
    backend: str = "reference",
) -> tuple[NDArray[np.int32], Floats]:
    """The router's choice and the mixing weights, [tokens, top_k] each.

    ``bias`` is added for the choice only; with ``experts`` the weights are those of the given ones.
    """
    chosen, weights = _backend(backend, 1).route(
        spec._core,
        _floats(logits, "logits"),
        _floats(bias, "bias"),
        as_input(experts, np.int32, "experts"),
    )
    return as_output(chosen), as_output(weights)


def moe(
    experts: Sequence[tuple[Weight, Weight, Weight]],
    x: Any,
    chosen: Any,
    weights: Any,
    backend: str = "reference",
    *,
    decode: bool = True,
    threads: int = 1,
) -> Floats:
    """Sum over the chosen experts of weight * down(silu(gate x) * up x).

    ``experts`` are (gate, up, down); ``chosen`` and ``weights`` are [tokens, top_k]. ``decode``:
    sums over slots, in order; else, as in a prompt, adds one expert after the other.
    """
    flat = [weight._core for expert in experts for weight in expert]
    core = _backend(backend, threads)
    checked_chosen = as_input(chosen, np.int32, "chosen")
    mixing = _floats(weights, "weights")
    return as_output(core.moe(flat, _floats(x, "x"), checked_chosen, mixing, decode))


def sample(
    logits: Any,
    count: int = 1,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    logit_bias: Mapping[int, float] | None = None,
    prompt: Sequence[int] = (),
    seed: int = 0,
) -> NDArray[np.int32]:
    """`count`, to 2^20, independent draws from float32 logits [vocab], with seeds `seed`, ...

    The next draw's seed is one more. The options are those of `Model.generate`; `prompt` counts for
    the repetition penalty.
    """
    if check_integer("count", count) > _MOST_DRAWS:
        raise parameter_error("count", f"must be at most {_MOST_DRAWS}, not {count}")
    return as_output(
        _core.sample(
            _floats(logits, "logits"),
            count,
            check_real("temperature", temperature),
            check_integer("top_k", top_k),
            check_real("top_p", top_p),
            check_real("min_p", min_p),
            check_real("repetition_penalty", repetition_penalty),
            bias_pairs(logit_bias),
            check_integers("prompt", prompt).tolist(),
            check_integer("seed", seed, bits=64),
        )
    )


def mla_attention(
    shape: Any,
    kv_b_proj: Weight,
    q: Any,
    latents: Sequence[Any],
    rows: Sequence[int],
    backend: str = "reference",
    *,
    decode: bool = False,
    fp8_cache: bool = False,
    threads: int = 1,
) -> Floats:
    """Causal latent attention of the last rows[i] tokens of sequence i: [sum(rows), heads * v].

    q: [sum(rows), heads * (nope + rope)], rotated; latents[i]: [tokens, kv_lora_rank + rope],
    normed and rotated. ``decode`` takes the absorbed path; ``fp8_cache`` keeps the latents in E4M3.
    """
    core = _backend(backend, threads)
    cached = [_floats(latent, "latents") for latent in latents]
    checked_rows = check_integers("rows", rows, "[sequences]").tolist()
    return as_output(
        core.mla_attention(
            shape, kv_b_proj._core, _floats(q, "q"), cached, checked_rows, decode, fp8_cache
        )
    )
