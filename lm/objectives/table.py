"""The config and the table of objectives; lengths, noise_mask, corrupt and uncorrupt."""

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
from lm.objectives.example_lengths import Lengths
from lm.objectives.noise_masks import Vocabulary


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """The section `objective` of a config: how running text is corrupted.

    Args:
      name: a key of OBJECTIVES.
      noise_density: the share of noise tokens, between 0 and 1, both excluded.
      mean_noise_span_length: in tokens, 1 or more.
      placement, replacement, target: choices of the objective, see Objective.choices.

    Raises ValueError for a value that the objective does not allow.
    """

    name: str = "span_corruption"
    noise_density: float = 0.15
    mean_noise_span_length: float = 3.0
    placement: str = "uniform"
    replacement: str = "mask"
    target: str = "hidden"

    def __post_init__(self):
        objective = lookup.lookup(OBJECTIVES, self.name, "objective.name")
        for field, choices in objective.choices.items():
            label = f"with objective.name={self.name!r}, objective.{field}"
            lookup.lookup(choices, getattr(self, field), label)
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
    """An objective: its length arithmetic, noise mask, corruption and the inverse of that."""

    lengths: Callable  # (config, raw) -> Lengths
    noise_mask: Callable  # (config, tokens, rng, vocabulary) -> bool[L]
    corrupt: (
        Callable  # (config, tokens, rng, vocabulary) -> inputs, targets; with noise_mask's mask
    )
    uncorrupt: Callable  # (config, inputs, targets, mask, vocabulary) -> tokens, all without eos
    choices: dict[str, dict]  # the values of placement, replacement and target, as keys
    bounded: str = "inputs"  # the field of Lengths that input_length bounds


def _objective(
    lengths, masks, functions, replacements=("mask",), targets=("hidden",), bounded="inputs"
) -> Objective:
    """Compose an objective of mask functions by placement and of a Corruption."""

    def noise_mask(config, tokens, rng, vocabulary):
        return masks[config.placement](config, tokens, rng, vocabulary)

    def corrupt(config, tokens, rng, vocabulary):
        mask = noise_mask(config, tokens, rng, vocabulary)
        return functions.corrupt(config, tokens, mask, rng, vocabulary)

    choices = dict(placement=masks, replacement=replacements, target=targets)
    choices = {field: dict.fromkeys(values) for field, values in choices.items()}
    return Objective(lengths, noise_mask, corrupt, functions.uncorrupt, choices, bounded)


# UL2 draws one of seven denoisers for each example and writes its mode's token before the inputs.
# All denoisers take texts of one length, the longest that fits the widest of them.

MODES = {"NLU": -1, "S2S": -2, "NLG": -3}  # index of the mode's token in vocabulary.sentinels
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
def _denoisers(placement):
    return [(mode, ObjectiveConfig(**dict(placement=placement) | keys)) for mode, keys in UL2]


def _sample_denoiser(config, rng):
    mode, denoiser = _denoisers(config.placement)[rng.integers(len(UL2))]
    return mode, denoiser, OBJECTIVES[denoiser.name]


def _ul2_lengths(config, raw):
    denoisers = [denoiser for _, denoiser in _denoisers(config.placement)]
    sizes = [OBJECTIVES[denoiser.name].lengths(denoiser, raw) for denoiser in denoisers]
    _, inputs, targets, sentinels = np.max(sizes, axis=0).tolist()
    return Lengths(raw, inputs + 1, targets, sentinels + len(MODES))


def _ul2_noise_mask(config, tokens, rng, vocabulary):
    _, denoiser, objective = _sample_denoiser(config, rng)
    return objective.noise_mask(denoiser, tokens, rng, vocabulary)


def _ul2_corrupt(config, tokens, rng, vocabulary):
    mode, denoiser, objective = _sample_denoiser(config, rng)
    span_vocabulary = vocabulary._replace(sentinels=vocabulary.sentinels[: -len(MODES)])
    inputs, targets = objective.corrupt(denoiser, tokens, rng, span_vocabulary)
    mode_token = np.int32(vocabulary.sentinels[MODES[mode]])
    return np.concatenate(([mode_token], inputs), dtype=np.int32), targets


def _ul2_uncorrupt(config, inputs, targets, mask, vocabulary):
    for mode, denoiser in _denoisers(config.placement):
        if len(inputs) and inputs[0] == vocabulary.sentinels[MODES[mode]]:
            objective = OBJECTIVES[denoiser.name]
            return objective.uncorrupt(denoiser, inputs[1:], targets, mask, vocabulary)
    raise ValueError("the inputs of objective.name='ul2' begin with no mode token.")


OBJECTIVES = {
    "span_corruption": _objective(
        example_lengths.span_lengths, noise_masks.SPANS, corruption.SPANS
    ),
    "iid_replace": _objective(example_lengths.iid_lengths, noise_masks.TOKENS, corruption.SPANS),
    "token_masking": _objective(
        example_lengths.mask_lengths,
        noise_masks.TOKENS,
        corruption.MASKS,
        replacements=corruption.REPLACEMENTS,
        targets=("hidden", "whole"),
    ),
    "mass": _objective(  # Song et al. 2019, arXiv:1905.02450
        example_lengths.mask_lengths, noise_masks.SINGLE_SPAN, corruption.MASKS
    ),
    "drop": _objective(example_lengths.split_lengths, noise_masks.TOKENS, corruption.DROP),
    "gap_sentences": _objective(  # Zhang et al. 2020, arXiv:1912.08777
        example_lengths.mask_lengths, noise_masks.SENTENCES, corruption.SENTENCES
    ),
    "prefix_lm": _objective(example_lengths.prefix_lengths, noise_masks.SUFFIX, corruption.SUFFIX),
    "language_model": _objective(
        lambda config, raw: Lengths(raw, 1, raw + 1, 0),  # the inputs are only eos
        noise_masks.ALL,
        corruption.SUFFIX,
        bounded="targets",
    ),
    "deshuffling": _objective(
        lambda config, raw: Lengths(raw, raw + 1, raw + 1, 0), noise_masks.ALL, corruption.ORDER
    ),
}
OBJECTIVES["ul2"] = Objective(
    *(_ul2_lengths, _ul2_noise_mask, _ul2_corrupt, _ul2_uncorrupt),
    choices=OBJECTIVES["span_corruption"].choices,
)


@functools.cache
def lengths(config: ObjectiveConfig, input_length: int) -> Lengths:
    """Return the lengths of the longest text whose inputs take at most `input_length` tokens.

    For language_model, whose inputs are only eos, `input_length` bounds the targets. At density
    0.5, T5 shortens the text by a token if inputs and targets are equally long; this does not.
    Raises ValueError if input_length is too short for a text of 2 tokens.
    Source: random_spans_helper in t5/data/preprocessors.py.
    """
    objective = OBJECTIVES[config.name]

    def size(raw: int) -> int:
        return getattr(objective.lengths(config, raw), objective.bounded)

    if input_length < size(2):
        raise ValueError(
            f"input_length={input_length} is too short for a text of 2 tokens with "
            f"objective.name={config.name!r}; use {size(2)} or more."
        )
    sizes = range(2, 1 << 31)  # inputs never shrink as the text grows
    raw = sizes[bisect.bisect_right(sizes, input_length, key=size) - 1]
    return objective.lengths(config, raw)


def check_sentinels(config: ObjectiveConfig, input_length: int, num_sentinels: int) -> None:
    """Raise ValueError if examples may need more sentinels than the tokenizer has."""
    required = lengths(config, input_length).sentinels
    if required > num_sentinels:
        fix = f"train it with {required} or more, or shorten input_length"
        if config.name in ("span_corruption", "iid_replace"):
            fix += f", or lower objective.noise_density={config.noise_density}"
        if config.name == "span_corruption":
            length = config.mean_noise_span_length
            fix += f", or raise objective.mean_noise_span_length={length}"
        raise ValueError(
            f"data.input_length={input_length} with objective.name={config.name!r} needs "
            f"{required} sentinels, but tokenizer.num_extra_ids={num_sentinels}; {fix}."
        )


def _as_text(tokens):
    if len(tokens) < 2:
        raise ValueError(
            f"a text of {len(tokens)} tokens is too short to hide a token and show another; drop "
            f"texts of fewer than 2 tokens."
        )
    return np.asarray(tokens)


def noise_mask(
    config: ObjectiveConfig, tokens: np.ndarray, rng: np.random.Generator, vocabulary: Vocabulary
) -> np.ndarray:
    """Return the mask that `corrupt` uses with a generator in the same state: bool[L]."""
    return OBJECTIVES[config.name].noise_mask(config, _as_text(tokens), rng, vocabulary)


def corrupt(
    config: ObjectiveConfig, tokens: np.ndarray, rng: np.random.Generator, vocabulary: Vocabulary
) -> tuple[np.ndarray, np.ndarray]:
    """Make an example of a text: (inputs, targets), int32, each with eos, within `lengths`.

    tokens: int[L], 2 or more, without eos.
    Raises ValueError for fewer than 2 tokens, and for more spans than sentinels.
    """
    return OBJECTIVES[config.name].corrupt(config, _as_text(tokens), rng, vocabulary)


def uncorrupt(
    config: ObjectiveConfig,
    inputs: np.ndarray,
    targets: np.ndarray,
    vocabulary: Vocabulary,
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """Invert `corrupt`: fill the blanks of the inputs from the targets; int32[L] without eos.

    Args:
      inputs, targets: read up to the first eos. Targets may be a model's: a blank without an answer
        stays as its sentinel, and an answer without a blank is ignored.
      mask: of `noise_mask`; required by objectives whose inputs do not show where tokens are
        hidden: drop, and token_masking of hidden targets with replacements other than mask.

    Raises ValueError if the mask is required but missing or of another length.
    """

    def before_eos(ids):
        ids = np.asarray(ids, np.int32)
        ends = np.flatnonzero(ids == vocabulary.eos)
        return ids[: ends[0]] if len(ends) else ids

    function = OBJECTIVES[config.name].uncorrupt
    return function(config, before_eos(inputs), before_eos(targets), mask, vocabulary)
