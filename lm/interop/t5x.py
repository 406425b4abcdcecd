"""T5X checkpoints in: the architecture and parameters of a T5, in every format of T5X.

A step folder (`checkpoint_1000000/`) holds a msgpack file `checkpoint` of nested dicts,
{"version": 3, "optimizer": {"target": parameters, "state": ...}} or {"target": .., "state": ..}.
A parameter is an array in that file, or a tensorstore spec (through Orbax, "PLACEHOLDER://name") of
a zarr folder in the same directory. Orbax writes everything into `state/`.
Sources: google-research/t5x, t5x/checkpoints.py (`Checkpointer.save`, `load_t5x_checkpoint`,
`OrbaxCheckpointManagerInterface`); google/flax, flax/serialization.py (arrays in msgpack, and
the chunks of arrays above 1 GiB); google/orbax, orbax/checkpoint/utils.py (placeholders).
"""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import os
import pathlib
import re
import struct
import sys
from typing import NamedTuple

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from lm import checkpoints, lookup, transformer

FLOATS = {"float32": np.float32, "bfloat16": jnp.bfloat16}
OLD_FLOATS = {"uint16": jnp.bfloat16}  # in zarr before version 3: t5x/checkpoint_importer.py
FIRST_KEYS = (b"\xa9optimizer", b"\xa6target", b"\xa5state", b"\xa7version", b"\xadflax_mutables")
CHUNK = 1 << 20  # numbers read at a time
M_MMAP_THRESHOLD = -3  # malloc.h: freed blocks of this size or more are returned to the system
ARRAY_KEYS = {"__msgpack_chunked_array__", "kvstore"}  # of a dict that represents an array
MAX_LISTED = 12  # names in an error

# T5X's name of a parameter in a layer -> ours. Source: t5x/examples/t5/network.py and layers.py.
LAYER_NAMES = {
    "pre_attention_layer_norm/scale": "self_norm/scale",
    "pre_self_attention_layer_norm/scale": "self_norm/scale",
    "pre_cross_attention_layer_norm/scale": "cross_norm/scale",
    "pre_mlp_layer_norm/scale": "ff_norm/scale",
    "mlp/wi/kernel": "feed_forward/up/kernel",
    "mlp/wi_0/kernel": "feed_forward/gate/kernel",  # activations ("gelu", "linear"), in order
    "mlp/wi_1/kernel": "feed_forward/up/kernel",
    "mlp/wo/kernel": "feed_forward/down/kernel",
    "relpos_bias/rel_embedding": "relative/relative_bias",
    "relative_posemb/rel_embedding": "relative/relative_bias",  # t5x/examples/scalable_t5
}
ATTENTIONS = {"attention": "self", "self_attention": "self", "encoder_decoder_attention": "cross"}
LAYER_NAMES |= {
    f"{t5x_name}/{kernel}/kernel": f"{name}_attention/{kernel}/kernel"
    for t5x_name, name in ATTENTIONS.items()
    for kernel in ("query", "key", "value", "out")
}

# T5X's names of the other parameters -> ours; separate embeddings: t5x/checkpoint_importer.py.
OTHER_NAMES = {
    "token_embedder/embedding": "embed/embedding",
    "decoder/token_embedder/embedding": "embed/embedding",
    "encoder/token_embedder/embedding": "encoder_embed/embedding",
    "decoder/logits_dense/kernel": "head",
    "encoder/encoder_norm/scale": "encoder/norm/scale",
    "decoder/decoder_norm/scale": "decoder/norm/scale",
    "encoder/relpos_bias/rel_embedding": "encoder/relative/relative_bias",
    "decoder/relpos_bias/rel_embedding": "decoder/relative/relative_bias",
}

# One layer: `encoder/layers_3/..`. All, stacked on axis 1: `encoder/layers/..` (T5X's scalable_t5,
# param_scan_axis), or `encoder/encoder/..` (umT5 as released; read in huggingface/transformers,
# models/umt5/convert_umt5_checkpoint_to_pytorch.py).
LAYER = re.compile(r"(encoder|decoder)/(?:layers_(\d+)|layers|encoder|decoder)/(.+)")


class Stored(NamedTuple):
    """An array inside the msgpack file, as byte ranges (offset, length) in order."""

    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: str
    ranges: list[tuple[int, int]]


class Zarr(NamedTuple):
    """An array in a zarr folder; `grid` has the start of the chunks on each axis."""

    shape: tuple[int, ...]
    folder: pathlib.Path
    grid: list[range]


def find_checkpoint(directory: str | os.PathLike) -> pathlib.Path | None:
    """Return the msgpack file of a step folder, its `state` folder, or the file itself."""
    path = pathlib.Path(directory)
    choices = (path, path / "checkpoint", path / "state" / "checkpoint")
    if (path := next((choice for choice in choices if choice.is_file()), None)) is None:
        return None
    with open(path, "rb") as file:
        head = file.read(16)
    return path if b"\x81" <= head[:1] <= b"\x8f" and head[1:].startswith(FIRST_KEYS) else None


def read_architecture(directory: str | os.PathLike) -> dict:
    """Return the ModelConfig fields that the names and shapes of a checkpoint determine.

    The others are T5's: `position.relative_attention_max_distance` is left out, the activation is
    geglu with a gate (swiglu has the same shapes) and relu without.
    Raises ValueError if the checkpoint is damaged or is no encoder-decoder T5.
    """
    arrays = _index(directory)
    slots, unused = _slots(arrays)

    def error(fault: str) -> ValueError:
        text = f"{directory} has {fault}: it is no T5 encoder-decoder of T5X, or incomplete"
        return ValueError(f"{text}; its parameters are {_listed(sorted(arrays))}.")

    if unused:
        raise error(f"names that no T5 has, {_listed(sorted(unused))}")

    def shape(path: str, *ranks: int) -> tuple[int, ...]:
        name, is_stacked = slots.get((path, 0)) or slots.get((path, None)) or (None, False)
        full = arrays[name].shape if name else ()
        if len(full) - is_stacked not in ranks:
            fault = f"{name} of shape {list(full)}" if name else "no parameter"
            raise error(f"{fault} for {path}")
        return full[:1] + full[2:] if is_stacked else full

    block = "decoder/layers"
    per_layer = (f"{block}/relative/relative_bias", 0) in slots
    table = f"{block}/relative" if per_layer else "decoder/relative"
    num_heads, buckets = shape(f"{table}/relative_bias", 2)
    width = lambda name: math.prod(shape(f"{block}/self_attention/{name}/kernel", 2, 3)[1:])
    depth = lambda tower: sum(path == f"{tower}/layers/ff_norm/scale" for path, _ in slots)
    head_dim = width("query") // num_heads
    vocab_size, d_model = shape("embed/embedding", 2)
    return {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_ff": shape(f"{block}/feed_forward/down/kernel", 2)[0],
        "num_heads": num_heads,
        "num_kv_heads": width("key") // max(1, head_dim),  # ModelConfig refuses a head_dim of 0
        "head_dim": head_dim,
        "num_encoder_layers": depth("encoder"),
        "num_decoder_layers": depth("decoder"),
        "activation": "geglu" if (f"{block}/feed_forward/gate/kernel", 0) in slots else "relu",
        "lm_head": "untied" if ("head", None) in slots else "tied",
        "shared_params": "none" if ("encoder_embed/embedding", None) in slots else "embeddings",
        "position.kind": "relative_per_layer" if per_layer else "relative",
        "position.relative_attention_num_buckets": buckets,
    }


def read_params(directory: str | os.PathLike, config: transformer.ModelConfig) -> dict:
    """Return the parameters as a nested dict of numpy float32, as in `transformer.param_shapes`.

    Arrays are filled in place: the peak of memory is their size and a few MiB, or one zarr chunk,
    stored and decoded (T5X's have at most 64 MiB). Arrays with the largest chunks are read first,
    while most of the result is untouched and takes no memory.
    Raises ValueError for damage, shapes that are not the config's, unused names, and missing
    parameters.
    """
    arrays = _index(directory)
    slots, unused = _slots(arrays)
    shapes = flax.traverse_util.flatten_dict(transformer.param_shapes(config), sep="/")
    params = {path: checkpoints.aligned_empty(leaf.shape) for path, leaf in shapes.items()}
    layers = lambda path: range(len(params[path])) if "/layers/" in path else (None,)
    needed = {(path, layer) for path in params for layer in layers(path)}
    unused += {name for key, (name, _) in slots.items() if key not in needed}
    missing = [path if i is None else f"{path}[{i}]" for path, i in needed - slots.keys()]
    if unused or missing:
        raise ValueError(
            f"{directory} and the config are of different models: unused in the checkpoint: "
            f"{_listed(sorted(unused))}; missing in the checkpoint: {_listed(sorted(missing))}."
        )
    targets = {}
    for (path, layer), (name, is_stacked) in slots.items():
        array = params[path] if is_stacked or layer is None else params[path][layer]
        targets[name] = _t5x_view(name, array, arrays[name].shape, is_stacked)
    size = lambda leaf: math.prod(side.step for side in leaf.grid) if isinstance(leaf, Zarr) else 0
    for name in sorted(targets, key=lambda name: size(arrays[name]), reverse=True):
        fill = _fill_from_zarr if isinstance(arrays[name], Zarr) else _fill_from_msgpack
        fill(targets[name], arrays[name])
    return flax.traverse_util.unflatten_dict(params, sep="/")


def _slots(arrays: dict) -> tuple[dict[tuple, tuple[str, bool]], list[str]]:
    """{(our path, layer or None): (T5X's name, whether layers are on axis 1)}, unused names."""
    slots, unused = {}, []
    for name, leaf in arrays.items():
        path, layers, is_stacked = OTHER_NAMES.get(name), (None,), False
        if leaf is not None and (match := LAYER.fullmatch(name)):
            tower, number, rest = match.groups()
            path = f"{tower}/layers/{LAYER_NAMES[rest]}" if rest in LAYER_NAMES else None
            is_stacked = number is None
            layers = range(*leaf.shape[1:2]) if is_stacked else (int(number),)
        keys = [(path, layer) for layer in layers]
        if leaf is None or path is None or any(key in slots for key in keys):
            unused.append(name)
        else:
            slots |= dict.fromkeys(keys, (name, is_stacked))
    return slots, unused


def _t5x_view(name: str, array: np.ndarray, shape: tuple, is_stacked: bool) -> np.ndarray:
    """A view of our array in T5X's `shape`: one layer, or all stacked on axis 1.

    T5X joins heads and head_dim in one axis (t5x/examples/t5/layers.py, `DenseGeneral`), or does
    not (scalable_t5/layers.py); its relative bias is [N, buckets], ours [buckets, N].
    """
    views = [array.swapaxes(-1, -2) if name.endswith("rel_embedding") else array]
    if array.ndim - is_stacked == 3:
        *depth, a, b, c = array.shape
        joined = (a * b, c) if name.endswith("out/kernel") else (a, b * c)
        views.append(array.reshape(*depth, *joined))
    views = [np.moveaxis(view, 0, 1) if is_stacked else view for view in views]
    for view in views:
        if view.shape == shape:
            return view
    expected = " or ".join(str(list(view.shape)) for view in views)
    raise ValueError(f"{name} has shape {list(shape)}, not {expected}; use read_architecture.")


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return (", ".join(names[:MAX_LISTED]) or "nothing") + rest


def _index(directory) -> dict[str, Stored | Zarr | None]:
    """The arrays of the checkpoint's target by name; None for a leaf that is no array."""
    if (path := find_checkpoint(directory)) is None:
        raise ValueError(f"{directory} is no T5X checkpoint; name the step folder, checkpoint_N.")
    try:
        with open(path, "rb") as file:
            tree = _Msgpack(file, path).value()
        tree = tree["optimizer"] if isinstance(tree.get("optimizer"), dict) else tree
        if not (isinstance(target := tree.get("target"), dict) and target):
            raise ValueError(f"{path} has no parameters: its `target` is missing or empty.")
        is_array = lambda _, node: node.keys() & ARRAY_KEYS
        leaves = flax.traverse_util.flatten_dict(target, is_leaf=is_array, sep="/")
    except (RecursionError, TypeError) as error:  # nested too deeply; a name that is no string
        raise ValueError(f"{path} is damaged: {error}; fetch it again.") from None
    arrays = {name: _leaf(path, name, leaf) for name, leaf in leaves.items()}
    folders = [leaf.folder for leaf in arrays.values() if isinstance(leaf, Zarr)]
    if len(set(folders)) < len(folders):
        raise ValueError(f"{path} names one folder for two arrays: it is damaged; fetch it again.")
    return arrays


def _leaf(path: pathlib.Path, name: str, node) -> Stored | Zarr | None:
    """The array of a node of the tree, after checks of its bytes and shape."""
    folder = lambda text: path.parent / pathlib.PurePosixPath(text).name  # may have been moved
    match node:
        case str() if node.startswith("PLACEHOLDER://"):
            return _zarr(folder(node), name)
        # "path" is outside `kvstore` before tensorstore 0.1.14
        case {"kvstore": dict(), "path": str(text)} | {"kvstore": {"path": str(text)}}:
            leaf, metadata = _zarr(folder(text), name), node.get("metadata")
            shape = metadata.get("shape") if isinstance(metadata, dict) else None
            if shape != list(leaf.shape):
                shapes = f"{list(leaf.shape)} in {leaf.folder} and {shape} in {path}"
                raise ValueError(f"{name} has shape {shapes}, of two checkpoints; fetch it again.")
            return leaf
        case {"shape": dict(shape), "chunks": dict(chunks)} if "kvstore" not in node:
            ordered = lambda table: [table.get(str(i)) for i in range(len(table))]
            chunks = [chunk for chunk in ordered(chunks) if isinstance(chunk, Stored)]
            dtype = ", ".join({chunk.dtype for chunk in chunks})
            ranges = [item for chunk in chunks for item in chunk.ranges]
            node = Stored(path, tuple(ordered(shape)), dtype, ranges)
        case dict() | list():
            raise ValueError(f"{name} in {path} is damaged: it is no array; fetch it again.")
    if not isinstance(node, Stored):
        return None
    size = np.dtype(lookup.lookup(FLOATS, node.dtype, f"{path}: the dtype of {name}")).itemsize
    lengths = [length for _, length in node.ranges]
    is_valid = all(type(n) is int and n > 0 for n in node.shape)
    is_valid = is_valid and sum(lengths) == math.prod(node.shape) * size
    if not is_valid or any(length % size for length in lengths):
        fault = f"has {sum(lengths)} bytes of {node.dtype}, but shape {list(node.shape)}"
        raise ValueError(f"{name} in {path} {fault}: it is damaged; fetch it again.")
    return node


def _zarr(folder: pathlib.Path, name: str) -> Zarr:
    """A zarr (version 2) array; ValueError if a chunk is missing.

    Tensorstore would read a missing chunk as zeros, but T5X writes every chunk.
    Source: the zarr storage specification, version 2.
    """
    try:
        metadata = json.loads((folder / ".zarray").read_text())
        shape, chunks = metadata["shape"], metadata["chunks"]
        grid = [range(0, size, chunk) for size, chunk in zip(shape, chunks, strict=True)]
        separator = str(metadata.get("dimension_separator", "."))
        numbers = itertools.product(*(range(len(side)) for side in grid))
        keys = [separator.join(map(str, number)) or "0" for number in numbers]
        missing = [key for key in keys if not (folder / key).is_file()]
        if missing or not keys:
            raise ValueError(f"{_listed(missing)} of {len(keys)} chunks are missing")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name}'s {folder} is incomplete ({error}); fetch it again.") from error
    return Zarr(tuple(shape), folder, grid)


def _fill_from_msgpack(target: np.ndarray, leaf: Stored) -> None:
    """Read an array in pieces into a target of its shape."""
    dtype, start = np.dtype(FLOATS[leaf.dtype]), 0
    flat = target.reshape(-1) if target.flags.c_contiguous else target.flat
    for offset, length in leaf.ranges:
        for first in range(0, length, CHUNK * dtype.itemsize):
            count = min(CHUNK * dtype.itemsize, length - first)
            chunk = np.fromfile(leaf.file, np.uint8, count, offset=offset + first).view(dtype)
            flat[start : start + chunk.size] = chunk
            start += chunk.size


def _fill_from_zarr(target: np.ndarray, leaf: Zarr) -> None:
    """Read an array chunk by chunk into a target of its shape."""
    import tensorstore

    if sys.platform == "linux":  # otherwise glibc retains memory that tensorstore's threads free
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, CHUNK)
    store = {"driver": "file", "path": str(leaf.folder.resolve())}
    blocks = ([slice(i, min(i + s.step, s.stop)) for i in s] for s in leaf.grid)
    try:
        array = tensorstore.open({"driver": "zarr", "kvstore": store}, read=True).result()
        dtype = lookup.lookup(FLOATS | OLD_FLOATS, array.dtype.name, "its dtype")
        for block in itertools.product(*blocks):
            target[block] = array[block].read().result().view(dtype)
    except (ValueError, OSError) as error:
        raise ValueError(f"{leaf.folder} is damaged; fetch it again: {error}") from error


class _Msgpack:
    """A reader of an open msgpack file that skips binary data and returns its byte ranges.

    Source: the msgpack specification; flax's extension types 1 and 3 are arrays and scalars, each
    a msgpack of (shape, dtype, bytes).
    """

    NUMBERS = dict(zip(range(0xCA, 0xD4), "fdBHIQbhiq", strict=True))
    LENGTHS = dict(zip([*range(0xC4, 0xCA), *range(0xD9, 0xE0)], "BHIBHIBHIHIHI", strict=True))

    def __init__(self, file, path: pathlib.Path):
        self.file, self.path, self.size = file, path, path.stat().st_size

    def value(self):
        """The next dict, list, str, number, None or Stored, or the (offset, length) of bytes."""
        kind = self._number("B")
        if kind <= 0x7F or kind >= 0xE0:
            return kind if kind <= 0x7F else kind - 0x100
        if kind in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[kind]
        if kind in self.NUMBERS:
            return self._number(self.NUMBERS[kind])
        if kind <= 0xBF:
            length = kind & (0x0F if kind <= 0x9F else 0x1F)
        elif 0xD4 <= kind <= 0xD8:
            length = 1 << kind - 0xD4
        elif kind in self.LENGTHS:
            length = self._number(self.LENGTHS[kind])
        else:
            raise self._error(f"has the byte {kind:#x} where a value begins")
        if kind <= 0x8F or kind >= 0xDE:
            return {self.value(): self.value() for _ in range(length)}
        if kind <= 0x9F or kind >= 0xDC:
            return [self.value() for _ in range(length)]
        if kind <= 0xBF or kind >= 0xD9:
            return self._read(length).decode(errors="replace")
        return self._skip(length) if kind <= 0xC6 else self._extension()

    def _extension(self) -> Stored:
        match self._number("B"), self.value():
            case 1 | 3, [list(shape), str(dtype), tuple((int(), int()) as item)]:
                return Stored(self.path, tuple(shape), dtype, [item])
        raise self._error("has an array that is not (shape, dtype, numbers)")

    def _number(self, kind: str):
        return struct.unpack(f">{kind}", self._read(struct.calcsize(f">{kind}")))[0]

    def _read(self, length: int) -> bytes:
        self.file.seek(self._skip(length)[0])
        return self.file.read(length)

    def _skip(self, length: int) -> tuple[int, int]:
        start = self.file.tell()
        if start + length > self.size:
            raise self._error("ends in the middle of a value")
        self.file.seek(start + length)
        return start, length

    def _error(self, fault: str) -> ValueError:
        return ValueError(
            f"{self.path} ({self.size} bytes) {fault}: it is damaged; fetch it again."
        )
