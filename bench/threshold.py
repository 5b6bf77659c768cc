"""What expert_threshold costs and saves: perplexity beside bytes read, at a cache of 25 %."""

import argparse
from itertools import islice
from pathlib import Path

import numpy as np

from demo_cache import TEXT, cached_demo, token_ids
from dsfp4 import Model
from machine import machine

THRESHOLDS = (0.0, 0.02, 0.05, 0.1, 0.2)


def losses(model: Model, ids: np.ndarray) -> np.ndarray:
    logits = model.forward(ids[:-1], decode=True).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    chosen = logits[np.arange(len(ids) - 1), ids[1:]]
    return np.log(np.exp(logits).sum(axis=1)) - chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", nargs="?", type=Path, default=TEXT)
    parser.add_argument("--texts", type=int, default=12)
    parser.add_argument("--first", type=int, default=300, help="tokens of each text")
    parser.add_argument("--share", type=float, default=0.25, help="of all experts, cached")
    args = parser.parse_args()

    ids = list(islice(token_ids(args.text, args.first), args.texts))
    print(f"machine: {machine()}; {sum(map(len, ids))} tokens, {100 * args.share:.0f} % cached")
    base = 0.0
    for threshold in THRESHOLDS:
        model = cached_demo(args.share, expert_threshold=threshold)
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
