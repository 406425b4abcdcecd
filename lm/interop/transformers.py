"""Checkpoints of transformers in and out: T5 1.0 and 1.1, Flan, mT5, umT5, ByT5, UL2, T5Gemma 1.

Weights are read and written in pieces of a few MiB. lm/interop/names.py has every name.
"""

from __future__ import annotations

import functools
import json
import math
import os
import pathlib
from typing import Any

import numpy as np
import tqdm
from flax import traverse_util

from lm import checkpoints, lookup, transformer
from lm.interop import names, safetensors

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_architecture(directory: str | os.PathLike) -> dict[str, Any]:
    """Return the ModelConfig fields that config.json and the tensors determine.

    transformers 5 writes `tie_word_embeddings: true` for every T5, so an untied head is detected
    from the tensors: it differs from the embedding.
    Raises ValueError for another model_type, and for options that ModelConfig cannot represent.
    """
    directory = pathlib.Path(directory)
    path = directory / "config.json"
    config = _read_json(path)
    family = _family(path, config)
    read_fields = _gemma_fields if family.model_type == "t5gemma" else _t5_fields
    fields = family.words | read_fields(path, config, family)
    tensors, is_separate = _tensors(directory), None
    if family.head in tensors:
        original = tensors.get(family.copies[family.head])
        is_separate = original is None or not safetensors.is_equal(tensors[family.head], original)
    return fields | {"lm_head": names.lm_head(config, family, is_separate)}


def read_params(directory: str | os.PathLike, config: transformer.ModelConfig) -> dict:
    """Return the parameters as our nested dict of float32 arrays, widened from 16 bits.

    Each stack of layers is filled in place: the peak of memory is the float32 checkpoint and a few
    MiB. If the version of transformers scales the input of an untied head, as 5.0 to 5.23 do in
    umT5, the head is multiplied by d_model**-0.5.
    Raises ValueError that lists tensors missing, unused, of another shape, and copies that differ
    from their original.
    """
    directory = pathlib.Path(directory)
    keys = _read_json(directory / "config.json")
    family = _family(directory / "config.json", keys)
    tensors, shapes = _tensors(directory), _flat(transformer.param_shapes(config))
    maps = names.tensor_maps(family, {path: leaf.shape for path, leaf in shapes.items()})
    sources = _match_tensors(directory, family, tensors, maps)
    leaves = {path: checkpoints.aligned_empty(leaf.shape) for path, leaf in shapes.items()}
    bar = tqdm.tqdm(maps.items(), "reading", unit="tensor", disable=None, leave=False)
    for name, tensor in bar:
        leaf = leaves[tensor.path]
        target = (leaf if tensor.layer is None else leaf[tensor.layer]).transpose(tensor.order)
        for first, chunk in safetensors.read_chunks(tensors[sources[name]], target.shape):
            target[first : first + len(chunk)] = chunk
    if config.lm_head == "untied" and names.is_scaled(keys, family):
        leaves["head"] *= np.float32(config.d_model**-0.5)
    return traverse_util.unflatten_dict(leaves, sep="/")


def write(
    params: dict,
    config: transformer.ModelConfig,
    directory: str | os.PathLike,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write what AutoModelForSeq2SeqLM of transformers 4.57 and 5 loads, all float32.

    The files are config.json, generation_config.json, and model.safetensors or shards of at most
    max_shard_bytes (a larger tensor has its own shard) with an index. Both versions compute our
    logits, except for two faults of version 5. Until 5.23 it multiplies the decoder's output by
    d_model**-0.5 in every umT5, even if its head is untied, unless
    model.config.tie_word_embeddings is set to False after loading. In local layers of T5Gemma's
    encoder it sees one more token on both sides than `window_size`.
    Raises ValueError for a model that no family can represent.
    """
    directory = pathlib.Path(directory)
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} is too small; use 1 or more.")
    family = names.family_of(config)
    leaves = _flat(params)
    maps = names.tensor_maps(family, {path: np.shape(leaf) for path, leaf in leaves.items()})
    _check_shapes(leaves, config)
    if config.lm_head == "tied_unscaled" and family.model_type == "t5":  # 4.57 scales if it ties
        maps[family.head] = maps[family.copies[family.head]]._replace(name=family.head)
    keys = names.transformers_config(config, family)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", keys)
    ids = {key: value for key, value in keys.items() if key.endswith("_token_id")}
    write_json(directory / "generation_config.json", ids)
    _write_shards(directory, leaves, maps, max_shard_bytes)


# config.json to ModelConfig. ------------------------------------------------------------------


def _family(path: pathlib.Path, config: dict) -> names.Family:
    return lookup.lookup(names.FAMILIES, config.get("model_type", ""), f"{path}: model_type")


def _value(label: Any, config: dict, key: str, default=None):
    """config[key], or the default if it is absent or null; ValueError if that is None."""
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"{label} lacks {key!r}; it is no complete config of a model.")
    return value


def _check(path: pathlib.Path, key: str, value, supported) -> None:
    if value != supported:
        raise ValueError(f"{path} has {key}={value!r}; only {supported!r} is supported.")


def _t5_fields(path: pathlib.Path, config: dict, family: names.Family) -> dict:
    value = functools.partial(_value, path, config)
    epsilon = value("layer_norm_epsilon", names.EPSILON)
    _check(path, "layer_norm_epsilon", epsilon, names.EPSILON)
    _check(path, "tie_encoder_decoder", value("tie_encoder_decoder", False), False)
    fields = {field: value(key, default) for field, key, default in names.T5_SIZES}
    fields["num_decoder_layers"] = value("num_decoder_layers", fields["num_encoder_layers"])
    fields["num_kv_heads"] = fields["num_heads"]
    default = "relu" if family.model_type == "t5" else "gated-gelu"
    fields["activation"] = _activation(path, family, value("feed_forward_proj", default))
    return fields


def _gemma_fields(path: pathlib.Path, config: dict, family: names.Family) -> dict:
    towers = {tower: _value(path, config, tower) for tower in names.TOWERS}
    sizes, fields, depths, types = {}, {}, {}, {}
    for tower, keys in towers.items():
        value = functools.partial(_value, f"{path}'s {tower}", keys)
        sizes[tower] = {field: value(key, default) for field, key, default in names.T5GEMMA_SIZES}
        fields[tower] = _gemma_tower_fields(path, keys, family)
        depths[tower] = value("num_hidden_layers")
        types[tower] = value("layer_types", names.layer_types("local_global_1_1", depths[tower]))
    encoder, decoder = fields["encoder"], fields["decoder"]
    for field in encoder:
        if field != "final_logits_soft_cap" and encoder[field] != decoder[field]:
            values = f"{encoder[field]!r} in the encoder and {decoder[field]!r} in the decoder"
            raise ValueError(f"{path} has {field}={values}; only one value is supported.")
    # Several patterns can fit few layers: prefer T5Gemma's.
    patterns = ("local_global_1_1", *transformer.config.ATTENTION_PATTERNS)
    fits = lambda pattern: all(types[t] == names.layer_types(pattern, depths[t]) for t in types)
    pattern = next(filter(fits, patterns), None)
    if pattern is None:
        choices = ", ".join(transformer.config.ATTENTION_PATTERNS)
        raise ValueError(f"{path} has layer_types {types}; model.attention.pattern has {choices}.")
    is_same = sizes["encoder"] == sizes["decoder"]
    encoder_sizes = {field: 0 if is_same else size for field, size in sizes["encoder"].items()}
    return {
        **decoder,
        **sizes["decoder"],
        "encoder": encoder_sizes,
        "num_encoder_layers": depths["encoder"],
        "num_decoder_layers": depths["decoder"],
        "attention.pattern": pattern,
        "dropout_rate": config.get("dropout_rate", 0.0),
        "decoder_start_token_id": _value(path, towers["decoder"], "bos_token_id", 2),
    }


def _gemma_tower_fields(path: pathlib.Path, tower: dict, family: names.Family) -> dict:
    """The fields that both towers must agree in, from the config of one."""
    value = functools.partial(_value, path, tower)
    rope = tower.get("rope_parameters") or tower.get("rope_scaling") or {}
    _check(path, "rms_norm_eps", value("rms_norm_eps", names.EPSILON), names.EPSILON)
    _check(path, "attention_bias", value("attention_bias", False), False)
    _check(path, "rope_type", rope.get("rope_type", rope.get("type", "default")), "default")
    cap = lambda key, default: float(tower.get(key, default) or 0.0)  # null: no cap
    return {
        "vocab_size": value("vocab_size", 256_000),
        "activation": _activation(path, family, value("hidden_activation", "gelu_pytorch_tanh")),
        "attention.scale": value("query_pre_attn_scalar", 256) ** -0.5,
        "attention.logits_soft_cap": cap("attn_logit_softcapping", 50.0),
        "final_logits_soft_cap": cap("final_logit_softcapping", 30.0),
        "position.rotary_base": float(rope.get("rope_theta", value("rope_theta", 10_000.0))),
        "attention.window_size": value("sliding_window", 4096),
    }


def _activation(path: pathlib.Path, family: names.Family, name: str) -> str:
    table = {value: key for key, value in family.activations.items()}
    return lookup.lookup(table, name, f"{path}: the activation")


def _read_json(path: pathlib.Path) -> dict:
    if not path.exists():
        raise ValueError(f"{path.parent} has no {path.name}; give a directory of transformers.")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); copy it again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} has no JSON object; copy it again.")
    return content


def write_json(path: pathlib.Path, content: dict) -> None:
    """Write a JSON object as transformers does, with sorted keys."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


# Tensors. -----------------------------------------------------------------------------------


def _match_tensors(directory, family: names.Family, tensors: dict, maps: dict) -> dict[str, str]:
    """The tensor to read for each that is needed; ValueError unless all match."""
    sources = {name: name for name in maps if name in tensors}
    for copy, original in family.copies.items():
        if original in maps and original not in sources and copy in tensors:
            sources[original] = copy
    faults = {"missing": sorted(set(maps) - set(sources)), "unused": [], "of another shape": []}
    differing = faults["differing though they should be copies"] = []
    for name in sorted(set(tensors) - set(sources.values()) - set(family.leftovers)):
        source = sources.get(family.copies.get(name, ""))
        if source is None:
            faults["unused"].append(name)
        elif not safetensors.is_equal(tensors[name], tensors[source]):
            differing.append(f"{name} (from {source})")
    for name, source in sources.items():
        shape, needed = tensors[source].shape, maps[name].tensor_shape
        if shape != needed:
            text = f"{source} {list(shape)} (the model needs {list(needed)})"
            faults["of another shape"].append(text)
    text = "; ".join(f"{fault}: {', '.join(items)}" for fault, items in faults.items() if items)
    if text:
        raise ValueError(
            f"The tensors of {directory} are not those of its config.json. {text}. Save the whole "
            f"model again, as one for conditional generation."
        )
    return sources


def _tensors(directory: pathlib.Path) -> dict[str, safetensors.Tensor]:
    """All tensors of a directory's safetensors files, by name."""
    if (directory / WEIGHTS).exists():
        return safetensors.read_header(directory / WEIGHTS)
    if not (directory / INDEX).exists():
        pickles = sorted(path.name for path in directory.glob("pytorch_model*.bin*"))
        fix = "give a directory that transformers' save_pretrained wrote."
        if pickles:
            fix = (
                f"its {pickles[0]} is a pickle, which can run code: if you trust it, load it with "
            )
            fix += "transformers and write it by save_pretrained."
        raise ValueError(f"{directory} has no {WEIGHTS}; {fix}")
    index = _read_json(directory / INDEX).get("weight_map", {})
    tensors = {}
    for shard in sorted(set(index.values())):
        if not (directory / shard).exists():
            raise ValueError(f"{directory / shard} is missing, but in the index; copy all shards.")
        tensors |= safetensors.read_header(directory / shard)
    missing = sorted(set(index) - set(tensors))
    if missing:
        raise ValueError(f"{directory}: {INDEX} lists {', '.join(missing)}, which no shard has.")
    return tensors


def _check_shapes(leaves: dict, config: transformer.ModelConfig) -> None:
    expected = {path: leaf.shape for path, leaf in _flat(transformer.param_shapes(config)).items()}
    shapes = {path: tuple(np.shape(leaf)) for path, leaf in leaves.items()}
    for path in sorted(expected.keys() | shapes.keys()):
        if (shape := shapes.get(path)) != expected.get(path):
            fault = f"{path} {shape} (not {expected.get(path)})"
            raise ValueError(f"The parameters are not those of the model: {fault}.")


def _write_shards(directory: pathlib.Path, leaves: dict, maps: dict, max_bytes: int) -> None:
    """Write one file, or shards of at most max_bytes of data and their index."""
    shards, free = [], 0
    for tensor in maps.values():
        size = 4 * math.prod(tensor.tensor_shape)
        if not shards or size > free:
            shards.append([])
            free = max_bytes
        shards[-1].append(tensor)
        free -= size
    files = [WEIGHTS]
    if len(shards) > 1:
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        index = {x.name: file for file, shard in zip(files, shards, strict=True) for x in shard}
        total = 4 * sum(math.prod(tensor.tensor_shape) for tensor in maps.values())
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    for file, shard in zip(files, shards, strict=True):
        safetensors.write(directory / file, leaves, shard)


def _flat(tree: dict) -> dict:
    return traverse_util.flatten_dict(tree, sep="/")
