"""T5X checkpoints in: the names, sizes and numbers of a T5, whichever way T5X wrote them.

A step folder (`checkpoint_1000000/`) holds a msgpack file `checkpoint` of nested dicts,
{"version": 3, "optimizer": {"target": parameters, "state": ...}} or {"target": .., "state": ..}.
A parameter is an array in that file, or stands there as a tensorstore spec (or, written through
Orbax, as "PLACEHOLDER://name") whose zarr folder, `target.encoder.encoder_norm.scale/`, lies
beside the file. Orbax puts all of it one folder lower, in `state/`.
Sources: google-research/t5x, t5x/checkpoints.py (`Checkpointer.save`, `load_t5x_checkpoint`,
`OrbaxCheckpointManagerInterface`); google/flax, flax/serialization.py (arrays in msgpack, and
the chunks of arrays above 1 GiB); google/orbax, orbax/checkpoint/utils.py (placeholders).
"""

from __future__ import annotations

import itertools
import json
import math
import pathlib
import re
import struct
from typing import NamedTuple

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from lm import checkpoints, transformer

FLOATS = {"float32": np.float32, "bfloat16": jnp.bfloat16}
FIRST_KEYS = (b"\xa9optimizer", b"\xa6target", b"\xa5state", b"\xa7version", b"\xadflax_mutables")
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
PARTS |= {
    f"{theirs}/{part}/kernel": f"{ours}/{part}/kernel"
    for theirs, ours in (
        ("attention", "self_attention"),  # the encoder's
        ("self_attention", "self_attention"),
        ("encoder_decoder_attention", "cross_attention"),
    )
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

    shape: tuple[int, ...]
    dtype: str
    places: list[tuple[int, int]]


class Zarr(NamedTuple):
    """An array in a zarr folder beside the msgpack file."""

    shape: tuple[int, ...]
    folder: pathlib.Path


def found(directory) -> bool:
    """Whether this is a T5X checkpoint: a step folder, its `state` folder, or the msgpack file."""
    path = _msgpack_path(directory)
    if path is None:
        return False
    with open(path, "rb") as file:
        head = file.read(16)
    return b"\x81" <= head[:1] <= b"\x8f" and head[1:].startswith(FIRST_KEYS)


def read_architecture(directory) -> dict:
    """The ModelConfig fields that the names and shapes of a checkpoint tell.

    What they cannot tell is left at T5's: `relative_limit`, and the activation, geglu where there
    is a gate and relu where there is none (a silu gate looks the same).
    Raises ValueError where the checkpoint is damaged or is no encoder-decoder T5.
    """
    arrays = _index(directory)[1]
    slots, _ = _slots(arrays)

    def shape(path: str) -> tuple[int, ...]:
        name, stacked = slots.get((path, 0)) or slots.get((path, None)) or (None, False)
        if name is None:
            raise ValueError(
                f"{directory} has no parameter for {path}: it is no T5 encoder-decoder of T5X, or "
                f"incomplete; its parameters are {_listed(sorted(arrays))}."
            )
        whole = arrays[name].shape
        return whole[:1] + whole[2:] if stacked else whole

    block = "decoder/layers"
    per_layer = (f"{block}/relative/relative_bias", 0) in slots
    table = f"{block}/relative" if per_layer else "decoder/relative"
    num_heads, buckets = shape(f"{table}/relative_bias")
    width = lambda part: math.prod(shape(f"{block}/self_attention/{part}/kernel")[1:])
    depth = lambda tower: sum(path == f"{tower}/layers/ff_norm/scale" for path, _ in slots)
    head_dim = width("query") // num_heads
    vocab_size, d_model = shape("embed/embedding")
    return {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_ff": shape(f"{block}/feed_forward/down/kernel")[0],
        "num_heads": num_heads,
        "num_kv_heads": width("key") // head_dim,
        "head_dim": head_dim,
        "num_encoder_layers": depth("encoder"),
        "num_decoder_layers": depth("decoder"),
        "activation": "geglu" if (f"{block}/feed_forward/gate/kernel", 0) in slots else "relu",
        "head": "untied" if ("head", None) in slots else "tied",
        "shared": "nothing" if ("encoder_embed/embedding", None) in slots else "embeddings",
        "position": "relative_per_layer" if per_layer else "relative",
        "relative_buckets": buckets,
    }


def read_params(directory, config: transformer.ModelConfig) -> dict:
    """The parameters as a nested dict of numpy float32, in the layout of `transformer.shapes`.

    Arrays are read one by one and the optimizer's state is passed over, so the peak of memory is
    the result and one parameter. Raises ValueError, in a sentence, for a file that ends early, a
    missing or broken zarr chunk, a shape that is not the config's, and, all in one, for the names
    that the config has no use for and the parameters that no name fills.
    """
    file, arrays = _index(directory)
    slots, unused = _slots(arrays)
    shapes = flax.traverse_util.flatten_dict(transformer.shapes(config), sep="/")
    shapes = {path: leaf.shape for path, leaf in shapes.items()}
    layers = lambda path: range(shapes[path][0]) if "/layers/" in path else (None,)
    wanted = {(path, layer) for path in shapes for layer in layers(path)}
    unused += {name for key, (name, _) in slots.items() if key not in wanted}
    missing = [path if i is None else f"{path}[{i}]" for path, i in wanted - slots.keys()]
    if unused or missing:
        raise ValueError(
            f"{directory} and the config are of different models: unused of the checkpoint: "
            f"{_listed(sorted(unused))}; missing of the model: {_listed(sorted(missing))}; "
            f"take the config from read_architecture."
        )
    params = {}
    for path, shape in shapes.items():
        params[path], held = checkpoints.empty(shape), None
        for layer in layers(path):
            name, stacked = slots[path, layer]
            if name != held:
                one = shape if layer is None else shape[1:]
                _check_shape(name, arrays[name].shape, one, shape[0] if stacked else None)
                held, array = name, _read(file, name, arrays[name])
            part = array[:, layer] if stacked else array
            part = part.T if name.endswith("rel_embedding") else part
            params[path][... if layer is None else layer] = part.reshape(one)
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


def _check_shape(name: str, shape: tuple, wanted: tuple, depth: int | None) -> None:
    """Refuse an array of T5X's that is not one layer of `wanted` shape, or `depth` of them.

    T5X joins heads and head_dim in one axis (t5x/examples/t5/layers.py, `DenseGeneral`), or does
    not (scalable_t5/layers.py); its relative table is [N, buckets], ours [buckets, N].
    """
    choices = [wanted[::-1] if name.endswith("rel_embedding") else wanted]
    if len(wanted) == 3:
        first, second, third = wanted
        out = name.endswith("out/kernel")
        choices.append((first * second, third) if out else (first, second * third))
    if depth is not None:
        choices = [(choice[0], depth, *choice[1:]) for choice in choices]
    if shape not in choices:
        raise ValueError(
            f"{name} has shape {list(shape)}, the config wants "
            f"{' or '.join(str(list(choice)) for choice in choices)}; "
            f"take the config from read_architecture."
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) or "nothing") + more


def _msgpack_path(directory) -> pathlib.Path | None:
    path = pathlib.Path(directory)
    choices = (path, path / "checkpoint", path / "state" / "checkpoint")
    return next((choice for choice in choices if choice.is_file()), None)


def _index(directory) -> tuple[pathlib.Path, dict[str, Stored | Zarr | None]]:
    """The msgpack file, and where each array of the target lies (None: what is no array)."""
    if not found(directory):
        raise ValueError(f"{directory} is no T5X checkpoint; name the step folder, checkpoint_N.")
    path = _msgpack_path(directory)
    with open(path, "rb") as file:
        tree = _Msgpack(file, path).value()
    tree = tree["optimizer"] if isinstance(tree.get("optimizer"), dict) else tree
    if not (target := tree.get("target")):
        raise ValueError(f"{path} holds no parameters: it has no `target`, or an empty one.")
    arrays = {}

    def walk(node, name: str) -> None:
        marks = {"__msgpack_chunked_array__", "kvstore"}
        if not isinstance(node, dict) or marks & node.keys():
            arrays[name] = _leaf(path, name, node)
            return
        for key, child in node.items():
            walk(child, f"{name}/{key}" if name else key)

    walk(target, "")
    return path, arrays


def _leaf(path: pathlib.Path, name: str, node) -> Stored | Zarr | None:
    """Where an array lies: what the msgpack file says of it, checked against the zarr folder."""
    beside = lambda at: path.parent / pathlib.PurePosixPath(at).name  # wherever it was written
    if isinstance(node, str) and node.startswith("PLACEHOLDER://"):
        return _zarr(beside(node), name)
    if isinstance(node, dict) and "kvstore" in node:
        # "path" stands outside `kvstore` where tensorstore was older than 0.1.14
        leaf = _zarr(beside(node.get("path") or node["kvstore"].get("path", "")), name)
        said = tuple(node.get("metadata", {}).get("shape", leaf.shape))
        if said != leaf.shape:
            raise ValueError(
                f"{name} has shape {list(leaf.shape)} in {leaf.folder} and {list(said)} in {path}: "
                f"the files are of two checkpoints; fetch it again."
            )
        return leaf
    if isinstance(node, dict):
        ordered = lambda key: [node[key][str(i)] for i in range(len(node[key]))]
        shape, chunks = ordered("shape"), ordered("chunks")
        return Stored(tuple(shape), chunks[0].dtype, [chunk.places[0] for chunk in chunks])
    return node if isinstance(node, Stored) else None


def _zarr(folder: pathlib.Path, name: str) -> Zarr:
    """A zarr (version 2) array whose chunks are all there.

    Tensorstore reads a missing chunk as zeros; T5X's arrays have no fill value, so every chunk
    was written. Source: the zarr storage specification, version 2.
    """
    try:
        metadata = json.loads((folder / ".zarray").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{name} lies in {folder}, whose .zarray is missing or broken ({error}): "
            f"the copy is incomplete; fetch the checkpoint again."
        ) from error
    shape, chunks = tuple(metadata["shape"]), metadata["chunks"]
    grid = [range(-(-size // chunk)) for size, chunk in zip(shape, chunks, strict=True)]
    dot = metadata.get("dimension_separator", ".")
    keys = [dot.join(map(str, index)) or "0" for index in itertools.product(*grid)]
    missing = [key for key in keys if not (folder / key).is_file()]
    if missing:
        raise ValueError(
            f"{name} lies in {folder}, of whose {len(keys)} chunks {_listed(missing)} are missing: "
            f"the copy is incomplete; fetch the checkpoint again."
        )
    return Zarr(shape, folder)


def _read(file: pathlib.Path, name: str, leaf: Stored | Zarr) -> np.ndarray:
    """The array of a leaf, float32."""
    if isinstance(leaf, Zarr):
        return _read_zarr(name, leaf)
    dtype, sizes = FLOATS.get(leaf.dtype), [length for _, length in leaf.places]
    if dtype is None or sum(sizes) != math.prod(leaf.shape) * np.dtype(dtype).itemsize:
        raise ValueError(
            f"{name} in {file} is {sum(sizes)} bytes of {leaf.dtype} for shape {list(leaf.shape)}; "
            f"wanted is as many as the shape says, of {', '.join(FLOATS)}."
        )
    array, start = np.empty(math.prod(leaf.shape), np.float32), 0
    for offset, size in leaf.places:
        piece = np.fromfile(file, np.uint8, size, offset=offset).view(dtype)
        array[start : start + piece.size] = piece
        start += piece.size
    return array.reshape(leaf.shape)


def _read_zarr(name: str, leaf: Zarr) -> np.ndarray:
    import tensorstore

    store = {"driver": "file", "path": str(leaf.folder.resolve())}
    try:
        array = tensorstore.open({"driver": "zarr", "kvstore": store}, read=True).result()
        array = array.read().result()
    except ValueError as error:
        raise ValueError(f"{name} is damaged in {leaf.folder}; fetch it again: {error}") from error
    if array.dtype == np.uint16:  # bfloat16 before version 3: t5x/checkpoint_importer.py
        array = array.view(jnp.bfloat16)
    if array.dtype.name not in FLOATS:
        raise ValueError(f"{name} is of {array.dtype}; wanted is one of {', '.join(FLOATS)}.")
    return array.astype(np.float32, copy=False)


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
        return self._pass_over(length) if kind <= 0xC6 else self._extension(length)

    def _extension(self, length: int) -> Stored | None:
        array, start = self._number("B") in (1, 3), self.file.tell()
        parts = self.value() if array else None
        self.file.seek(start)
        self._pass_over(length)
        return Stored(tuple(parts[0]), parts[1], [parts[2]]) if array else None

    def _number(self, kind: str):
        return struct.unpack(f">{kind}", self._take(struct.calcsize(f">{kind}")))[0]

    def _take(self, length: int) -> bytes:
        data = self.file.read(length)
        if len(data) < length:
            raise self._damaged("ends in the middle of a value")
        return data

    def _pass_over(self, length: int) -> tuple[int, int]:
        start = self.file.tell()
        if start + length > self.size:
            raise self._damaged("ends in the middle of an array")
        self.file.seek(start + length)
        return start, length

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"{self.path} ({self.size} bytes) {what}: it is damaged; fetch it again.")
