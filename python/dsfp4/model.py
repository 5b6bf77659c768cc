"""The model itself: ids in, logits or ids out."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn, overload

import numpy as np
import numpy.typing as npt

from dsfp4 import _core
from dsfp4._arrays import as_output, parameter_error
from dsfp4._checks import (
    check_gigabytes,
    check_integer,
    check_integers,
    check_quantization,
    check_real,
    check_text,
)
from dsfp4.demo import resolve_model
from dsfp4.errors import MemoryLimitError

Logits = npt.NDArray[np.float32]  # [tokens, vocab]
Experts = npt.NDArray[np.int32]  # [MoE layers, tokens, experts per token]
RouterLogits = npt.NDArray[np.float32]  # [MoE layers, tokens, experts]
Ids = Sequence[int] | npt.NDArray[np.integer[Any]]
Progress = Callable[[int, int], None]  # bytes done, bytes in all
Quantization = Literal["auto", "keep"] | Mapping[str, str]  # a mapping: role -> format


def resolve_device(device: str) -> str:
    """Return the device that `device` means: "auto" is the fastest backend present."""
    if device != "auto":
        return device
    return "cpu" if _core.cuda_problem() else "cuda"


def check_limit(memory_limit: float | None) -> float:
    """Return `memory_limit` as the core takes it. Raises ParameterError for what is no limit."""
    if memory_limit is None:
        return 0.0
    limit = check_real("memory_limit", memory_limit)
    if not limit > 0:
        raise parameter_error("memory_limit", f"must be over 0 GB, not {memory_limit!r}")
    return limit


class Model:
    """A checkpoint, loaded on one device.

    `path` is a checkpoint folder, "org/name" or "org/name@revision" for a repository in the Hub's
    cache (`dsfp4 pull`), or "demo"; `device` is "cpu", "cuda" (an NVIDIA GPU whose memory holds at
    least the KV cache, the head and the dense weights of a few layers), "reference" (scalar and
    slow: the truth that the others are compared with) or "auto", the fastest present: a GPU that is
    too small is passed over with a warning; `threads` 0 is one for each core;
    `max_context` is in tokens, 0 is the model's own limit, or less where its KV cache would take
    over an eighth of the memory; `kv_cache_dtype` is "bf16" (FP32 on
    "reference") or "fp8" (half the memory, an error of some percent in each cached value);
    `memory_limit` is the most VRAM in GB (10^9 bytes), everything included; None is what is free;
    `ram_limit` is the most RAM of this process in GB, Python and its other models included; None
    leaves the machine, or the control group, room to breathe;
    `progress` is called with bytes.

    A model whose experts do not fit into RAM is run from its files, and so are the dense weights of
    as many layers as must. `cpu_cache_size` is what cached
    experts may take, `prefetch_size` the memory for reads in flight, both in GB of RAM; on a GPU,
    `max_experts` is how many experts may stay in VRAM (0: none) and `gpu_reserved` the GB of VRAM,
    within `memory_limit`, that are left to others; None is planned from what is available, and no
    `gpu_reserved`. `max_gpu_layers` and `min_layers` are how many layers' dense weights stay in
    VRAM at most and at least: those of the others, three or more, lie in RAM and are copied for
    each step while the layers before them compute; None is as many as fit. `prefetch_layers`,
    `expert_threshold` and `cpu_share` are as in `set_memory_config()`, where "auto" says what None
    means here.
    `quantization` says in which formats dense weights lie in memory, converted while they are
    loaded: "auto" is as published, and where VRAM does not hold that, FP8 first, then NVFP4, for as
    few roles as it takes; "keep" is always as published; a mapping names roles, "attention" (all of
    self_attn but o_proj), "o_proj", "shared_experts", "mlp" (of the dense layers) and "lm_head",
    and "fp8", "nvfp4" (not of attention and lm_head) or "keep" for each.
    `cache_policy` is "default", "lru", "lfu", "lrfu" or "router". `warm_start` remembers how
    experts were used in a small file, so that the next load caches them at once, and in another one
    the machine's rates, which the first load of such a model measures in some seconds: False turns
    both off, a path is the folder to use, True is `$XDG_CACHE_HOME/dsfp4` (`~/.cache/dsfp4`).
    `reader` is "auto", "io_uring" or "pread"; `direct_reads` False goes through the page cache.
    `trace` is a file for a timeline that Perfetto (ui.perfetto.dev) opens: steps, waits, and what
    SSD, PCIe, CPU and GPU do; it is whole once the model is gone.
    Raises the errors of `dsfp4.errors`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        device: str = "cpu",
        *,
        threads: int = 0,
        max_context: int = 0,
        kv_cache_dtype: str = "bf16",
        memory_limit: float | None = None,
        cpu_cache_size: float | None = None,
        prefetch_size: float | None = None,
        max_experts: int | None = None,
        gpu_reserved: float | None = None,
        max_gpu_layers: int | None = None,
        min_layers: int | None = None,
        prefetch_layers: int | Literal["auto"] | None = None,
        expert_threshold: float = 0.0,
        cpu_share: float | Literal["auto"] | None = None,
        cache_policy: str = "default",
        warm_start: bool | str | os.PathLike[str] = True,
        reader: str = "auto",
        direct_reads: bool = True,
        trace: str | os.PathLike[str] | None = None,
        ram_limit: float | None = None,
        progress: Progress | None = None,
        quantization: Quantization = "auto",
        ssd_rate: float | None = None,  # GB/s that reads are held to, for `dsfp4 bench decode`
    ) -> None:
        folder = str(resolve_model(path))
        self._config: dict[str, Any] = _core.read_config(folder)
        self._memory_config: dict[str, Any] = {
            "prefetch_layers": prefetch_layers,
            "expert_threshold": expert_threshold,
            "cpu_share": cpu_share,
        }
        self._ram_limit = check_gigabytes("ram_limit", ram_limit)
        options: dict[str, Any] = {
            "threads": check_integer("threads", threads),
            "max_context": check_integer("max_context", max_context),
            "kv_cache_dtype": check_text("kv_cache_dtype", kv_cache_dtype),
            "memory_limit": check_limit(memory_limit),
            "cpu_cache_size": check_optional("cpu_cache_size", cpu_cache_size),
            "prefetch_size": check_optional("prefetch_size", prefetch_size),
            "max_experts": check_count("max_experts", max_experts),
            "max_gpu_layers": check_count("max_gpu_layers", max_gpu_layers),
            "min_layers": check_count("min_layers", min_layers),
            "gpu_reserved": check_optional("gpu_reserved", gpu_reserved),
            "prefetch_layers": check_layers(prefetch_layers),
            "expert_threshold": check_real("expert_threshold", expert_threshold),
            "cpu_share": check_share(cpu_share),
            "cache_policy": check_text("cache_policy", cache_policy),
            "warm_start_folder": warm_start_folder(warm_start),
            "reader": check_text("reader", reader),
            "direct_reads": bool(direct_reads),
            "trace_file": "" if trace is None else os.fspath(trace),
            "ram_limit": self._ram_limit,
            "progress": progress,
            "ssd_rate": check_gigabytes("ssd_rate", ssd_rate),
            "quantization": check_quantization(quantization),
        }
        chosen = resolve_device(check_text("device", device))
        try:
            self._core = _core.Model(folder, device=chosen, **options)
        except MemoryLimitError as error:
            of_vram = (memory_limit, max_experts, gpu_reserved, max_gpu_layers, min_layers)
            if device != "auto" or chosen != "cuda" or any(given is not None for given in of_vram):
                raise
            warnings.warn(f"using the CPU: {error}", stacklevel=2)
            self._core = _core.Model(folder, device="cpu", **options)

    @property
    def config(self) -> dict[str, Any]:
        """The fields of config.json, by their Hugging Face names."""
        return self._config

    @property
    def device(self) -> str:
        """The backend that computes."""
        return self._core.device

    @property
    def max_context(self) -> int:
        """The most tokens of prompt and answer together."""
        return self._core.max_context

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights in memory."""
        return self._core.weight_bytes

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled."""
        raise TypeError("a Model cannot be copied or pickled; load it once in each process")

    def set_memory_config(
        self,
        *,
        prefetch_layers: int | Literal["auto"] | None = None,
        expert_threshold: float | None = None,
        cpu_share: float | Literal["auto"] | None = None,
    ) -> None:
        """Change how experts are read from the SSD, from the next call on; None changes nothing.

        `prefetch_layers`, 0 (off) to 16: so many layers ahead, experts are predicted and read while
        the SSD is idle; "auto", as at first: 1 for a prompt, whose tokens need most experts between
        them, and while the cache has room, else 0. `expert_threshold`, 0 (exact) to 1: an expert
        that would have to be read and has less than this share of its token's routing weight is
        left out and the rest scaled up; `stats()` counts them. `cpu_share`, 0 to 1: of a token's
        experts that lie in RAM beside a GPU, the processor computes this share and the GPU, after a
        copy, the others; "auto", as at first: so many that both end together. Raises
        ParameterError.
        """
        wanted = dict(self._memory_config)
        if prefetch_layers is not None:
            wanted["prefetch_layers"] = check_layers(prefetch_layers)
        if expert_threshold is not None:
            wanted["expert_threshold"] = check_real("expert_threshold", expert_threshold)
        if cpu_share is not None:
            wanted["cpu_share"] = check_share(cpu_share)
        self._core.set_memory_config(**wanted)
        self._memory_config = wanted

    def set_memory_strategy(self, strategy: Mapping[str, float]) -> None:
        """Change where RAM and VRAM go, from the next call on: what fits stays.

        Keys: `cpu_cache_size`, GB for cached experts, and `prefetch_size`, GB for reads in flight;
        on a GPU `max_experts`, a number of experts that may stay in VRAM, and `gpu_reserved`, GB of
        VRAM left to others. What is not named is planned, but `gpu_reserved` stays as it is. Raises
        ParameterError, and MemoryLimitError where there is not so much.
        """
        if not isinstance(strategy, Mapping):
            raise parameter_error("strategy", f"must map names to numbers, not be {strategy!r}")
        known = ("cpu_cache_size", "prefetch_size", "max_experts", "gpu_reserved")
        wanted: dict[str, Any] = {}
        for name, value in strategy.items():
            if name not in known:
                raise parameter_error("strategy", f"has {name!r}; it may have {', '.join(known)}")
            wanted[name] = (
                check_count(name, value) if name == "max_experts" else check_optional(name, value)
            )
        self._core.set_memory_strategy(**wanted)

    def set_compute_streams(self, streams: Mapping[str, bool]) -> None:
        """Switch overlap of stages on or off, from the next call on; what is not named is on.

        Keys: `prefetch`, reads (off: nothing is read ahead, and a layer's routed experts are
        computed once all its reads are over); `compute`, a GPU's ops (off: each group of experts
        has been computed before anything else goes on); `transfer`, copies between RAM and VRAM
        (off: each has been made before anything else goes on). To find a fault, and to see what
        overlap brings: the text is the same, beside a GPU with `cpu_share` 0. Raises
        ParameterError.
        """
        if not isinstance(streams, Mapping):
            raise parameter_error("streams", f"must map stages to bools, not be {streams!r}")
        wanted = dict.fromkeys(("prefetch", "compute", "transfer"), True)
        for name, value in streams.items():
            if name not in wanted:
                raise parameter_error("streams", f"has {name!r}; it may have {', '.join(wanted)}")
            if not isinstance(value, bool | np.bool_):
                raise parameter_error("streams", f"{name} must be True or False, not {value!r}")
            wanted[name] = bool(value)
        self._core.set_compute_streams(**wanted)

    def stats(self) -> dict[str, Any]:
        """Return what was counted since loading: hits, misses, bytes and seconds by name.

        `include/dsfp4/model.h` (ModelStats) says what each is. `rates` is a dict of GB/s by the
        names of `include/dsfp4/rates.h`; what is not known is not in it.
        """
        return self._core.stats()

    @overload
    def forward(
        self,
        ids: Ids,
        experts: npt.ArrayLike | None = None,
        return_experts: Literal[False] = False,
        decode: bool = False,
    ) -> Logits: ...
    @overload
    def forward(
        self,
        ids: Ids,
        experts: npt.ArrayLike | None = None,
        *,
        return_experts: Literal[True],
        decode: bool = False,
    ) -> tuple[Logits, Experts]: ...
    def forward(
        self,
        ids: Ids,
        experts: npt.ArrayLike | None = None,
        return_experts: bool = False,
        decode: bool = False,
    ) -> Logits | tuple[Logits, Experts]:
        """Return the logits, float32 [tokens, vocab], after each of `ids` from an empty context.

        `experts`, integers [MoE layers, tokens, experts per token], forces the routers' choices;
        `return_experts` also returns those made; `decode` feeds one token at a time through the
        cache as generation does, instead of all at once. Raises MemoryLimitError where the result
        is more than `ram_limit`, or the machine, has room for.
        """
        logits, chosen, _ = self._forward(ids, experts, decode)
        return (logits, chosen) if return_experts else logits

    def forward_windows(
        self,
        ids: Ids,
        on_logits: Callable[[int, Logits], object],
        *,
        experts: npt.ArrayLike | None = None,
        decode: bool = False,
    ) -> None:
        """Like forward(), in memory that does not grow with logits: some rows at a time, in order.

        `on_logits` is called with the place of the first row in `ids` and the rows, float32 [up to
        32, vocab]. It may keep them, must not call this model, and ends it all by raising.
        """

        def pass_on(first: int, logits: Any) -> None:
            on_logits(first, as_output(logits))

        self._forward(ids, experts, decode, on_logits=pass_on)

    def routing_trace(self, ids: Ids, decode: bool = False) -> tuple[Experts, RouterLogits]:
        """Return the experts that each of `ids` chooses, and the routers' logits.

        The context is empty at first. The experts are as forward()'s `return_experts`; the logits
        are float32 [MoE layers, tokens, experts]. This is what `bench/replay.py` replays. Raises
        MemoryLimitError as forward() does.
        """
        _, chosen, logits = self._forward(
            ids, None, decode, return_logits=False, return_router_logits=True
        )
        return chosen, logits

    def chosen_experts(self, ids: Ids, decode: bool = False) -> Experts:
        """Return the experts that each of `ids` chooses, as forward()'s `return_experts`.

        The context is empty at first. No logits are computed: it takes a prefill's time and memory.
        """
        return self._forward(ids, None, decode, return_logits=False)[1]

    def token_seconds(self, ids: Ids, *, routed_experts: bool = True) -> list[float]:
        """Return the seconds of each of `ids`, decoded one by one from an empty context.

        For `dsfp4 bench decode`. Without routed experts: what all else takes; only of a model whose
        experts are not all in memory. The first tokens also pay for what is new.
        """
        return self._core.token_seconds(check_integers("ids", ids), routed_experts)

    def _forward(
        self, ids: Ids, experts: npt.ArrayLike | None, decode: bool, **wanted: Any
    ) -> tuple[Logits, Experts, RouterLogits]:
        forced = None
        if experts is not None:
            shape = "[MoE layers, tokens, experts per token]"
            forced = check_integers("experts", experts, shape).astype(np.int32)
        checked = check_integers("ids", ids)
        results = self._core.forward(
            checked,
            forced,
            decode,
            ram_limit=self._ram_limit,
            **wanted,
        )
        logits, chosen, routers = map(as_output, results)
        return logits, chosen, routers

    def generate(
        self,
        ids: Ids,
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        logit_bias: Mapping[int, float] | None = None,
        logprobs: int = 0,
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
        on_token: Callable[[int], bool] | None = None,
        on_prefill: Callable[[int, int], bool] | None = None,
    ) -> _core.GenerationResult:
        """Continue `ids` by up to `max_tokens` ids.

        `temperature`, 0 to 100: 0 takes the likeliest token. `top_k` (0 is off), `top_p` (over 0, 1
        is off) and `min_p` (0 is off, a share of the likeliest token's probability) cut the tail.
        `repetition_penalty` (over 0, 1 is off) divides the positive logits of ids that are in the
        prompt or the answer and multiplies the negative ones; `logit_bias` adds to the logits of
        single ids, -inf forbids one. `logprobs`, 0 to 20, asks for each id's log probability and
        those of so many likeliest ids. The same `seed`, 0 to 2^64 - 1, gives the same ids.
        `stop_ids` None means the model's end ids. `on_token` sees each id as it is made,
        `on_prefill` the tokens of the prompt done and in all; either cancels by returning False.
        """
        return self._core.generate(
            check_integers("ids", ids),
            max_tokens=check_integer("max_tokens", max_tokens),
            temperature=check_real("temperature", temperature),
            top_k=check_integer("top_k", top_k),
            top_p=check_real("top_p", top_p),
            min_p=check_real("min_p", min_p),
            repetition_penalty=check_real("repetition_penalty", repetition_penalty),
            logit_bias=bias_pairs(logit_bias),
            logprobs=check_integer("logprobs", logprobs),
            seed=check_integer("seed", seed, bits=64),
            stop_ids=None if stop_ids is None else check_integers("stop_ids", stop_ids).tolist(),
            on_token=on_token,
            on_prefill=on_prefill,
        )


def check_layers(prefetch_layers: int | Literal["auto"] | None) -> int | None:
    """Return a whole number; None for "auto" and None."""
    if prefetch_layers is None or prefetch_layers == "auto":
        return None
    return check_integer("prefetch_layers", prefetch_layers)


def check_share(cpu_share: float | Literal["auto"] | None) -> float | None:
    """Return a float; None for "auto" and None."""
    return check_optional("cpu_share", None if cpu_share == "auto" else cpu_share)


def check_optional(name: str, value: float | None) -> float | None:
    """Return `value` as a float, or None. Raises ParameterError for what is no number."""
    return None if value is None else check_real(name, value)


def check_count(name: str, count: float | None) -> int | None:
    """Return `count`, or None. Raises ParameterError for what is no whole number."""
    return None if count is None else check_integer(name, count)


def warm_start_folder(warm_start: bool | str | os.PathLike[str]) -> str:
    """Return the folder that `warm_start` means; empty is off."""
    if warm_start is False:
        return ""
    if warm_start is not True:
        return os.fspath(warm_start)
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # the specification ignores relative ones
        cache = os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(cache, "dsfp4")


def bias_pairs(logit_bias: Mapping[int, float] | None) -> list[tuple[int, float]]:
    """Return the pairs that the core takes. Raises ParameterError for what is no such mapping."""
    if logit_bias is None:
        return []
    if not isinstance(logit_bias, Mapping):
        raise parameter_error("logit_bias", f"must map ids to numbers, not be {logit_bias!r}")
    return [
        (check_integer("logit_bias", id), check_real("logit_bias", bias))
        for id, bias in logit_bias.items()
    ]
