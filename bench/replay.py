"""Replays routing traces through every cache policy at several capacities, beside Belady's optimum.

Traces: the demo model's on text (JSON lines with `text`, .gz too), each a generation of its own
with the cache kept between them, and synthetic ones: experts of Zipf's law that stay the same, and
such whose ranking drifts. The policies are the engine's own. Prints a table of hit rates; --plot
writes it as SVG.
"""

import argparse
import heapq
import json
from pathlib import Path

import numpy as np

from demo_cache import TEXT, token_ids
from dsfp4 import Model, _core
from dsfp4.demo import resolve_model
from machine import machine
from routing_model import choose_experts, fit_bias, place_ranks

CAPACITIES = (12, 25, 38, 50)  # percent of all experts
WARM = 200  # tokens that are not counted

Trace = tuple[np.ndarray, np.ndarray]  # used [layers, tokens, k] int32, scores [layers, tokens, E]


def demo_trace(file: Path, tokens: int, first: int) -> Trace:
    """Return the demo model's routing of the first tokens of each text."""
    folder = resolve_model("demo")
    model = Model(folder)
    biases = router_biases(folder, model.config)
    used, scores, count = [], [], 0
    for ids in token_ids(file, first):
        chosen, logits = model.routing_trace(ids)
        used.append(chosen)
        scores.append((1 / (1 + np.exp(-logits)) + biases[:, None, :]).astype(np.float32))
        count += len(ids)
        if count >= tokens:
            break
    return np.concatenate(used, 1), np.concatenate(scores, 1)


def router_biases(folder: Path, config: dict) -> np.ndarray:
    """Return e_score_correction_bias [MoE layers, experts] from the shards."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name.endswith("e_score_correction_bias"):
                begin, end = entry["data_offsets"]
                tensors[name] = np.frombuffer(data[start + begin : start + end], np.float32)
    layers = range(config["first_k_dense_replace"], config["num_hidden_layers"])
    names = [f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in layers]
    return np.stack([tensors[name] for name in names])


def synthetic_trace(
    skew: float, drift: float, tokens: int, layers: int = 4, experts: int = 64
) -> Trace:
    """Return a routing by Zipf's law; with `drift`, what a text prefers wanders with it."""
    random = np.random.default_rng(int(100 * skew + 10 * drift))
    by_rank = fit_bias(experts, skew, 1.0)
    used, scores = [], []
    for _ in range(layers):
        bias = by_rank[place_ranks(experts, random)]
        logits = random.standard_normal((tokens, experts), np.float32)
        if drift:
            # Half of the variance is a walk that forgets in about 1 / drift tokens.
            walk = np.empty_like(logits)
            state = random.standard_normal(experts).astype(np.float32)
            for t in range(tokens):
                state = np.sqrt(1 - drift) * state + np.sqrt(drift) * random.standard_normal(
                    experts
                )
                walk[t] = state
            logits = np.sqrt(0.5) * (logits + walk)
        used.append(choose_experts(logits, bias).astype(np.int32))
        scores.append((1 / (1 + np.exp(-logits)) + bias).astype(np.float32))
    return np.stack(used), np.stack(scores)


def belady_misses(used: np.ndarray, experts: int, capacity: int, first: int) -> int:
    """Return the fewest misses that any policy can have: gives up what is needed last."""
    layers, tokens, _ = used.shape
    never = layers * tokens
    next_use = np.full((layers, experts), never, np.int64)
    following: list[list[np.ndarray]] = [[] for _ in range(tokens)]
    for t in range(tokens - 1, -1, -1):
        for layer in range(layers - 1, -1, -1):
            chosen = used[layer, t]
            following[t].append(next_use[layer, chosen].copy())
            next_use[layer, chosen] = t * layers + layer
        following[t].reverse()
    due: dict[int, int] = {}  # cached expert -> next use
    queue: list[tuple[int, int]] = []  # latest next use first; stale entries are skipped
    misses = 0
    for t in range(tokens):
        for layer in range(layers):
            for expert, after in zip(used[layer, t], following[t][layer], strict=True):
                key = layer * experts + int(expert)
                misses += key not in due and t >= first
                due[key] = int(after)
                heapq.heappush(queue, (-int(after), key))
            while len(due) > capacity:
                after, key = heapq.heappop(queue)
                if due.get(key) == -after:
                    del due[key]
    return misses


def replay(trace: Trace, capacities: list[int]) -> dict[str, list[float]]:
    """Return {policy: hit rate at each capacity}."""
    used, scores = trace
    layers, tokens, k = used.shape
    experts = scores.shape[2]
    counted = layers * (tokens - WARM) * k
    rates: dict[str, list[float]] = {}
    for name in _core.policy_names():
        rates[name] = [
            1 - _core.replay_misses(name, used, scores, layers * experts * c // 100, WARM) / counted
            for c in capacities
        ]
    rates["belady"] = [
        1 - belady_misses(used, experts, layers * experts * c // 100, WARM) / counted
        for c in capacities
    ]
    return rates


def print_table(title: str, rates: dict[str, list[float]]) -> None:
    print(f"\n{title}")
    print(f"{'policy':10}" + "".join(f"{c:>8} %" for c in CAPACITIES))
    for name, values in rates.items():
        print(f"{name:10}" + "".join(f"{value:10.3f}" for value in values))
    best = [max(v for n, v in column) for column in columns(rates)]
    gap = [
        (d - lru) / (b - lru) if b > lru else 0.0
        for d, lru, b in zip(rates["default"], rates["lru"], rates["belady"], strict=True)
    ]
    print("default at or above the best other: "
          + ", ".join("yes" if d >= b else f"{d - b:+.4f}"
                      for d, b in zip(rates["default"], best, strict=True)))  # fmt: skip
    print("of the gap from LRU to Belady, default closes: "
          + ", ".join(f"{100 * g:.0f} %" for g in gap))  # fmt: skip


def columns(rates: dict[str, list[float]]) -> list[list[tuple[str, float]]]:
    """Return the simple policies' rates by capacity."""
    simple = [name for name in rates if name not in ("default", "belady")]
    return [[(name, rates[name][i]) for name in simple] for i in range(len(CAPACITIES))]


def write_plot(path: Path, all_rates: dict[str, dict[str, list[float]]]) -> None:
    """Write hit rate over capacity, one panel a trace, as SVG."""
    colours = ["#888", "#1b9e77", "#7570b3", "#d95f02", "#d00", "#000"]
    width, height, parts = 260, 240, []
    for panel, (title, rates) in enumerate(all_rates.items()):
        left = 40 + panel * width

        def place(c: float, rate: float, left: int = left) -> str:
            return f"{left + 3.6 * c:.1f},{height - 30 - 180 * rate:.1f}"

        parts.append(f'<text x="{left}" y="16" font-size="11">{title}</text>')
        for tick in (0, 0.5, 1):
            x, y = place(0, tick).split(",")
            parts.append(f'<text x="{float(x) - 22}" y="{y}" font-size="9">{tick}</text>')
            parts.append(f'<path d="M{x} {y}h200" stroke="#ddd"/>')
        for (name, values), colour in zip(rates.items(), colours, strict=False):
            points = " ".join(place(c, v) for c, v in zip(CAPACITIES, values, strict=True))
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
            x, y = place(CAPACITIES[-1], values[-1]).split(",")
            parts.append(f'<text x="{x}" y="{y}" font-size="8" fill="{colour}">{name}</text>')
    total = 40 + width * len(all_rates)
    body = "\n".join(parts)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{height}" '
        f'font-family="sans-serif">\n{body}\n</svg>\n',
        encoding="utf-8",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", nargs="?", type=Path, default=TEXT)
    parser.add_argument("--tokens", type=int, default=6000, help="of the demo model's trace")
    parser.add_argument("--first", type=int, default=600, help="tokens of each text")
    parser.add_argument("--synthetic-tokens", type=int, default=5000)
    parser.add_argument("--plot", type=Path, metavar="SVG")
    args = parser.parse_args()

    print(f"machine: {machine()}")
    n = args.synthetic_tokens
    traces = {
        f"demo model, {args.text.name}": demo_trace(args.text, args.tokens, args.first),
        "skew 0": synthetic_trace(0.0, 0.0, n),
        "skew 0.5": synthetic_trace(0.5, 0.0, n),
        "skew 0.8": synthetic_trace(0.8, 0.0, n),
        "skew 0.5, drifting": synthetic_trace(0.5, 0.02, n),
    }
    results = {}
    for title, trace in traces.items():
        results[title] = replay(trace, list(CAPACITIES))
        print_table(f"{title}: {trace[0].shape[1]} tokens", results[title])
    if args.plot:
        write_plot(args.plot, results)


if __name__ == "__main__":
    main()
