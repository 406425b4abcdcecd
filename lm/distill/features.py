"""Loss terms that compare states inside student and teacher: hidden states, attention, relations.

Each position has the weight (targets of its example) / (positions of its example in this tower): 1
in a decoder; in an encoder an example's inputs together weigh as much as its targets. Sums so do
not depend on packing or on the split of a batch, and divided by all targets they are means. The
layers of a tower are averaged, and the towers added.

Layers count from 1. The student's last layer learns from the teacher's last, any other from the one
that teacher.student_init='even' would copy, or from the one of its pair, as in ((2, 7), (4, 12)).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm import attention, batch, layers, steps, transformer
from lm.distill.student_init import evenly
from lm.distill.terms import INSIDE, Term

Array = jax.Array
ModelConfig = transformer.ModelConfig
Pairs = tuple[tuple[int, int], ...]  # (the student's layer, the teacher's), of one tower

PROJECTIONS = "projections"  # of hidden states, next to the student's own parameters
EPSILON = 1e-12  # added to a squared norm


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["intermediates"], meta_fields=["config"]
)
@dataclasses.dataclass(frozen=True)
class Features:
    """The intermediates of a model on a batch, as transformer.Transformer describes them."""

    config: ModelConfig
    intermediates: Any

    def tower(self, name: str) -> TowerFeatures:
        """The features of the "encoder" or the "decoder"."""
        calls = self.intermediates["encoder" if self.config.shared_params == "all" else name]
        # A tower with shared parameters is called twice, as a decoder last.
        index = -1 if name == "decoder" else 0
        call = jax.tree.map(lambda x: x[index], calls, is_leaf=lambda x: isinstance(x, tuple))
        return TowerFeatures(num_layers(self.config, name), call, name == "decoder")


class TowerFeatures(NamedTuple):
    """The intermediates of one tower."""

    num_layers: int
    intermediates: Any
    is_decoder: bool

    def hidden_state(self, layer: int) -> Array:
        """The hidden state after a layer, float32 [B, T, D]; 0: the tower's input.

        Numbered as hidden_states of transformers: the last layer's has passed the final norm.
        """
        ends = {0: "input", self.num_layers: "output"}
        if layer in ends:
            return jnp.float32(self.intermediates[ends[layer]])
        return jnp.float32(self.intermediates["layers"]["hidden"][layer - 1])

    def attention(self, kind: str, name: str, layer: int) -> Array:
        """The "queries", "keys", "values" or "scores" of a layer's attention of this kind."""
        return jnp.float32(self.intermediates["layers"][kind][name][layer - 1])

    @property
    def attention_kinds(self) -> list[str]:
        """The kinds of attention: "self_attention", and "cross_attention" in a decoder."""
        has_cross = self.is_decoder and "cross_attention" in self.intermediates["layers"]
        return ["self_attention", *["cross_attention"] * has_cross]


def num_layers(config: ModelConfig, tower: str) -> int:
    """The number of layers of a tower."""
    return config.num_encoder_layers if tower == "encoder" else config.num_decoder_layers


def model_params(params: dict) -> dict:
    """The model's own parameters, without projections."""
    return {name: leaf for name, leaf in params.items() if name != PROJECTIONS}


def needs_features(terms: tuple[Term, ...]) -> bool:
    """Whether a term compares states inside both models."""
    return any(term.name in INSIDE for term in terms)


def forward(
    model: transformer.Transformer,
    params: Any,
    examples: batch.Batch,
    key: Array | None,
    with_features: bool,
) -> tuple[Array, Features | None]:
    """(logits [B, T, V], features or None); with a key, dropout is on."""
    if not with_features:
        return steps.apply_model(model, params, examples, key), None
    logits, collections = model.apply(
        {"params": model_params(params)},
        examples,
        deterministic=key is None,
        rngs={} if key is None else {"dropout": key},
        mutable=[layers.INTERMEDIATES],
    )
    return logits, Features(model.config, collections[layers.INTERMEDIATES])


def compare(
    term: Term,
    student: Features,
    teacher: Features,
    examples: batch.Batch,
    projections: dict | None = None,
) -> tuple[Array, Array]:
    """A term of INSIDE as (total, weight), with positions weighted as this file's docstring says.

    projections: of the shapes of projection_shapes, or None. weight: the number of targets.
    Raises ValueError as `layer_pairs` does.
    """
    total = jnp.zeros([], jnp.float32)
    for name, pairs in layer_pairs(term, student.config, teacher.config).items():
        segments = _segments(student.config, name, examples)
        towers = student.tower(name), teacher.tower(name)
        projection = (projections or {}).get(name)
        for number, pair in enumerate(pairs):
            kernel = None if projection is None else projection["layers"]["kernel"][number]
            distances = COMPARISONS[term.name](term, towers, pair, segments, kernel)
            total += jnp.sum(distances * _position_weights(segments, examples)) / len(pairs)
    return total, jnp.sum(batch.loss_weights(examples))


def _segments(config: ModelConfig, tower: str, examples: batch.Batch) -> Array:
    """The segment ids of a tower's positions: int [B, P]."""
    inputs, targets = examples.inputs_segment_ids, examples.targets_segment_ids
    if config.architecture != "encoder_decoder":
        return jnp.concatenate([inputs, targets], axis=1)
    return inputs if tower == "encoder" else targets


def _position_weights(segments: Array, examples: batch.Batch) -> Array:
    """The weight of each position: float32 [B, P], 0 on padding."""
    count = lambda keys: jnp.sum(attention.same_segment(segments, keys), axis=-1)
    targets = count(examples.targets_segment_ids)
    return targets / jnp.maximum(count(segments), 1.0)


# Each comparison takes (term, (student tower, teacher tower), (student layer, teacher layer),
# segments [B, P], kernel) and returns float32 [B, P].


def _hidden_distance(term: Term, towers, pair, segments, kernel) -> Array:
    """By term.distance the mean squared difference of two hidden states' units, or 1 - cosine.

    kernel: [D, D of the teacher], which projects the student's states, or None for equal widths.
    Source: Sanh et al. 2019, arXiv:1910.01108 (cosine); Jiao et al. 2020, arXiv:1909.10351 (mse).
    """
    student, teacher = (t.hidden_state(layer) for t, layer in zip(towers, pair, strict=True))
    if kernel is not None:
        student = student @ kernel
    if term.distance == "mse":
        return jnp.mean(jnp.square(student - teacher), axis=-1)
    # Half the squared distance of unit vectors, which is exactly 0 if they are equal.
    unit = lambda x: x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + EPSILON)
    return jnp.sum(jnp.square(unit(student) - unit(teacher)), axis=-1) / 2


def _attention_divergence(term: Term, towers, pair, segments, kernel) -> Array:
    """KL(teacher's attention || student's) of each query, averaged over heads, without dropout.

    In a decoder that of self-attention and that of cross-attention are added.
    Source: Wang et al. 2020, section 3.1, arXiv:2002.10957.
    """
    sides = list(zip(towers, pair, strict=True))
    scores = lambda kind: (tower.attention(kind, "scores", layer) for tower, layer in sides)
    return sum(_divergence(*scores(kind)) for kind in towers[0].attention_kinds)


def _relation_divergence(term: Term, towers, pair, segments, kernel) -> Array:
    """KL of the relations between an example's positions, averaged over relation heads.

    For each of the term's queries, keys and values of self-attention, added: its heads, side by
    side, are split into term.heads new heads A of width d, with relations softmax(A A' / sqrt(d)).
    Source: Wang et al. 2021, section 3, arXiv:2012.15828.
    """
    mask = attention.same_segment(segments, segments)
    heads = term.heads or towers[0].attention("self_attention", "queries", pair[0]).shape[2]

    def relation_scores(tower: TowerFeatures, layer: int, name: str) -> Array:
        x = tower.attention("self_attention", name, layer)
        x = x.reshape(*x.shape[:2], heads, -1)
        return attention.scores(x, x, mask, None, attention.ScoreConfig(x.shape[-1] ** -0.5))

    sides = list(zip(towers, pair, strict=True))
    names = [name for name in ("queries", "keys", "values") if name[0] in term.vectors]
    return sum(_divergence(*(relation_scores(*side, name) for side in sides)) for name in names)


def _divergence(student: Array, teacher: Array) -> Array:
    """KL(teacher || student) of softmaxes of scores [B, N, T, S], averaged over heads: [B, T]."""
    student, teacher = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    return jnp.mean(jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1), axis=1)


COMPARISONS = {
    "hidden": _hidden_distance,
    "attention": _attention_divergence,
    "relations": _relation_divergence,
}


def layer_pairs(term: Term, student: ModelConfig, teacher: ModelConfig) -> dict[str, Pairs]:
    """The pairs (student's layer, teacher's layer), from 1, that a term compares, by tower.

    Layer 0, before the first, is for the term `hidden` only. Towers without pairs are left out.
    Raises ValueError if there is no pair, or a layer does not exist in its model.
    """
    path = f"teacher.loss.{term.name}"
    if student.architecture != teacher.architecture:
        raise ValueError(
            f"{path} compares towers, but model.architecture={student.architecture!r} is not the "
            f"teacher's {teacher.architecture!r}; use forward_kl instead, or the same architecture."
        )
    has_encoder, pairs_by_tower = student.architecture == "encoder_decoder", {}
    for tower in ("encoder", "decoder") if has_encoder else ("decoder",):
        counts = num_layers(student, tower), num_layers(teacher, tower)
        least = 0 if term.name == "hidden" else 1
        pairs = _pair_layers(f"{path}.{tower}", getattr(term, tower), counts, least)
        if pairs:
            pairs_by_tower[tower] = pairs
            _check_comparable(term, tower, pairs, student.tower(tower), teacher.tower(tower))
    if not pairs_by_tower:
        raise ValueError(f"{path} compares no layers; set encoder or decoder to 'last'.")
    return pairs_by_tower


def _pair_layers(path: str, choice: str | tuple, counts: tuple[int, int], least: int) -> Pairs:
    """Pair each chosen layer of the student with one of the teacher; counts: (student, teacher)."""
    student_count, teacher_count = counts
    evenly_copied = evenly(teacher_count, student_count)

    def default_pair(layer: int) -> tuple[int, int]:
        if layer == student_count:
            return layer, teacher_count
        return layer, evenly_copied[layer - 1] + 1 if layer else 0

    every = range(1, student_count + 1)
    names = {"none": (), "last": every[-1:], "all": every, "even": every[::-1][::2][::-1]}
    if isinstance(choice, str):
        return tuple(default_pair(layer) for layer in names[choice])
    for layer in choice:
        pair = layer if isinstance(layer, tuple) else (layer,)
        for number, most in zip(pair, counts, strict=False):
            if not least <= number <= most:
                raise ValueError(f"{path}={choice} has layer {number}; use {least} to {most}.")
    return tuple(x if isinstance(x, tuple) else default_pair(x) for x in choice)


def _check_comparable(
    term: Term, tower: str, pairs: Pairs, student: ModelConfig, teacher: ModelConfig
) -> None:
    """Raise ValueError unless attention has equal heads and windows, or relation heads divide."""
    path = f"teacher.loss.{term.name}"
    if term.name == "attention":
        if student.num_heads != teacher.num_heads:
            raise ValueError(
                f"{path} compares head with head, but the {tower} has {student.num_heads} and the "
                f"teacher's {teacher.num_heads}; use relations, which take any number of heads."
            )
        for layer, teacher_layer in pairs:
            if student.layer_window(layer - 1) != teacher.layer_window(teacher_layer - 1):
                raise ValueError(
                    f"{path} compares layer {layer} of the {tower} with the teacher's "
                    f"{teacher_layer}, which has another window; choose pairs of layers, as "
                    f"((2, 4),), or use relations."
                )
    if term.name == "relations":
        heads = term.heads or student.num_heads
        for owner, config in (("student's", student), ("teacher's", teacher)):
            for names, count in (("q", config.num_heads), ("kv", config.num_kv_heads)):
                width = count * config.head_dim
                if set(names) & set(term.vectors) and width % heads:
                    raise ValueError(
                        f"{path}.heads={heads} does not divide the {width} units of the {owner} "
                        f"{tower}; use a divisor of both models', as {math.gcd(width, heads)}."
                    )


def projection_shapes(terms: tuple[Term, ...], student: ModelConfig, teacher: ModelConfig) -> dict:
    """The shapes of the projections of hidden states, which are trained with the student.

    {tower: {"layers": {"kernel": [pairs of layers, D, D of the teacher]}}} for each tower whose
    width differs from the teacher's. Raises ValueError as `layer_pairs` does, for any term.
    """
    shapes = {}
    for term in terms:
        pairs = layer_pairs(term, student, teacher) if term.name in INSIDE else {}
        for tower in pairs:
            widths = student.tower(tower).d_model, teacher.tower(tower).d_model
            if term.name == "hidden" and widths[0] != widths[1]:
                kernel = jax.ShapeDtypeStruct((len(pairs[tower]), *widths), jnp.float32)
                shapes[tower] = {"layers": {"kernel": kernel}}
    return shapes


def init_projections(shapes: dict, key: Array) -> dict:
    """Fresh projections: normal, of variance 1 / D, which preserves the norm."""
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(key, len(leaves))
    init = lambda key, leaf: jax.random.normal(key, leaf.shape, leaf.dtype) * leaf.shape[1] ** -0.5
    return jax.tree.unflatten(tree, list(map(init, keys, leaves)))
