"""One MoE layer of DeepSeek-R1's widths in dsfp4, llama.cpp and KTransformers, side by side."""

import argparse
import os
import statistics
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from dsfp4 import _core

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".cache" / "peers"
sys.path.insert(0, str(HERE.parent))

from machine import machine  # noqa: E402

LLAMA = "llama_cpp_python-0.3.36"
KT_KERNEL = "0.7.2"
HIDDEN, INTERMEDIATE, TOP_K, SLOTS = 7168, 2048, 8, 64
BYTES_PER_WEIGHT = {"nvfp4": 0.5625, "mxfp4": 0.53125}


def run(*command: str | Path, **options) -> str:
    """Output of a command; its errors go to stderr."""
    return subprocess.run(
        [str(part) for part in command], check=True, text=True, stdout=subprocess.PIPE, **options
    ).stdout


def download(package: str, *options: str) -> Path:
    """A package's file, from PyPI as pip is set up to find it."""
    folder = CACHE / "files"
    name = package.split("==")[0].replace("-", "_")
    if not list(folder.glob(f"{name}-*")):
        print(f"downloading {package}", file=sys.stderr)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
        run(*pip, *options, "-d", folder, package)
    return next(folder.glob(f"{name}-*"))


def build_llama() -> Path:
    """The program ggml_layer, built with llama.cpp's library."""
    program = CACHE / "ggml_layer"
    source = CACHE / LLAMA / "vendor" / "llama.cpp"
    build = CACHE / "ggml-build"
    if not source.exists():
        package = download(
            LLAMA.replace("_python-", "_python==").replace("_", "-"),
            *("--no-binary", ":all:", "--no-build-isolation"),
        )
        with tarfile.open(package) as archive:
            archive.extractall(CACHE, filter="data")
    if not (build / "bin" / "libggml.so").exists():
        print("building llama.cpp's library: some minutes", file=sys.stderr)
        off = ("TESTS", "EXAMPLES", "TOOLS", "SERVER", "COMMON")
        flags = [f"-DLLAMA_BUILD_{what}=OFF" for what in off]
        flags += ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=ON"]
        run("cmake", "-S", source, "-B", build, *flags)
        run("cmake", "--build", build, "--target", "ggml", "-j", str(os.cpu_count()))
    libraries = build / "bin"
    code = HERE / "ggml_layer.cpp"
    if not program.exists() or program.stat().st_mtime < code.stat().st_mtime:
        link = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lggml", "-lggml-cpu", "-lggml-base"]
        include = f"-I{source / 'ggml' / 'include'}"
        run("g++", "-std=c++17", "-O2", include, code, "-o", program, *link)
    return program


def llama_layer(fmt: str, repack: bool, threads: int, tokens: int, runs: int) -> list[float]:
    """Seconds of llama.cpp's layer."""
    program = build_llama()
    output = run(program, fmt, str(int(repack)), str(threads), str(SLOTS), str(tokens), str(runs))
    return [float(line) for line in output.split()]


def kt_variant() -> str:
    """The best of kt-kernel's builds that this processor runs."""
    with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
        flags = set(next(line for line in cpuinfo if line.startswith("flags")).split())
    if {"amx_tile", "amx_bf16"} <= flags:
        return "amx"
    if {"avx512f", "avx512bw", "avx512_bf16", "avx512_vbmi"} <= flags:
        return "avx512_bf16"
    return "avx512_base" if {"avx512f", "avx512bw"} <= flags else "avx2"


def kt_layer(fmt: str, threads: int, tokens: int, runs: int) -> list[float]:
    """Seconds of kt-kernel's layer."""
    folder = CACHE / "kt-kernel"
    if not folder.exists():
        wheel = download(f"kt-kernel=={KT_KERNEL}")
        with zipfile.ZipFile(wheel) as archive:
            names = [
                n for n in archive.namelist() if n.startswith(("kt_kernel/", "kt_kernel.libs/"))
            ]
            archive.extractall(folder, names)
    command = [sys.executable, HERE / "kt_layer.py", folder, kt_variant(), fmt, str(threads)]
    output = run(*command, str(SLOTS), str(tokens), str(runs))
    # It reports on itself on stdout, too.
    return [float(line) for line in output.splitlines() if line.replace(".", "", 1).isdigit()]


def dsfp4_layer(fmt: str, threads: int, tokens: int, runs: int) -> list[float]:
    """Seconds of dsfp4's layer."""
    bench = _core.KernelBench("cpu", threads)
    chosen = [i % SLOTS for i in range((runs + 1) * tokens * TOP_K)]
    return bench.experts(fmt, HIDDEN, INTERMEDIATE, SLOTS, tokens, TOP_K, chosen, runs)


def why(error: Exception) -> str:
    """A failure in plain words."""
    if isinstance(error, subprocess.CalledProcessError):
        if error.returncode == 3:
            return "has no such layout for this processor"
        if error.returncode == -4:
            return "needs instructions that this processor lacks"
        return f"failed with exit code {error.returncode}"
    return f"not measured: {error}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=_core.available_cores())
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 512])
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)

    bench = _core.KernelBench("cpu", args.threads)
    rate = 2**29 / statistics.median(bench.read_memory(2**29, 5))
    print(f"machine: {machine()}; {args.threads} threads; dsfp4 computes with {bench.isa}")
    print(f"memory read: {rate / 1e9:.1f} GB/s; kt-kernel's build: {kt_variant()}")
    print(f"\n{'layer':34} {'tokens':>6} {'ms':>9} {'GB/s':>6} {'of RAM':>7} {'GFLOP/s':>8}")
    threads = args.threads
    for fmt in ("nvfp4", "mxfp4"):
        engines = {
            f"dsfp4 {fmt}": lambda *a, f=fmt: dsfp4_layer(f, *a),
            f"llama.cpp {fmt}": lambda *a, f=fmt: llama_layer(f, False, *a),
            f"llama.cpp {fmt} repacked": lambda *a, f=fmt: llama_layer(f, True, *a),
            f"kt-kernel {fmt}": lambda *a, f=fmt: kt_layer(f, *a),
        }
        for tokens in args.tokens:
            for name, measure in engines.items():
                try:
                    seconds = measure(threads, tokens, args.runs if tokens < 64 else 3)
                except (subprocess.CalledProcessError, OSError, StopIteration) as error:
                    print(f"{name:34} {tokens:6} {why(error)}", flush=True)
                    continue
                median = statistics.median(seconds)
                read = (
                    min(tokens * TOP_K, SLOTS) * 3 * HIDDEN * INTERMEDIATE * BYTES_PER_WEIGHT[fmt]
                )
                flops = 6.0 * HIDDEN * INTERMEDIATE * TOP_K * tokens
                print(
                    f"{name:34} {tokens:6} {1e3 * median:9.2f} {read / median / 1e9:6.1f} "
                    f"{read / median / rate:7.2f} {flops / median / 1e9:8.1f}",
                    flush=True,
                )
    print(
        "\nGB/s: the checkpoint's bytes of the chosen experts over the time, for all engines alike"
    )


if __name__ == "__main__":
    main()
