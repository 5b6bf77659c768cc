"""A checkpoint's tensors as a converter reads them: ranges of bytes, and rows as float32."""

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dsfp4 import _core
from dsfp4.errors import CheckpointError, IoError, UnsupportedError
from dsfp4.ops import formats

if TYPE_CHECKING:
    from dsfp4._core import TensorInfo

TILE = 128  # rows and columns of an FP8 tile


class Source:
    """The tensors in `folder`. Thread-safe; use as a context manager, which closes the files."""

    def __init__(self, folder: Path) -> None:
        self._catalogue = _core.Catalogue(str(folder))
        self.tensors: list[TensorInfo] = list(self._catalogue.tensors)
        self._lock = threading.Lock()
        self._descriptors: dict[str, int] = {}

    def find(self, name: str) -> "TensorInfo | None":
        """Return the tensor of that name, or None."""
        return self._catalogue.find(name)

    def matrix(self, module: str) -> "Matrix":
        """Return the weight of a linear module.

        Raises UnsupportedError for a weight that is not BF16, F32 or FP8 with block scales.
        """
        weight = self.find(f"{module}.weight")
        if weight is None:
            raise CheckpointError(f"tensor '{module}.weight' is missing", tensor=f"{module}.weight")
        scale_inv = self.find(f"{module}.weight_scale_inv")
        if weight.dtype not in ("BF16", "F32") and (weight.dtype != "F8_E4M3" or not scale_inv):
            raise UnsupportedError(
                f"tensor '{weight.name}' in '{weight.file}' is {weight.dtype}; the source must be "
                "BF16, F32 or FP8 with weight_scale_inv"
            )
        return Matrix(self, module, weight, scale_inv if weight.dtype == "F8_E4M3" else None)

    def read(self, tensor: "TensorInfo", start: int, stop: int) -> bytearray:
        """Return the bytes [start, stop) of `tensor`. Raises IoError or, at a file's early end,
        CheckpointError.
        """
        data = bytearray(stop - start)
        view = memoryview(data)
        offset = tensor.offset + start
        while view:
            try:
                count = os.preadv(self._descriptor(tensor.file), [view], offset)
            except OSError as error:
                raise IoError(
                    f"cannot read '{tensor.file}' at byte {offset}: {error.strerror}",
                    file=tensor.file,
                    offset=offset,
                    errno=error.errno or 0,
                ) from error
            if count == 0:
                raise CheckpointError(
                    f"'{tensor.file}' ends at byte {offset}, inside tensor '{tensor.name}'",
                    file=tensor.file,
                    tensor=tensor.name,
                    offset=offset,
                )
            view = view[count:]
            offset += count
        return data

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY)
            return self._descriptors[file]

    def __enter__(self) -> "Source":
        """Return the source itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the files."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


@dataclass(frozen=True)
class Matrix:
    """The weight [rows, cols] of `module`; `scale_inv` only where it is FP8."""

    source: Source
    module: str
    weight: "TensorInfo"
    scale_inv: "TensorInfo | None"

    @property
    def rows(self) -> int:
        """Output features."""
        return self.weight.shape[0]

    @property
    def cols(self) -> int:
        """Input features."""
        return self.weight.shape[1]

    @property
    def bytes(self) -> int:
        """Bytes in the files, scales included."""
        return self.weight.bytes + (self.scale_inv.bytes if self.scale_inv else 0)

    def read_rows(self, first: int, last: int) -> npt.NDArray[np.float32]:
        """Return rows [first, last) as float32; `first` is a multiple of TILE.

        Raises CheckpointError for a value that is NaN or infinite.
        """
        row_bytes = self.weight.bytes // self.rows
        data = self.source.read(self.weight, first * row_bytes, last * row_bytes)
        shape = (last - first, self.cols)
        values: npt.NDArray[np.float32]
        if self.scale_inv is not None:
            codes = np.frombuffer(data, np.uint8).reshape(shape)
            values = formats.dequantize_fp8_block(codes, self._scales(self.scale_inv, first, last))
        elif self.weight.dtype == "BF16":
            values = formats.decode_bf16(np.frombuffer(data, np.uint16).reshape(shape))
        else:
            values = np.frombuffer(data, np.float32).reshape(shape)
        if not np.isfinite(values).all():
            row = first + int(np.argmin(np.isfinite(values).all(axis=1)))
            raise CheckpointError(
                f"tensor '{self.weight.name}' in '{self.weight.file}' has a value that is not "
                f"finite in row {row}",
                file=self.weight.file,
                tensor=self.weight.name,
                offset=self.weight.offset + row * row_bytes,
            )
        return values

    def _scales(self, scale_inv: "TensorInfo", first: int, last: int) -> npt.NDArray[np.float32]:
        tiles, across = scale_inv.shape
        row_bytes = scale_inv.bytes // tiles
        top, bottom = first // TILE, -(-last // TILE)
        data = self.source.read(scale_inv, top * row_bytes, bottom * row_bytes)
        return np.frombuffer(data, np.float32).reshape(bottom - top, across)
