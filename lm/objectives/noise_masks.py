"""Noise masks: pure functions (config, tokens, rng, vocabulary) -> bool[L], true for noise."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lm.objectives import example_lengths


class Vocabulary(NamedTuple):
    """The ids that objectives use.

    sentinels: int32[..], the id of sentinel k at k. eos: an id. words: int32[..], the ids that
    random tokens are sampled from. ends: bool[size], whether an id ends a sentence.
    """

    sentinels: np.ndarray
    eos: int
    words: np.ndarray
    ends: np.ndarray


def random_tokens_mask(config, tokens, rng, vocabulary) -> np.ndarray:
    """A fixed number of tokens, every subset equally likely."""
    length = len(tokens)
    noise = example_lengths.num_noise_tokens(config, length)
    hidden = np.zeros(length, bool)
    hidden[rng.random(length).argpartition(noise - 1)[:noise]] = True
    return hidden


def random_spans_mask(config, tokens, rng, vocabulary) -> np.ndarray:
    """T5's noise mask: the first token is never noise, the last one always.

    Every mask with T5's numbers of noise tokens and spans that starts with a visible token and ends
    with noise is equally likely.
    Source: random_spans_noise_mask in t5/data/preprocessors.py.
    """
    length = len(tokens)
    noise, spans = (
        example_lengths.num_noise_tokens(config, length),
        example_lengths.num_noise_spans(config, length),
    )
    before = random_segment_ends(rng, length - noise, spans)  # shown tokens before each span
    sizes = random_segment_ends(rng, noise, spans)
    sizes[1:] -= sizes[:-1]
    hidden = np.zeros(length, bool)
    hidden[before.repeat(sizes) + np.arange(noise)] = True
    return hidden


def random_segment_ends(rng, total: int, parts: int) -> np.ndarray:
    """The ends of a random segmentation of `total` into nonempty parts, uniformly: int[parts]."""
    keys = rng.random(total)
    keys[0] = 1.0  # the maximum: no part ends before the first token
    ends = keys.argpartition(parts - 1)[:parts]  # after the parts - 1 smallest keys, in any order
    ends[-1] = total
    ends.sort()
    return ends


def rotated_spans_mask(config, tokens, rng, vocabulary) -> np.ndarray:
    """T5's mask, rotated by a random shift: every position is noise equally often.

    A span that crosses the end of the text continues at its start as a second span, which takes one
    more sentinel in inputs and targets.
    """
    hidden = random_spans_mask(config, tokens, rng, vocabulary)
    shift = int(rng.random() * len(tokens))
    return np.concatenate((hidden[shift:], hidden[:shift]))


def single_span_mask(config, tokens, rng, vocabulary) -> np.ndarray:
    """A single span at a uniformly random position."""
    length = len(tokens)
    noise = example_lengths.num_noise_tokens(config, length)
    start = rng.integers(length - noise + 1)
    hidden = np.zeros(length, bool)
    hidden[start : start + noise] = True
    return hidden


def random_suffix_mask(config, tokens, rng, vocabulary) -> np.ndarray:
    """The suffix after a uniformly random cut with a token on both sides.

    Source: random_prefix_noise_mask in t5/data/preprocessors.py.
    """
    return np.arange(len(tokens)) >= rng.integers(1, len(tokens))


def suffix_mask(config, tokens, rng, vocabulary) -> np.ndarray:
    """The last tokens: the share noise_density."""
    length = len(tokens)
    return np.arange(length) >= length - example_lengths.num_noise_tokens(config, length)


def full_mask(config, tokens, rng, vocabulary) -> np.ndarray:
    """The whole text."""
    return np.ones(len(tokens), bool)


# Sentences. ----------------------------------------------------------------------------------


def sentence_ends(tokens: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Whether a token is the last of a sentence: it ends one and the next does not."""
    ends = vocabulary.ends[tokens]
    ends[:-1] &= ~ends[1:]
    return ends


def shared_token_counts(tokens: np.ndarray, sentences: np.ndarray) -> np.ndarray:
    """The number of tokens that each sentence shares with the others, with repetition.

    sentences: int[L], the number of each token's sentence. Returns int[sentences].
    Times 2 / L this is the ROUGE-1 F-measure of a sentence against the rest.
    """
    _, ids = np.unique(tokens, return_inverse=True)
    size = ids.max() + 1
    pairs, counts = np.unique(sentences * size + ids, return_counts=True)
    elsewhere = np.bincount(ids)[pairs % size] - counts
    return np.bincount(pairs // size, np.minimum(counts, elsewhere)).astype(np.int64)


def random_order(tokens, sentences, rng) -> np.ndarray:
    """A uniformly random order of the sentences."""
    return rng.permutation(sentences[-1] + 1)


def lead_order(tokens, sentences, rng) -> np.ndarray:
    """The order of the text."""
    return np.arange(sentences[-1] + 1)


def principal_order(tokens, sentences, rng) -> np.ndarray:
    """By descending overlap with the other sentences, each scored independently."""
    return np.argsort(-shared_token_counts(tokens, sentences), kind="stable")


def sentence_mask(order):
    """A noise mask of whole sentences, selected in `order` while they fit the noise density.

    A sentence that does not fit is skipped. If none fits, the last tokens of the first one in order
    are noise.
    """

    def mask_function(config, tokens, rng, vocabulary) -> np.ndarray:
        ends = sentence_ends(tokens, vocabulary)
        sentences = np.cumsum(ends) - ends
        sizes = np.bincount(sentences)
        noise = remaining = example_lengths.num_noise_tokens(config, len(tokens))
        chosen, ordered = np.zeros(len(sizes), bool), order(tokens, sentences, rng)
        for sentence, size in zip(ordered.tolist(), sizes[ordered].tolist(), strict=True):
            if size <= remaining:
                chosen[sentence], remaining = True, remaining - size
        hidden = chosen[sentences]
        if remaining == noise:
            last = sizes[: ordered[0] + 1].sum()
            hidden[last - noise : last] = True
        return hidden

    return mask_function
