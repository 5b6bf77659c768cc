"""`dsfp4 eval MODEL FILE`: how well a model predicts a text, also beside another one."""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from dsfp4.cli.options import add_engine_flags, add_json_flag, add_model, integer, load
from dsfp4.cli.progress import Progress, format_tokens
from dsfp4.cli.text import rate_line
from dsfp4.evaluate import evaluate, read_documents

_BAR = 40  # characters, of the longest
_EIGHTHS = " ▏▎▍▌▋▊▉"


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "eval",
        help="measure perplexity on a text, also against another checkpoint",
        description="Predicts each token of FILE from those before it. Perplexity is e to the mean "
        "-log p. With --against, the divergence is KL(OTHER || MODEL) in nats a token: 0 where "
        "both predict the same. OTHER is as published, whatever --quantization says.",
        examples=(
            "dsfp4 eval demo book.txt --plot",
            "dsfp4 eval MODEL-FP4 texts.jsonl.gz --against MODEL --first 500",
            "dsfp4 eval MODEL book.txt --against MODEL --quantization attention=fp8",
        ),
    )
    add_model(parser)
    parser.add_argument(
        "file", metavar="FILE", help='plain text, or *.jsonl with a "text" in each line; also .gz'
    )
    parser.add_argument("--against", metavar="OTHER", help="the checkpoint to compare with")
    parser.add_argument(
        "--first",
        type=integer(0, 2**31 - 1),
        default=0,
        metavar="N",
        help="only the first N tokens of each document; 0: all",
    )
    parser.add_argument(
        "--window",
        type=integer(2, 2**20),
        default=1024,
        metavar="TOKENS",
        help="documents are cut into windows of this length (default: %(default)s)",
    )
    parser.add_argument("--plot", action="store_true", help="draw the figures by position")
    add_json_flag(parser)
    add_engine_flags(parser)
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> None:
    """Measure, and print the figures."""
    documents = read_documents(arguments.file)
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(load(arguments, arguments.model))
        other = arguments.against and stack.enter_context(
            load(arguments, arguments.against, traced=False, quantization="keep")
        )
        progress = stack.enter_context(Progress("evaluating", format_tokens))
        evaluation = evaluate(
            model,
            documents,
            against=other,
            first=arguments.first,
            window=arguments.window,
            progress=progress,
        )
        seconds, device = progress.seconds, model.model.device
    result = evaluation.as_dict() | {"seconds": seconds, "device": device}
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print("\n".join(_lines(result, arguments.against)))
    if arguments.plot:
        print("\n".join(_plots(result)))
    tokens = result["tokens"]
    print(rate_line(f"{tokens} tokens", tokens, seconds, f"tokens/s on {device}"), file=sys.stderr)


def _lines(result: Mapping[str, Any], against: str | None) -> Iterable[str]:
    yield (
        f"{result['documents']} documents, {result['tokens']} tokens: "
        f"{result['nats_per_token']:.4f} nats/token, perplexity {result['perplexity']:.4g}"
    )
    if against is not None:
        more = 100 * (result["perplexity_ratio"] - 1)
        yield (
            f"{against}: {result['against_nats_per_token']:.4f} nats/token, perplexity "
            f"{result['against_perplexity']:.4g}; MODEL's is {more:+.2f} % from it"
        )
        yield (
            f"KL divergence {result['kl_divergence']:.4g} nats/token, the same likeliest token at "
            f"{100 * result['top1_agreement']:.2f} % of positions"
        )
    yield ""
    heads = ("position", "tokens", "nats/token", "perplexity")
    yield "  ".join(f"{head:>11}" for head in (*heads, *(("KL", "top-1") if against else ())))
    for row in result["by_position"]:
        cells = [_range(row), str(row["tokens"])]
        cells += [f"{row['nats_per_token']:.4f}", f"{row['perplexity']:.4g}"]
        if against is not None:
            cells += [f"{row['kl_divergence']:.4g}", f"{100 * row['top1_agreement']:.2f} %"]
        yield "  ".join(f"{cell:>11}" for cell in cells)


def _plots(result: Mapping[str, Any]) -> Iterable[str]:
    titles = {
        "nats_per_token": "nats/token by position",
        "kl_divergence": "KL divergence by position, nats/token",
        "top1_agreement": "share of positions with the same likeliest token",
    }
    for key, title in titles.items():
        if key not in result:
            continue
        yield ""
        yield title
        largest = max(row[key] for row in result["by_position"])
        for row in result["by_position"]:
            share = row[key] / largest if largest > 0 and row[key] > 0 else 0.0  # NaN too
            yield f"{_range(row):>11}  {_bar(share)} {row[key]:.4g}"


def _bar(share: float) -> str:
    eighths = round(share * _BAR * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _range(row: Mapping[str, Any]) -> str:
    low, high = row["from"], row["to"]
    return str(low) if low == high else f"{low}-{high}"
