"""T5X checkpoints in: the names, sizes and numbers of a T5, whichever way T5X wrote them.

A step folder (`checkpoint_1000000/`) holds a msgpack file `checkpoint` of nested dicts,
{"version": 3, "optimizer": {"target": parameters, "state": ...}} or {"target": .., "state": ..}.
A parameter is an array in that file, or stands there as a tensorstore spec (or, written through
Orbax, as "PLACEHOLDER://name") whose zarr folder lies beside it. Orbax puts all in `state/`.
Sources: google-research/t5x, t5x/checkpoints.py (`Checkpointer.save`, `load_t5x_checkpoint`,
`OrbaxCheckpointManagerInterface`); google/flax, flax/serialization.py (arrays in msgpack, and
the chunks of arrays above 1 GiB); google/orbax, orbax/checkpoint/utils.py (placeholders).
"""

from __future__ import annotations

import ctypes
import itertools
import json
import math
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
PIECE = 1 << 20  # numbers read at a time
M_MMAP_THRESHOLD = -3  # malloc.h: so many bytes or more are given back as soon as they are freed
MARKS = {"__msgpack_chunked_array__", "kvstore"}  # of a dict that stands for an array
SHOWN = 12  # names in an error, of perhaps hundreds

# T5X's name inside a layer -> ours. Source: t5x/examples/t5/network.py and layers.py.
PARTS = {
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
PARTS |= {
    f"{theirs}/{part}/kernel": f"{ours}_attention/{part}/kernel"
    for theirs, ours in ATTENTIONS.items()
    for part in ("query", "key", "value", "out")
}

# T5X's name outside the layers -> ours; separate embeddings: t5x/checkpoint_importer.py.
WHOLES = {
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
    """An array inside the msgpack file: its bytes lie at these (offset, length), in this order."""

    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: str
    places: list[tuple[int, int]]


class Zarr(NamedTuple):
    """An array in a zarr folder beside the msgpack file; where its chunks begin on each axis."""

    shape: tuple[int, ...]
    folder: pathlib.Path
    grid: list[range]


def found(directory) -> pathlib.Path | None:
    """The msgpack file of a T5X checkpoint: of a step folder, its `state` folder, or this file."""
    path = pathlib.Path(directory)
    choices = (path, path / "checkpoint", path / "state" / "checkpoint")
    if (path := next((choice for choice in choices if choice.is_file()), None)) is None:
        return None
    with open(path, "rb") as file:
        head = file.read(16)
    return path if b"\x81" <= head[:1] <= b"\x8f" and head[1:].startswith(FIRST_KEYS) else None


def read_architecture(directory) -> dict:
    """The ModelConfig fields that the names and shapes of a checkpoint tell.

    What they cannot tell is left at T5's: `position.relative_attention_max_distance`, and the
    activation, geglu where there
    is a gate and relu where there is none (a silu gate looks the same).
    Raises ValueError where the checkpoint is damaged or is no encoder-decoder T5.
    """
    arrays = _index(directory)
    slots, unused = _slots(arrays)

    def refuse(what: str) -> ValueError:
        why = f"{directory} has {what}: it is no T5 encoder-decoder of T5X, or incomplete"
        return ValueError(f"{why}; its parameters are {_listed(sorted(arrays))}.")

    if unused:
        raise refuse(f"names that no T5 has, {_listed(sorted(unused))}")

    def shape(path: str, *ranks: int) -> tuple[int, ...]:
        name, stacked = slots.get((path, 0)) or slots.get((path, None)) or (None, False)
        whole = arrays[name].shape if name else ()
        if len(whole) - stacked not in ranks:
            what = f"{name} of shape {list(whole)}" if name else "no parameter"
            raise refuse(f"{what} for {path}")
        return whole[:1] + whole[2:] if stacked else whole

    block = "decoder/layers"
    per_layer = (f"{block}/relative/relative_bias", 0) in slots
    table = f"{block}/relative" if per_layer else "decoder/relative"
    num_heads, buckets = shape(f"{table}/relative_bias", 2)
    width = lambda part: math.prod(shape(f"{block}/self_attention/{part}/kernel", 2, 3)[1:])
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


def read_params(directory, config: transformer.ModelConfig) -> dict:
    """The parameters as a nested dict of numpy float32, in the layout of `transformer.shapes`.

    They are filled in place, so the peak of memory is their own, and a few MiB or one zarr chunk,
    as stored and decoded: T5X's have at most 64 MiB. The largest come first, while the rest of the
    result, not yet touched, takes no memory.
    Raises ValueError, in a sentence, for damage, a shape that is not the config's, and, all in one,
    for the names that the config has no use for and the parameters that no name fills.
    """
    arrays = _index(directory)
    slots, unused = _slots(arrays)
    shapes = flax.traverse_util.flatten_dict(transformer.param_shapes(config), sep="/")
    params = {path: checkpoints.aligned_empty(leaf.shape) for path, leaf in shapes.items()}
    layers = lambda path: range(len(params[path])) if "/layers/" in path else (None,)
    wanted = {(path, layer) for path in params for layer in layers(path)}
    unused += {name for key, (name, _) in slots.items() if key not in wanted}
    missing = [path if i is None else f"{path}[{i}]" for path, i in wanted - slots.keys()]
    if unused or missing:
        raise ValueError(
            f"{directory} and the config are of different models: unused of the checkpoint: "
            f"{_listed(sorted(unused))}; missing of the model: {_listed(sorted(missing))}; "
            f"take the config from read_architecture."
        )
    targets = {}
    for (path, layer), (name, stacked) in slots.items():
        ours = params[path] if stacked or layer is None else params[path][layer]
        targets[name] = _in_their_axes(name, ours, arrays[name].shape, stacked)
    chunk = lambda leaf: math.prod(side.step for side in leaf.grid) if isinstance(leaf, Zarr) else 0
    for name in sorted(targets, key=lambda name: chunk(arrays[name]), reverse=True):
        fill = _fill_from_zarr if isinstance(arrays[name], Zarr) else _fill_from_msgpack
        fill(targets[name], arrays[name])
    return flax.traverse_util.unflatten_dict(params, sep="/")


def _slots(arrays: dict) -> tuple[dict[tuple, tuple[str, bool]], list[str]]:
    """(Our path, layer or None) -> (T5X's name, all layers on axis 1?); and the names not ours."""
    slots, unused = {}, []
    for name, leaf in arrays.items():
        path, layers, stacked = WHOLES.get(name), (None,), False
        if leaf is not None and (match := LAYER.fullmatch(name)):
            tower, number, part = match.groups()
            path = f"{tower}/layers/{PARTS[part]}" if part in PARTS else None
            stacked = number is None
            layers = range(*leaf.shape[1:2]) if stacked else (int(number),)
        keys = [(path, layer) for layer in layers]
        if leaf is None or path is None or any(key in slots for key in keys):
            unused.append(name)
        else:
            slots |= dict.fromkeys(keys, (name, stacked))
    return slots, unused


def _in_their_axes(name: str, ours: np.ndarray, shape: tuple, stacked: bool) -> np.ndarray:
    """Our memory as a view of T5X's `shape`: of one layer, or of all, which T5X stacks on axis 1.

    T5X joins heads and head_dim in one axis (t5x/examples/t5/layers.py, `DenseGeneral`), or does
    not (scalable_t5/layers.py); its relative table is [N, buckets], ours [buckets, N].
    """
    views = [ours.swapaxes(-1, -2) if name.endswith("rel_embedding") else ours]
    if ours.ndim - stacked == 3:
        *depth, a, b, c = ours.shape
        joined = (a * b, c) if name.endswith("out/kernel") else (a, b * c)
        views.append(ours.reshape(*depth, *joined))
    views = [np.moveaxis(view, 0, 1) if stacked else view for view in views]
    for view in views:
        if view.shape == shape:
            return view
    wanted = " or ".join(str(list(view.shape)) for view in views)
    raise ValueError(f"{name} has shape {list(shape)}, not {wanted}; use read_architecture.")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) or "nothing") + more


def _index(directory) -> dict[str, Stored | Zarr | None]:
    """Where each array of the target lies, by its name; None for what is no array."""
    if (path := found(directory)) is None:
        raise ValueError(f"{directory} is no T5X checkpoint; name the step folder, checkpoint_N.")
    try:
        with open(path, "rb") as file:
            tree = _Msgpack(file, path).value()
        tree = tree["optimizer"] if isinstance(tree.get("optimizer"), dict) else tree
        if not (isinstance(target := tree.get("target"), dict) and target):
            raise ValueError(f"{path} holds no parameters: it has no `target`, or an empty one.")
        marked = lambda _, node: node.keys() & MARKS
        leaves = flax.traverse_util.flatten_dict(target, is_leaf=marked, sep="/")
    except (RecursionError, TypeError) as error:  # nested without end; a name that is no string
        raise ValueError(f"{path} is damaged: {error}; fetch it again.") from None
    arrays = {name: _leaf(path, name, leaf) for name, leaf in leaves.items()}
    folders = [leaf.folder for leaf in arrays.values() if isinstance(leaf, Zarr)]
    if len(set(folders)) < len(folders):
        raise ValueError(f"{path} names one folder for two arrays: it is damaged; fetch it again.")
    return arrays


def _leaf(path: pathlib.Path, name: str, node) -> Stored | Zarr | None:
    """Where an array lies, checked: its bytes against its shape, or the zarr folder's shape."""
    beside = lambda at: path.parent / pathlib.PurePosixPath(at).name  # wherever it was written
    match node:
        case str() if node.startswith("PLACEHOLDER://"):
            return _zarr(beside(node), name)
        # "path" stands outside `kvstore` where tensorstore was older than 0.1.14
        case {"kvstore": dict(), "path": str(at)} | {"kvstore": {"path": str(at)}}:
            leaf, said = _zarr(beside(at), name), node.get("metadata")
            said = said.get("shape") if isinstance(said, dict) else None
            if said != list(leaf.shape):
                raise ValueError(
                    f"{name} has shape {list(leaf.shape)} in {leaf.folder} and {said} in {path}: "
                    f"the files are of two checkpoints; fetch it again."
                )
            return leaf
        case {"shape": dict(shape), "chunks": dict(chunks)} if "kvstore" not in node:
            ordered = lambda table: [table.get(str(i)) for i in range(len(table))]
            chunks = [chunk for chunk in ordered(chunks) if isinstance(chunk, Stored)]
            dtype = ", ".join({chunk.dtype for chunk in chunks})
            places = [place for chunk in chunks for place in chunk.places]
            node = Stored(path, tuple(ordered(shape)), dtype, places)
        case dict() | list():
            raise ValueError(f"{name} in {path} is damaged: it is no array; fetch it again.")
    if not isinstance(node, Stored):
        return None
    size = np.dtype(lookup.lookup(FLOATS, node.dtype, f"{path}: the dtype of {name}")).itemsize
    lengths, sound = [n for _, n in node.places], all(type(n) is int and n > 0 for n in node.shape)
    if any(n % size for n in lengths) or not sound or sum(lengths) != math.prod(node.shape) * size:
        raise ValueError(
            f"{name} in {path} has {sum(lengths)} bytes of {node.dtype}, not as many as its shape "
            f"{list(node.shape)}: it is damaged; fetch it again."
        )
    return node


def _zarr(folder: pathlib.Path, name: str) -> Zarr:
    """A zarr (version 2) array whose chunks are all there.

    Tensorstore reads a missing chunk as zeros; T5X's arrays have no fill value, so every chunk
    was written. Source: the zarr storage specification, version 2.
    """
    try:
        metadata = json.loads((folder / ".zarray").read_text())
        shape, chunks = metadata["shape"], metadata["chunks"]
        grid = [range(0, size, chunk) for size, chunk in zip(shape, chunks, strict=True)]
        dot = str(metadata.get("dimension_separator", "."))
        numbers = itertools.product(*(range(len(side)) for side in grid))
        keys = [dot.join(map(str, number)) or "0" for number in numbers]
        missing = [key for key in keys if not (folder / key).is_file()]
        if missing or not keys:
            raise ValueError(f"of {len(keys)} chunks {_listed(missing)} are missing")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name}'s {folder} is not whole ({error}); fetch it again.") from error
    return Zarr(tuple(shape), folder, grid)


def _fill_from_msgpack(target: np.ndarray, leaf: Stored) -> None:
    """Write the leaf's numbers, some at a time, into an array of its shape."""
    dtype, start = np.dtype(FLOATS[leaf.dtype]), 0
    flat = target.reshape(-1) if target.flags.c_contiguous else target.flat
    for offset, length in leaf.places:
        for at in range(0, length, PIECE * dtype.itemsize):
            count = min(PIECE * dtype.itemsize, length - at)
            piece = np.fromfile(leaf.file, np.uint8, count, offset=offset + at).view(dtype)
            flat[start : start + piece.size] = piece
            start += piece.size


def _fill_from_zarr(target: np.ndarray, leaf: Zarr) -> None:
    """Write the leaf's numbers, chunk by chunk, into an array of its shape."""
    import tensorstore

    if sys.platform == "linux":  # else glibc keeps much of what tensorstore's threads free
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, PIECE)
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
    """An open msgpack file, read without its bulk: of bytes only the place is noted.

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
            raise self._damaged(f"holds the byte {kind:#x} where a value begins")
        if kind <= 0x8F or kind >= 0xDE:
            return {self.value(): self.value() for _ in range(length)}
        if kind <= 0x9F or kind >= 0xDC:
            return [self.value() for _ in range(length)]
        if kind <= 0xBF or kind >= 0xD9:
            return self._take(length).decode(errors="replace")
        return self._pass_over(length) if kind <= 0xC6 else self._extension()

    def _extension(self) -> Stored:
        match self._number("B"), self.value():
            case 1 | 3, [list(shape), str(dtype), tuple((int(), int()) as place)]:
                return Stored(self.path, tuple(shape), dtype, [place])
        raise self._damaged("holds an array that is not (shape, dtype, numbers)")

    def _number(self, kind: str):
        return struct.unpack(f">{kind}", self._take(struct.calcsize(f">{kind}")))[0]

    def _take(self, length: int) -> bytes:
        self.file.seek(self._pass_over(length)[0])
        return self.file.read(length)

    def _pass_over(self, length: int) -> tuple[int, int]:
        start = self.file.tell()
        if start + length > self.size:
            raise self._damaged("ends in the middle of a value")
        self.file.seek(start + length)
        return start, length

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"{self.path} ({self.size} bytes) {what}: it is damaged; fetch it again.")
