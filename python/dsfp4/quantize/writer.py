"""Writes safetensors files: the header first, then each tensor's bytes in any order."""

import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from dsfp4.errors import IoError

# The order of tensors in a file: wide types first, so that every tensor is aligned to its type.
_DTYPE_ORDER = (
    *("U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)


def _rank(dtype: str) -> int:
    """Return a dtype's place; those that are not known, and are only copied, come last."""
    return _DTYPE_ORDER.index(dtype) if dtype in _DTYPE_ORDER else len(_DTYPE_ORDER)


class TensorSpec(NamedTuple):
    """One tensor to be written: `dtype` as safetensors spells it, `size` in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int


class ShardWriter:
    """Writes one file under a temporary name, which commit() turns into `path`.

    Tensors are sorted by dtype and then by name. write() may be called by several threads. Raises
    IoError where the system refuses. Use as a context manager: leaving it without commit() deletes
    the temporary file.
    """

    def __init__(self, path: Path, tensors: Iterable[TensorSpec]) -> None:
        self._path = path
        self._part = path.with_name(path.name + ".part")
        self._lock = threading.Lock()
        self._missing = 0
        self._offsets: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for spec in sorted(tensors, key=lambda spec: (_rank(spec.dtype), spec.name)):
            self._offsets[spec.name] = self._missing
            end = self._missing + spec.size
            header[spec.name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [self._missing, end],
            }
            self._missing = end
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        try:
            self._fd = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except OSError as error:
            raise self._io_error(error, 0) from error
        self._pwrite(len(text).to_bytes(8, "little") + text, 0)

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Write `data` at byte `start` of tensor `name`. No byte twice."""
        view = data.cast("B")
        self._pwrite(view, self._data + self._offsets[name] + start)
        with self._lock:
            self._missing -= len(view)

    def commit(self) -> None:
        """Make the file durable and give it its name."""
        if self._missing:
            raise RuntimeError(f"{self._missing} bytes of '{self._path}' were not written")
        try:
            os.fsync(self._fd)
            os.replace(self._part, self._path)
        except OSError as error:
            raise self._io_error(error, 0) from error

    def __enter__(self) -> "ShardWriter":
        """Return the writer itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the file, and delete it if it was not committed."""
        os.close(self._fd)
        self._part.unlink(missing_ok=True)

    def _pwrite(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view:
            try:
                written = os.pwrite(self._fd, view, offset)
            except OSError as error:
                raise self._io_error(error, offset) from error
            view = view[written:]
            offset += written

    def _io_error(self, error: OSError, offset: int) -> IoError:
        return IoError(
            f"cannot write '{self._part}': {error.strerror}",
            file=str(self._part),
            offset=offset,
            errno=error.errno or 0,
        )
