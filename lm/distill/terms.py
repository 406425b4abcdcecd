"""The terms of a distillation loss: the section teacher.loss, {term: its options}.

labels      the cross-entropy of the targets, with loss.z_loss and loss.label_smoothing
forward_kl  KL(teacher || student); reverse_kl, the other way; jsd, between them by beta (0 to 1);
            of distributions softened by temperature, times its square
logit_mse   the squared difference of logits
hidden      hidden states of chosen layers; distance: mse or cosine
attention   attention maps of chosen layers
relations   similarities between positions of the queries, keys and values of chosen layers
            (MiniLMv2); vectors: qkv or fewer of them; heads: relation heads, 0: the student's
policy      MiniLLM's long-term part, on the student's own answers

Each has a weight, and a final_weight if the weight changes linearly from the first update to the
last. encoder and decoder choose the student's layers, from 1: "last", "all", "even" (every second,
with the last), "none", or a tuple of layers, or of pairs (layer, teacher's layer).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from lm import lookup, losses


class TermKind(NamedTuple):
    """What a term of this name takes and needs.

    options: fields of Term, beside weight and final_weight. divergence: (student logits, teacher
    logits [B, T, V], weights [B, T], **options) -> (total, weight); None for a term that compares
    more than logits. is_cacheable: whether top-k outputs of a cached teacher suffice.
    """

    options: tuple[str, ...] = ()
    divergence: Callable | None = None
    is_cacheable: bool = False


TERMS = {
    "labels": TermKind(is_cacheable=True),
    "forward_kl": TermKind(("temperature",), losses.forward_kl, is_cacheable=True),
    "reverse_kl": TermKind(("temperature",), losses.reverse_kl, is_cacheable=True),
    "jsd": TermKind(("beta", "temperature"), losses.jsd, is_cacheable=True),
    "logit_mse": TermKind((), losses.logit_mse),
    "hidden": TermKind(("distance", "encoder", "decoder")),
    "attention": TermKind(("encoder", "decoder")),
    "relations": TermKind(("vectors", "heads", "encoder", "decoder")),
    "policy": TermKind(),
}
INSIDE = ("hidden", "attention", "relations")  # these compare states inside both models
BOUNDS = {  # of an option, and what else to use
    "weight": (0.0, 1e6, ""),
    "final_weight": (0.0, 1e6, ""),
    "temperature": (0.01, 1000.0, ""),
    "beta": (0.001, 0.999, ", or forward_kl (0) or reverse_kl (1) instead"),
    "heads": (0, 4096, ""),
}
DISTANCES = {"mse": "mean squared error", "cosine": "1 - cosine"}
LAYERS = {"last": "", "all": "", "even": "every second, with the last", "none": ""}


@dataclasses.dataclass(frozen=True)
class Term:
    """A term of the loss; its options are described in this file's docstring.

    final_weight: the weight at the last update; None: weight. Options that the term does not use
    have their defaults. Raises ValueError for an option of the wrong kind or out of bounds.
    """

    name: str
    weight: float = 1.0
    final_weight: float | None = None
    temperature: float = 1.0
    beta: float = 0.5
    distance: str = "mse"
    encoder: str | tuple = "last"
    decoder: str | tuple = "last"
    vectors: str = "qkv"
    heads: int = 0

    def __post_init__(self):
        lookup.lookup(TERMS, self.name, "the term of teacher.loss")
        path = f"teacher.loss.{self.name}"
        for option, (low, high, cure) in BOUNDS.items():
            value = getattr(self, option)
            if option == "final_weight" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{path}.{option}={value!r} is not a number; write one.")
            if not (math.isfinite(value) and low <= value <= high):
                raise ValueError(
                    f"{path}.{option}={value:g} is out of bounds; use {low:g} to {high:g}{cure}."
                )
        lookup.lookup(DISTANCES, self.distance, f"{path}.distance")
        if not self.vectors or not re.fullmatch("q?k?v?", self.vectors):
            raise ValueError(
                f"{path}.vectors={self.vectors!r} is unknown; write qkv, or fewer of them in order."
            )
        for tower in ("encoder", "decoder"):
            layers = _check_layers(getattr(self, tower), f"{path}.{tower}")
            object.__setattr__(self, tower, layers)

    def weight_at(self, progress):
        """Return the weight after this fraction of the updates, 0 to 1; None: the last weight."""
        first, last = self.weight, self.weight if self.final_weight is None else self.final_weight
        return last if progress is None or first == last else first + (last - first) * progress


def _check_layers(layers, path: str) -> str | tuple:
    if isinstance(layers, str):
        lookup.lookup(LAYERS, layers, path)
        return layers
    pairs = tuple(tuple(layer) if isinstance(layer, list | tuple) else layer for layer in layers)
    is_valid = lambda x: isinstance(x, int) or (len(x) == 2 and all(isinstance(i, int) for i in x))
    if not pairs or not all(is_valid(pair) for pair in pairs):
        raise ValueError(
            f"{path}={layers!r} are no layers; write them as (1, 3) or ((2, 6), (4, 12))."
        )
    return pairs


def loss_terms(section: Mapping[str, Mapping]) -> tuple[Term, ...]:
    """Return the terms of the section teacher.loss, in the order of TERMS.

    Raises ValueError for a term or option that is unknown, and if all weights are 0.
    """
    if not isinstance(section, Mapping):
        raise ValueError(
            f"teacher.loss={section!r} is for a whole section; write {{term: {{option: value}}}}, "
            f"as {{'labels': {{'weight': 0.2}}}}."
        )
    terms = []
    for name in sorted(section, key=lambda name: [*TERMS, name].index(name)):
        options, path = section[name], f"teacher.loss.{name}"
        kind = lookup.lookup(TERMS, name, "the term of teacher.loss")
        allowed = ("weight", "final_weight", *kind.options)
        if not isinstance(options, Mapping):
            raise ValueError(
                f"{path}={options!r} is for a whole section; set {', '.join(allowed)}."
            )
        for option in options:
            if option not in allowed:
                hint = lookup.nearest(option, allowed) or "."
                raise ValueError(
                    f"{path} does not use {option!r}; its options are {', '.join(allowed)}{hint}"
                )
        terms.append(Term(name, **options))
    if not any(term.weight or term.final_weight for term in terms):
        raise ValueError("teacher.loss has no term with a weight above 0; give one a weight.")
    return tuple(terms)


def shared_temperature(terms: tuple[Term, ...]) -> float:
    """Return the temperature of all divergences, which a cached teacher is asked at; 1 if none.

    Raises ValueError if they differ.
    """
    temperatures = {term.temperature for term in terms if "temperature" in TERMS[term.name].options}
    if len(temperatures) > 1:
        listed = ", ".join(f"{t:g}" for t in sorted(temperatures))
        raise ValueError(
            f"teacher.loss has the temperatures {listed}, but a teacher cache has one; use one for "
            f"all terms, or remove teacher.cache."
        )
    return temperatures.pop() if temperatures else 1.0


def uncached(terms: tuple[Term, ...]) -> list[str]:
    """Return the names of the terms that a cached teacher cannot serve."""
    return [term.name for term in terms if not TERMS[term.name].is_cacheable]
