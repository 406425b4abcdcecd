"""The safetensors format: an 8-byte header length, a JSON header, then the tensors' data.

Unlike the library safetensors, which maps a file into memory and holds a file's tensors to write
it, this reads and writes a few MiB at a time: importing takes half the memory.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm import lookup
from lm.interop import names

DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # bfloat16 is the upper half of float32
CHUNK = 1 << 20  # numbers read at a time


class Tensor(NamedTuple):
    """A tensor in a file: `start` is its first byte, `dtype` a key of DTYPES."""

    path: pathlib.Path
    start: int
    dtype: str
    shape: tuple[int, ...]


def read_header(path: str | os.PathLike) -> dict[str, Tensor]:
    """Return the tensors of a file by name. Raises ValueError if the file is damaged."""
    path = pathlib.Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        text = file.read(start - 8) if start <= size else b""
    try:
        header = json.loads(text)
    except ValueError:
        raise ValueError(f"{path} is no complete safetensors file; copy it again.") from None
    header.pop("__metadata__", None)
    end = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != size:
        raise ValueError(
            f"{path} has {size} bytes, but its header describes {end}: it is cut or damaged; copy "
            f"it again."
        )
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        shape = tuple(entry["shape"])
        kind = lookup.lookup(DTYPES, entry["dtype"], f"{path}: the dtype of {name}")
        if last - first != math.prod(shape) * np.dtype(kind).itemsize:
            raise ValueError(f"{path}: the bytes of {name} do not fit its shape; copy it again.")
        tensors[name] = Tensor(path, start + first, entry["dtype"], shape)
    return tensors


def read_chunks(tensor: Tensor, shape: tuple[int, ...]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield a tensor, reshaped, some rows at a time: the first one's index, float32 [rows, ..]."""
    row = math.prod(shape[1:])
    step = max(1, CHUNK // max(1, row))
    with tensor.path.open("rb") as file:
        file.seek(tensor.start)
        for first in range(0, shape[0], step):
            rows = min(step, shape[0] - first)
            chunk = np.fromfile(file, DTYPES[tensor.dtype], rows * row)
            if tensor.dtype == "BF16":
                chunk = (chunk.astype(np.uint32) << 16).view(np.float32)
            yield first, chunk.astype(np.float32, copy=False).reshape(rows, *shape[1:])


def is_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape and equal numbers; NaNs are equal."""
    if a.shape != b.shape:
        return False
    pairs = zip(read_chunks(a, a.shape), read_chunks(b, b.shape), strict=True)
    return all(np.array_equal(x, y, equal_nan=True) for (_, x), (_, y) in pairs)


def write(
    path: str | os.PathLike, leaves: Mapping[str, Any], maps: Sequence[names.TensorMap]
) -> None:
    """Write tensors as float32 to a file.

    leaves: our parameters by path. maps: the file's tensors, in order.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in maps:
        first, end = end, end + 4 * math.prod(tensor.tensor_shape)
        shape = list(tensor.tensor_shape)
        header[tensor.name] = {"dtype": "F32", "shape": shape, "data_offsets": [first, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in maps:
            leaf = leaves[tensor.path]
            array = np.asarray(leaf if tensor.layer is None else leaf[tensor.layer], "<f4")
            np.ascontiguousarray(array.transpose(tensor.order)).tofile(file)
