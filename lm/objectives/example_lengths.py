"""The lengths of inputs and targets of each objective, from the length of the text."""

from __future__ import annotations

from typing import NamedTuple


class Lengths(NamedTuple):
    """The tokens of an example: raw text; at most so many inputs and targets, eos included.

    sentinels: the number of distinct ones it may need, modes of ul2 included.
    """

    raw: int
    inputs: int
    targets: int
    sentinels: int


def num_noise_tokens(config, raw: int) -> int:
    """The noise tokens of `raw` >= 2: the rounded share, at least one, leaving at least one."""
    return min(max(round(raw * config.noise_density), 1), raw - 1)


def num_noise_spans(config, raw: int) -> int:
    """The noise spans of `raw` tokens.

    Two spans need a visible token between them; T5 does not check this and would lose spans.
    """
    noise = num_noise_tokens(config, raw)
    return min(max(round(noise / config.mean_noise_span_length), 1), raw - noise)


def span_lengths(config, raw: int) -> Lengths:
    """Span corruption: exact for t5; an upper bound for uniform, which may split one span."""
    noise, spans = num_noise_tokens(config, raw), num_noise_spans(config, raw)
    if config.placement == "uniform" and noise > spans:
        spans += 1
    return Lengths(raw, raw - noise + spans + 1, noise + spans + 1, spans)


def run_lengths(config, raw: int) -> Lengths:
    """Independent noise tokens: an upper bound, reached when no two are adjacent."""
    noise = num_noise_tokens(config, raw)
    runs = min(noise, raw - noise + 1)
    return Lengths(raw, raw - noise + runs + 1, noise + runs + 1, runs)


def mask_lengths(config, raw: int) -> Lengths:
    """A mask token for each noise token; exact."""
    asked = raw if config.target == "whole" else num_noise_tokens(config, raw)
    return Lengths(raw, raw + 1, asked + 1, 1)


def gap_lengths(config, raw: int) -> Lengths:
    """Noise sentences: an upper bound, reached when each is a single token."""
    return Lengths(raw, raw + 1, num_noise_tokens(config, raw) + 1, 1)


def part_lengths(config, raw: int) -> Lengths:
    """Tokens divided between inputs and targets at a fixed share; exact."""
    noise = num_noise_tokens(config, raw)
    return Lengths(raw, raw - noise + 1, noise + 1, 0)


def prefix_lengths(config, raw: int) -> Lengths:
    """A prefix and a suffix: exact for end; an upper bound for a uniform cut."""
    return Lengths(raw, raw, raw, 0) if config.placement == "uniform" else part_lengths(config, raw)


def language_lengths(config, raw: int) -> Lengths:
    """eos alone as inputs, the whole text as targets; exact."""
    return Lengths(raw, 1, raw + 1, 0)


def order_lengths(config, raw: int) -> Lengths:
    """The text as inputs and as targets; exact."""
    return Lengths(raw, raw + 1, raw + 1, 0)
