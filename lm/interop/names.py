"""What transformers calls our parameters and words: tables a family, and no name anywhere else.

A row is (our path, their name, how the axes map): "D N H -> (N H) D" says that their matrix
[N*H, D] holds our axes [D, N, H] in that order. Rows of a layer stand for every layer: our leading
L is left out, since each of their layers has tensors of its own. Letters as in lm/batch.py; R is
relative buckets. {tower} is encoder or decoder, {layer} a number, {last} the place of a T5 block's
feed-forward, {up} its first matrix.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from lm import transformer

TOWERS = {"encoder": "1", "decoder": "2"}  # and {last}: T5's decoder has cross-attention before it

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
    ("self_attention/query/kernel", "0.SelfAttention.q.weight", "D N H -> (N H) D"),
    ("self_attention/key/kernel", "0.SelfAttention.k.weight", "D K H -> (K H) D"),
    ("self_attention/value/kernel", "0.SelfAttention.v.weight", "D K H -> (K H) D"),
    ("self_attention/out/kernel", "0.SelfAttention.o.weight", "N H D -> D (N H)"),
    ("self_norm/scale", "0.layer_norm.weight", "D -> D"),
    ("cross_attention/query/kernel", "1.EncDecAttention.q.weight", "D N H -> (N H) D"),
    ("cross_attention/key/kernel", "1.EncDecAttention.k.weight", "D K H -> (K H) D"),
    ("cross_attention/value/kernel", "1.EncDecAttention.v.weight", "D K H -> (K H) D"),
    ("cross_attention/out/kernel", "1.EncDecAttention.o.weight", "N H D -> D (N H)"),
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
    ("self_attention/query/kernel", "self_attn.q_proj.weight", "D N H -> (N H) D"),
    ("self_attention/key/kernel", "self_attn.k_proj.weight", "D K H -> (K H) D"),
    ("self_attention/value/kernel", "self_attn.v_proj.weight", "D K H -> (K H) D"),
    ("self_attention/out/kernel", "self_attn.o_proj.weight", "N H D -> D (N H)"),
    ("self_norm/scale", "pre_self_attn_layernorm.weight", "D -> D"),
    ("self_post_norm/scale", "post_self_attn_layernorm.weight", "D -> D"),
    ("cross_attention/query/kernel", "cross_attn.q_proj.weight", "D N H -> (N H) D"),
    ("cross_attention/key/kernel", "cross_attn.k_proj.weight", "D K H -> (K H) D"),
    ("cross_attention/value/kernel", "cross_attn.v_proj.weight", "D K H -> (K H) D"),
    ("cross_attention/out/kernel", "cross_attn.o_proj.weight", "N H D -> D (N H)"),
    ("cross_norm/scale", "pre_cross_attn_layernorm.weight", "D -> D"),
    ("cross_post_norm/scale", "post_cross_attn_layernorm.weight", "D -> D"),
    ("feed_forward/gate/kernel", "mlp.gate_proj.weight", "D F -> F D"),
    ("feed_forward/up/kernel", "mlp.up_proj.weight", "D F -> F D"),
    ("feed_forward/down/kernel", "mlp.down_proj.weight", "F D -> D F"),
    ("ff_norm/scale", "pre_feedforward_layernorm.weight", "D -> D"),
    ("ff_post_norm/scale", "post_feedforward_layernorm.weight", "D -> D"),
)

EOS, PAD, EPSILON = 1, 0, 1e-6  # ids; of our norms

# Our field, their key in config.json, and the value where the file leaves it out (None: it must
# be there). T5Gemma has such keys in each tower.
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
    "gelu": "gelu_new",  # theirs called "gelu" is not the tanh form that ours is
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
    """How one model_type of transformers writes down models that have these words."""

    model_type: str
    architecture: str
    words: Mapping[str, Any]  # fields of ModelConfig that the family knows one value of
    heads: tuple[str, ...]  # the words for `head` that it can write
    activations: Mapping[str, str]
    rows: tuple[tuple[str, str, str], ...]
    layer: str  # what their names of a layer's tensors begin with
    layer_rows: tuple[tuple[str, str, str], ...]
    head: str  # their name of an output matrix of its own
    copies: Mapping[str, str]  # names a file may also give to a tensor: copy -> original
    leftovers: tuple[str, ...] = ()  # tensors of old files that no version ever used


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


class Place(NamedTuple):
    """Where one of their tensors lives in our tree, and how its axes map."""

    name: str
    path: str  # of our leaf, keys joined by "/"
    layer: int | None  # the index on our leading L, None where the leaf is no stack
    ours: tuple[int, ...]  # our shape, without L
    order: tuple[int, ...]  # our axes in their order
    theirs: tuple[int, ...]  # their shape


def places(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """Every tensor that a model with these leaves needs, by their name.

    shapes: our leaves, path (keys joined by "/") -> shape, layers stacked on a leading L.
    Raises ValueError naming the leaves for which the family has no name.
    """
    up = "wi_1" if any("/feed_forward/gate/" in path for path in shapes) else "wi"
    found, nameless = {}, set(shapes)
    for tower, last in TOWERS.items():
        fill = dict(tower=tower, last=last, up=up)
        rows = [(us.format(**fill), them, axes, 0) for us, them, axes in family.rows]
        for us, them, axes in family.layer_rows:
            path = f"{tower}/layers/{us}"
            rows.append((path, family.layer + them, axes, shapes.get(path, (0,))[0]))
        for path, name, axes, layers in rows:
            if path not in shapes:
                continue
            nameless.discard(path)
            for layer in range(layers) if layers else (None,):
                shape = shapes[path][1:] if layers else shapes[path]
                place = (name.format(**fill, layer=layer), path, layer)
                found[place[0]] = Place(*place, tuple(shape), *_axes(axes, shape))
    if nameless:
        raise ValueError(
            f"The model's parameters {', '.join(sorted(nameless))} have no name in "
            f"transformers' {family.model_type}; choose words that this family knows."
        )
    return found


def _axes(axes: str, ours: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """ "D N H -> (N H) D" and our shape -> our axes in their order, and their shape."""
    left, right = axes.split(" -> ")
    size = dict(zip(left.split(), ours, strict=True))
    groups = [(many or one).split() for many, one in re.findall(r"\((.*?)\)|(\w)", right)]
    order = [left.split().index(letter) for group in groups for letter in group]
    theirs = [math.prod(size[letter] for letter in group) for group in groups]
    return tuple(order), tuple(theirs)


def is_scaled(config: Mapping[str, Any], family: Family) -> bool:
    """Whether what the head sees is multiplied by d_model**-0.5, in the version that wrote this.

    Version 5 does so by a word of its own, in a T5 always and in a umT5 from 5.24 on, before which
    it did in every umT5 whatever its head. Versions that do not know the word carry it along.
    """
    kind = family.model_type
    tied = config.get("tie_word_embeddings", kind != "mt5")
    word = config.get("scale_decoder_outputs", tied)
    return {
        "t5": word if _since(config, 5) else tied,
        "mt5": tied and not _since(config, 5),  # version 5 never does
        "umt5": word if _since(config, 5, 24) else tied,
        "t5gemma": False,
    }[kind]


def head(config: Mapping[str, Any], family: Family, own: bool | None) -> str:
    """The word for the head, from config.json, the version that wrote it, and the tensors.

    own: is there an output matrix that differs from the embedding? None: there is none at all.
    Raises ValueError where version 4 would not use the matrix that is there.
    """
    tied = config.get("tie_word_embeddings", family.model_type != "mt5")
    if own and tied and not _since(config, 5):
        raise ValueError(
            f"config.json ties the head to the embedding, but {family.head} differs from "
            f"{family.copies[family.head]}; versions of transformers disagree about it. Set "
            f"tie_word_embeddings to false in config.json if that head is meant, or drop that "
            f"tensor if it is not."
        )
    if own or (own is None and not tied):  # without the tensor, read_params will say it is missing
        return "untied"
    return "tied" if is_scaled(config, family) else "tied_unscaled"


def _since(config: Mapping[str, Any], *first: int) -> bool:
    """Whether config.json was written by this version of transformers, or a later one."""
    numbers = str(config.get("transformers_version", "4")).split(".")[: len(first)]
    return tuple(map(int, numbers)) >= first


def layer_types(windows: str, depth: int) -> list[str]:
    """What each layer of a tower sees, in their words."""
    letters = itertools.islice(
        itertools.cycle(transformer.config.ATTENTION_PATTERNS[windows]), depth
    )
    return [LAYER_TYPES[letter] for letter in letters]


def family_of(config: transformer.ModelConfig) -> Family:
    """The family whose words can say all of this model.

    Raises ValueError naming the field that none can express, and what could stand there.
    """
    homes = {"relative": "t5", "relative_per_layer": "umt5", "rotary": "t5gemma"}
    if config.position.kind not in homes:
        raise ValueError(
            f"model.position.kind={config.position.kind!r} cannot be exported: "
            f"transformers' T5 family has "
            f"{' or '.join(map(repr, homes))} only."
        )
    family = FAMILIES[homes[config.position.kind]]
    wanted = {field: (value,) for field, value in family.words.items()}
    wanted |= {"lm_head": family.heads, "activation": tuple(family.activations)}
    if family.model_type != "t5gemma":
        wanted["num_kv_heads"] = (config.num_heads,)
        for key in dataclasses.asdict(config.encoder):
            wanted[f"encoder.{key}"] = (0, getattr(config, key))
    elif _scalar(config) ** -0.5 != config.attention.scale:
        raise ValueError(
            f"model.attention.scale={config.attention.scale} cannot be exported: t5gemma writes an "
            f"integer n for n**-0.5; use such a scale."
        )
    keys = config.to_flat()
    for field, values in wanted.items():
        if keys[field] not in values:
            raise ValueError(
                f"model.{field}={keys[field]!r} cannot be exported: transformers' "
                f"{family.model_type} has {' or '.join(map(repr, values))} only."
            )
    return family


def _scalar(config: transformer.ModelConfig) -> int:
    # The n of which T5Gemma's attention.scale is n**-0.5, or the nearest there is.
    return max(1, round(config.attention.scale**-2))


def their_config(config: transformer.ModelConfig, family: Family) -> dict[str, Any]:
    """config.json of such a model; both 4.57 and 5 read their own words in it."""
    theirs = {
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
        towers = {tower: _their_tower(config, family, tower) for tower in TOWERS}
        start_id = config.decoder_start_token_id
        start = {"bos_token_id": start_id, "decoder_start_token_id": start_id}
        return theirs | towers | start | {"tie_word_embeddings": config.lm_head != "untied"}
    theirs |= {key: config.to_flat()[ours] for ours, key, _ in T5_SIZES}
    theirs |= {"num_decoder_layers": config.num_decoder_layers, "layer_norm_epsilon": EPSILON}
    # Version 4.57 scales where it ties; version 5 ignores the first of these words for the second.
    theirs["tie_word_embeddings"] = config.lm_head == "tied"
    theirs["scale_decoder_outputs"] = config.lm_head == "tied"
    theirs["feed_forward_proj"] = family.activations[config.activation]
    return theirs


def _their_tower(config: transformer.ModelConfig, family: Family, tower: str) -> dict:
    side = config.tower(tower)
    depth = getattr(config, f"num_{tower}_layers")
    return {key: getattr(side, ours) for ours, key, _ in T5GEMMA_SIZES} | {
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
