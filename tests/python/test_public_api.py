"""What the package gives to C++ users: a library that shows and uses only what it should."""

import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest

import dsfp4

PACKAGE = Path(dsfp4.__file__).parent
API = (PACKAGE / "include" / "dsfp4" / "api.h").read_text()
ABI = int(re.findall(r"^#define DSFP4_ABI (\d+)$", API, re.MULTILINE)[0])
LIBRARY = PACKAGE / "lib" / f"libdsfp4.so.{ABI}"
EXPORTED = Path(__file__).with_name("exported_symbols.txt")
_STRING = "std::__cxx11::basic_string<char, std::char_traits<char>, std::allocator<char> >"
_VIEW = "std::basic_string_view<char, std::char_traits<char> >"


def symbols(*options: str) -> set[str]:
    command = ["nm", "--dynamic", "--demangle", "--format=posix", *options, str(LIBRARY)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    names = {re.sub(r" [A-Za-z] ?[0-9a-f ]*$", "", line).strip() for line in lines}
    return {
        name.replace(_STRING, "std::string").replace(_VIEW, "std::string_view") for name in names
    }


def test_exports_are_the_checked_list():
    lines = EXPORTED.read_text().splitlines()
    expected = {line for line in lines if line and not line.startswith("#")}
    actual = symbols("--defined-only")
    # A new line belongs here on purpose only: programs that are built today will need it.
    assert sorted(actual - expected) == [], "exported, but not in exported_symbols.txt"
    assert sorted(expected - actual) == [], "in exported_symbols.txt, but not exported"


def test_the_version_of_the_interface_is_in_every_name() -> None:
    """What a program of another version finds is no library, or no symbol, but not a wrong one."""
    assert f"#define DSFP4_ABI_NAMESPACE abi{ABI}\n" in API
    names = symbols("--defined-only")
    assert all(f"dsfp4::abi{ABI}::" in name for name in names), names
    said = subprocess.run(["readelf", "-d", LIBRARY], check=True, capture_output=True, text=True)
    assert f"soname: [libdsfp4.so.{ABI}]" in said.stdout
    assert [path.name for path in LIBRARY.parent.glob("libdsfp4.so*")] == [LIBRARY.name]


def test_nothing_prints_or_ends_the_process():
    used = {re.sub(r"@.*", "", name) for name in symbols("--undefined-only")}
    enders = {"exit", "_exit", "_Exit", "quick_exit", "abort", "raise", "kill", "__assert_fail"}
    printers = {
        "printf",
        "vprintf",
        "puts",
        "putchar",
        "perror",
        "fprintf",
        "vfprintf",
        "fputs",
        "fwrite",
        "fputc",
        "putc",
        "syslog",
        "write",
        "stdout",
        "stderr",
        "__printf_chk",
        "__fprintf_chk",
        "std::cout",
        "std::cerr",
        "std::clog",
    }
    assert used & (enders | printers) == set()
    assert {"snprintf", "pread"} & used, "the names are read as they should be"


def test_headers_use_the_standard_library_only():
    headers = sorted((PACKAGE / "include" / "dsfp4").glob("*"))
    assert {"api.h", "error.h", "log.h", "model.h"} <= {header.name for header in headers}
    known = {f"dsfp4/{header.name}" for header in headers}
    for header in headers:
        text = header.read_text()
        for name in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, re.MULTILINE):
            assert name in known or re.fullmatch("[a-z_]+", name), f"{header.name}: {name}"


def test_stubs_are_shipped():
    assert (PACKAGE / "py.typed").is_file()
    stub = (PACKAGE / "_core.pyi").read_text()
    assert "class Model" in stub
    assert "def generate(" in stub


def test_cmake_dir_is_printed():
    command = [sys.executable, "-m", "dsfp4", "--cmake-dir"]
    said = subprocess.run(command, check=True, capture_output=True, text=True)
    assert (Path(said.stdout.strip()) / "dsfp4Config.cmake").is_file()
    assert said.stderr == ""
    assert (PACKAGE / "lib" / "pkgconfig" / "dsfp4.pc").is_file()


@pytest.mark.parametrize("module", ["dsfp4", "dsfp4.errors"])
def test_import_is_light(module: str):
    code = f"import sys, {module}; print(*sorted(m.partition('.')[0] for m in sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    heavy = {"numpy", "tokenizers", "jinja2", "huggingface_hub", "torch", "asyncio"}
    assert not heavy & set(said.stdout.split())


def test_the_sandbox_has_no_published_escape():
    needed = [text for text in requires("dsfp4") or [] if text.startswith("jinja2")]
    assert needed == ["jinja2>=3.1.6"], "CVE-2025-27516"
