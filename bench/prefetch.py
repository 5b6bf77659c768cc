"""What prefetching saves and wastes: the demo model decodes texts with 25 % of its experts cached.

Each depth decodes the same texts, from an empty cache, in turn; seconds are medians of the rounds.
"""

import argparse
import statistics
import time
from itertools import islice
from pathlib import Path

from demo_cache import TEXT, cached_demo, token_ids
from machine import machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", nargs="?", type=Path, default=TEXT)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--first", type=int, default=200, help="tokens of each text")
    parser.add_argument("--share", type=float, default=0.25, help="of all experts, cached")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    ids = list(islice(token_ids(args.text, args.first), args.texts))
    tokens = sum(map(len, ids))
    seconds: dict[int, list[float]] = {layers: [] for layers in args.layers}
    stats: dict[int, dict] = {}
    for round_ in range(args.rounds):
        for layers in args.layers[:: 1 if round_ % 2 == 0 else -1]:
            model = cached_demo(args.share, prefetch_layers=layers)
            start = time.perf_counter()
            for one in ids:
                model.forward(one, decode=True)
            seconds[layers].append(time.perf_counter() - start)
            stats[layers] = model.stats()
    print(f"machine: {machine()}; {tokens} tokens, {100 * args.share:.0f} % cached")
    print(f"{'layers':>6} {'tok/s':>7} {'recall':>7} {'precision':>9} {'MB read':>8} {'wasted':>7}")
    for layers, found in stats.items():
        rate = tokens / statistics.median(seconds[layers])
        read = found["demand_bytes"] + found["speculative_bytes"]
        print(
            f"{layers:6} {rate:7.1f} {found['predicted_used'] / max(1, found['predictable']):7.2f} "
            f"{found['predicted_used'] / max(1, found['predicted']):9.2f} {read / 1e6:8.1f} "
            f"{100 * found['wasted_bytes'] / read:6.1f} %"
        )


if __name__ == "__main__":
    main()
