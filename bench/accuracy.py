"""Distance from transformers in float32: every golden vector, on `reference` and on `cpu`.

The golden vectors lie in tests/golden; for each checkpoint this prints, of prefill and of decode,
the relative L2 error of the logits. On `cpu` the experts are forced; the error may be twice what
rounding to BF16 makes in the oracle itself, and the largest reference margin at which its own
router would have chosen otherwise must be under 1e-2.
"""

import argparse
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from dsfp4 import Model
from fixtures.cases import CASES
from fixtures.golden_vectors import (
    Golden,
    chosen_otherwise,
    compare_free,
    load_demo_golden,
    load_golden,
    relative_error,
)
from fixtures.random_checkpoint import write_checkpoint
from machine import machine


def errors(model: Model, golden: Golden, forced: bool) -> tuple[list[float], float]:
    """[prefill, decode] relative errors, and the largest margin of another choice, 0 if none."""
    result, margin = [], 0.0
    for decode in (False, True):
        logits, experts = model.forward(
            golden.ids,
            experts=golden.experts if forced else None,
            return_experts=True,
            decode=decode,
        )
        result.append(relative_error(logits[golden.positions], golden.logits))
        otherwise = golden.margin[chosen_otherwise(experts, golden)]
        margin = max(margin, float(otherwise.max(initial=0.0)))
    return result, margin


def row(name: str, golden: Golden, reference: Model, cpu: Model, forced: bool) -> None:
    (prefill, decode), _ = errors(reference, golden, forced)
    (cpu_prefill, cpu_decode), margin = errors(cpu, golden, True)
    print(
        f"{name:22} {prefill:9.1e} {decode:9.1e}   {cpu_prefill:9.1e} {cpu_decode:9.1e} "
        f"{2 * golden.bf16_error:9.1e} {margin:9.1e}",
        flush=True,
    )


def free(cpu: Model, texts: list[Any]) -> None:
    """The demo model with its own choice of experts."""
    agreement, perplexity = compare_free(cpu.forward, texts)
    print(
        f"demo, free, on cpu: the same top token at {100 * agreement:.2f} % of the clear "
        f"positions, perplexity {100 * perplexity:+.3f} %"
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(f"machine: {machine()}")
    print(f"{'':22} {'reference':>19}   {'cpu, forced':>19}")
    print(
        f"{'':22} {'prefill':>9} {'decode':>9}   {'prefill':>9} {'decode':>9} {'may be':>9} "
        f"{'margin':>9}"
    )
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            write_checkpoint(CASES[name], path)
            golden = load_golden(name, path)
            row(name, golden, Model(path, "reference"), Model(path, "cpu"), False)
    texts = load_demo_golden(Path(str(files("dsfp4"))) / "demo_model")
    reference, cpu = Model("demo", "reference"), Model("demo", "cpu")
    for text in texts:
        row(f"demo {text.name}", text, reference, cpu, True)
    free(cpu, texts)


if __name__ == "__main__":
    main()
