"""Checkpoints of transformers, both ways: T5 1.0 and 1.1, Flan, mT5, umT5, ByT5, UL2, T5Gemma 1.

Files are read and written tensor by tensor in the safetensors format: eight bytes of length, a JSON
header of names, dtypes, shapes and offsets, then the data. lm/interop/names.py has every name.
"""

from __future__ import annotations

import functools
import json
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tqdm
from flax import traverse_util

from lm import checkpoints, lookup, transformer
from lm.interop import names

DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # bfloat16 is the upper half of float32
PIECE = 1 << 20  # numbers read at a time
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class Tensor(NamedTuple):
    """Where a tensor's data lie: file, first byte, kind of number, shape."""

    path: pathlib.Path
    start: int
    dtype: str
    shape: tuple[int, ...]


def read_architecture(directory: str | os.PathLike) -> dict[str, Any]:
    """The fields of ModelConfig that config.json and the tensors' names say; see names.FAMILIES.

    transformers 5 writes `tie_word_embeddings: true` for every T5, so whether there is a head of
    its own is read from the tensors: one that differs from the embedding.
    Raises ValueError for another model_type, and for options that our words cannot say.
    """
    directory = pathlib.Path(directory)
    where = directory / "config.json"
    config = _read_json(where)
    family = _family(where, config)
    fields = _gemma_fields if family.model_type == "t5gemma" else _t5_fields
    fields = family.words | fields(where, config, family)
    tensors, own = _tensors(directory), None
    if family.head in tensors:
        original = tensors.get(family.copies[family.head])
        own = original is None or not _equal(tensors[family.head], original)
    return fields | {"lm_head": names.head(config, family, own)}


def read_params(directory: str | os.PathLike, config: transformer.ModelConfig) -> dict:
    """The parameters as our nested dict of float32 arrays; bfloat16 and float16 are widened.

    Each stack of layers is filled in place from a few MiB of file at a time: the peak of memory is
    the float32 checkpoint and little more. Where a version of transformers scales what a head of
    its own sees, as 5.0 to 5.23 do in every umT5, that head comes in multiplied by d_model**-0.5.
    Raises ValueError, listing all that is wrong: tensors missing, unused, of another shape, and
    copies that differ from their original.
    """
    directory = pathlib.Path(directory)
    theirs = _read_json(directory / "config.json")
    family = _family(directory / "config.json", theirs)
    tensors, shapes = _tensors(directory), _flat(transformer.param_shapes(config))
    places = names.places(family, {path: leaf.shape for path, leaf in shapes.items()})
    sources = _account(directory, family, tensors, places)
    leaves = {path: checkpoints.aligned_empty(leaf.shape) for path, leaf in shapes.items()}
    bar = tqdm.tqdm(places.items(), "reading", unit="tensor", disable=None, leave=False)
    for name, place in bar:
        leaf = leaves[place.path]
        into = (leaf if place.layer is None else leaf[place.layer]).transpose(place.order)
        for first, piece in _pieces(tensors[sources[name]], into.shape):
            into[first : first + len(piece)] = piece
    if config.lm_head == "untied" and names.is_scaled(theirs, family):
        leaves["head"] *= np.float32(config.d_model**-0.5)
    return traverse_util.unflatten_dict(leaves, sep="/")


def write(
    params: dict,
    config: transformer.ModelConfig,
    directory: str | os.PathLike,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """The files that AutoModelForSeq2SeqLM of transformers 4.57 and 5 loads, all float32.

    config.json, generation_config.json and model.safetensors, or shards of at most max_shard_bytes
    (a larger tensor has a shard to itself) with their index. Both versions then compute our logits,
    but for two faults of version 5: until 5.23 it multiplies the decoder's output by d_model**-0.5
    in every umT5, also in one with an untied head, unless model.config.tie_word_embeddings is set
    to False after loading (in config.json it is overruled); and in local layers of T5Gemma's
    encoder it sees one token further on both sides than `window`.
    Raises ValueError for a model that no family can express.
    """
    directory = pathlib.Path(directory)
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} is too small; use 1 or more.")
    family = names.family_of(config)
    leaves = _flat(params)
    places = names.places(family, {path: np.shape(leaf) for path, leaf in leaves.items()})
    _check_shapes(leaves, config)
    if config.lm_head == "tied_unscaled" and family.model_type == "t5":  # 4.57 scales where it ties
        places[family.head] = places[family.copies[family.head]]._replace(name=family.head)
    theirs = names.their_config(config, family)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", theirs)
    ids = {key: value for key, value in theirs.items() if key.endswith("_token_id")}
    write_json(directory / "generation_config.json", ids)
    _write_shards(directory, leaves, places, max_shard_bytes)


# Their words to ours.


def _family(where: pathlib.Path, config: dict) -> names.Family:
    return lookup.lookup(names.FAMILIES, config.get("model_type", ""), f"{where}: model_type")


def _say(where, config: dict, key: str, default=None):
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"{where} lacks {key!r}; it is no whole config of a model.")
    return value


def _t5_fields(where: pathlib.Path, config: dict, family: names.Family) -> dict:
    say = functools.partial(_say, where, config)
    _check(where, "layer_norm_epsilon", say("layer_norm_epsilon", names.EPSILON), names.EPSILON)
    _check(where, "tie_encoder_decoder", say("tie_encoder_decoder", False), False)
    fields = {ours: say(theirs, default) for ours, theirs, default in names.T5_SIZES}
    fields["num_decoder_layers"] = say("num_decoder_layers", fields["num_encoder_layers"])
    fields["num_kv_heads"] = fields["num_heads"]
    default = "relu" if family.model_type == "t5" else "gated-gelu"
    fields["activation"] = _activation(where, family, say("feed_forward_proj", default))
    return fields


def _gemma_fields(where: pathlib.Path, config: dict, family: names.Family) -> dict:
    towers = {tower: _say(where, config, tower) for tower in names.TOWERS}
    sizes, words, depths, seen = {}, {}, {}, {}
    for tower, theirs in towers.items():
        say = functools.partial(_say, f"{where}'s {tower}", theirs)
        sizes[tower] = {ours: say(key, default) for ours, key, default in names.T5GEMMA_SIZES}
        words[tower] = _gemma_words(where, theirs, family)
        depths[tower] = say("num_hidden_layers")
        seen[tower] = say("layer_types", names.layer_types("local_global_1_1", depths[tower]))
    for ours, theirs in words["encoder"].items():
        if ours != "final_logits_soft_cap" and theirs != words["decoder"][ours]:
            raise ValueError(
                f"{where} asks for {ours}={theirs!r} in the encoder and {words['decoder'][ours]!r} "
                f"in the decoder; our towers have one such word, so it cannot be imported."
            )
    fits = lambda word: all(seen[t] == names.layer_types(word, depths[t]) for t in seen)
    # Of words that say the same of so few layers, the one that all T5Gemma have.
    windows = [
        word for word in ("local_global_1_1", *transformer.config.ATTENTION_PATTERNS) if fits(word)
    ]
    if not windows:
        known = ", ".join(transformer.config.ATTENTION_PATTERNS)
        raise ValueError(f"{where} has layer_types {seen}; model.attention.pattern knows {known}.")
    same = sizes["encoder"] == sizes["decoder"]
    return (
        words["decoder"]
        | sizes["decoder"]
        | {
            "encoder": {key: 0 if same else size for key, size in sizes["encoder"].items()},
            "num_encoder_layers": depths["encoder"],
            "num_decoder_layers": depths["decoder"],
            "attention.pattern": windows[0],
            "dropout_rate": config.get("dropout_rate", 0.0),
            "decoder_start_token_id": _say(where, towers["decoder"], "bos_token_id", 2),
        }
    )


def _gemma_words(where: pathlib.Path, tower: dict, family: names.Family) -> dict:
    # What must be the same in both towers, from the config of one.
    say = functools.partial(_say, where, tower)
    rope = tower.get("rope_parameters") or tower.get("rope_scaling") or {}
    _check(where, "rms_norm_eps", say("rms_norm_eps", names.EPSILON), names.EPSILON)
    _check(where, "attention_bias", say("attention_bias", False), False)
    _check(where, "rope_type", rope.get("rope_type", rope.get("type", "default")), "default")
    base = rope.get("rope_theta", say("rope_theta", 10_000.0))
    cap = lambda key, default: float(tower.get(key, default) or 0.0)  # null is no cap
    return {
        "vocab_size": say("vocab_size", 256_000),
        "activation": _activation(where, family, say("hidden_activation", "gelu_pytorch_tanh")),
        "attention.scale": say("query_pre_attn_scalar", 256) ** -0.5,
        "attention.logits_soft_cap": cap("attn_logit_softcapping", 50.0),
        "final_logits_soft_cap": cap("final_logit_softcapping", 30.0),
        "position.rotary_base": float(base),
        "attention.window_size": say("sliding_window", 4096),
    }


def _activation(where: pathlib.Path, family: names.Family, theirs: str) -> str:
    table = {them: us for us, them in family.activations.items()}
    return lookup.lookup(table, theirs, f"{where}: the activation")


def _check(where: pathlib.Path, key: str, value, ours) -> None:
    if value != ours:
        raise ValueError(
            f"{where} has {key}={value!r}, which our words cannot say; only models with {ours!r} "
            f"can be imported."
        )


def _read_json(path: pathlib.Path) -> dict:
    if not path.exists():
        raise ValueError(f"{path.parent} has no {path.name}; give a directory of transformers.")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); copy it again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; copy it again.")
    return content


def write_json(path: pathlib.Path, content: dict) -> None:
    """An object as their configs have it, its keys in order."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


# Tensors and trees.


def _account(directory, family: names.Family, tensors: dict, places: dict) -> dict[str, str]:
    # Which tensor of the file is read for each that is needed; ValueError unless all are used.
    sources = {name: name for name in places if name in tensors}
    for copy, original in family.copies.items():
        if original in places and original not in sources and copy in tensors:
            sources[original] = copy
    missing = sorted(set(places) - set(sources))
    unused, unlike = [], []
    for name in sorted(set(tensors) - set(sources.values()) - set(family.leftovers)):
        source = sources.get(family.copies.get(name, ""))
        if source is None:
            unused.append(name)
        elif not _equal(tensors[name], tensors[source]):
            unlike.append(f"{name} (from {source})")
    shaped = [
        f"{source} {list(tensors[source].shape)} (the model needs {list(places[name].theirs)})"
        for name, source in sources.items()
        if tensors[source].shape != places[name].theirs
    ]
    lists = {"missing": missing, "unused": unused, "of another shape": shaped}
    lists["differing though they should be copies"] = unlike
    wrong = "; ".join(f"{what}: {', '.join(found)}" for what, found in lists.items() if found)
    if wrong:
        raise ValueError(
            f"The tensors of {directory} are not those of its config.json. {wrong}. Save the whole "
            f"model again, as one for conditional generation."
        )
    return sources


def _tensors(directory: pathlib.Path) -> dict[str, Tensor]:
    # Every tensor of the directory's safetensors files, by name.
    if (directory / WEIGHTS).exists():
        return _header(directory / WEIGHTS)
    if not (directory / INDEX).exists():
        pickled = sorted(path.name for path in directory.glob("pytorch_model*.bin*"))
        cure = "give a directory that transformers' save_pretrained wrote."
        if pickled:
            cure = (
                f"its {pickled[0]} is a pickle, which can run code when it is read: load it with "
                f"transformers where you trust it, and write it by save_pretrained."
            )
        raise ValueError(f"{directory} has no {WEIGHTS}; {cure}")
    index = _read_json(directory / INDEX).get("weight_map", {})
    tensors = {}
    for shard in sorted(set(index.values())):
        tensors |= _header(directory / shard)
    absent = sorted(set(index) - set(tensors))
    if absent:
        raise ValueError(f"{directory}: {INDEX} lists {', '.join(absent)}, which no shard has.")
    return tensors


def _header(path: pathlib.Path) -> dict[str, Tensor]:
    # The tensors of one file, checked to lie within it.
    if not path.exists():
        raise ValueError(f"{path} is absent, though the index lists it; copy all shards.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        text = file.read(start - 8) if start <= size else b""
    try:
        header = json.loads(text)
    except ValueError:
        raise ValueError(f"{path} is no whole safetensors file; copy it again.") from None
    header.pop("__metadata__", None)
    end = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != size:
        raise ValueError(
            f"{path} has {size} bytes, but its header speaks of {end}: it is cut or damaged; "
            f"copy it again."
        )
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        shape = tuple(entry["shape"])
        kind = lookup.lookup(DTYPES, entry["dtype"], f"{path}: the dtype of {name}")
        if last - first != math.prod(shape) * np.dtype(kind).itemsize:
            raise ValueError(f"{path}: {name} has not the bytes of its shape; copy it again.")
        tensors[name] = Tensor(path, start + first, entry["dtype"], shape)
    return tensors


def _pieces(tensor: Tensor, shape: tuple[int, ...]) -> Iterator[tuple[int, np.ndarray]]:
    # The tensor as this shape, some rows at a time: the first one's index, float32 [rows, ...].
    # Each piece is read into memory of its own: a mapped file's pages would count as ours.
    row = math.prod(shape[1:])
    step = max(1, PIECE // max(1, row))
    with tensor.path.open("rb") as file:
        file.seek(tensor.start)
        for first in range(0, shape[0], step):
            rows = min(step, shape[0] - first)
            piece = np.fromfile(file, DTYPES[tensor.dtype], rows * row)
            if tensor.dtype == "BF16":
                piece = (piece.astype(np.uint32) << 16).view(np.float32)
            yield first, piece.astype(np.float32, copy=False).reshape(rows, *shape[1:])


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    pairs = zip(_pieces(one, one.shape), _pieces(other, other.shape), strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for (_, a), (_, b) in pairs)


def _check_shapes(leaves: dict, config: transformer.ModelConfig) -> None:
    wanted = {path: leaf.shape for path, leaf in _flat(transformer.param_shapes(config)).items()}
    found = {path: tuple(np.shape(leaf)) for path, leaf in leaves.items()}
    wrong = sorted(p for p in wanted.keys() | found.keys() if wanted.get(p) != found.get(p))
    if wrong:
        listed = ", ".join(f"{p} {found.get(p)} (not {wanted.get(p)})" for p in wrong)
        raise ValueError(f"The parameters are not those of the model: {listed}.")


def _write_shards(directory: pathlib.Path, leaves: dict, places: dict, most: int) -> None:
    # The tensors in files of at most `most` bytes of data, one where they fit, and the index.
    shards, room = [], 0
    for name, place in places.items():
        size = 4 * math.prod(place.theirs)
        if not shards or size > room:
            shards.append([])
            room = most
        shards[-1].append(name)
        room -= size
    files = [WEIGHTS]
    if len(shards) > 1:
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        index = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = 4 * sum(math.prod(place.theirs) for place in places.values())
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    for file, shard in zip(files, shards, strict=True):
        write_tensors(directory / file, leaves, [places[name] for name in shard])


def write_tensors(path: pathlib.Path, leaves: dict, places: list[names.Place]) -> None:
    """A safetensors file of these places; leaves: ours, by their path."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for place in places:
        first, end = end, end + 4 * math.prod(place.theirs)
        shape = list(place.theirs)
        header[place.name] = {"dtype": "F32", "shape": shape, "data_offsets": [first, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for place in places:
            leaf = leaves[place.path]
            ours = np.asarray(leaf if place.layer is None else leaf[place.layer], "<f4")
            np.ascontiguousarray(ours.transpose(place.order)).tofile(file)


def _flat(tree: dict) -> dict:
    return traverse_util.flatten_dict(tree, sep="/")
