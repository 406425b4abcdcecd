"""Noise masks: which tokens of a text an objective hides.

A mask function takes (config, tokens int[L], rng, vocabulary) and returns bool[L], True for noise.
The tables at the end map config.placement to mask functions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lm.objectives.example_lengths import num_noise_spans, num_noise_tokens


class Vocabulary(NamedTuple):
    """The ids that objectives use."""

    sentinels: np.ndarray  # int32 [num_sentinels], in the order of use
    eos: int
    words: np.ndarray  # int32 [..], from which random tokens are drawn
    ends: np.ndarray  # bool [vocabulary size], whether an id ends a sentence


def _random_tokens(config, tokens, rng, vocabulary):
    """A fixed number of tokens, every subset equally likely."""
    length = len(tokens)
    noise = num_noise_tokens(config, length)
    mask = np.zeros(length, bool)
    mask[rng.random(length).argpartition(noise - 1)[:noise]] = True
    return mask


def _t5_spans(config, tokens, rng, vocabulary):
    """T5's spans: the first token is never noise, the last always; all such masks equally likely.

    Source: random_spans_noise_mask in t5/data/preprocessors.py.
    """
    length = len(tokens)
    noise, spans = num_noise_tokens(config, length), num_noise_spans(config, length)
    num_visible_before = random_segment_ends(rng, length - noise, spans)  # each span
    sizes = random_segment_ends(rng, noise, spans)
    sizes[1:] -= sizes[:-1]
    mask = np.zeros(length, bool)
    mask[num_visible_before.repeat(sizes) + np.arange(noise)] = True
    return mask


def random_segment_ends(rng: np.random.Generator, total: int, count: int) -> np.ndarray:
    """Draw a division of `total` tokens into `count` nonempty segments; return their ends."""
    keys = rng.random(total)
    keys[0] = 1.0  # the maximum: no segment ends before the first token
    ends = keys.argpartition(count - 1)[:count]  # after the count - 1 smallest keys, in any order
    ends[-1] = total
    ends.sort()
    return ends


def _rotated_spans(config, tokens, rng, vocabulary):
    """T5's mask, rotated by a random shift: every position is noise equally often.

    A span that crosses the end of the text continues at its start, as a second span.
    """
    mask = _t5_spans(config, tokens, rng, vocabulary)
    shift = int(rng.random() * len(tokens))
    return np.concatenate((mask[shift:], mask[:shift]))


def _single_span(config, tokens, rng, vocabulary):
    """One span at a uniformly random position."""
    length = len(tokens)
    noise = num_noise_tokens(config, length)
    start = rng.integers(length - noise + 1)
    mask = np.zeros(length, bool)
    mask[start : start + noise] = True
    return mask


def _random_suffix(config, tokens, rng, vocabulary):
    """The suffix after a uniformly random cut with a token on both sides.

    Source: random_prefix_noise_mask in t5/data/preprocessors.py.
    """
    return np.arange(len(tokens)) >= rng.integers(1, len(tokens))


def _suffix(config, tokens, rng, vocabulary):
    """The last tokens, a share of noise_density."""
    length = len(tokens)
    return np.arange(length) >= length - num_noise_tokens(config, length)


def _all(config, tokens, rng, vocabulary):
    """The whole text."""
    return np.ones(len(tokens), bool)


def sentence_ends(tokens: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Mark the last token of each sentence: the last of several sentence ends in a row."""
    ends = vocabulary.ends[tokens]
    ends[:-1] &= ~ends[1:]
    return ends


def shared_token_counts(tokens: np.ndarray, sentences: np.ndarray) -> np.ndarray:
    """Count the tokens that each sentence shares with the others, with repetition: int [sentences].

    sentences: int [L], the sentence of each token. Counts times 2 / L are the ROUGE-1 F-measures of
    the sentences against the rest of the text.
    """
    _, ids = np.unique(tokens, return_inverse=True)
    size = ids.max() + 1
    pairs, counts = np.unique(sentences * size + ids, return_counts=True)
    elsewhere = np.bincount(ids)[pairs % size] - counts
    return np.bincount(pairs // size, np.minimum(counts, elsewhere)).astype(np.int64)


def _sentences(order):
    """Make the mask function of whole sentences, selected in `order` while they fit the density.

    A sentence that does not fit is skipped. If none fits, the last tokens of the first one in order
    are noise.
    """

    def mask_sentences(config, tokens, rng, vocabulary):
        ends = sentence_ends(tokens, vocabulary)
        sentences = np.cumsum(ends) - ends
        sizes = np.bincount(sentences)
        noise = remaining = num_noise_tokens(config, len(tokens))
        is_selected, ordered = np.zeros(len(sizes), bool), order(tokens, sentences, rng)
        for sentence, size in zip(ordered.tolist(), sizes[ordered].tolist(), strict=True):
            if size <= remaining:
                is_selected[sentence], remaining = True, remaining - size
        mask = is_selected[sentences]
        if remaining == noise:
            end = sizes[: ordered[0] + 1].sum()
            mask[end - noise : end] = True
        return mask

    return mask_sentences


ORDERS = {  # (tokens, sentences int [L], rng) -> the sentences in the order of selection
    "uniform": lambda tokens, sentences, rng: rng.permutation(sentences[-1] + 1),
    "lead": lambda tokens, sentences, rng: np.arange(sentences[-1] + 1),
    "principal": lambda tokens, sentences, rng: np.argsort(
        -shared_token_counts(tokens, sentences), kind="stable"
    ),
}
SPANS = {"uniform": _rotated_spans, "t5": _t5_spans}
SINGLE_SPAN = {"uniform": _single_span}
TOKENS = {"uniform": _random_tokens}
SUFFIX = {"uniform": _random_suffix, "end": _suffix}
ALL = {"uniform": _all}
SENTENCES = {placement: _sentences(order) for placement, order in ORDERS.items()}
