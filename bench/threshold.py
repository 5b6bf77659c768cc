"""What expert_threshold costs and saves: perplexity beside bytes read, at a cache of 25 %."""

import argparse
import gzip
import json
from pathlib import Path

import numpy as np

from dsfp4 import Model
from dsfp4.demo import resolve_model
from dsfp4.tokenizer import Tokenizer
from machine import machine

THRESHOLDS = (0.0, 0.02, 0.05, 0.1, 0.2)


def texts(file: Path, count: int) -> list[str]:
    opened = gzip.open(file, "rt") if file.suffix == ".gz" else file.open(encoding="utf-8")
    with opened as lines:
        return [json.loads(line)["text"] for line, _ in zip(lines, range(count), strict=False)]


def losses(model: Model, ids: np.ndarray) -> np.ndarray:
    logits = model.forward(ids[:-1], decode=True).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    chosen = logits[np.arange(len(ids) - 1), ids[1:]]
    return np.log(np.exp(logits).sum(axis=1)) - chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "text", nargs="?", type=Path, default=Path(__file__).with_name("text.jsonl")
    )
    parser.add_argument("--texts", type=int, default=12)
    parser.add_argument("--first", type=int, default=300, help="tokens of each text")
    parser.add_argument("--share", type=float, default=0.25, help="of all experts, cached")
    args = parser.parse_args()

    folder = resolve_model("demo")
    probe = Model(folder, cpu_cache_size=0, warm_start=False).stats()
    experts = 7 * 32  # of the demo model
    size = (int(args.share * experts) + 0.1) * probe["slot_bytes"] / 1e9
    tokenizer = Tokenizer(folder)
    ids = [
        np.asarray(tokenizer.encode_prompt(t)[: args.first]) for t in texts(args.text, args.texts)
    ]
    print(f"machine: {machine()}; {sum(map(len, ids))} tokens, {100 * args.share:.0f} % cached")
    base = 0.0
    for threshold in THRESHOLDS:
        model = Model(folder, cpu_cache_size=size, expert_threshold=threshold, warm_start=False)
        all_losses = np.concatenate([losses(model, one) for one in ids])
        stats = model.stats()
        loss = float(all_losses.mean())
        base = base or loss
        print(
            f"{threshold:4.2f}: perplexity {np.exp(loss):.4f} "
            f"({100 * (np.exp(loss - base) - 1):+.2f} %), "
            f"{stats['demand_bytes'] / len(all_losses) / 1e3:.0f} kB read a token, "
            f"{100 * stats['skipped_pairs'] / stats['total_pairs']:.1f} % of the experts left out"
        )


if __name__ == "__main__":
    main()
