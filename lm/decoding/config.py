"""DecodingConfig: the section decoding of a config, and its short form for flags."""

from __future__ import annotations

import dataclasses

from lm import lookup

LENGTH_PENALTIES = {  # (length in tokens, length_penalty) -> divisor of a sum of log-probabilities
    "google": lambda length, penalty: ((5 + length) / 6) ** penalty,  # Wu et al. 2016, T5
    "power": lambda length, penalty: length**penalty,  # transformers
}

COMMON = ("repetition_penalty", "min_length", "max_length")
BEAM = ("num_beams", "length_penalty", "length_penalty_kind", "early_stopping")
METHODS = {  # a method, and the options that it uses
    "greedy": COMMON,
    "beam": (*BEAM, "num_return_sequences", *COMMON),
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

    Raises ValueError for an option that the method does not use, and for a value out of bounds.
    """

    method: str = "greedy"  # or "beam" (beam search), "sample" (random sampling)
    num_beams: int = 4
    length_penalty: float = 0.6  # exponent; 0 favours short answers
    length_penalty_kind: str = "google"  # of LENGTH_PENALTIES
    # True: end a row as soon as num_beams hypotheses have ended. False: as soon as, moreover, no
    # open hypothesis would score higher than the worst of them if it ended now.
    early_stopping: bool = False
    temperature: float = 1.0
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    num_return_sequences: int = 1
    repetition_penalty: float = 1.0  # 1: none
    min_length: int = 0  # in tokens, with eos
    max_length: int = 0  # in tokens, with eos; 0: the length of the targets

    def __post_init__(self):
        lookup.lookup(METHODS, self.method, "decoding")
        kind = self.length_penalty_kind
        lookup.lookup(LENGTH_PENALTIES, kind, "decoding length_penalty_kind")
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"decoding {name}={value} is out of bounds; use {low} to {high}.")
        for name in self._changed_options():
            _check_option(self.method, name)
        if self.method == "beam" and self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"decoding num_return_sequences={self.num_return_sequences} is more than "
                f"num_beams={self.num_beams}; use at most that."
            )
        self.max_tokens(self.min_length)

    def max_tokens(self, length: int) -> int:
        """Return the most tokens of an answer, with eos: max_length, or `length` if that is 0.

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
        options = (f"{name}={getattr(self, name)}" for name in self._changed_options())
        return " ".join([self.method, *options])

    def _changed_options(self) -> list[str]:
        fields = dataclasses.fields(self)[1:]
        return [field.name for field in fields if getattr(self, field.name) != field.default]


def parse(text: str) -> DecodingConfig:
    """Parse the short form: a method, then options, as "beam num_beams=4 length_penalty=0.6".

    Raises ValueError for an option that is unknown, unused by the method or repeated, and for a
    value that is not a number or out of bounds.
    """
    method, *words = text.split() or [""]
    lookup.lookup(METHODS, method, "decoding")
    values = {}
    for word in words:
        name, _, value = word.partition("=")
        _check_option(method, name)
        if name in values:
            raise ValueError(f"decoding {text!r} has {name} twice; give it once.")
        kind = type(getattr(DecodingConfig, name))
        if kind is bool:
            booleans = {"True": True, "False": False, "true": True, "false": False}
            values[name] = lookup.lookup(booleans, value, f"decoding {name}")
            continue
        try:
            values[name] = kind(value)
        except ValueError:
            noun = {int: "a whole number", float: "a number"}[kind]
            raise ValueError(f"decoding {name}={value!r} is not {noun}; write one.") from None
    return DecodingConfig(method, **values)


def _check_option(method: str, name: str) -> None:
    options = METHODS[method]
    if name not in options:
        hint = lookup.nearest(name, options) or "."
        raise ValueError(
            f"decoding {method} does not use {name!r}; its options are {', '.join(options)}{hint}"
        )
