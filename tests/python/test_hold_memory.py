"""`bench/hold_memory.py`: it locks until so much is left, and runs the command."""

import mmap
import os
import resource
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "hold_memory.py"
FREE = 10_000_000_000


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import hold_memory

    return hold_memory


@pytest.fixture
def taken(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine with 10 GB available, less what the script locks: the sizes of those pieces."""
    sizes: list[int] = []

    class Piece:
        def __init__(self, size: int) -> None:
            self.size = size
            sizes.append(size)

        def __len__(self) -> int:
            return self.size

        def close(self) -> None:
            sizes.remove(self.size)

    monkeypatch.setattr(script, "available", lambda: FREE - sum(sizes))
    monkeypatch.setattr(script, "locked", Piece)
    return sizes


def locked_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmLck")).split()[1])


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, leave: str, *command: str) -> int:
    monkeypatch.setattr(sys, "argv", ["hold_memory.py", "--leave", leave, "--", *command])
    return script.main()


def test_so_much_is_left_while_the_command_runs(script: ModuleType, taken: list[int]) -> None:
    with script.held(8_700_000_000) as size:
        assert size == sum(taken)
        assert 0 <= FREE - size - 8_700_000_000 <= script.CLOSE_ENOUGH
        assert max(taken) <= script.PIECE
    assert taken == []


def test_the_commands_exit_status_is_passed_on(
    script: ModuleType, taken: list[int], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    status = run(script, monkeypatch, "9.5", sys.executable, "-c", "print('runs'); exit(3)")
    assert status == 3
    assert taken == []
    said = capfd.readouterr()
    assert said.out == "runs\n"
    assert "holding 0.5" in said.err or "holding 0.4" in said.err


@pytest.mark.parametrize("leave", ["0", "-1", "10.1", "nan"])
def test_what_is_not_there_cannot_be_left(
    script: ModuleType, taken: list[int], monkeypatch: pytest.MonkeyPatch, capfd: Any, leave: str
) -> None:
    with pytest.raises(SystemExit) as left:
        run(script, monkeypatch, leave, "true")
    assert left.value.code == 2
    assert "--leave must be over 0 and at most MemAvailable, 10.00 GB" in capfd.readouterr().err


def test_locked_memory_is_locked(script: ModuleType) -> None:
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("a sanitizer's mlock() locks nothing")
    size = 16 * mmap.PAGESIZE  # less than any user may
    if 0 <= resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] < locked_bytes() + size:
        pytest.skip("no memory may be locked here")
    before = locked_bytes()
    memory = script.locked(size)
    assert locked_bytes() - before == size
    memory.close()
    assert locked_bytes() == before


def test_a_limit_on_locked_memory_is_said(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refuses:
        def mlock(self, *_: object) -> int:
            return -1

    monkeypatch.setattr(script.ctypes, "CDLL", lambda *_, **__: Refuses())
    with pytest.raises(OSError, match=r"0 MB more cannot be locked .* raise ulimit -l"):
        script.locked(4096)
