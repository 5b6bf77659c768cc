"""The options that several functions of DeepseekInference share, for type checkers."""

import os
from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

from dsfp4.model import Quantization


class Options(TypedDict, total=False):
    """What generate() and chat() both take; DeepseekInference says what each means."""

    top_k: int | None
    top_p: float | None
    min_p: float
    repetition_penalty: float
    logit_bias: Mapping[int, float] | None
    logprobs: int
    seed: int | None
    stop: str | Sequence[str] | None
    stop_ids: Sequence[int] | None
    thinking: bool | None


class Memory(TypedDict, total=False):
    """Where a model that does not fit lies, and how to see it; Model says what each means."""

    cpu_cache_size: float | None
    prefetch_size: float | None
    max_experts: int | None
    gpu_reserved: float | None
    max_gpu_layers: int | None
    min_layers: int | None
    prefetch_layers: int | Literal["auto"] | None
    expert_threshold: float
    cpu_share: float | Literal["auto"] | None
    quantization: Quantization
    cache_policy: str
    warm_start: bool | str | os.PathLike[str]
    reader: str
    direct_reads: bool
    trace: str | os.PathLike[str] | None
