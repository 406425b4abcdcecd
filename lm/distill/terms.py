"""What a student learns from, in words: the terms of its loss.

Terms stand between commas, each a name and its options, as in
"labels weight=0.2, forward_kl weight=0.8 temperature=2". Every term takes weight=W, or weight=A:B:
A at the first update, B at the last, linear in between.

labels      the cross-entropy of the targets, with loss.z_loss and loss.label_smoothing
forward_kl  KL(teacher || student); reverse_kl, the other way; jsd, between them by beta (0 to 1);
            each of distributions softened by temperature, times its square; a cached teacher is
            asked at one temperature, the same for all of them
logit_mse   the squared difference of logits
hidden      hidden states of chosen layers; distance=mse or cosine
attention   attention maps of chosen layers
relations   of chosen layers, which positions have like queries, keys and values: of=qkv, or fewer
            of them, by so many heads
policy      MiniLLM's long-term part, of the student's own answers

encoder= and decoder= choose the student's layers, from 1: last, all, even (every second, with the
last), none, or numbers, as 1-3-5, or with the teacher's layer that each learns from, as 2:6-4:12.
"""

from __future__ import annotations

import dataclasses
import math
import re

from lm import lookup

SOFT, LAYERS = ("temperature",), ("encoder", "decoder")
OPTIONS = {  # of each term, beside its weight
    "labels": (),
    "forward_kl": SOFT,
    "reverse_kl": SOFT,
    "jsd": ("beta", *SOFT),
    "logit_mse": (),
    "hidden": ("distance", *LAYERS),
    "attention": LAYERS,
    "relations": ("of", "heads", *LAYERS),
    "policy": (),
}
CACHED = ("labels", "forward_kl", "reverse_kl", "jsd")  # that a cached teacher can serve
INSIDE = ("hidden", "attention", "relations")  # that look inside both models
BOUNDS = {  # of an option, with what else may be meant
    "weight": (0.0, 1e6, ""),
    "temperature": (0.01, 1000.0, ""),
    "beta": (0.001, 0.999, ", or forward_kl (0) or reverse_kl (1) instead"),
    "heads": (0, 4096, ""),
}
PATTERNS = {
    "distance": (r"mse|cosine", "mse or cosine"),
    "encoder": (
        r"last|all|even|none|\d+(:\d+)?(-\d+(:\d+)?)*",
        "last, all, even, none, or numbers, as 1-3-5 or 2:6-4:12",
    ),
    "of": (r"q?k?v?", "qkv, or fewer of them in this order"),
}
PATTERNS["decoder"] = PATTERNS["encoder"]


@dataclasses.dataclass(frozen=True)
class Term:
    """One term of the loss; checked when built. What is said in this file's docstring.

    weight: at the first and at the last update. heads: relation heads; 0: as the student has. An
    option that the name has no use for is as it is here.
    """

    name: str
    weight: tuple[float, float] = (1.0, 1.0)
    temperature: float = 1.0
    beta: float = 0.5
    distance: str = "mse"
    encoder: str = "last"
    decoder: str = "last"
    of: str = "qkv"
    heads: int = 0

    def __post_init__(self):
        lookup.lookup(OPTIONS, self.name, "teacher.loss")
        for option, (low, high, cure) in BOUNDS.items():
            value = getattr(self, option)
            for each in value if option == "weight" else (value,):
                if not (math.isfinite(each) and low <= each <= high):
                    raise ValueError(
                        f"teacher.loss {self.name} {option}={each:g} is out of bounds; use {low:g} "
                        f"to {high:g}{cure}."
                    )
        for option, (pattern, choices) in PATTERNS.items():
            value = getattr(self, option)
            if not value or not re.fullmatch(pattern, value):
                raise ValueError(
                    f"teacher.loss {self.name} {option}={value!r} is unknown; write {choices}."
                )

    def weight_at(self, progress):
        """The weight once a share of the updates is taken, 0 to 1; None: all of them."""
        first, last = self.weight
        return last if progress is None or first == last else first + (last - first) * progress


def parse(text: str) -> tuple[Term, ...]:
    """The terms that a string says; what is not said is as in Term.

    Raises ValueError for a term or option that is unknown or said twice, and for a value that is
    out of bounds.
    """
    terms = tuple(_term(part.split()) for part in text.split(","))
    names = [term.name for term in terms]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"teacher.loss={text!r} says {name} twice; say it once.")
    if not any(any(term.weight) for term in terms):
        raise ValueError(f"teacher.loss={text!r} has no weight but 0; give one term more.")
    return terms


def shared_temperature(terms: tuple[Term, ...]) -> float:
    """The one temperature that a cached teacher is asked at, of all divergences; 1 without any.

    Raises ValueError where they have several.
    """
    found = {term.temperature for term in terms if "temperature" in OPTIONS[term.name]}
    if len(found) > 1:
        raise ValueError(
            f"teacher.loss has the temperatures {', '.join(f'{t:g}' for t in sorted(found))}, but "
            f"a cached teacher is asked at one; use one for all, or a teacher beside the loop."
        )
    return found.pop() if found else 1.0


def uncached(terms: tuple[Term, ...]) -> list[str]:
    """The names of the terms that a cached teacher cannot serve."""
    return [term.name for term in terms if term.name not in CACHED]


def _term(words: list[str]) -> Term:
    name, *options = words or [""]
    known = ("weight", *lookup.lookup(OPTIONS, name, "teacher.loss"))
    said = {}
    for word in options:
        option, _, value = word.partition("=")
        if option not in known:
            near = lookup.nearest(option, known) or "."
            raise ValueError(
                f"teacher.loss {name} has no use for {option!r}; it takes {', '.join(known)}{near}"
            )
        if option in said:
            raise ValueError(f"teacher.loss {name} says {option} twice; say it once.")
        said[option] = _value(name, option, value)
    return Term(name, **said)


def _value(name: str, option: str, text: str):
    try:
        if option == "weight":
            first, _, last = text.partition(":")
            return float(first), float(last or first)
        return {"temperature": float, "beta": float, "heads": int}.get(option, str)(text)
    except ValueError:
        kinds = {"weight": "a number, or two as 1:0.5", "heads": "a whole number"}
        kind = kinds.get(option, "a number")
        raise ValueError(
            f"teacher.loss {name} {option}={text!r} is not {kind}; write one."
        ) from None
