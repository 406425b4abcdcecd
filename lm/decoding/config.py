"""How to decode, in words: one string, the same in a config and in a flag."""

from __future__ import annotations

import dataclasses
import math

from lm import lookup

PENALTIES = {  # length in tokens, alpha -> what a sum of log-probabilities is divided by
    "google": lambda length, alpha: ((5 + length) / 6) ** alpha,  # Wu et al. 2016, T5
    "power": lambda length, alpha: length**alpha,  # transformers' length_penalty
}
STOPS = {"bound": False, "full": True}  # does a row end as soon as `width` answers have ended?

ALWAYS = ("repetition", "min_length", "max_length")
METHODS = {  # a method, and the options that it has a use for
    "greedy": ALWAYS,
    "beam": ("width", "alpha", "penalty", "stop", "n_best", *ALWAYS),
    "sample": ("temperature", "top_k", "top_p", "n_best", *ALWAYS),
}
BOUNDS = {
    "width": (1, 1000),
    "alpha": (0.0, 10.0),
    "temperature": (0.001, 1000.0),
    "top_k": (0, 10**9),
    "top_p": (1e-6, 1.0),
    "n_best": (1, 1000),
    "repetition": (0.01, 100.0),
    "min_length": (0, 10**9),
    "max_length": (0, 10**9),
}


@dataclasses.dataclass(frozen=True)
class DecodingConfig:
    """How answers are found; checked when built, and `str` of it is what `parse` reads.

    method: "greedy", the likeliest token at each step; "beam", the likeliest answers met on the way
    of `width` beginnings; "sample", tokens drawn by chance.
    width, alpha, penalty: beams a row, and what length weighs: alpha 0 favours short answers; see
    PENALTIES. stop: "bound", when the likeliest open answer, ended now, would be no better than the
    worst of the `width` found (transformers' early_stopping=False); "full", as soon as so many are
    found. temperature, top_k, top_p: see filters; top_k=0 and top_p=1 leave all tokens.
    n_best: answers a row; of beams the best, of a sample so many draws.
    repetition: what a token said before is divided by, 1 for nothing; see filters.repeated.
    min_length: tokens before eos at least. max_length: with it at most; 0: as the caller says.
    """

    method: str = "greedy"
    width: int = 4
    alpha: float = 0.6
    penalty: str = "google"
    stop: str = "bound"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    n_best: int = 1
    repetition: float = 1.0
    min_length: int = 0
    max_length: int = 0

    def __post_init__(self):
        options = lookup.lookup(METHODS, self.method, "decoding")
        lookup.lookup(PENALTIES, self.penalty, "decoding penalty")
        lookup.lookup(STOPS, self.stop, "decoding stop")
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                raise ValueError(f"decoding {name}={value} is out of bounds; use {low} to {high}.")
        for name in _said(self):
            _check_option(self.method, options, name)
        if self.method == "beam" and self.n_best > self.width:
            raise ValueError(
                f"decoding n_best={self.n_best} is more than width={self.width}, the answers that "
                f"beams find; use at most that."
            )
        self.room(self.min_length)

    def room(self, length: int) -> int:
        """The most tokens of an answer, eos counted: max_length, or `length` where that is 0.

        Raises ValueError where min_length is more than that.
        """
        length = self.max_length or length
        if self.min_length > length:
            raise ValueError(
                f"decoding min_length={self.min_length} is more than the {length} tokens of an "
                f"answer; lower it, or raise max_length."
            )
        return length

    def __str__(self) -> str:
        return " ".join([self.method, *(f"{name}={getattr(self, name)}" for name in _said(self))])


def parse(text: str) -> DecodingConfig:
    """The Decoding that a string says: a method, then options, as "beam width=4 alpha=0.6".

    What is not said is as in Decoding. Raises ValueError for a word that is unknown or of no use
    to the method, an option said twice, and a value that is no number or out of bounds.
    """
    method, *words = text.split() or [""]
    known = lookup.lookup(METHODS, method, "decoding")
    kinds = {field.name: type(field.default) for field in dataclasses.fields(DecodingConfig)}
    options = {}
    for word in words:
        name, _, value = word.partition("=")
        _check_option(method, known, name)
        if name in options:
            raise ValueError(f"decoding {text!r} says {name} twice; say it once.")
        try:
            options[name] = kinds[name](value)
        except ValueError:
            kind = {int: "a whole number", float: "a number"}[kinds[name]]
            raise ValueError(f"decoding {name}={value!r} is not {kind}; write one.") from None
    return DecodingConfig(method, **options)


def _said(how: DecodingConfig) -> list[str]:
    fields = dataclasses.fields(how)[1:]
    return [field.name for field in fields if getattr(how, field.name) != field.default]


def _check_option(method: str, options: tuple[str, ...], name: str) -> None:
    if name not in options:
        near = lookup.nearest(name, options) or "."
        raise ValueError(
            f"decoding {method} has no use for {name!r}; it takes {', '.join(options)}{near}"
        )
