"""The lengths of an example's inputs and targets, from the length of its text.

A length function takes (config, raw) and returns Lengths. A length is exact unless stated
otherwise; an upper bound is reached by some texts and masks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lm.objectives.table import ObjectiveConfig


class Lengths(NamedTuple):
    """Lengths in tokens: of the text without eos, of inputs and targets at most, with eos."""

    raw: int
    inputs: int
    targets: int
    sentinels: int  # the most distinct sentinels of an example, modes of ul2 included


def num_noise_tokens(config: ObjectiveConfig, raw: int) -> int:
    """Return the noise tokens of `raw` >= 2: at least one is noise and at least one is not."""
    return min(max(round(raw * config.noise_density), 1), raw - 1)


def num_noise_spans(config: ObjectiveConfig, raw: int) -> int:
    """Return the noise spans of `raw` tokens.

    Two spans need a visible token between them; T5 does not check this and would lose spans.
    """
    noise = num_noise_tokens(config, raw)
    return min(max(round(noise / config.mean_noise_span_length), 1), raw - noise)


def span_lengths(config: ObjectiveConfig, raw: int) -> Lengths:
    """A sentinel for each span. Placement "uniform": a bound, since it may split one span."""
    noise, spans = num_noise_tokens(config, raw), num_noise_spans(config, raw)
    if config.placement == "uniform" and noise > spans:
        spans += 1
    return Lengths(raw, raw - noise + spans + 1, noise + spans + 1, spans)


def iid_lengths(config: ObjectiveConfig, raw: int) -> Lengths:
    """A sentinel for each span of independent noise tokens: a bound, if no two are adjacent."""
    noise = num_noise_tokens(config, raw)
    spans = min(noise, raw - noise + 1)
    return Lengths(raw, raw - noise + spans + 1, noise + spans + 1, spans)


def mask_lengths(config: ObjectiveConfig, raw: int) -> Lengths:
    """A mask token for each noise token; a bound for sentences, which share one mask token."""
    targets = raw if config.target == "whole" else num_noise_tokens(config, raw)
    return Lengths(raw, raw + 1, targets + 1, 1)


def split_lengths(config: ObjectiveConfig, raw: int) -> Lengths:
    """Visible tokens as inputs, noise tokens as targets."""
    noise = num_noise_tokens(config, raw)
    return Lengths(raw, raw - noise + 1, noise + 1, 0)


def prefix_lengths(config: ObjectiveConfig, raw: int) -> Lengths:
    """A prefix as inputs, the rest as targets; a bound if the cut is random."""
    if config.placement == "uniform":
        return Lengths(raw, raw, raw, 0)
    return split_lengths(config, raw)
