"""What a student learns from, in words: the terms of its loss."""

from __future__ import annotations

import dataclasses

from lm import choose

NAMES = {
    "labels": "the cross-entropy of the targets",
    "forward_kl": "KL(teacher || student)",
}


@dataclasses.dataclass(frozen=True)
class Term:
    """One term of the loss. weight: at the first and at the last update, linear in between."""

    name: str
    weight: tuple[float, float] = (1.0, 1.0)
    temperature: float = 1.0

    def weight_at(self, progress):
        """The weight once a share of the updates is taken; None: all of them."""
        first, last = self.weight
        return last if progress is None or first == last else first + (last - first) * progress


def parse(text: str) -> tuple[Term, ...]:
    """The terms of a line such as "labels weight=0.2, forward_kl weight=0.8 temperature=2".

    Raises ValueError for what it does not know.
    """
    terms = []
    for part in text.split(","):
        name, *words = part.split()
        choose.choose(NAMES, name, "teacher.loss")
        given = dict(word.split("=") for word in words)
        first, _, last = given.get("weight", "1").partition(":")
        weight = (float(first), float(last or first))
        terms.append(Term(name, weight, float(given.get("temperature", 1))))
    return tuple(terms)
