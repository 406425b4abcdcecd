"""Names of transformers for parameters and config keys: one table per family.

A row is (path of our parameter, name of their tensor, map of axes): "D N H -> (N H) D" says that
their matrix [N*H, D] has our axes [D, N, H] in that order. Rows of a layer omit our leading L:
transformers has one tensor per layer. Letters as in lm/batch.py; R is relative buckets. {tower} is
encoder or decoder, {layer} a number, {last} the index of a T5 block's feed-forward, {up} its first
matrix.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from lm import layers, transformer

AXIS = r"\((.*?)\)|(\w)"  # joined axes in brackets, or one
TOWERS = {"encoder": "1", "decoder": "2"}  # tower: {last}; T5's decoder has cross-attention at 1

PROJECTIONS = (
    ("query", "D N H -> (N H) D"),
    ("key", "D K H -> (K H) D"),
    ("value", "D K H -> (K H) D"),
    ("out", "N H D -> D (N H)"),
)


def _attention_rows(path: str, name: str) -> list[tuple[str, str, str]]:
    """Rows of an attention layer; {} in the name is q, k, v or o."""
    return [(f"{path}/{key}/kernel", name.format(key[0]), axes) for key, axes in PROJECTIONS]


_BIAS = "0.SelfAttention.relative_attention_bias.weight"

T5_ROWS = (
    ("embed/embedding", "shared.weight", "V D -> V D"),
    ("head", "lm_head.weight", "D V -> V D"),
    ("{tower}/norm/scale", "{tower}.final_layer_norm.weight", "D -> D"),
    ("{tower}/relative/relative_bias", "{tower}.block.0.layer." + _BIAS, "R N -> R N"),
)
T5_LAYER = "{tower}.block.{layer}.layer."
T5_LAYER_ROWS = (
    ("relative/relative_bias", _BIAS, "R N -> R N"),
    *_attention_rows("self_attention", "0.SelfAttention.{}.weight"),
    ("self_norm/scale", "0.layer_norm.weight", "D -> D"),
    *_attention_rows("cross_attention", "1.EncDecAttention.{}.weight"),
    ("cross_norm/scale", "1.layer_norm.weight", "D -> D"),
    ("feed_forward/gate/kernel", "{last}.DenseReluDense.wi_0.weight", "D F -> F D"),
    ("feed_forward/up/kernel", "{last}.DenseReluDense.{up}.weight", "D F -> F D"),
    ("feed_forward/down/kernel", "{last}.DenseReluDense.wo.weight", "F D -> D F"),
    ("ff_norm/scale", "{last}.layer_norm.weight", "D -> D"),
)

T5GEMMA_ROWS = (
    ("embed/embedding", "model.decoder.embed_tokens.weight", "V D -> V D"),
    ("encoder_embed/embedding", "model.encoder.embed_tokens.weight", "V D -> V D"),
    ("head", "lm_head.out_proj.weight", "D V -> V D"),
    ("{tower}/norm/scale", "model.{tower}.norm.weight", "D -> D"),
)
T5GEMMA_LAYER = "model.{tower}.layers.{layer}."
T5GEMMA_LAYER_ROWS = (
    *_attention_rows("self_attention", "self_attn.{}_proj.weight"),
    ("self_norm/scale", "pre_self_attn_layernorm.weight", "D -> D"),
    ("self_post_norm/scale", "post_self_attn_layernorm.weight", "D -> D"),
    *_attention_rows("cross_attention", "cross_attn.{}_proj.weight"),
    ("cross_norm/scale", "pre_cross_attn_layernorm.weight", "D -> D"),
    ("cross_post_norm/scale", "post_cross_attn_layernorm.weight", "D -> D"),
    ("feed_forward/gate/kernel", "mlp.gate_proj.weight", "D F -> F D"),
    ("feed_forward/up/kernel", "mlp.up_proj.weight", "D F -> F D"),
    ("feed_forward/down/kernel", "mlp.down_proj.weight", "F D -> D F"),
    ("ff_norm/scale", "pre_feedforward_layernorm.weight", "D -> D"),
    ("ff_post_norm/scale", "post_feedforward_layernorm.weight", "D -> D"),
)

EOS, PAD = 1, 0  # ids
EPSILON = 1e-6  # of our norms

# Our field, their key in config.json, and its default (None: required). T5Gemma has such keys in
# each tower.
T5_SIZES = (
    ("vocab_size", "vocab_size", None),
    ("d_model", "d_model", None),
    ("d_ff", "d_ff", None),
    ("num_heads", "num_heads", None),
    ("head_dim", "d_kv", None),
    ("num_encoder_layers", "num_layers", None),
    ("position.relative_attention_num_buckets", "relative_attention_num_buckets", 32),
    ("position.relative_attention_max_distance", "relative_attention_max_distance", 128),
    ("decoder_start_token_id", "decoder_start_token_id", 0),
    ("dropout_rate", "dropout_rate", 0.1),
)
T5GEMMA_SIZES = (
    ("d_model", "hidden_size", None),
    ("d_ff", "intermediate_size", None),
    ("num_heads", "num_attention_heads", None),
    ("num_kv_heads", "num_key_value_heads", None),
    ("head_dim", "head_dim", 256),
)
T5_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu_new",  # the tanh form; their "gelu" is the exact one
    "geglu": "gated-gelu",
    "swiglu": "gated-silu",
}
T5GEMMA_ACTIVATIONS = {"geglu": "gelu_pytorch_tanh", "swiglu": "silu"}
LAYER_TYPES = {"l": "sliding_attention", "g": "full_attention"}  # letters of ATTENTION_PATTERNS

T5_WORDS = {
    "architecture": "encoder_decoder",
    "shared_params": "embeddings",
    "position.kind": "relative",
    "norm.kind": "rms",
    "norm.placement": "pre",
    "attention.query_key_norm": "none",
    "embedding_scale": "none",
    "attention.scale": 1.0,
    "attention.logits_soft_cap": 0.0,
    "final_logits_soft_cap": 0.0,
    "attention.pattern": "global",
}
T5GEMMA_WORDS = {
    "architecture": "encoder_decoder",
    "shared_params": "none",
    "position.kind": "rotary",
    "norm.kind": "rms_offset",
    "norm.placement": "both",
    "attention.query_key_norm": "none",
    "embedding_scale": "sqrt_d_model",
}


class Family(NamedTuple):
    """How one model_type of transformers represents its models."""

    model_type: str
    architecture: str
    words: Mapping[str, Any]  # fields of ModelConfig that have one value in the family
    heads: tuple[str, ...]  # values of lm_head that it can represent
    activations: Mapping[str, str]
    rows: tuple[tuple[str, str, str], ...]
    layer: str  # prefix of a layer's tensors
    layer_rows: tuple[tuple[str, str, str], ...]
    head: str  # name of an untied output matrix
    copies: Mapping[str, str]  # tensors that a file may repeat: copy -> original
    leftovers: tuple[str, ...] = ()  # tensors of old files that no version used


_T5 = Family(
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    words=T5_WORDS,
    heads=("tied", "untied", "tied_unscaled"),
    activations=T5_ACTIVATIONS,
    rows=T5_ROWS,
    layer=T5_LAYER,
    layer_rows=T5_LAYER_ROWS,
    head="lm_head.weight",
    copies={
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
        "lm_head.weight": "shared.weight",
    },
    leftovers=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
)
FAMILIES = {
    "t5": _T5,
    "mt5": _T5._replace(model_type="mt5", architecture="MT5ForConditionalGeneration"),
    "umt5": _T5._replace(
        model_type="umt5",
        architecture="UMT5ForConditionalGeneration",
        words=T5_WORDS | {"position.kind": "relative_per_layer"},
        heads=("tied", "untied"),
    ),
    "t5gemma": Family(
        model_type="t5gemma",
        architecture="T5GemmaForConditionalGeneration",
        words=T5GEMMA_WORDS,
        heads=("tied_unscaled", "untied"),
        activations=T5GEMMA_ACTIVATIONS,
        rows=T5GEMMA_ROWS,
        layer=T5GEMMA_LAYER,
        layer_rows=T5GEMMA_LAYER_ROWS,
        head="lm_head.out_proj.weight",
        copies={"lm_head.out_proj.weight": "model.decoder.embed_tokens.weight"},
    ),
}


class TensorMap(NamedTuple):
    """Which part of our parameters one of their tensors holds, and how its axes map."""

    name: str
    path: str  # of our parameter, keys joined by "/"
    layer: int | None  # the index on our leading L; None if the parameter is not stacked
    shape: tuple[int, ...]  # our shape, without L
    order: tuple[int, ...]  # our axes in their order
    tensor_shape: tuple[int, ...]


def tensor_maps(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorMap]:
    """Return the map of every tensor of a model, by the tensor's name.

    shapes: path of each parameter (keys joined by "/") -> shape, layers stacked on a leading L.
    Raises ValueError for parameters that have no name in the family.
    """
    up = "wi_1" if any("/feed_forward/gate/" in path for path in shapes) else "wi"
    maps = {}
    for tower, last in TOWERS.items():
        fill = dict(tower=tower, last=last, up=up)
        rows = [(path.format(**fill), name, axes, 0) for path, name, axes in family.rows]
        for path, name, axes in family.layer_rows:
            path = f"{tower}/layers/{path}"
            rows.append((path, family.layer + name, axes, shapes.get(path, (0,))[0]))
        for path, name, axes, depth in rows:
            if path not in shapes:
                continue
            for layer in range(depth) if depth else (None,):
                shape = tuple(shapes[path][1:] if depth else shapes[path])
                full_name = name.format(**fill, layer=layer)
                maps[full_name] = TensorMap(full_name, path, layer, shape, *_axes(axes, shape))
    if unnamed := ", ".join(sorted(set(shapes) - {tensor.path for tensor in maps.values()})):
        raise ValueError(f"Parameters {unnamed} have no name in transformers' {family.model_type}.")
    return maps


def _axes(axes: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """ "D N H -> (N H) D" and our shape -> our axes in their order, and their shape."""
    source, target = axes.split(" -> ")
    letters = source.split()
    size = dict(zip(letters, shape, strict=True))
    groups = [(several or single).split() for several, single in re.findall(AXIS, target)]
    order = [letters.index(letter) for group in groups for letter in group]
    tensor_shape = [math.prod(size[letter] for letter in group) for group in groups]
    return tuple(order), tuple(tensor_shape)


def is_scaled(config: Mapping[str, Any], family: Family) -> bool:
    """Whether the version that wrote config.json multiplies the head's input by d_model**-0.5.

    Version 5 has a key for it, which T5 reads from 5.0 and umT5 from 5.24 on; before, umT5 scaled
    whatever its head. Older versions copy the key without reading it.
    """
    kind = family.model_type
    is_tied = config.get("tie_word_embeddings", kind != "mt5")
    key = config.get("scale_decoder_outputs", is_tied)
    return {
        "t5": key if _since(config, 5) else is_tied,
        "mt5": is_tied and not _since(config, 5),  # version 5 never scales
        "umt5": key if _since(config, 5, 24) else is_tied,
        "t5gemma": False,
    }[kind]


def lm_head(config: Mapping[str, Any], family: Family, is_separate: bool | None) -> str:
    """Return model.lm_head for config.json, the version that wrote it, and the tensors.

    is_separate: whether the output matrix differs from the embedding; None if there is none.
    Raises ValueError if version 4 would ignore a separate matrix.
    """
    is_tied = config.get("tie_word_embeddings", family.model_type != "mt5")
    if is_separate and is_tied and not _since(config, 5):
        raise ValueError(
            f"config.json ties the head to the embedding, but {family.head} differs from "
            f"{family.copies[family.head]}; versions of transformers disagree about it. Set "
            f"tie_word_embeddings to false in config.json to use that head, or remove the tensor."
        )
    if is_separate or (is_separate is None and not is_tied):  # read_params reports a missing one
        return "untied"
    return "tied" if is_scaled(config, family) else "tied_unscaled"


def _since(config: Mapping[str, Any], *first: int) -> bool:
    """Whether config.json was written by this version of transformers or a later one."""
    numbers = str(config.get("transformers_version", "4")).split(".")[: len(first)]
    return tuple(map(int, numbers)) >= first


def layer_types(pattern: str, depth: int) -> list[str]:
    """Return transformers' layer_types of a tower, for a model.attention.pattern."""
    letters = itertools.cycle(transformer.config.ATTENTION_PATTERNS[pattern])
    return [LAYER_TYPES[letter] for letter in itertools.islice(letters, depth)]


def family_of(config: transformer.ModelConfig) -> Family:
    """Return the family that can represent a model.

    Raises ValueError for a field that none can represent, with the values that it can have.
    """
    kinds = {"relative": "t5", "relative_per_layer": "umt5", "rotary": "t5gemma"}
    if config.position.kind not in kinds:
        text = f"model.position.kind={config.position.kind!r} cannot be exported: transformers has"
        raise ValueError(f"{text} {' or '.join(map(repr, kinds))} only.")
    family = FAMILIES[kinds[config.position.kind]]
    allowed = {field: (value,) for field, value in family.words.items()}
    allowed |= {"lm_head": family.heads, "activation": tuple(family.activations)}
    allowed["attention.implementation"] = layers.BUILT_IN_ATTENTION
    if family.model_type != "t5gemma":
        allowed["num_kv_heads"] = (config.num_heads,)
        for key in dataclasses.asdict(config.encoder):
            allowed[f"encoder.{key}"] = (0, getattr(config, key))
    elif _scalar(config) ** -0.5 != config.attention.scale:
        text = f"model.attention.scale={config.attention.scale} cannot be exported"
        raise ValueError(f"{text}: t5gemma has n**-0.5 for an integer n only.")
    keys = config.to_flat()
    for field, values in allowed.items():
        if keys[field] not in values:
            raise ValueError(
                f"model.{field}={keys[field]!r} cannot be exported: transformers' "
                f"{family.model_type} has {' or '.join(map(repr, values))} only."
            )
    return family


def _scalar(config: transformer.ModelConfig) -> int:
    """T5Gemma's query_pre_attn_scalar: the n for which attention.scale is n**-0.5."""
    return max(1, round(config.attention.scale**-2))


def transformers_config(config: transformer.ModelConfig, family: Family) -> dict[str, Any]:
    """Return config.json of a model, for versions 4.57 and 5 of transformers."""
    keys = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "is_encoder_decoder": True,
        "dtype": "float32",
        "dropout_rate": config.dropout_rate,
        "vocab_size": config.vocab_size,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    if family.model_type == "t5gemma":
        towers = {tower: _tower_config(config, family, tower) for tower in TOWERS}
        start_id = config.decoder_start_token_id
        start = {"bos_token_id": start_id, "decoder_start_token_id": start_id}
        return keys | towers | start | {"tie_word_embeddings": config.lm_head != "untied"}
    keys |= {key: config.to_flat()[field] for field, key, _ in T5_SIZES}
    keys |= {"num_decoder_layers": config.num_decoder_layers, "layer_norm_epsilon": EPSILON}
    # Version 4.57 scales if it ties; version 5 reads the second key instead of the first.
    keys["tie_word_embeddings"] = config.lm_head == "tied"
    keys["scale_decoder_outputs"] = config.lm_head == "tied"
    keys["feed_forward_proj"] = family.activations[config.activation]
    return keys


def _tower_config(config: transformer.ModelConfig, family: Family, tower: str) -> dict:
    side = config.tower(tower)
    depth = getattr(config, f"num_{tower}_layers")
    return {key: getattr(side, field) for field, key, _ in T5GEMMA_SIZES} | {
        "model_type": "t5_gemma_module",
        "num_hidden_layers": depth,
        "layer_types": layer_types(config.attention.pattern, depth),
        "sliding_window": config.attention.window_size,
        "vocab_size": config.vocab_size,
        "hidden_activation": family.activations[config.activation],
        "query_pre_attn_scalar": _scalar(config),
        "attn_logit_softcapping": config.attention.logits_soft_cap or None,
        "final_logit_softcapping": config.final_logits_soft_cap or None,
        "rope_theta": config.position.rotary_base,
        "rms_norm_eps": EPSILON,
        "attention_bias": False,
        "attention_dropout": config.dropout_rate,
        "dropout_rate": config.dropout_rate,
        "is_decoder": tower == "decoder",
        "tie_word_embeddings": config.lm_head != "untied",
        "bos_token_id": config.decoder_start_token_id,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
