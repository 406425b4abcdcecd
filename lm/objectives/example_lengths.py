"""How long the halves of an example are, from the length of its text alone."""

from __future__ import annotations

from typing import NamedTuple


class Lengths(NamedTuple):
    """The tokens of one example: raw, and the most in both halves, eos counted.

    sentinels: how many different ones it may need, modes of ul2 included.
    """

    raw: int
    inputs: int
    targets: int
    sentinels: int


def num_noise_tokens(config, raw: int) -> int:
    """Tokens to hide of `raw`, 2 or more: the rounded share, but one hidden and one shown."""
    return min(max(round(raw * config.noise_density), 1), raw - 1)


def num_noise_spans(config, raw: int) -> int:
    """Spans that T5 hides of `raw` tokens.

    Two spans need a shown token between them; T5 does not check this and would lose spans.
    """
    noise = num_noise_tokens(config, raw)
    return min(max(round(noise / config.mean_noise_span_length), 1), raw - noise)


def span_lengths(config, raw: int) -> Lengths:
    """Of span corruption: exact for t5; the most for uniform, which may cut one span in two."""
    noise, spans = num_noise_tokens(config, raw), num_noise_spans(config, raw)
    if config.placement == "uniform" and noise > spans:
        spans += 1
    return Lengths(raw, raw - noise + spans + 1, noise + spans + 1, spans)


def run_lengths(config, raw: int) -> Lengths:
    """Of tokens hidden one by one: the most, where no two hidden tokens touch."""
    noise = num_noise_tokens(config, raw)
    runs = min(noise, raw - noise + 1)
    return Lengths(raw, raw - noise + runs + 1, noise + runs + 1, runs)


def mask_lengths(config, raw: int) -> Lengths:
    """Of a mask token for each hidden token; exact."""
    asked = raw if config.target == "whole" else num_noise_tokens(config, raw)
    return Lengths(raw, raw + 1, asked + 1, 1)


def gap_lengths(config, raw: int) -> Lengths:
    """Of hidden sentences: the most, where each is a single token."""
    return Lengths(raw, raw + 1, num_noise_tokens(config, raw) + 1, 1)


def part_lengths(config, raw: int) -> Lengths:
    """Of tokens that are either shown or asked for, a fixed share; exact."""
    noise = num_noise_tokens(config, raw)
    return Lengths(raw, raw - noise + 1, noise + 1, 0)


def prefix_lengths(config, raw: int) -> Lengths:
    """Of a text cut in two: exact at the end; the most for a uniform cut."""
    return Lengths(raw, raw, raw, 0) if config.placement == "uniform" else part_lengths(config, raw)


def language_lengths(config, raw: int) -> Lengths:
    """Of eos alone, and the whole text; exact."""
    return Lengths(raw, 1, raw + 1, 0)


def order_lengths(config, raw: int) -> Lengths:
    """Of the text twice; exact."""
    return Lengths(raw, raw + 1, raw + 1, 0)
