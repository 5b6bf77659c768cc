"""Makes the golden vectors: what Hugging Face transformers computes in float32 on the CPU.

Run it in an environment of its own; the tests need only what it writes:

    python -m venv build/golden
    build/golden/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    build/golden/bin/pip install transformers==5.23.0 ml_dtypes numpy tokenizers
    build/golden/bin/python tests/golden/make_golden.py               # all random checkpoints
    build/golden/bin/python tests/golden/make_golden.py v3-bf16-real  # some of them
    build/golden/bin/python tests/golden/make_golden.py --demo python/dsfp4/demo_model

A random checkpoint's file <case>.npz holds, for T tokens, L MoE layers, k active experts:
    sha256      of the checkpoint that the vectors belong to
    ids         int64 [T]
    logits      float32 [T, vocab]
    experts     int32 [L, T, k], best selection score first
    margin      float32 [L, T]: the smallest kept minus the largest dropped selection score, of
                groups and of experts, whichever is less (inf where nothing is dropped)
    bf16_error  relative L2 error of the logits when the inputs of every matrix product but the
                router's are rounded to BF16, with the experts of the exact run
demo.npz holds the same for each of its texts, the names followed by _<text>, with logits and
bf16_error at `positions` only, and for every position `top` (the best token), `gap` (its logit
minus the second's) and `nll` (nats of each next token, T - 1 values).
demo_drawn.npz holds ids, top, gap and nll of texts that the model itself has drawn, [texts, T]:
where a choice of experts is close, one position's nats may move by 4, so that perplexity needs
thousands of them.
"""

import argparse
import contextlib
import json
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from fixtures import numpy_ops  # noqa: E402
from fixtures.cases import CASES  # noqa: E402
from fixtures.checkpoint_io import (  # noqa: E402
    checkpoint_sha256,
    dequantized_weights,
    write_shard,
)
from fixtures.numpy_model import read_router  # noqa: E402
from fixtures.random_checkpoint import token_ids, write_checkpoint  # noqa: E402
from golden.demo_texts import DEMO_TEXTS  # noqa: E402

Arrays = dict[str, NDArray[Any]]

# The demo model's logits are large; this many positions of each text are kept.
DEMO_POSITIONS = 40
LEAST_MARGIN = 2e-4
# Drawn texts go on from the first tokens of each text.
DRAWN_OF_EACH = 3
DRAWN_START = 32
DRAWN_TOKENS = 512


# --- the oracle ----------------------------------------------------------------------------------


def load(folder: Path) -> Any:
    """The checkpoint in `folder`, dequantised by our own reader, as a transformers model."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)
    config.update(dtype="float32", num_nextn_predict_layers=0)
    layers = config["num_hidden_layers"]
    extra = f"model.layers.{layers}."  # an MTP layer, which decoding does not use
    weights = {n: w for n, w in dequantized_weights(folder).items() if not n.startswith(extra)}
    with tempfile.TemporaryDirectory() as name:
        plain = Path(name)
        (plain / "config.json").write_text(json.dumps(config), encoding="utf-8")
        write_shard(plain / "model.safetensors", dict(weights))
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            plain,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
    problems = {k: v for k, v in report.items() if v}
    if problems:
        raise RuntimeError(
            f"{folder}: transformers did not take the weights as they are: {problems}"
        )
    return model.eval()


def moe_modules(model: Any) -> list[Any]:
    """The MoE blocks, in the order of the layers."""
    return [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]


@torch.no_grad()
def run(model: Any, ids: NDArray[Any]) -> NDArray[np.float32]:
    """Logits [T, vocab] of one sequence."""
    return model(torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()


@contextlib.contextmanager
def recorded_routers(model: Any) -> Iterator[list[tuple[NDArray[Any], ...]]]:
    """Collects (router logits, weights, experts) of each MoE layer while the model runs."""
    records: list[tuple[NDArray[Any], ...]] = []

    def record(_module: Any, _inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
        records.append(tuple(part.numpy().copy() for part in output))

    handles = [moe.gate.register_forward_hook(record) for moe in moe_modules(model)]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def read_routing(
    model: Any, config: dict[str, Any], records: list[tuple[NDArray[Any], ...]]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Experts [L, T, k] best first, and margins [L, T], from the router's recorded outputs.

    Our own routing of the recorded logits gives order and margin, so it must have made the oracle's
    choice with the oracle's weights.
    """
    experts, margins = [], []
    for moe, (logits, weights, chosen) in zip(moe_modules(model), records, strict=True):
        bias = getattr(moe.gate, "e_score_correction_bias", None)
        routing = numpy_ops.route(
            logits.astype(np.float64), read_router(config), None if bias is None else bias.numpy()
        )
        order = np.argsort(chosen, axis=-1)
        ours = np.argsort(routing.experts, axis=-1)
        theirs_sorted = np.take_along_axis(chosen, order, axis=-1)
        if not np.array_equal(theirs_sorted, np.take_along_axis(routing.experts, ours, axis=-1)):
            raise RuntimeError("our routing of the oracle's router logits chooses other experts")
        np.testing.assert_allclose(
            np.take_along_axis(routing.weights, ours, axis=-1),
            np.take_along_axis(weights, order, axis=-1),
            rtol=2e-5,
        )
        experts.append(routing.experts)
        margins.append(routing.margin)
    return np.stack(experts).astype(np.int32), np.stack(margins).astype(np.float32)


# --- the same, with BF16 inputs ------------------------------------------------------------------


def _bf16(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).to(torch.float32)


def _rounded_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **_kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = _bf16(query) @ _bf16(key).transpose(2, 3) * scaling + attention_mask
    weights = torch.softmax(scores, dim=-1)
    return (_bf16(weights) @ _bf16(value)).transpose(1, 2).contiguous(), weights


def _rounded_experts(experts: Any) -> Any:
    def forward(x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            token, slot = torch.nonzero(chosen == expert, as_tuple=True)
            gate, up = (_bf16(x[token]) @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
            hidden = nn.functional.silu(gate) * up
            routed = _bf16(hidden) @ experts.down_proj[expert].T
            out.index_add_(0, token, routed * weights[token, slot, None])
        return out

    return forward


def _forced_router(gate: Any, config: dict[str, Any], experts: NDArray[np.int32]) -> Any:
    def hook(_module: Any, _inputs: Any, output: tuple[torch.Tensor, ...]) -> Any:
        logits = output[0].numpy().astype(np.float64)
        routing = numpy_ops.route(logits, read_router(config), forced=experts.astype(np.int64))
        weights = torch.from_numpy(routing.weights.astype(np.float32))
        return output[0], weights, torch.from_numpy(experts.astype(np.int64))

    return gate.register_forward_hook(hook)


@contextlib.contextmanager
def rounded_inputs(
    model: Any, config: dict[str, Any], experts: NDArray[np.int32]
) -> Iterator[None]:
    """Rounds the activations of all matrix products but the router's; forces `experts`."""
    family = sys.modules[type(model).__module__]
    attention = family.eager_attention_forward
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    handles = [
        m.register_forward_pre_hook(lambda _m, inputs: tuple(_bf16(x) for x in inputs))
        for m in linears
    ]
    for moe, forced in zip(moe_modules(model), experts, strict=True):
        handles.append(_forced_router(moe.gate, config, forced))
        moe.experts.forward = _rounded_experts(moe.experts)
    family.eager_attention_forward = _rounded_attention
    try:
        yield
    finally:
        family.eager_attention_forward = attention
        for moe in moe_modules(model):
            del moe.experts.forward
        for handle in handles:
            handle.remove()


def relative_error(values: NDArray[Any], truth: NDArray[Any]) -> float:
    """Relative L2 error."""
    difference = values.astype(np.float64) - truth
    return float(np.linalg.norm(difference) / np.linalg.norm(truth.astype(np.float64)))


# --- files ---------------------------------------------------------------------------------------


def observe(model: Any, config: dict[str, Any], ids: NDArray[Any]) -> tuple[Arrays, NDArray[Any]]:
    """What a golden file holds of one sequence, and the logits with rounded inputs."""
    with recorded_routers(model) as records:
        logits = run(model, ids)
    experts, margin = read_routing(model, config, records)
    with rounded_inputs(model, config, experts):
        rounded = run(model, ids)
    arrays = {"ids": ids, "logits": logits, "experts": experts, "margin": margin}
    return arrays, rounded


def save(path: Path, folder: Path, arrays: Arrays) -> None:
    """Writes one golden file and says how large it is."""
    facts = {
        "sha256": np.array(checkpoint_sha256(folder)),
        "transformers": np.array(transformers.__version__),
    }
    np.savez_compressed(path, **facts, **arrays)
    print(f"    {path.name}: {path.stat().st_size / 1000:.0f} kB")


def make_case(name: str, output: Path) -> None:
    """The golden file of one random checkpoint."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_checkpoint(case, folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        arrays, rounded = observe(load(folder), config, token_ids(case))
        if arrays["margin"].min() < LEAST_MARGIN:
            raise RuntimeError(f"{name}: a routing margin is below {LEAST_MARGIN}; change its seed")
        error = relative_error(rounded, arrays["logits"])
        arrays["bf16_error"] = np.array(error)
        print(f"{name}: bf16_error {error:.2e}, least margin {arrays['margin'].min():.1e}")
        save(output / f"{name}.npz", folder, arrays)


def predictions(logits: NDArray[np.float32], ids: NDArray[Any]) -> Arrays:
    """Of every position the best token, its distance to the second, and the next token's nats."""
    exact = logits.astype(np.float64)
    largest = exact.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(exact - largest).sum(axis=1)) + largest[:, 0]
    best = np.sort(exact, axis=1)
    return {
        "top": exact.argmax(axis=1).astype(np.int32),
        "gap": (best[:, -1] - best[:, -2]).astype(np.float32),
        "nll": (log_sum[:-1] - exact[np.arange(len(ids) - 1), ids[1:]]).astype(np.float32),
    }


@torch.no_grad()
def drawn_texts(model: Any, starts: NDArray[Any]) -> Arrays:
    """What demo_drawn.npz holds: texts drawn at temperature 1, without an end."""
    torch.manual_seed(0)
    ids = model.generate(
        torch.from_numpy(np.repeat(starts, DRAWN_OF_EACH, axis=0)),
        do_sample=True,
        top_k=0,
        max_new_tokens=DRAWN_TOKENS - DRAWN_START,
        min_new_tokens=DRAWN_TOKENS - DRAWN_START,
        pad_token_id=0,
    ).numpy()
    of_texts = [predictions(run(model, text), text) for text in ids]
    return {"ids": ids} | {key: np.stack([p[key] for p in of_texts]) for key in of_texts[0]}


def make_demo(folder: Path, output: Path) -> None:
    """The golden file of the demo model, on the texts of demo_texts.py."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = load(folder)
    saved: Arrays = {"texts": np.array(list(DEMO_TEXTS))}
    for name, text in DEMO_TEXTS.items():
        ids = np.array([config["bos_token_id"], *tokenizer.encode(text).ids], np.int64)
        arrays, rounded = observe(model, config, ids)
        positions = np.linspace(0, len(ids) - 1, DEMO_POSITIONS).astype(np.int32)
        arrays |= predictions(arrays["logits"], ids)
        arrays |= {"positions": positions, "logits": arrays["logits"][positions]}
        error = relative_error(rounded[positions], arrays["logits"])
        arrays["bf16_error"] = np.array(error)
        print(
            f"{name}: {len(ids)} tokens, {arrays['nll'].mean():.3f} nats a token, "
            f"bf16_error {error:.2e}, least margin {arrays['margin'].min():.1e}"
        )
        saved |= {f"{key}_{name}": value for key, value in arrays.items()}
    save(output / "demo.npz", folder, saved)
    starts = [saved[f"ids_{name}"][:DRAWN_START] for name in DEMO_TEXTS]
    save(output / "demo_drawn.npz", folder, drawn_texts(model, np.stack(starts)))


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description="Makes the golden vectors with transformers.")
    parser.add_argument("cases", nargs="*", help=f"of: {', '.join(CASES)} (default: all)")
    parser.add_argument("--demo", type=Path, metavar="FOLDER", help="the demo model's vectors")
    parser.add_argument("--output", type=Path, default=HERE, metavar="FOLDER")
    options = parser.parse_args()
    unknown = set(options.cases) - set(CASES)
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    if options.demo is not None:
        make_demo(options.demo, options.output)
    if options.cases or options.demo is None:
        for name in options.cases or CASES:
            make_case(name, options.output)


if __name__ == "__main__":
    main()
