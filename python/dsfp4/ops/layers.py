"""Single operations of a layer. Matrices are float32 [tokens, width] unless said otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsfp4 import _core
from dsfp4._arrays import as_input, as_output

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

MlaShape = _core.MlaShape
Floats = NDArray[np.float32]


@lru_cache(maxsize=8)
def _backend(name: str, threads: int) -> Any:
    return _core.Backend(name, threads)


def _floats(values: Any) -> Floats:
    return as_input(values, np.float32)


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
        shape: tuple[int, int],
        data: NDArray[Any],
        scales: NDArray[Any] | None = None,
        global_scale: float = 1.0,
    ) -> Weight:
        scales = np.zeros(0, np.uint8) if scales is None else scales
        return cls(_core.Weight.make(name, *shape, _bytes(data), _bytes(scales), global_scale))

    @classmethod
    def f32(cls, values: Any) -> Weight:
        """From float32 [out, in]."""
        values = _floats(values)
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
        """Raises ParameterError for names that are not known."""
        self._core = _core.RouterSpec.make(
            experts, top_k, groups, kept_groups, scoring, group_score, normalize, scaling_factor
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
    return as_output(core.linear(weight._core, _floats(x), exact_inputs))


def embed(table: Weight, ids: Any, backend: str = "reference") -> Floats:
    """Rows ``ids`` of an f32 or bf16 table [vocab, hidden]."""
    return as_output(_backend(backend, 1).embed(table._core, as_input(ids, np.int32)))


def rms_norm(x: Any, weight: Any, eps: float, backend: str = "reference") -> Floats:
    """x / sqrt(mean(x^2) + eps) * weight, row by row."""
    return as_output(_backend(backend, 1).rms_norm(_floats(x), _floats(weight), eps))


def silu_mul(gate: Any, up: Any, backend: str = "reference") -> Floats:
    """silu(gate) * up."""
    return as_output(_backend(backend, 1).silu_mul(_floats(gate), _floats(up)))


def rope(x: Any, heads: int, cos_sin: Any, backend: str = "reference") -> Floats:
    """Rotates adjacent pairs of every head: x [tokens, heads * dim].

    Row t of ``cos_sin`` [tokens, dim] is [cos 0, sin 0, cos 1, sin 1, ...].
    """
    return as_output(_backend(backend, 1).rope(_floats(x), heads, _floats(cos_sin)))


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
        spec._core, _floats(logits), _floats(bias), as_input(experts, np.int32)
    )
    return as_output(chosen), as_output(weights)


def moe(
    experts: Sequence[tuple[Weight, Weight, Weight]],
    x: Any,
    chosen: Any,
    weights: Any,
    backend: str = "reference",
    *,
    threads: int = 1,
) -> Floats:
    """Sum over the chosen experts of weight * down(silu(gate x) * up x).

    ``experts`` are (gate, up, down); ``chosen`` and ``weights`` are [tokens, top_k].
    """
    flat = [weight._core for expert in experts for weight in expert]
    core = _backend(backend, threads)
    return as_output(core.moe(flat, _floats(x), as_input(chosen, np.int32), _floats(weights)))


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
    """`count` independent draws from float32 logits [vocab], with seeds `seed`, `seed` + 1, ...

    The options are those of `Model.generate`; `prompt` counts for the repetition penalty.
    """
    bias = list((logit_bias or {}).items())
    return as_output(
        _core.sample(
            _floats(logits),
            count,
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            bias,
            list(prompt),
            seed,
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
    cached = [_floats(latent) for latent in latents]
    return as_output(
        core.mla_attention(
            shape, kv_b_proj._core, _floats(q), cached, list(rows), decode, fp8_cache
        )
    )
