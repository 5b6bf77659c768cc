"""Records every command in a terminal, as a new user would type it, into docs/terminal.md.

    python docs/record.py          with the package and its test requirements installed

Each command runs on a pseudo-terminal of 100 columns in a folder of its own, with `dsfp4` as it is
installed. What is written down is what stands on the screen at the end.
"""

import json
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Sequence
from fcntl import ioctl
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

from dsfp4.demo import resolve_model
from fixtures.checkpoint_io import dequantized_weights, to_bf16, write_shard
from fixtures.hub_server import HubRepository, serve_hub
from machine import machine

ROOT = Path(__file__).resolve().parents[1]
PROMPT = ">>> "
COLUMNS = 100
_SECONDS = 300
_CHAT = [
    "What is a file system?",
    "/thoughts",
    "/set temperature 0.3",
    "And what is a king?",
    "/fly",
    "/help",
    "/quit",
]

# Headings, what is said about them, and commands; lines typed into one follow it in a list.
Step = tuple[str, list[str]]
CHAPTERS: list[tuple[str, list[Step]]] = [
    ("First steps", [("dsfp4 demo", []), ("dsfp4 --help", [])]),
    (
        "One answer",
        [
            ("dsfp4 run demo 'What is a king?' --temperature 0.5 --seed 1", []),
            ("dsfp4 run demo 'And the king said' --raw --max-tokens 30 --seed 1", []),
            ("dsfp4 run demo 'And the king said' --raw --max-tokens 8 --seed 1 --json", []),
        ],
    ),
    ("A conversation", [("dsfp4 chat demo --temperature 0.5 --seed 1", _CHAT)]),
    ("What a checkpoint holds", [("dsfp4 info demo", []), ("dsfp4 info original", [])]),
    (
        "Will it run, how fast",
        [
            (
                "dsfp4 plan deepseek-r1-fp4 --gpu-memory 16 --ram 96 --ssd-rate 14 --pcie-rate 55",
                [],
            ),
            ("dsfp4 plan deepseek-r1-fp4 --gpu-memory 3 --ram 96", []),
            ("dsfp4 plan demo --no-rates", []),
        ],
    ),
    (
        "A model of the Hub",
        [
            ("dsfp4 info org/demo-model", []),
            ("dsfp4 pull org/demo-model", []),
            ("dsfp4 run org/demo-model 'What is a king?' --temperature 0.5 --seed 1", []),
        ],
    ),
    (
        "Converting",
        [
            ("dsfp4 quantize original smaller --attention nvfp4", []),
            ("dsfp4 info smaller", []),
        ],
    ),
    (
        "How good it is",
        [
            ("dsfp4 eval demo texts.jsonl --first 100", []),
            ("dsfp4 eval smaller texts.jsonl --first 100 --against original --plot", []),
        ],
    ),
    (
        "Is it whole",
        [
            ("dsfp4 verify model --write", []),
            ("dsfp4 verify model", []),
            ("dsfp4 verify damaged", []),
            ("dsfp4 run damaged 'Who is there?'", []),
        ],
    ),
    (
        "What the machine reaches",
        [
            ("dsfp4 doctor", []),
            ("dsfp4 bench storage demo --block-kib 256 --depth 16 --seconds 0.2", []),
            ("dsfp4 bench decode demo --cpu-cache-size 0.005 --plot decode.png", []),
        ],
    ),
    (
        "Wrong usage",
        [
            ("dsfp4", []),
            ("dsfp4 dmo", []),
            ("dsfp4 demo --device tpu", []),
            ("dsfp4 run demo", []),
            ("dsfp4 run demo Hello --temperature hot", []),
            ("dsfp4 chat", []),
            ("dsfp4 pull", []),
            ("dsfp4 info", []),
            ("dsfp4 info nowhere", []),
            ("dsfp4 plan", []),
            ("dsfp4 plan deepseek-r2", []),
            ("dsfp4 eval demo", []),
            ("dsfp4 verify demo --threads many", []),
            ("dsfp4 quantize original", []),
            ("dsfp4 doctor --seconds soon", []),
            ("dsfp4 bench", []),
            ("dsfp4 bench storage", []),
        ],
    ),
]


def render(output: str) -> str:
    """Return what stands on the screen after `output`: returns and erasures done, no colours."""
    output = re.sub(r"\x1b\[[0-9;?]*[a-ln-zA-JL-Z]|\x1b\[[0-9;]*m|\a", "", output)
    lines = []
    for line in output.replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in re.split("(\r|\x1b\\[K)", line):
            if part == "\r":
                column = 0
                continue
            if part == "\x1b[K":
                shown = shown[:column]
                continue
            column = len(shown) if not shown else column
            shown = shown[:column] + part + shown[column + len(part) :]
            column += len(part)
        lines.append(shown.rstrip())
    return "\n".join(lines).rstrip()


def record(command: str, typed: Sequence[str], folder: Path) -> tuple[str, int]:
    """Run `command` in `folder` on a pseudo-terminal; return what it shows and its exit code.

    Each of `typed` is typed once the prompt is there.
    """
    screen, terminal = pty.openpty()
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    ignored = ("CI", "XDG_STATE_HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE")
    environment = {k: v for k, v in os.environ.items() if k not in ignored}
    environment |= {"HOME": str(folder), "TERM": "dumb", "COLUMNS": str(COLUMNS)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    process = subprocess.Popen(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    waiting, output, seen = list(typed), b"", 0
    deadline = time.monotonic() + _SECONDS
    while True:
        if time.monotonic() > deadline:
            process.kill()
            raise TimeoutError(f"{command}: {output.decode(errors='replace')}")
        if not select.select([screen], [], [], 1)[0]:
            continue
        try:
            output += os.read(screen, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if waiting and output[seen:].endswith(PROMPT.encode()):
            seen = len(output)
            os.write(screen, f"{waiting.pop(0)}\n".encode())
    os.close(screen)
    text = render(output.decode()).replace(str(folder), "~")
    return text, process.wait()


def prepare(folder: Path) -> None:
    """Put there what a user would have: checkpoints, one of them damaged, and texts."""
    demo = resolve_model("demo")
    original = folder / "original"
    original.mkdir()
    weights = dequantized_weights(demo)
    write_shard(original / "model.safetensors", {n: to_bf16(w) for n, w in weights.items()})
    config = json.loads((demo / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    (original / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for path in demo.glob("*token*.json"):
        shutil.copyfile(path, original / path.name)
    shutil.copyfile(ROOT / "bench" / "text.jsonl", folder / "texts.jsonl")
    shutil.copytree(demo, folder / "model")
    shutil.copytree(folder / "model", folder / "damaged")
    subprocess.run(
        [sys.executable, "-m", "dsfp4", "verify", str(folder / "damaged"), "--write"],
        check=True,
        capture_output=True,
    )
    shard = folder / "damaged" / "model-00002-of-00005.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)


def main() -> None:
    """Write the recording."""
    lines = [
        "# In a terminal",
        "",
        "Every command as a new user types it, made by `python docs/record.py` on",
        f"{machine()}. `demo` is the built-in model: 33 million parameters,",
        "real and small. `original` is the demo model with its weights in BF16, `model` and",
        "`damaged` are copies of it, one bit of the latter flipped; the Hub is a server on this",
        "machine that has the demo model. An exit code is shown where it is not 0.",
    ]
    with tempfile.TemporaryDirectory() as name, serve_hub() as hub:
        os.environ["HF_ENDPOINT"] = hub.url
        files = {path.name: path.read_bytes() for path in resolve_model("demo").iterdir()}
        hub.repositories["org/demo-model"] = HubRepository({"main": files})
        folder = Path(name)
        prepare(folder)
        for heading, steps in CHAPTERS:
            lines += ["", f"## {heading}"]
            for command, typed in steps:
                print(command, file=sys.stderr)
                text, code = record(command, typed, folder)
                lines += ["", "```console", f"$ {command}", *text.splitlines()]
                lines += [f"[exit {code}]"] if code else []
                lines += ["```"]
    Path(__file__).with_name("terminal.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
