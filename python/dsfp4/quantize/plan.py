"""What becomes of each tensor of a checkpoint that is quantised, and in which file it ends."""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dsfp4.errors import UnsupportedError
from dsfp4.quantize.source import TILE, Matrix, Source
from dsfp4.quantize.writer import TensorSpec

if TYPE_CHECKING:
    from dsfp4._core import TensorInfo

Format = Literal["keep", "fp8", "nvfp4"]

BLOCK = 16  # values along a row that share an NVFP4 block scale

_MODULE = re.compile(
    r"model\.layers\.(?P<layer>\d+)\.(?:"
    r"mlp\.(?P<mlp>experts\.\d+\.|shared_experts\.|)(?:gate|up|down)_proj"
    r"|self_attn\.(?:q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj))"
)
_ALREADY_FP4 = re.compile(r".*\.(?:weight_packed|weight_scale|weight_scale_2)")


@dataclass(frozen=True)
class Linear:
    """One linear module of the layers that decoding uses, and what becomes of it."""

    matrix: Matrix
    role: str
    target: Format

    @property
    def family(self) -> str:
        """A name in common with the modules that share its global scale: gate and up of an MLP."""
        return re.sub(r"(?:gate|up)_proj$", "gate_up_proj", self.matrix.module)

    def outputs(self) -> list[TensorSpec]:
        """Return the tensors that replace the weight; none where it is kept."""
        module, rows, cols = self.matrix.module, self.matrix.rows, self.matrix.cols
        if self.target == "nvfp4":
            packed, scales = (rows, cols // 2), (rows, cols // BLOCK)
            return [
                TensorSpec(f"{module}.weight", "U8", packed, rows * cols // 2),
                TensorSpec(f"{module}.weight_scale", "F8_E4M3", scales, rows * cols // BLOCK),
                TensorSpec(f"{module}.weight_scale_2", "F32", (), 4),
                TensorSpec(f"{module}.input_scale", "F32", (), 4),
            ]
        if self.target == "fp8":
            tiles = (-(-rows // TILE), -(-cols // TILE))
            return [
                TensorSpec(f"{module}.weight", "F8_E4M3", (rows, cols), rows * cols),
                TensorSpec(f"{module}.weight_scale_inv", "F32", tiles, 4 * tiles[0] * tiles[1]),
            ]
        return []


@dataclass
class Shard:
    """One file to write: all its tensors, those copied, and the linears that are converted."""

    specs: list[TensorSpec] = field(default_factory=list)
    copies: list["TensorInfo"] = field(default_factory=list)
    linears: list[Linear] = field(default_factory=list)


@dataclass
class Plan:
    """Everything that is known before a weight is read."""

    linears: dict[str, Linear]  # by module
    shards: dict[str, Shard]  # by file name
    exclude_modules: list[str]  # what is not NVFP4, in the patterns of NVIDIA's exports

    @property
    def bytes_out(self) -> int:
        """Bytes of all tensors to be written."""
        return sum(spec.size for shard in self.shards.values() for spec in shard.specs)

    def families(self) -> dict[str, list[Linear]]:
        """Return the linears that become NVFP4, by what they share a global scale with."""
        families: dict[str, list[Linear]] = defaultdict(list)
        for linear in self.linears.values():
            if linear.target == "nvfp4":
                families[linear.family].append(linear)
        return families


def make_plan(source: Source, layers: int, attention: Format) -> Plan:
    """Plan the conversion of a model of so many layers; those after them (MTP) are copied.

    Raises UnsupportedError for a source that is in FP4 already.
    """
    linears: dict[str, Linear] = {}
    for tensor in source.tensors:
        if _ALREADY_FP4.fullmatch(tensor.name):
            raise UnsupportedError(
                f"tensor '{tensor.name}' in '{tensor.file}' shows that the source is in FP4 already"
            )
        module = tensor.name.removesuffix(".weight")
        match = _MODULE.fullmatch(module)
        if match is None or module == tensor.name or int(match["layer"]) >= layers:
            continue
        matrix = source.matrix(module)
        linears[module] = Linear(matrix, _role(match), _target(matrix, match, attention))
    shards: dict[str, Shard] = defaultdict(Shard)
    for tensor in source.tensors:
        _assign(tensor, linears, shards[Path(tensor.file).name])
    shards = {name: shard for name, shard in sorted(shards.items()) if shard.specs}
    return Plan(linears, shards, _exclude_modules(source, linears, layers))


def _role(match: re.Match[str]) -> str:
    if match["mlp"] is None:
        return "attention"
    roles = {"": "dense MLP", "shared_experts.": "shared experts"}
    return roles.get(match["mlp"], "routed experts")


def _target(matrix: Matrix, match: re.Match[str], attention: Format) -> Format:
    target: Format = attention if match["mlp"] is None else "nvfp4"
    blocks_fit = target != "nvfp4" or matrix.cols % BLOCK == 0
    is_fp8_already = target == "fp8" and matrix.scale_inv is not None
    return target if blocks_fit and not is_fp8_already else "keep"


def _assign(tensor: "TensorInfo", linears: dict[str, Linear], shard: Shard) -> None:
    module, _, suffix = tensor.name.rpartition(".")
    linear = linears.get(module)
    if linear is None or linear.target == "keep":
        shard.copies.append(tensor)
        shard.specs.append(TensorSpec(tensor.name, tensor.dtype, tensor.shape, tensor.bytes))
    elif suffix == "weight":  # and an FP8 source's weight_scale_inv goes where its weight goes
        shard.linears.append(linear)
        shard.specs.extend(linear.outputs())


def _exclude_modules(source: Source, linears: dict[str, Linear], layers: int) -> list[str]:
    patterns = {"lm_head"} if source.find("lm_head.weight") else set()
    attention: dict[str, list[Linear]] = {}
    for module, linear in linears.items():
        if linear.role == "attention":
            attention.setdefault(module.rpartition(".")[0], []).append(linear)
        elif linear.target != "nvfp4":
            patterns.add(module)
    for prefix, group in attention.items():
        excluded = [linear.matrix.module for linear in group if linear.target != "nvfp4"]
        patterns.update([f"{prefix}*"] if len(excluded) == len(group) else excluded)
    for tensor in source.tensors:
        match = re.match(r"model\.layers\.(\d+)\.", tensor.name)
        if match and int(match[1]) >= layers:
            patterns.add(f"model.layers.{match[1]}*")
        elif tensor.name.endswith(".mlp.gate.weight"):
            patterns.add("*mlp.gate")
    # Text and numbers take turns in the key, so that layer 2 comes before layer 10.
    return sorted(
        patterns, key=lambda p: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", p)]
    )
