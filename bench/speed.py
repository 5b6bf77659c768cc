"""Tokens per second of prefill and decode: medians of several runs on random ids."""

import argparse
import statistics

import numpy as np

from dsfp4 import Model
from machine import machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()

    model = Model(args.model, device=args.device, threads=args.threads)
    ids = np.random.default_rng(0).integers(3, model.config["vocab_size"], args.prompt_tokens)
    prefill, decode = [], []
    for run in range(args.runs + 1):
        result = model.generate(ids, max_tokens=args.tokens, temperature=1.0, seed=run, stop_ids=[])
        if run > 0:  # the first one warms up
            prefill.append(args.prompt_tokens / result.prefill_seconds)
            decode.append((len(result.tokens) - 1) / result.decode_seconds)
    print(f"machine: {machine()}")
    print(f"model: {args.model}, device: {args.device}, {args.runs} runs, tokens/s")
    for name, rates in (("prefill", prefill), ("decode", decode)):
        print(
            f"{name:8} median {statistics.median(rates):8.1f}"
            f"  (min {min(rates):.1f}, max {max(rates):.1f})"
        )


if __name__ == "__main__":
    main()
