"""What two models show on their way, compared: hidden states, attention maps, relations.

A position counts (targets of its example) / (positions of its example in this tower): 1 in a
decoder, and in an encoder so that an example's inputs together count as its targets do. So what is
added up depends on no packing and on no cut of the batch, and divided by all targets it is a mean.
The layers of a tower are averaged, the two towers added.

Layers count from 1. The student's last learns from the teacher's last, any other from the one that
teacher.student_init='even' would copy, or from the number said for it, as in ((2, 7), (4, 12)).
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
Pairs = tuple[tuple[int, int], ...]  # (the student's layer, the teacher's), of one tower

PROJECTIONS = "projections"  # of hidden states, beside the student's parameters
TINY = 1e-12  # of a squared norm


@functools.partial(jax.tree_util.register_dataclass, data_fields=["shown"], meta_fields=["config"])
@dataclasses.dataclass(frozen=True)
class Features:
    """What a model showed of a batch; `shown` is as transformer.Transformer says."""

    config: transformer.ModelConfig
    shown: Any

    def tower(self, name: str) -> Tower:
        """What its "encoder" or "decoder" showed."""
        runs = self.shown["encoder" if self.config.shared_params == "all" else name]
        last = -1 if name == "decoder" else 0  # one tower that is both is run as a decoder last
        own = jax.tree.map(lambda run: run[last], runs, is_leaf=lambda run: isinstance(run, tuple))
        return Tower(depth(self.config, name), own, name == "decoder")


class Tower(NamedTuple):
    """What one tower showed."""

    depth: int
    shown: Any
    decodes: bool

    def hidden(self, layer: int) -> Array:
        """The hidden state after a layer, float32 [B, T, D]; 0: its input, the last: its output.

        So numbered as hidden_states of transformers; the last has been normed.
        """
        ends = {0: "input", self.depth: "output"}
        if layer in ends:
            return jnp.float32(self.shown[ends[layer]])
        return jnp.float32(self.shown["layers"]["hidden"][layer - 1])

    def of(self, part: str, name: str, layer: int) -> Array:
        """The "queries", "keys", "values" or "scores" of a layer's self- or cross_attention."""
        return jnp.float32(self.shown["layers"][part][name][layer - 1])

    @property
    def parts(self) -> list[str]:
        """Its kinds of attention."""
        crossed = self.decodes and "cross_attention" in self.shown["layers"]
        return ["self_attention", *["cross_attention"] * crossed]


def depth(config: transformer.ModelConfig, tower: str) -> int:
    """How many layers a tower has."""
    return config.num_encoder_layers if tower == "encoder" else config.num_decoder_layers


def plain(params: dict) -> dict:
    """The model's own parameters, without projections."""
    return {name: leaf for name, leaf in params.items() if name != PROJECTIONS}


def wanted(terms: tuple[Term, ...]) -> bool:
    """Whether a term looks inside both models."""
    return any(term.name in INSIDE for term in terms)


def features(
    model, params, examples: batch.Batch, key: Array | None, shown: bool
) -> tuple[Array, Features | None]:
    """Logits [B, T, V], and if `shown`, what is on the way to them; with a key, dropout is on."""
    if not shown:
        return steps.apply_model(model, params, examples, key), None
    rngs = {} if key is None else {"dropout": key}
    logits, kept = model.apply(
        {"params": plain(params)},
        examples,
        deterministic=key is None,
        rngs=rngs,
        mutable=[layers.INTERMEDIATES],
    )
    return logits, Features(model.config, kept[layers.INTERMEDIATES])


def compare(
    term: Term, ours: Features, theirs: Features, examples: batch.Batch, projections=None
) -> tuple[Array, Array]:
    """A term of INSIDE as (total, weight), summed over positions as this file's docstring says.

    ours, theirs: of student and teacher. projections: as `shapes` has them, or None. weight: the
    number of targets. Raises ValueError as `pairs` does.
    """
    added = jnp.zeros([], jnp.float32)
    for name, chosen in pairs(term, ours.config, theirs.config).items():
        segments = _segments(ours.config, name, examples)
        towers = ours.tower(name), theirs.tower(name)
        kernel = (projections or {}).get(name)
        for number, pair in enumerate(chosen):
            own = None if kernel is None else kernel["layers"]["kernel"][number]
            each = KINDS[term.name](term, towers, pair, segments, own)
            added += jnp.sum(each * _shares(segments, examples)) / len(chosen)
    return added, jnp.sum(batch.loss_weights(examples))


def _segments(config, tower: str, examples: batch.Batch) -> Array:
    # Of a tower's positions: int [B, P].
    theirs, own = examples.inputs_segment_ids, examples.targets_segment_ids
    if config.architecture != "encoder_decoder":
        return jnp.concatenate([theirs, own], axis=1)
    return theirs if tower == "encoder" else own


def _shares(segments: Array, examples: batch.Batch) -> Array:
    # What each position counts: float32 [B, P], 0 on padding.
    count = lambda keys: jnp.sum(attention.same_segment(segments, keys), axis=-1)
    targets = count(examples.targets_segment_ids)
    return targets / jnp.maximum(count(segments), 1.0)


def hidden(term: Term, towers, pair, segments, kernel) -> Array:
    """Per position, over the units of two hidden states, float32 [B, P]: by term.distance the mean
    of their squared difference, or 1 - their cosine.

    towers, pair: (student's, teacher's). kernel: [D, D of the teacher], or None for equal widths.
    Source: Sanh et al. 2019, arXiv:1910.01108 (cosine); Jiao et al. 2020, arXiv:1909.10351 (mse).
    """
    ours, theirs = (tower.hidden(layer) for tower, layer in zip(towers, pair, strict=True))
    if kernel is not None:
        ours = ours @ kernel
    if term.distance == "mse":
        return jnp.mean(jnp.square(ours - theirs), axis=-1)
    # Half the squared distance of unit vectors: exactly 0 where they are equal.
    unit = lambda x: x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + TINY)
    return jnp.sum(jnp.square(unit(ours) - unit(theirs)), axis=-1) / 2


def maps(term: Term, towers, pair, segments, kernel) -> Array:
    """KL(teacher's attention || student's) of each query, the mean over heads: float32 [B, T].

    Of self-attention and, in a decoder, of cross-attention: added. No dropout is in them.
    Source: Wang et al. 2020, section 3.1, arXiv:2002.10957.
    """
    sides = list(zip(towers, pair, strict=True))
    scores = lambda part: (tower.of(part, "scores", layer) for tower, layer in sides)
    return sum(_divergence(*scores(part)) for part in towers[0].parts)


def relations(term: Term, towers, pair, segments, kernel) -> Array:
    """KL of how the positions of an example are related, the mean over relation heads: [B, T].

    Of queries, keys or values of self-attention, as term.of says, and added: all heads side by side
    are cut into term.heads new ones A of width d, whose relations are softmax(A A' / sqrt(d)).
    Source: Wang et al. 2021, section 3, arXiv:2012.15828.
    """
    mask = attention.same_segment(segments, segments)
    heads = term.heads or towers[0].of("self_attention", "queries", pair[0]).shape[2]

    def related(tower, layer, name):
        made = tower.of("self_attention", name, layer)
        made = made.reshape(*made.shape[:2], heads, -1)
        return attention.scores(made, made, mask, None, attention.Scores(made.shape[-1] ** -0.5))

    sides = list(zip(towers, pair, strict=True))
    names = [name for name in ("queries", "keys", "values") if name[0] in term.of]
    return sum(_divergence(*(related(*side, name) for side in sides)) for name in names)


def _divergence(ours: Array, theirs: Array) -> Array:
    # KL(theirs || ours) of the softmax of scores [B, N, T, S], the mean over heads: [B, T].
    ours, theirs = jax.nn.log_softmax(ours), jax.nn.log_softmax(theirs)
    return jnp.mean(jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1), axis=1)


KINDS = {"hidden": hidden, "attention": maps, "relations": relations}


def pairs(
    term: Term, ours: transformer.ModelConfig, theirs: transformer.ModelConfig
) -> dict[str, Pairs]:
    """Which layers of the student learn from which of the teacher, by tower.

    Raises ValueError where the two models cannot be so compared.
    """
    word = f"teacher.loss.{term.name}"
    if ours.architecture != theirs.architecture:
        raise ValueError(
            f"{word} compares towers, but model.architecture={ours.architecture!r} is the "
            f"teacher's "
            f"{theirs.architecture!r}; use forward_kl instead, or the same architecture."
        )
    towers = ("encoder", "decoder") if ours.architecture == "encoder_decoder" else ("decoder",)
    found = {}
    for tower in towers:
        depths = depth(ours, tower), depth(theirs, tower)
        chosen = _chosen(f"{word}.{tower}", getattr(term, tower), depths, term.name == "hidden")
        if chosen:
            found[tower] = chosen
            _check_alike(term, tower, chosen, ours, theirs)
    if not found:
        raise ValueError(f"{word} compares no layers; set encoder or decoder to 'last'.")
    return found


def _chosen(word: str, said: str | tuple, depths: tuple[int, int], inputs: bool) -> Pairs:
    ours, theirs = depths
    copied = evenly(theirs, ours)

    def match(layer: int) -> int:
        if layer == ours:
            return theirs
        return copied[layer - 1] + 1 if layer else 0

    every = range(1, ours + 1)
    names = {"none": (), "last": (ours,), "all": every, "even": every[::-1][::2][::-1]}
    if isinstance(said, str):
        return tuple((layer, match(layer)) for layer in names[said])
    found, least = [], 0 if inputs else 1
    for layer in said:
        mine, *other = layer if isinstance(layer, tuple) else (layer,)
        for number, most in ((mine, ours), (*(other or (least,)), theirs)):
            if not least <= number <= most:
                raise ValueError(f"{word}={said} has layer {number}; use {least} to {most}.")
        found.append((mine, *(other or (match(mine),))))
    return tuple(found)


def _check_alike(term: Term, tower: str, chosen: Pairs, ours, theirs) -> None:
    """Maps are compared head by head; relation heads divide what there is."""
    word, both = f"teacher.loss.{term.name}", (ours.tower(tower), theirs.tower(tower))
    if term.name == "attention":
        heads = [side.num_heads for side in both]
        if heads[0] != heads[1]:
            raise ValueError(
                f"{word} compares head with head, but the {tower} has {heads[0]} and the teacher's "
                f"{heads[1]}; use relations, which take any number of heads."
            )
        for pair in chosen:
            seen = [side.layer_window(layer - 1) for side, layer in zip(both, pair, strict=True)]
            if seen[0] != seen[1]:
                raise ValueError(
                    f"{word} compares layer {pair[0]} of the {tower} with the teacher's {pair[1]}, "
                    "which sees another window; choose pairs of layers, as ((2, 4),), or "
                    f"use relations."
                )
    if term.name == "relations":
        heads = term.heads or both[0].num_heads
        for side, whose in zip(both, ("student's", "teacher's"), strict=True):
            for name, count in (("q", side.num_heads), ("kv", side.num_kv_heads)):
                width = count * side.head_dim
                if set(name) & set(term.of) and width % heads:
                    raise ValueError(
                        f"{word}.heads={heads} does not divide the {width} units of the {whose} "
                        f"{tower}; use a divisor of both models', as {math.gcd(width, heads)}."
                    )


def shapes(terms: tuple[Term, ...], ours, theirs) -> dict:
    """The projections of hidden states that the student's training holds, as shapes.

    {tower: {"layers": {"kernel": [chosen layers, D, D of the teacher]}}} for each tower whose width
    is not the teacher's, else nothing. Raises ValueError for any term that `pairs` refuses.
    """
    made = {}
    for term in terms:
        for tower, chosen in pairs(term, ours, theirs).items() if term.name in INSIDE else ():
            widths = ours.tower(tower).d_model, theirs.tower(tower).d_model
            if term.name == "hidden" and widths[0] != widths[1]:
                kernel = jax.ShapeDtypeStruct((len(chosen), *widths), jnp.float32)
                made[tower] = {"layers": {"kernel": kernel}}
    return made


def first_projections(wanted: dict, key: Array) -> dict:
    """Fresh projections of these shapes: normal, of variance 1 / D, so they keep the norm."""
    leaves, tree = jax.tree.flatten(wanted)
    keys = jax.random.split(key, len(leaves))
    draw = lambda key, leaf: jax.random.normal(key, leaf.shape, leaf.dtype) * leaf.shape[1] ** -0.5
    return jax.tree.unflatten(tree, list(map(draw, keys, leaves)))
