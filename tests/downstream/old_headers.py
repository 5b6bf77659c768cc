"""Copies the public headers as an older version had them: usage: old_headers.py INCLUDE OUT [ABI].

Each struct that carries its size lacks its last two fields. With ABI, a number, the headers are of
that binary interface.
"""

import re
import shutil
import sys
from pathlib import Path

SIZED = ("LoadOptions", "GenerateOptions", "ForwardOptions", "ModelStats", "GenerationResult")
LACKING = 2


def shorten(text: str, struct: str) -> str:
    """Return `text` without the last fields of `struct`."""
    begin = text.index(f"struct {struct} {{\n")
    end = text.index("\n};", begin)
    lines = text[begin:end].split("\n")
    fields = [i for i, line in enumerate(lines) if not line.strip().startswith("//")]
    kept = lines[: fields[-LACKING]]
    assert all(lines[i].split("//")[0].strip().endswith(";") for i in fields[-LACKING:])
    return text[:begin] + "\n".join(kept) + text[end:]


def main(include: str, out: str, abi: str | None = None) -> None:
    """Write the headers into the folder `out`."""
    folder = Path(shutil.copytree(Path(include, "dsfp4"), Path(out, "dsfp4")))
    model = folder / "model.h"
    text = model.read_text()
    for struct in SIZED:
        text = shorten(text, struct)
    model.write_text(text)
    if abi is not None:
        api = folder / "api.h"
        text = re.sub(r"DSFP4_ABI \d+", f"DSFP4_ABI {abi}", api.read_text())
        api.write_text(re.sub(r"_NAMESPACE abi\d+", f"_NAMESPACE abi{abi}", text))


if __name__ == "__main__":
    main(*sys.argv[1:])
