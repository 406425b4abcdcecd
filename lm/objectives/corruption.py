"""Corruptions: from a text and its noise mask to inputs and targets, and back.

A corrupt function takes (config, tokens int[L], mask bool[L], rng, vocabulary) and returns inputs
and targets, both int32 with eos. An uncorrupt function takes (config, inputs, targets, mask or
None, vocabulary), without eos, and returns int32 tokens; a model's targets may have missing, wrong
or superfluous tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lm.objectives import noise_masks

# Cumulative shares of noise tokens replaced by the mask token, and by a random token; the rest is
# unchanged. "bert" is Devlin et al. 2019, "mask_or_random" the BERT-style of T5.
REPLACEMENTS = {"mask": (1.0, 1.0), "mask_or_random": (0.9, 1.0), "bert": (0.8, 0.9)}


class Corruption(NamedTuple):
    """A corrupt function and its inverse."""

    corrupt: Callable
    uncorrupt: Callable


def _with_eos(ids, eos):
    row = np.empty(len(ids) + 1, np.int32)
    row[:-1], row[-1] = ids, eos
    return row


def _split_before_sentinels(ids, vocabulary):
    return np.split(ids, np.flatnonzero(np.isin(ids, vocabulary.sentinels)))


def _corrupt_spans(config, tokens, mask, rng, vocabulary):
    """Replace each span by its own sentinel; targets: each sentinel, then its span."""
    size = len(tokens) + 2  # a position before the text, and eos
    text = np.empty(size, np.int32)
    text[1:-1], text[-1] = tokens, vocabulary.eos
    in_targets = np.empty(size, bool)
    in_targets[0], in_targets[1:-1], in_targets[-1] = False, mask, True
    before_spans = (in_targets[1:-1] > in_targets[:-2]).nonzero()[0]
    if len(before_spans) > len(vocabulary.sentinels):
        raise ValueError(
            f"an example hides {len(before_spans)} spans, but there are "
            f"{len(vocabulary.sentinels)} sentinels; objectives.check_sentinels says how many a "
            f"config needs."
        )
    sentinels = vocabulary.sentinels[: len(before_spans)]
    in_inputs, first = ~in_targets, before_spans + 1
    in_inputs[0], in_inputs[-1], in_inputs[first] = False, True, True
    targets = text.copy()
    text[first], targets[before_spans] = sentinels, sentinels
    in_targets[before_spans] = True  # in the targets, the sentinel replaces a visible token
    return text[in_inputs], targets[in_targets]


def _uncorrupt_spans(config, inputs, targets, mask, vocabulary):
    """Replace each sentinel of the inputs by the tokens after it in the targets."""
    pieces = _split_before_sentinels(targets, vocabulary)[1:]
    answers = {int(piece[0]): piece[1:] for piece in pieces}
    head, *pieces = _split_before_sentinels(inputs, vocabulary)
    filled = [np.append(answers.get(int(piece[0]), piece[:1]), piece[1:]) for piece in pieces]
    return np.concatenate([head, *filled])


def _corrupt_masks(config, tokens, mask, rng, vocabulary):
    """Replace each noise token by the mask token, a random token or itself."""
    inputs = _with_eos(tokens, vocabulary.eos)
    if config.replacement == "mask":
        inputs[:-1][mask] = vocabulary.sentinels[0]
    else:
        masked_share, changed_share = REPLACEMENTS[config.replacement]
        positions = mask.nonzero()[0]
        draw = rng.random(len(positions))
        random = positions[draw < changed_share]
        inputs[random] = vocabulary.words[rng.integers(len(vocabulary.words), size=len(random))]
        inputs[positions[draw < masked_share]] = vocabulary.sentinels[0]
    targets = tokens if config.target == "whole" else tokens[mask]
    return inputs, _with_eos(targets, vocabulary.eos)


def _fill(tokens, mask, targets):
    """Write the targets to the noise positions, as many as there are of both."""
    positions = np.flatnonzero(mask)
    tokens[positions[: len(targets)]] = targets[: len(positions)]
    return tokens


def _uncorrupt_masks(config, inputs, targets, mask, vocabulary):
    """Replace each mask token, or each noise position, by the next target."""
    if config.target == "whole":
        return targets
    if config.replacement == "mask":
        mask = np.isin(inputs, vocabulary.sentinels)
    else:
        _check_mask(config, mask, len(inputs))
    return _fill(inputs.copy(), mask, targets)


def _check_mask(config, mask, num_inputs, visible_only=False):
    if mask is None:
        raise ValueError(
            f"objective.name={config.name!r} with objective.replacement={config.replacement!r} "
            f"does not store which tokens it hid; pass mask=objectives.noise_mask(..) of the same "
            f"text and seed to uncorrupt."
        )
    if num_inputs != (np.count_nonzero(~mask) if visible_only else len(mask)):
        raise ValueError(
            f"{num_inputs} input tokens do not fit a mask of {len(mask)} tokens, of which "
            f"{np.count_nonzero(mask)} are noise; pass the mask of the same text to uncorrupt."
        )


def _corrupt_split(config, tokens, mask, rng, vocabulary):
    """Inputs: the visible tokens; targets: the noise tokens."""
    return _with_eos(tokens[~mask], vocabulary.eos), _with_eos(tokens[mask], vocabulary.eos)


def _uncorrupt_dropped(config, inputs, targets, mask, vocabulary):
    """Insert the targets at the noise positions, the mask token if there are too few."""
    _check_mask(config, mask, len(inputs), visible_only=True)
    tokens = np.full(len(mask), vocabulary.sentinels[0], np.int32)
    tokens[~mask] = inputs
    return _fill(tokens, mask, targets)


def _corrupt_sentences(config, tokens, mask, rng, vocabulary):
    """Replace each noise sentence by the mask token; targets: the noise sentences, in order."""
    is_first = mask.copy()
    ends = noise_masks.sentence_ends(tokens, vocabulary)
    is_first[1:] &= ~mask[:-1] | ends[:-1]
    inputs = np.where(is_first, vocabulary.sentinels[0], tokens)[~mask | is_first]
    return _with_eos(inputs, vocabulary.eos), _with_eos(tokens[mask], vocabulary.eos)


def _uncorrupt_sentences(config, inputs, targets, mask, vocabulary):
    """Replace each mask token by the next sentence of the targets."""
    ends = np.flatnonzero(noise_masks.sentence_ends(targets, vocabulary)) + 1
    answers = [piece for piece in np.split(targets, ends) if len(piece)]
    head, *pieces = _split_before_sentinels(inputs, vocabulary)
    answers += [piece[:1] for piece in pieces[len(answers) :]]
    filled = [np.append(answer, piece[1:]) for answer, piece in zip(answers, pieces, strict=False)]
    return np.concatenate([head, *filled])


def _corrupt_order(config, tokens, mask, rng, vocabulary):
    """Inputs: the tokens in random order; targets: the text."""
    return _with_eos(rng.permutation(tokens), vocabulary.eos), _with_eos(tokens, vocabulary.eos)


SPANS = Corruption(_corrupt_spans, _uncorrupt_spans)
MASKS = Corruption(_corrupt_masks, _uncorrupt_masks)
SENTENCES = Corruption(_corrupt_sentences, _uncorrupt_sentences)
DROP = Corruption(_corrupt_split, _uncorrupt_dropped)
SUFFIX = Corruption(
    _corrupt_split, lambda config, inputs, targets, *_: np.concatenate([inputs, targets])
)
ORDER = Corruption(_corrupt_order, lambda config, inputs, targets, *_: targets)
