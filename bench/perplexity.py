"""Nats per token on text, by kind (prose or chat), of one checkpoint or of two side by side."""

import argparse
import gzip
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from dsfp4 import Model
from dsfp4.demo import resolve_model
from dsfp4.tokenizer import Tokenizer
from machine import machine

Totals = dict[str, tuple[float, int]]


def token_losses(model: Model, ids: list[int]) -> np.ndarray:
    """-log p of ids[1:], in nats."""
    logits = model.forward(np.asarray(ids[:-1], np.int32)).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    chosen = logits[np.arange(len(ids) - 1), ids[1:]]
    return np.log(np.exp(logits).sum(axis=1)) - chosen


def measure(path: str, documents: list[dict[str, str]], first: int, device: str) -> Totals:
    """{kind: (sum of losses, tokens)} over the first tokens of every document."""
    folder = resolve_model(path)
    model = Model(path, device=device)
    tokenizer = Tokenizer(folder)
    totals: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for number, document in enumerate(documents):
        ids = tokenizer.encode_prompt(document["text"])[:first]
        losses = token_losses(model, ids)
        kind = "chat" if "chat" in document["source"] else "prose"
        total, count = totals[kind]
        totals[kind] = (total + float(losses.sum()), count + len(losses))
        if sys.stderr.isatty():
            print(f"\r{path}: {number + 1}/{len(documents)}", end="", file=sys.stderr)
    return dict(totals)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("file", nargs="?", default=str(Path(__file__).with_name("text.jsonl")))
    parser.add_argument("--against", help="a second checkpoint, whose loss is the base")
    parser.add_argument("--first", type=int, default=500, help="tokens of each document")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    opener = gzip.open if args.file.endswith(".gz") else open
    with opener(args.file, "rt", encoding="utf-8") as lines:
        documents = [json.loads(line) for line in lines]
    print(f"machine: {machine()}; {len(documents)} documents, first {args.first} tokens of each")
    base = measure(args.against, documents, args.first, args.device) if args.against else {}
    for kind, (total, count) in measure(args.model, documents, args.first, args.device).items():
        loss = total / count
        line = f"{kind:6} {count:7} tokens  {loss:.4f} nats/token  perplexity {np.exp(loss):.3f}"
        if kind in base:
            other = base[kind][0] / base[kind][1]
            line += f"  against {other:.4f}: perplexity {100 * (np.exp(loss - other) - 1):+.2f} %"
        print(line)


if __name__ == "__main__":
    main()
