"""DecodingConfig: the section decoding of a config, and its short form for flags."""

from __future__ import annotations

import dataclasses
import math

from lm import lookup

LENGTH_PENALTIES = {  # (length in tokens, length_penalty) -> divisor of a sum of log-probabilities
    "google": lambda length, penalty: ((5 + length) / 6) ** penalty,  # Wu et al. 2016, T5
    "power": lambda length, penalty: length**penalty,  # transformers
}

COMMON = ("repetition_penalty", "min_length", "max_length")
METHODS = {  # a method, and the options that it uses
    "greedy": COMMON,
    "beam": (
        *("num_beams", "length_penalty", "length_penalty_kind", "early_stopping"),
        *("num_return_sequences", *COMMON),
    ),
    "sample": ("temperature", "top_k", "top_p", "num_return_sequences", *COMMON),
}
BOUNDS = {
    "num_beams": (1, 1000),
    "length_penalty": (0.0, 10.0),
    "temperature": (0.001, 1000.0),
    "top_k": (0, 10**9),
    "top_p": (1e-6, 1.0),
    "num_return_sequences": (1, 1000),
    "repetition_penalty": (0.01, 100.0),
    "min_length": (0, 10**9),
    "max_length": (0, 10**9),
}


@dataclasses.dataclass(frozen=True)
class DecodingConfig:
    """How to decode; names are those of transformers' GenerationConfig.

    method: "greedy"; "beam", beam search; "sample", random sampling.
    length_penalty: exponent, 0 favours short answers; length_penalty_kind: see LENGTH_PENALTIES.
    early_stopping: end a row as soon as num_beams hypotheses have ended; if False, as soon as no
    open hypothesis would score higher than the worst of them if it ended now.
    temperature, top_k, top_p: see logits_processors; top_k=0 and top_p=1 keep all tokens.
    repetition_penalty: 1 for none. min_length, max_length: tokens with eos; max_length=0: the
    length of the targets.
    Raises ValueError for an unknown or unused option, and for a value out of bounds.
    """

    method: str = "greedy"
    num_beams: int = 4
    length_penalty: float = 0.6
    length_penalty_kind: str = "google"
    early_stopping: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    num_return_sequences: int = 1
    repetition_penalty: float = 1.0
    min_length: int = 0
    max_length: int = 0

    def __post_init__(self):
        options = lookup.lookup(METHODS, self.method, "decoding")
        kind = self.length_penalty_kind
        lookup.lookup(LENGTH_PENALTIES, kind, "decoding length_penalty_kind")
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                raise ValueError(f"decoding {name}={value} is out of bounds; use {low} to {high}.")
        for name in _changed_fields(self):
            _check_option(self.method, options, name)
        if self.method == "beam" and self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"decoding num_return_sequences={self.num_return_sequences} is more than "
                f"num_beams={self.num_beams}; use at most that."
            )
        self.max_tokens(self.min_length)

    def max_tokens(self, length: int) -> int:
        """Return the most tokens of an answer, eos included: max_length, or `length` if that is 0.

        Raises ValueError if min_length is more.
        """
        length = self.max_length or length
        if self.min_length > length:
            raise ValueError(
                f"decoding min_length={self.min_length} is more than the {length} tokens of an "
                f"answer; lower it, or raise max_length."
            )
        return length

    def __str__(self) -> str:
        options = (f"{name}={getattr(self, name)}" for name in _changed_fields(self))
        return " ".join([self.method, *options])


def parse(text: str) -> DecodingConfig:
    """Read the short form: a method, then options, as "beam num_beams=4 length_penalty=0.6".

    Raises ValueError for an option that is unknown, unused by the method or given twice, and for a
    value that is no number or out of bounds.
    """
    method, *words = text.split() or [""]
    options = lookup.lookup(METHODS, method, "decoding")
    kinds = {field.name: type(field.default) for field in dataclasses.fields(DecodingConfig)}
    values = {}
    for word in words:
        name, _, value = word.partition("=")
        _check_option(method, options, name)
        if name in values:
            raise ValueError(f"decoding {text!r} has {name} twice; give it once.")
        if kinds[name] is bool:
            booleans = {"True": True, "False": False, "true": True, "false": False}
            values[name] = lookup.lookup(booleans, value, f"decoding {name}")
            continue
        try:
            values[name] = kinds[name](value)
        except ValueError:
            kind = {int: "a whole number", float: "a number"}[kinds[name]]
            raise ValueError(f"decoding {name}={value!r} is not {kind}; write one.") from None
    return DecodingConfig(method, **values)


def _changed_fields(config: DecodingConfig) -> list[str]:
    fields = dataclasses.fields(config)[1:]
    return [field.name for field in fields if getattr(config, field.name) != field.default]


def _check_option(method: str, options: tuple[str, ...], name: str) -> None:
    if name not in options:
        hint = lookup.nearest(name, options) or "."
        raise ValueError(
            f"decoding {method} does not use {name!r}; its options are {', '.join(options)}{hint}"
        )
