"""Flags that several commands share, and the checks of their values."""

import argparse
import math
from collections.abc import Callable
from typing import Any

from dsfp4.cli.progress import Progress
from dsfp4.inference import DeepseekInference


def integer(low: int, high: int) -> Callable[[str], int]:
    """Return an argparse type: an integer from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"'{text}' is not an integer from {low} to {high}")
        return value

    return parse


def real(low: float, high: float) -> Callable[[str], float]:
    """Return an argparse type: a number from `low` to `high`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:  # also false for NaN
            raise argparse.ArgumentTypeError(f"'{text}' is not a number from {low:g} to {high:g}")
        return value

    return parse


def share(text: str) -> float | None:
    """Parse a --cpu-share, auto is None: an argparse type."""
    if text == "auto":
        return None
    try:
        return real(0, 1)(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"'{text}' is neither a number from 0 to 1 nor auto"
        ) from None


def quantization(text: str) -> str | dict[str, str]:
    """Parse auto, keep or ROLE=FORMAT,ROLE=FORMAT: an argparse type."""
    if text in ("auto", "keep"):
        return text
    formats = {}
    for item in text.split(","):
        role, equals, format = item.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(f"'{text}' is neither auto, keep nor ROLE=FORMAT,...")
        formats[role] = format
    return formats


_MOST = 2**31 - 1
_MEMORY = "memory, for models that do not fit"  # heads a group of flags
_SWITCH = {"on": True, "off": False, "auto": None}


def switch(text: str) -> bool | None:
    """Parse on, off or auto (None): an argparse type."""
    if text not in _SWITCH:
        raise argparse.ArgumentTypeError(f"'{text}' is not one of {', '.join(_SWITCH)}")
    return _SWITCH[text]


def bias(text: str) -> tuple[int, float]:
    """Parse ID=BIAS: an argparse type."""
    id_text, _, value = text.partition("=")
    try:
        pair = int(id_text), float(value)
    except ValueError:
        pair = -1, math.nan
    if not 0 <= pair[0] <= _MOST or math.isnan(pair[1]):
        raise argparse.ArgumentTypeError(f"'{text}' is not ID=BIAS, as in 42=-5 or 42=-inf")
    return pair


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="print one JSON object, for programs")


def add_model(parser: argparse.ArgumentParser, name: str = "model") -> None:
    """Add the positional argument MODEL."""
    parser.add_argument(
        name,
        metavar=name.upper(),
        help="a checkpoint folder, a repository that was pulled (org/name), or the word demo",
    )


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add what decides where and how the model runs."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--device",
        default="auto",
        choices=["auto", "cpu", "cuda", "reference"],
        help="auto is the fastest present; reference is plain, exact and slow",
    )
    _add_threads(group)
    _add_limits(group)
    group.add_argument(
        "--trace", metavar="FILE", help="write a timeline there, for ui.perfetto.dev to open"
    )
    _add_memory_flags(parser)


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """Add those of the engine's flags that a plan depends on."""
    group = parser.add_argument_group("engine, as a load takes them")
    _add_threads(group)
    _add_limits(group)
    _add_placement(parser.add_argument_group(_MEMORY))


def _add_threads(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--threads", type=integer(0, 1024), default=0, metavar="N", help="0: one for each core"
    )


def _add_limits(group: "argparse._ArgumentGroup") -> None:
    """Add what bounds a model's memory."""
    group.add_argument(
        "--max-context",
        type=integer(0, _MOST),
        default=0,
        metavar="TOKENS",
        help="0: as long as the model allows",
    )
    group.add_argument(
        "--memory-limit",
        type=real(0.001, 1e6),
        metavar="GB",
        help="VRAM that may be taken, everything included; default: what is free",
    )
    group.add_argument(
        "--kv-cache-dtype",
        default="bf16",
        choices=["bf16", "fp8"],
        help="fp8 takes half the memory, at an error of some percent a value",
    )
    group.add_argument(
        "--ram-limit",
        type=real(1e-9, 1e9),
        metavar="GB",
        help="most RAM of the whole process; default: what the machine can spare",
    )


def _add_memory_flags(parser: argparse.ArgumentParser) -> None:
    """Add what decides where a model lies that does not fit."""
    group = parser.add_argument_group(_MEMORY)
    _add_placement(group)
    group.add_argument(
        "--expert-threshold",
        type=real(0, 1),
        default=0.0,
        metavar="SHARE",
        help="leave out experts on the SSD with less of the routing weight; 0 is exact",
    )
    group.add_argument(
        "--no-warm-start",
        dest="warm_start",
        action="store_false",
        help="do not remember in ~/.cache/dsfp4 how experts were used, nor measure the machine",
    )


def _add_placement(group: "argparse._ArgumentGroup") -> None:
    """Add the part of it that a plan depends on."""
    group.add_argument(
        "--cpu-cache-size", type=real(0, 1e6), metavar="GB", help="RAM for cached experts"
    )
    group.add_argument(
        "--prefetch-size", type=real(0, 1e6), metavar="GB", help="RAM for reads in flight"
    )
    group.add_argument(
        "--max-experts",
        type=integer(0, _MOST),
        metavar="N",
        help="experts that may stay in VRAM, 0 is none; default: as many as fit",
    )
    group.add_argument(
        "--gpu-reserved",
        type=real(0, 1e6),
        metavar="GB",
        help="VRAM that is left to others, within --memory-limit; default: none",
    )
    group.add_argument(
        "--max-gpu-layers",
        type=integer(0, _MOST),
        metavar="N",
        help="dense weights of so many layers stay in VRAM, the others' are copied from RAM for "
        "each token; default: as many as fit",
    )
    group.add_argument(
        "--min-layers",
        type=integer(0, _MOST),
        metavar="N",
        help="of at least so many; default: 0",
    )
    group.add_argument(
        "--prefetch-layers",
        type=integer(0, 16),
        metavar="N",
        help="predict and read experts so many layers ahead; 0 is off, the default is 1 for "
        "prompts and while the cache has room, else 0",
    )
    group.add_argument(
        "--cpu-share",
        type=share,
        metavar="SHARE",
        help="of a token's experts in RAM beside a GPU, the processor computes so many, 0 to 1; "
        "auto, the default: so that both end together",
    )
    group.add_argument(
        "--quantization",
        type=quantization,
        default="auto",
        metavar="ROLE=FORMAT,...",
        help="convert dense weights while they are loaded: attention, o_proj, shared_experts, mlp, "
        "lm_head to fp8, or all but the first and the last to nvfp4; auto, the default: where VRAM "
        "does not hold them as published; keep: never",
    )


_PLACEMENT = (
    *("cpu_cache_size", "prefetch_size", "max_experts", "gpu_reserved"),
    *("max_gpu_layers", "min_layers", "prefetch_layers"),
)


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the keywords of a load that the memory flags gave."""
    others = ("expert_threshold", "cpu_share", "quantization", "warm_start")
    return placement(arguments) | {name: getattr(arguments, name) for name in others}


def placement(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the keywords of a plan that the memory flags gave."""
    return {name: getattr(arguments, name) for name in _PLACEMENT}


def add_sampling_flags(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """Add what decides how text is made; None means the checkpoint's recommendation."""
    group = parser.add_argument_group("generation")
    group.add_argument(
        "--max-tokens", type=integer(1, _MOST), default=max_tokens, metavar="N", help="%(default)s"
    )
    group.add_argument(
        "--temperature", type=real(0, 100), metavar="T", help="0 takes the likeliest token"
    )
    group.add_argument("--top-k", type=integer(0, _MOST), metavar="K", help="0 is off")
    group.add_argument("--top-p", type=real(0, 1), metavar="P", help="1 is off")
    group.add_argument(
        "--min-p", type=real(0, 1), default=0.0, metavar="P", help="0 is off, the default"
    )
    group.add_argument(
        "--repetition-penalty",
        type=real(0.01, 100),
        default=1.0,
        metavar="R",
        help="1 is off, the default",
    )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may be given several times",
    )
    group.add_argument(
        "--stop-id",
        action="append",
        type=integer(0, _MOST),
        metavar="ID",
        help="end at this token, in place of the model's own end tokens; several times too",
    )
    group.add_argument(
        "--logit-bias",
        action="append",
        type=bias,
        default=[],
        metavar="ID=BIAS",
        help="add to a token's logit, -inf forbids it; several times too",
    )
    group.add_argument(
        "--thinking",
        type=switch,
        metavar="WHEN",
        help="on or off, where the chat template can switch the thoughts; auto, its own choice",
    )
    group.add_argument(
        "--seed", type=integer(0, 2**64 - 1), metavar="N", help="the same seed, the same text"
    )


def load(
    arguments: argparse.Namespace, model: str, *, traced: bool = True, **others: Any
) -> DeepseekInference:
    """Load `model` as the engine flags and `others` say, with progress on a terminal."""
    with Progress("loading") as progress:
        return DeepseekInference(
            model,
            arguments.device,
            threads=arguments.threads,
            max_context=arguments.max_context,
            kv_cache_dtype=arguments.kv_cache_dtype,
            memory_limit=arguments.memory_limit,
            ram_limit=arguments.ram_limit,
            progress=progress,
            trace=arguments.trace if traced else None,
            **(memory(arguments) | others),
        )


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the keywords of generate() that the sampling flags gave."""
    names = (
        *("max_tokens", "temperature", "top_k", "top_p"),
        *("min_p", "repetition_penalty", "stop", "thinking", "seed"),
    )
    return {name: getattr(arguments, name) for name in names} | {
        "stop_ids": arguments.stop_id,
        "logit_bias": dict(arguments.logit_bias),
    }
