"""Runs clang-tidy on C++ sources, and not again on what has passed as it is.

    python tests/lint/clang_tidy.py BUILD FILE...

BUILD is a Ninja build of the package that is up to date: it knows the headers of each file. A file
that passed leaves a note in .cache/clang-tidy whose name is the hash of all that was looked at.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOTES = ROOT / ".cache" / "clang-tidy"
BIN = Path(sys.executable).parent


@cache
def content(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


@cache
def version() -> bytes:
    return subprocess.check_output([BIN / "clang-tidy", "--version"])


def headers(build: Path) -> dict[str, list[str]]:
    """Return what each object was made of, as `ninja -t deps` lists it."""
    listed = subprocess.run(
        [BIN / "ninja", "-C", build, "-t", "deps"], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, list[str]] = {}
    made = ""
    for line in listed.stdout.splitlines():
        if line.startswith("    "):
            found[made].append(line.strip())
        elif line:
            made, _, state = line.partition(": ")
            found[made] = []
            if not state.endswith("(VALID)"):
                sys.exit(f"clang_tidy: error: {made} in {build} is older than its sources: build")
    return found


def commands(build: Path) -> dict[Path, list[dict[str, str]]]:
    """Return the compile commands of each source; a file of two programs has two."""
    found: dict[Path, list[dict[str, str]]] = defaultdict(list)
    for entry in json.loads((build / "compile_commands.json").read_text()):
        found[Path(entry["file"])].append(entry)
    return found


def note(build: Path, entries: list[dict[str, str]], deps: dict[str, list[str]]) -> Path:
    """Return the path of the note that a file with these commands leaves when it passes."""

    def parts() -> Iterator[bytes]:
        yield version()
        yield content(ROOT / ".clang-tidy")
        for entry in entries:
            yield entry["command"].encode()
            for header in deps[os.path.relpath(build / entry["output"], build)]:
                yield header.encode() + content(Path(os.path.normpath(build / header)))

    return NOTES / hashlib.sha256(b"\0".join(parts())).hexdigest()


def passes(build: Path, file: Path, passed: Path) -> bool:
    done = subprocess.run(
        [BIN / "clang-tidy", "--quiet", "-p", build, file],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        print(f"{file.relative_to(ROOT)}:\n{done.stdout}", flush=True)
        return False
    passed.touch()
    return True


def main() -> None:
    build = Path(sys.argv[1]).resolve()
    files = [Path(name).resolve() for name in sys.argv[2:]]
    compiled, deps = commands(build), headers(build)
    if unknown := [str(file) for file in files if file not in compiled]:
        sys.exit(f"clang_tidy: error: {build} does not compile {', '.join(unknown)}")
    notes = {file: note(build, compiled[file], deps) for file in files}
    left = [file for file in files if not notes[file].exists()]
    NOTES.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda file: passes(build, file, notes[file]), left))
    print(f"clang-tidy: {len(files)} files, {len(left)} of them new or changed")
    if not all(results):
        failed = [str(f.relative_to(ROOT)) for f, ok in zip(left, results, strict=True) if not ok]
        sys.exit("clang-tidy: error: see above for " + ", ".join(failed))


if __name__ == "__main__":
    main()
