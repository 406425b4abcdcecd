"""The config and the table of objectives; lengths, noise_mask, corrupt and restore."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lm import lookup
from lm.objectives import corruption, example_lengths, noise_masks


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """The corruption of running text; keys as in configs/base.py, checked when built.

    noise_density: the share of noise tokens, in (0, 1). mean_noise_span_length: in tokens, 1 or
    more. placement, replacement, target: choices of the objective.
    Raises ValueError.
    """

    name: str = "span_corruption"
    noise_density: float = 0.15
    mean_noise_span_length: float = 3.0
    placement: str = "uniform"
    replacement: str = "mask"
    target: str = "hidden"

    def __post_init__(self):
        objective = lookup.lookup(OBJECTIVES, self.name, "objective.name")
        for field, choices in objective.words.items():
            what = f"with objective.name={self.name!r}, objective.{field}"
            lookup.lookup(choices, getattr(self, field), what)
        if not 0 < self.noise_density < 1:
            raise ValueError(
                f"objective.noise_density={self.noise_density} is not between 0 and 1, both "
                f"excluded; use 0.15, as T5 and BERT do."
            )
        if not 1 <= self.mean_noise_span_length < math.inf:
            raise ValueError(
                f"objective.mean_noise_span_length={self.mean_noise_span_length} is not a finite "
                f"number of at least 1 token; use 3.0, as T5 does."
            )


class Objective(NamedTuple):
    """An objective is its length arithmetic, what it hides, the corruption and its inverse."""

    lengths: Callable  # config, raw -> Lengths
    hide: Callable  # config, tokens, rng, vocabulary -> bool[L]
    corrupt: Callable  # config, tokens, rng, vocabulary -> inputs, targets; hides first
    fill: Callable  # config, inputs, targets, hidden, vocabulary -> tokens, all without eos
    words: dict  # the words it has for placement, replacement and target
    bound: str = "inputs"  # the half that input_length bounds


def _objective(lengths, placements, write, fill, bound="inputs", **words) -> Objective:
    def hide(config, tokens, rng, vocabulary):
        return placements[config.placement](config, tokens, rng, vocabulary)

    def corrupt(config, tokens, rng, vocabulary):
        return write(config, tokens, hide(config, tokens, rng, vocabulary), rng, vocabulary)

    return Objective(lengths, hide, corrupt, fill, _words(placements, **words), bound)


def _words(placements, replacements=("mask",), targets=("hidden",)) -> dict:
    kinds = dict(placement=placements, replacement=replacements, target=targets)
    return {field: dict.fromkeys(choices) for field, choices in kinds.items()}


# UL2: one of seven denoisers, equally often, with a token for the mode before the inputs. ------
# All take texts of one length, which the widest of them allows: rows of the others are padded.

MODES = {"NLU": -1, "S2S": -2, "NLG": -3}  # which sentinel, counted from the last
UL2 = (  # Tay et al. 2022, arXiv:2205.05131
    ("NLU", dict(noise_density=0.15, mean_noise_span_length=3.0)),
    ("NLU", dict(noise_density=0.15, mean_noise_span_length=8.0)),
    ("S2S", dict(noise_density=0.25, name="prefix_lm", placement="end")),
    ("NLG", dict(noise_density=0.5, mean_noise_span_length=3.0)),
    ("NLG", dict(noise_density=0.5, mean_noise_span_length=8.0)),
    ("NLG", dict(noise_density=0.15, mean_noise_span_length=64.0)),
    ("NLG", dict(noise_density=0.5, mean_noise_span_length=64.0)),
)


@functools.cache
def _denoisers(place: str) -> list[tuple[str, ObjectiveConfig]]:
    return [(mode, ObjectiveConfig(**dict(placement=place) | keys)) for mode, keys in UL2]


def _sample_denoiser(config, rng) -> tuple[str, ObjectiveConfig]:
    return _denoisers(config.placement)[rng.integers(len(UL2))]


def _ul2_lengths(config, raw):
    sizes = [
        OBJECTIVES[denoiser.name].lengths(denoiser, raw)
        for _, denoiser in _denoisers(config.placement)
    ]
    _, inputs, targets, sentinels = np.max(sizes, axis=0).tolist()
    return example_lengths.Lengths(raw, inputs + 1, targets, sentinels + len(MODES))


def _ul2_hide(config, tokens, rng, vocabulary):
    _, denoiser = _sample_denoiser(config, rng)
    return OBJECTIVES[denoiser.name].hide(denoiser, tokens, rng, vocabulary)


def _ul2_corrupt(config, tokens, rng, vocabulary):
    mode, denoiser = _sample_denoiser(config, rng)
    of_spans = vocabulary._replace(sentinels=vocabulary.sentinels[: -len(MODES)])
    inputs, targets = OBJECTIVES[denoiser.name].corrupt(denoiser, tokens, rng, of_spans)
    before = np.int32(vocabulary.sentinels[MODES[mode]])
    return np.concatenate(([before], inputs), dtype=np.int32), targets


def _ul2_fill(config, inputs, targets, hidden, vocabulary):
    names = {int(vocabulary.sentinels[place]): mode for mode, place in MODES.items()}
    input_mode = names.get(int(inputs[0])) if len(inputs) else None
    if input_mode is None:
        raise ValueError("the inputs of objective.name='ul2' begin with no mode token.")
    denoiser = next(
        denoiser for mode, denoiser in _denoisers(config.placement) if mode == input_mode
    )
    return OBJECTIVES[denoiser.name].fill(denoiser, inputs[1:], targets, hidden, vocabulary)


# The table. ----------------------------------------------------------------------------------

SPANS = {"uniform": noise_masks.rotated_spans_mask, "t5": noise_masks.random_spans_mask}
TOKENS = {"uniform": noise_masks.random_tokens_mask}
ALL = {"uniform": noise_masks.full_mask}
CUTS = {"uniform": noise_masks.random_suffix_mask, "end": noise_masks.suffix_mask}
SENTENCES = {
    "uniform": noise_masks.sentence_mask(noise_masks.random_order),
    "lead": noise_masks.sentence_mask(noise_masks.lead_order),
    "principal": noise_masks.sentence_mask(noise_masks.principal_order),
}

OBJECTIVES = {
    "span_corruption": _objective(
        example_lengths.span_lengths, SPANS, corruption.write_runs, corruption.fill_runs
    ),
    "iid_replace": _objective(
        example_lengths.run_lengths, TOKENS, corruption.write_runs, corruption.fill_runs
    ),
    "token_masking": _objective(
        example_lengths.mask_lengths,
        TOKENS,
        corruption.write_masks,
        corruption.fill_masks,
        replacements=corruption.REPLACEMENTS,
        targets=("hidden", "whole"),
    ),
    "mass": _objective(  # Song et al. 2019, arXiv:1905.02450
        example_lengths.mask_lengths,
        {"uniform": noise_masks.single_span_mask},
        corruption.write_masks,
        corruption.fill_masks,
    ),
    "drop": _objective(
        example_lengths.part_lengths, TOKENS, corruption.write_parts, corruption.fill_dropped
    ),
    "gap_sentences": _objective(  # Zhang et al. 2020, arXiv:1912.08777
        example_lengths.gap_lengths, SENTENCES, corruption.write_gaps, corruption.fill_gaps
    ),
    "prefix_lm": _objective(
        example_lengths.prefix_lengths, CUTS, corruption.write_parts, corruption.fill_suffix
    ),
    "language_model": _objective(
        example_lengths.language_lengths,
        ALL,
        corruption.write_parts,
        corruption.fill_suffix,
        bound="targets",  # the inputs are eos alone
    ),
    "deshuffling": _objective(
        example_lengths.order_lengths, ALL, corruption.write_shuffled, corruption.fill_whole
    ),
    "ul2": Objective(_ul2_lengths, _ul2_hide, _ul2_corrupt, _ul2_fill, _words(SPANS)),
}


# Functions. ----------------------------------------------------------------------------------


@functools.cache
def lengths(config: ObjectiveConfig, input_length: int) -> example_lengths.Lengths:
    """The longest text whose corrupted inputs, eos included, take at most `input_length` tokens.

    Of language_model, whose inputs are eos alone: the longest whose targets do. T5 searches up from
    input_length - 1, and the inputs never shrink as the text grows, so that its answer is the
    greatest. At density 0.5, T5 then takes one token off where that makes the targets as long as
    the inputs; this does not.
    Raises ValueError if input_length cannot hold a text of 2 tokens.
    Source: random_spans_helper in t5/data/preprocessors.py.
    """
    objective = OBJECTIVES[config.name]

    def size(raw: int) -> int:
        return getattr(objective.lengths(config, raw), objective.bound)

    if input_length < size(2):
        raise ValueError(
            f"input_length={input_length} cannot hold what objective.name={config.name!r} makes of "
            f"2 tokens; use {size(2)} or more."
        )
    fitting = range(2, 1 << 31)
    return objective.lengths(
        config, fitting[bisect.bisect_right(fitting, input_length, key=size) - 1]
    )


# The keys that decide, beside the length, how many sentinels an example needs; others have none.
DECIDING = {
    "span_corruption": ("noise_density", "mean_noise_span_length"),
    "iid_replace": ("noise_density",),
}


def check_sentinels(config: ObjectiveConfig, input_length: int, num_sentinels: int) -> None:
    """Refuse a config whose examples may need more sentinels than the tokenizer has.

    T5 and its descendants then write ids of ordinary pieces without a word.
    Raises ValueError.
    """
    needed = lengths(config, input_length).sentinels
    if needed > num_sentinels:
        keys = DECIDING.get(config.name, ())
        settings = "".join(f", objective.{key}={getattr(config, key)}" for key in keys)
        cure = " or lengthen mean_noise_span_length" if "mean_noise_span_length" in keys else ""
        raise ValueError(
            f"input_length={input_length} with objective.name={config.name!r}{settings} needs "
            f"{needed} sentinels, but the tokenizer has num_sentinels={num_sentinels}; train it "
            f"with {needed} or more, shorten input_length{cure}."
        )


def _text(tokens) -> np.ndarray:
    if len(tokens) < 2:
        raise ValueError(
            f"a text of {len(tokens)} tokens has nothing to hide and still show; drop texts of "
            f"fewer than 2 tokens."
        )
    return np.asarray(tokens)


def noise_mask(
    config: ObjectiveConfig,
    tokens: np.ndarray,
    rng: np.random.Generator,
    vocabulary: noise_masks.Vocabulary,
) -> np.ndarray:
    """The noise mask that `corrupt` uses with a generator in the same state: bool[L]."""
    return OBJECTIVES[config.name].hide(config, _text(tokens), rng, vocabulary)


def corrupt(
    config: ObjectiveConfig,
    tokens: np.ndarray,
    rng: np.random.Generator,
    vocabulary: noise_masks.Vocabulary,
) -> tuple[np.ndarray, np.ndarray]:
    """Hide part of `tokens`: the (inputs, targets) of one example.

    tokens: int[L], L of 2 or more, without eos.
    Returns int32 arrays that end with eos, no longer than `lengths` says of L.
    Raises ValueError if L < 2, or if it needs more sentinels than there are.
    """
    return OBJECTIVES[config.name].corrupt(config, _text(tokens), rng, vocabulary)


def restore(
    config: ObjectiveConfig,
    inputs: np.ndarray,
    targets: np.ndarray,
    vocabulary: noise_masks.Vocabulary,
    hidden: np.ndarray | None = None,
) -> np.ndarray:
    """Fill the blanks: the inverse of `corrupt`, int[...] and int[...] -> int32[L] without eos.

    Both arrays are read up to their first eos. The targets may be a model's: a blank that they do
    not answer stays, as its sentinel, and an answer without a blank is left out.
    hidden: bool[L] of `hide`, for what does not write down which tokens it hid: drop, and token
    masking of hidden targets with replacements that show tokens.
    Raises ValueError where that is missing.
    """

    def before_eos(ids):
        ids = np.asarray(ids, np.int32)
        ended = np.flatnonzero(ids == vocabulary.eos)
        return ids[: ended[0]] if len(ended) else ids

    fill = OBJECTIVES[config.name].fill
    return fill(config, before_eos(inputs), before_eos(targets), hidden, vocabulary)
