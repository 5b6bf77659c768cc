"""Writes a checkpoint of real width with few layers and random weights, for benchmarks.

Names, shapes, formats and the order of bytes are those of NVIDIA's NVFP4 checkpoints of
DeepSeek-R1: attention, router, embedding and head in BF16, every MLP in NVFP4; with `--attention
fp8-nvfp4`, attention's inputs are FP8 in blocks and its output NVFP4. There is no tokenizer. With
`--sparse`, routed experts are holes in their files: they read as zeros, without a disk behind
them. The residual stream keeps a known size from layer to layer, from which follow two things
that caches and prefetch live on:
- `--skew Z`: expert r of a layer's ranking is used in proportion to r^-Z (at most once a token).
  The routers' e_score_correction_bias is fitted to that.
- `--predictability P`: how many of a layer's experts the layer's router finds when it is run on the
  input of the MoE layer before it. What a layer adds to the stream is sized for that.
Both are measured afterwards and printed: with the routers that were written on a simulated stream,
and, with --measure, by running the model.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dsfp4.quantize.writer import ShardWriter, TensorSpec
from routing_model import (
    choose_experts,
    cosine_for_recall,
    fit_bias,
    fit_exponent,
    place_ranks,
    recall_at_cosine,
)

SHARD_BYTES = 5 << 30
CHUNK_BYTES = 8 << 20
ROUTER_GAIN = 1.0  # standard deviation of a router's logits
HEAD_GAIN = 2.0
# Mean squares of a random E2M1 code and of the block scales that are used (E4M3 0.5 to 1.875).
_E2M1_SQUARE = 68.5 / 8
_SCALE_CODES = (0x30, 0x3F)
_FP8_SCALE_TILE = 128
_ORDER = ("F32", "BF16", "F8_E4M3", "U8")  # in a file
# E[silu(g)^2] u^2 for standard normal g and u: what an MLP of gain 1 gives its down-projection.
_MLP_SQUARE = 0.3557
ATTENTION_SHARE = 0.1  # of the square of what a layer adds to the stream


def r1_config(args: argparse.Namespace) -> dict[str, Any]:
    """Return config.json of DeepSeek-R1 with the counts that were asked for."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": args.vocab,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": args.dense_layers + args.moe_layers,
        "first_k_dense_replace": args.dense_layers,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": args.experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "max_position_embeddings": 163840,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def quant_config(attention: str) -> dict[str, Any]:
    """Return hf_quant_config.json."""
    inputs = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
    kept = ["*"] if attention == "bf16" else [f".{name}" for name in inputs]
    return {
        "producer": {"name": "modelopt", "version": "0.29.0"},
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": 16,
            "exclude_modules": [
                "lm_head",
                "model.embed_tokens",
                *(f"model.layers.*.self_attn{name}" for name in kept),
                "model.layers.*.mlp.gate",
            ],
        },
    }


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Return the codes, uint16, of float32 values rounded to nearest."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


class Source:
    """Random bytes of each kind, cut at random places out of pools: as fast as a disk writes."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.Generator(np.random.SFC64(seed))
        self._bytes = self._random.bytes(1 << 26)
        self._scales = self._random.integers(
            _SCALE_CODES[0], _SCALE_CODES[1], 1 << 22, np.uint8, endpoint=True
        ).tobytes()
        codes = np.arange(_SCALE_CODES[0], _SCALE_CODES[1] + 1)
        values = 2.0 ** (codes // 8 - 7) * (1 + codes % 8 / 8)
        self.nvfp4_rms = math.sqrt(_E2M1_SQUARE * float(np.mean(values**2)))
        self.fp8_rms = math.sqrt(float(np.mean(values**2)))
        signs = self._random.integers(0, 2, 1 << 22, np.uint8) << 7
        self._fp8 = (np.frombuffer(self._scales, np.uint8) | signs).tobytes()
        self._normal = self._random.standard_normal(1 << 22, np.float32)
        self._pools: dict[float, bytes] = {}

    def packed(self, size: int) -> Iterator[memoryview]:
        return self._cut(self._bytes, size, 1)

    def scales(self, size: int) -> Iterator[memoryview]:
        return self._cut(self._scales, size, 1)

    def fp8(self, size: int) -> Iterator[memoryview]:
        return self._cut(self._fp8, size, 1)

    def bf16(self, size: int, std: float) -> Iterator[memoryview]:
        if std not in self._pools:
            self._pools[std] = to_bf16(self._normal * std).tobytes()
        return self._cut(self._pools[std], size, 2)

    def matrix(self, rows: int, cols: int, std: float) -> np.ndarray:
        values = self._random.standard_normal((rows, cols), np.float32)
        return to_bf16(values * std)

    def ranking(self, count: int) -> np.ndarray:
        return place_ranks(count, self._random)

    def _cut(self, pool: bytes, size: int, unit: int) -> Iterator[memoryview]:
        view = memoryview(pool)
        chunk = min(CHUNK_BYTES, len(pool) // 2)
        while size > 0:
            take = min(chunk, size)
            at = int(self._random.integers(0, (len(pool) - take) // unit + 1)) * unit
            yield view[at : at + take]
            size -= take


class HoleWriter(ShardWriter):
    """A ShardWriter that can leave tensors out, as holes of a sparse file."""

    def __init__(self, path: Path, tensors: list[TensorSpec]) -> None:
        super().__init__(path, tensors)
        os.ftruncate(self._fd, self._data + self._missing)

    def leave(self, spec: TensorSpec) -> None:
        self._missing -= spec.size


class Checkpoint:
    """The tensors in the order of the layers, each with a function that gives its bytes.

    Instead of one, a hole has None.
    """

    def __init__(self, config: dict[str, Any], source: Source, attention: str) -> None:
        self.config, self.source, self.form = config, source, attention
        self.tensors: list[tuple[TensorSpec, Any]] = []

    def bf16(self, module: str, rows: int, cols: int, gain: float) -> None:
        std = gain / math.sqrt(cols)
        size = 2 * rows * cols
        self._add(f"{module}.weight", "BF16", (rows, cols), size,
                  lambda: self.source.bf16(size, std))  # fmt: skip

    def array(self, name: str, dtype: str, values: np.ndarray) -> None:
        data = memoryview(np.ascontiguousarray(values).view(np.uint8).reshape(-1))
        self._add(name, dtype, values.shape, len(data), lambda: iter([data]))

    def norm(self, module: str, width: int) -> None:
        self.array(f"{module}.weight", "BF16", np.full(width, 0x3F80, np.uint16))

    def fp8(self, module: str, rows: int, cols: int, gain: float) -> None:
        size = rows * cols
        self._add(f"{module}.weight", "F8_E4M3", (rows, cols), size,
                  lambda: self.source.fp8(size))  # fmt: skip
        tiles = (-(-rows // _FP8_SCALE_TILE), -(-cols // _FP8_SCALE_TILE))
        scale = gain / math.sqrt(cols) / self.source.fp8_rms
        self.array(f"{module}.weight_scale_inv", "F32", np.full(tiles, scale, np.float32))

    def nvfp4(self, module: str, rows: int, cols: int, gain: float, hole: bool = False) -> None:
        size, scales = rows * cols // 2, rows * cols // 16
        self._add(f"{module}.weight", "U8", (rows, cols // 2), size,
                  None if hole else lambda: self.source.packed(size))  # fmt: skip
        self._add(f"{module}.weight_scale", "F8_E4M3", (rows, cols // 16), scales,
                  None if hole else lambda: self.source.scales(scales))  # fmt: skip
        scale = gain / math.sqrt(cols) / self.source.nvfp4_rms
        self.array(f"{module}.weight_scale_2", "F32", np.array(scale, np.float32))
        self.array(f"{module}.input_scale", "F32", np.array(1 / 448, np.float32))

    def mlp(self, prefix: str, width: int, down_gain: float, hole: bool = False) -> None:
        hidden = self.config["hidden_size"]
        self.nvfp4(f"{prefix}.gate_proj", width, hidden, 1.0, hole)
        self.nvfp4(f"{prefix}.up_proj", width, hidden, 1.0, hole)
        self.nvfp4(f"{prefix}.down_proj", hidden, width, down_gain, hole)

    def attention(self, prefix: str, gain: float) -> None:
        c = self.config
        hidden, heads, lora = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
        nope, rope, v = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
        linear, output = (self.bf16,) * 2 if self.form == "bf16" else (self.fp8, self.nvfp4)
        linear(f"{prefix}.q_a_proj", c["q_lora_rank"], hidden, 1.0)
        self.norm(f"{prefix}.q_a_layernorm", c["q_lora_rank"])
        linear(f"{prefix}.q_b_proj", heads * (nope + rope), c["q_lora_rank"], 1.0)
        linear(f"{prefix}.kv_a_proj_with_mqa", lora + rope, hidden, 1.0)
        self.norm(f"{prefix}.kv_a_layernorm", lora)
        linear(f"{prefix}.kv_b_proj", heads * (nope + v), lora, 1.0)
        output(f"{prefix}.o_proj", hidden, heads * v, gain)

    def _add(self, name: str, dtype: str, shape: tuple[int, ...], size: int, data: Any) -> None:
        self.tensors.append((TensorSpec(name, dtype, tuple(shape), size), data))


def added_square(cosine: float) -> float:
    """Return the square of what a layer adds, in units of the stream's before it."""
    return 1 / cosine**2 - 1


def build(args: argparse.Namespace, config: dict[str, Any]) -> tuple[Checkpoint, list, float]:
    """Lay out all tensors; return them, the routers (gate, bias) and their inputs' cosine."""
    source = Source(args.seed)
    out = Checkpoint(config, source, args.attention)
    hidden, experts = config["hidden_size"], config["n_routed_experts"]
    bias_by_rank = fit_bias(experts, args.skew, ROUTER_GAIN)
    cosine = cosine_for_recall(bias_by_rank, ROUTER_GAIN, args.predictability)
    added = added_square(cosine)
    routers = []
    out.bf16("model.embed_tokens", config["vocab_size"], hidden, math.sqrt(hidden))
    square = 1.0  # of the residual stream
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        attention = ATTENTION_SHARE * added * square
        rest = (1 - ATTENTION_SHARE) * added * square
        out.norm(f"{prefix}.input_layernorm", hidden)
        out.attention(f"{prefix}.self_attn", math.sqrt(attention))
        out.norm(f"{prefix}.post_attention_layernorm", hidden)
        if layer < config["first_k_dense_replace"]:
            out.mlp(f"{prefix}.mlp", config["intermediate_size"], math.sqrt(rest / _MLP_SQUARE))
        else:
            # Eight weights of about 2.5 / 8 each, unless they are zeros, and the shared expert.
            routed = config["routed_scaling_factor"] ** 2 / config["num_experts_per_tok"]
            routed *= not args.sparse
            gain = math.sqrt(rest / _MLP_SQUARE / (1 + routed))
            gate = source.matrix(experts, hidden, ROUTER_GAIN / math.sqrt(hidden))
            bias = bias_by_rank[source.ranking(experts)]
            routers.append((gate, bias))
            out.array(f"{prefix}.mlp.gate.weight", "BF16", gate)
            out.array(f"{prefix}.mlp.gate.e_score_correction_bias", "F32", bias)
            for expert in range(experts):
                width = config["moe_intermediate_size"]
                out.mlp(f"{prefix}.mlp.experts.{expert}", width, gain, args.sparse)
            out.mlp(f"{prefix}.mlp.shared_experts", config["moe_intermediate_size"], gain)
        square *= 1 + added
    out.norm("model.norm", hidden)
    out.bf16("lm_head", config["vocab_size"], hidden, HEAD_GAIN)
    return out, routers, cosine


def write(out: Checkpoint, folder: Path) -> int:
    """Write shards, index and configurations; return the bytes of the tensors."""
    shards: list[list[tuple[TensorSpec, Any]]] = [[]]
    filled = 0
    for tensor in out.tensors:
        if filled > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor[0].size
    weight_map, total = {}, 0
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with HoleWriter(folder / name, [spec for spec, _ in tensors]) as writer:
            # In the order of the file, so that the disk sees one stream.
            for spec, data in sorted(tensors, key=lambda t: (_ORDER.index(t[0].dtype), t[0].name)):
                at = 0
                for chunk in data() if data else ():
                    writer.write(spec.name, at, chunk)
                    at += len(chunk)
                if not data:
                    writer.leave(spec)
                weight_map[spec.name] = name
                total += spec.size
            writer.commit()
        print(f"{name}: {total / 1e9:.1f} GB so far", file=sys.stderr)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    for file, value in (
        ("model.safetensors.index.json", index),
        ("hf_quant_config.json", quant_config(out.form)),
        ("config.json", out.config),
    ):
        (folder / file).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    return total


def measure_routers(routers: list, cosine: float, tokens: int = 2048) -> tuple[float, float | None]:
    """Return the Zipf exponent of use and the recall from layer to layer, on a simulated stream."""
    random = np.random.default_rng(1)
    hidden = routers[0][0].shape[1]
    state = random.standard_normal((tokens, hidden), np.float32)
    exponents, recalls = [], []
    previous = None
    for gate, bias in routers:
        weights = (gate.astype(np.uint32) << 16).view(np.float32)
        if previous is not None:
            noise = random.standard_normal((tokens, hidden), np.float32)
            state = cosine * previous + math.sqrt(1 - cosine**2) * noise
        chosen = choose_experts(state @ weights.T, bias)
        exponents.append(fit_exponent(chosen, len(bias)))
        if previous is not None:
            guess = choose_experts(previous @ weights.T, bias)
            recalls.append(recall_at_cosine(guess, chosen))
        previous = state
    return float(np.mean(exponents)), float(np.mean(recalls)) if recalls else None


def measure_model(folder: Path, tokens: int) -> float:
    """Return the Zipf exponent of the experts that the model itself chooses on random ids."""
    from dsfp4 import Model

    model = Model(folder, max_context=tokens)
    ids = np.random.default_rng(2).integers(2, model.config["vocab_size"], tokens)
    chosen = model.chosen_experts(ids)
    experts = model.config["n_routed_experts"]
    return float(np.mean([fit_exponent(layer, experts) for layer in chosen]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--like", choices=["r1"], default="r1")
    parser.add_argument("--dense-layers", type=int, required=True)
    parser.add_argument("--moe-layers", type=int, required=True)
    parser.add_argument("--vocab", type=int, default=129280)
    parser.add_argument("--experts", type=int, default=256, help="a multiple of 8, at least 16")
    parser.add_argument("--sparse", action="store_true", help="routed experts are holes")
    parser.add_argument("--attention", choices=["bf16", "fp8-nvfp4"], default="bf16")
    parser.add_argument("--skew", type=float, default=0.5, metavar="Z", help="0 is uniform")
    parser.add_argument("--predictability", type=float, default=0.5, metavar="P")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", type=int, default=0, metavar="TOKENS",
                        help="run the model on so many random ids too")  # fmt: skip
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    if args.dense_layers < 0 or args.moe_layers < 1 or args.vocab < 2:
        parser.error("there must be at least one MoE layer and two tokens")
    if args.experts < 16 or args.experts % 8:
        parser.error("--experts must be a multiple of 8 and at least 16")
    if args.skew < 0 or not 0 < args.predictability < 1:
        parser.error("--skew must be at least 0 and --predictability between 0 and 1")
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"{args.out} is there and not empty")
    return args


def main() -> None:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    out, routers, cosine = build(args, r1_config(args))
    start = time.perf_counter()
    total = write(out, args.out)
    seconds = time.perf_counter() - start
    disk = sum(512 * file.stat().st_blocks for file in args.out.iterdir())
    print(
        f"{args.out}: {total / 1e9:.2f} GB, {disk / 1e9:.2f} GB of them on the disk, in "
        f"{seconds:.0f} s, {disk / 1e9 / seconds:.2f} GB/s"
    )
    skew, recall = measure_routers(routers, cosine)
    print(f"skew: asked {args.skew:.2f}, measured {skew:.2f} (routers on a simulated stream)")
    found = "one MoE layer alone has none" if recall is None else f"measured {recall:.2f}"
    print(f"predictability: asked {args.predictability:.2f}, {found}")
    if args.measure:
        print(f"skew of the model on random ids: {measure_model(args.out, args.measure):.2f}")


if __name__ == "__main__":
    main()
