"""The demo model with a share of its experts cached, and texts for it."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dsfp4 import Model
from dsfp4.demo import resolve_model
from dsfp4.tokenizer import Tokenizer

EXPERTS = 7 * 32  # of the demo model
TEXT = Path(__file__).with_name("text.jsonl")


def token_ids(file: Path, first: int) -> Iterator[np.ndarray]:
    """Yield the first tokens of each text of JSON lines with `text` (.gz too)."""
    tokenizer = Tokenizer(resolve_model("demo"))
    opened = gzip.open(file, "rt") if file.suffix == ".gz" else file.open(encoding="utf-8")
    with opened as lines:
        for line in lines:
            yield np.asarray(tokenizer.encode_prompt(json.loads(line)["text"])[:first])


def cached_demo(share: float, **options: object) -> Model:
    """Return the demo model with that share of its experts in RAM, none of them yet."""
    folder = resolve_model("demo")
    probe = Model(folder, cpu_cache_size=0, warm_start=False).stats()
    size = (int(share * EXPERTS) + 0.1) * probe["slot_bytes"] / 1e9
    return Model(folder, cpu_cache_size=size, warm_start=False, **options)
