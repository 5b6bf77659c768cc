"""Runs a conversion: folder to folder, shard by shard, and tidy if it fails."""

import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import dsfp4
from dsfp4 import _core
from dsfp4._checks import check_integer
from dsfp4.demo import resolve_model
from dsfp4.errors import IoError, ParameterError
from dsfp4.files import read_checkpoint_file
from dsfp4.jsonfile import read_json
from dsfp4.model import Progress
from dsfp4.quantize.convert import Done, make_jobs
from dsfp4.quantize.plan import BLOCK, Format, Plan, make_plan
from dsfp4.quantize.source import Source
from dsfp4.quantize.writer import ShardWriter
from dsfp4.verify import check_sound

_MOST_WORKERS = 16  # unless the caller asks for more
_MOST_THREADS = 1024
_COPIED_FILES = (
    *("tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "generation_config.json"),
    *("configuration_*.py", "modeling_*.py", "LICENSE*"),
)


def quantize(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    attention: Format = "keep",
    threads: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the checkpoint in folder `source` to folder `destination` with NVFP4 weights.

    Experts, shared experts and dense MLPs become NVFP4; `attention` says what becomes of the
    attention's linears: "keep" as they are, "fp8" (128 x 128 tiles) or "nvfp4". All else stays. A
    matrix whose input features are not a multiple of 16 is kept and listed. `destination` must be
    empty or absent; if anything fails, what was written there is removed. `threads`, to 1024, 0 is
    one for each core, 16 at most; `progress` is called with bytes of the source done and in all.
    A source with checksums (see verify()) is compared with them first.
    Memory: slabs of 1024 rows, one for each thread, however large the matrices are.

    Returns bytes_in, bytes_out, files, matrices (format -> count), relative_rms_error (role ->
    fraction) and kept (modules left as they were for their shape). Raises the errors of
    `dsfp4.errors`.
    """
    if attention not in get_args(Format):
        raise ParameterError(
            f"attention must be keep, fp8 or nvfp4, not {attention!r}", parameter="attention"
        )
    if check_integer("threads", threads) > _MOST_THREADS:
        raise ParameterError(
            f"threads must be 0 (one for each core) to {_MOST_THREADS}, not {threads}",
            parameter="threads",
        )
    workers = threads or min(os.cpu_count() or 1, _MOST_WORKERS)
    folder = resolve_model(source)
    _core.describe(str(folder))  # a source that could not be run is refused before any work
    check_sound(folder, workers)  # slabs are read one by one: no later place sees whole tensors
    layers = _core.read_config(str(folder))["num_hidden_layers"]
    copied = _read_copied_files(folder)
    with Source(folder) as tensors:
        plan = make_plan(tensors, layers, attention)
        with _fresh_folder(Path(destination), plan.bytes_out) as out:
            done = _write_shards(plan, tensors, out, workers, progress)
            _write_side_files(plan, folder, copied, out)
    return _summary(plan, done, attention)


@contextmanager
def _fresh_folder(folder: Path, needed: int) -> Iterator[Path]:
    """Give an empty folder with room for `needed` bytes; empty it again if the body fails."""
    existed = folder.exists()
    if existed and (not folder.is_dir() or any(folder.iterdir())):
        raise ParameterError(
            f"'{folder}' is not an empty folder; remove it or choose another destination",
            parameter="destination",
        )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise IoError(
                f"'{folder}' has {free} bytes free, but the checkpoint needs {needed}",
                file=str(folder),
                errno=errno.ENOSPC,
            )
        yield folder
    except BaseException:
        for path in folder.iterdir():
            path.unlink()
        if not existed:
            folder.rmdir()
        raise


def _write_shards(
    plan: Plan, source: Source, folder: Path, workers: int, progress: Progress | None
) -> list[Done]:
    done: list[Done] = []
    bytes_done, total = 0, sum(tensor.bytes for tensor in source.tensors)
    with ThreadPoolExecutor(workers, thread_name_prefix="dsfp4-quantize") as executor:
        for name, shard in plan.shards.items():
            with ShardWriter(folder / name, shard.specs) as writer:
                jobs = [executor.submit(job) for job in make_jobs(plan, source, shard, writer)]
                try:
                    for job in as_completed(jobs):
                        done += job.result()
                        bytes_done += sum(part.bytes_in for part in job.result())
                        if progress is not None:
                            progress(bytes_done, total)
                except BaseException:
                    executor.shutdown(cancel_futures=True)  # the writer is in use until then
                    raise
                writer.commit()
    return done


def _read_copied_files(folder: Path) -> dict[str, bytes]:
    """Return what is taken over as it is, by name: read first, as the weights take hours."""
    paths = (path for pattern in _COPIED_FILES for path in folder.glob(pattern))
    return {path.name: read_checkpoint_file(path) for path in paths if not path.is_dir()}


def _write_side_files(plan: Plan, source: Path, copied: dict[str, bytes], folder: Path) -> None:
    """Write what is not weights; the index comes last, so that it marks a finished checkpoint."""
    for name, data in copied.items():
        (folder / name).write_bytes(data)
    producer = {"name": "dsfp4", "version": dsfp4.__version__}
    quantization = {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": BLOCK,
        "exclude_modules": plan.exclude_modules,
    }
    _write_json(
        folder / "hf_quant_config.json", {"producer": producer, "quantization": quantization}
    )
    config = read_json(source / "config.json")
    config["quantization_config"] = {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "kv_cache_scheme": None,
        "group_size": BLOCK,
        "ignore": plan.exclude_modules,
        "producer": producer,
    }
    _write_json(folder / "config.json", config)
    weight_map = {spec.name: name for name, shard in plan.shards.items() for spec in shard.specs}
    _write_json(
        folder / "model.safetensors.index.json",
        {
            "metadata": {"total_size": plan.bytes_out},
            "weight_map": dict(sorted(weight_map.items())),
        },
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with path.open("x", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _summary(plan: Plan, done: list[Done], attention: Format) -> dict[str, Any]:
    matrices: Counter[str] = Counter()
    kept = []
    for module, linear in plan.linears.items():
        stored = linear.matrix.weight.dtype.lower().replace("f8_e4m3", "fp8")
        matrices[stored if linear.target == "keep" else linear.target] += 1
        wanted = attention if linear.role == "attention" else "nvfp4"
        if wanted == "nvfp4" and linear.target == "keep":
            kept.append(module)
    errors: dict[str, float] = {}
    for role in sorted({part.role for part in done if part.role}):
        parts = [part for part in done if part.role == role]
        squares = sum(part.squares for part in parts)
        error = sum(part.error_squares for part in parts)
        errors[role] = (error / squares) ** 0.5 if squares else 0.0
    return {
        "bytes_in": sum(part.bytes_in for part in done),
        "bytes_out": plan.bytes_out,
        "files": len(plan.shards),
        "matrices": dict(matrices),
        "relative_rms_error": errors,
        "kept": kept,
    }
