"""Where the hidden tokens stand: (config, tokens, rng, vocabulary) -> bool[L], all of them pure."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lm.objectives import example_lengths


class Vocabulary(NamedTuple):
    """The ids that objectives write and ask about.

    sentinels: int32[..], the id of sentinel k at k. eos: an id. words: int32[..], the ids that a
    random token is drawn from. ends: bool[size], whether an id ends a sentence.
    """

    sentinels: np.ndarray
    eos: int
    words: np.ndarray
    ends: np.ndarray


def random_tokens_mask(config, tokens, rng, vocabulary) -> np.ndarray:
    """A fixed number of tokens, every subset equally likely."""
    raw = len(tokens)
    noise = example_lengths.num_noise_tokens(config, raw)
    hidden = np.zeros(raw, bool)
    hidden[rng.random(raw).argpartition(noise - 1)[:noise]] = True
    return hidden


def random_spans_mask(config, tokens, rng, vocabulary) -> np.ndarray:
    """T5's own spans: the first token is never hidden, the last one always.

    Every mask with T5's numbers of hidden tokens and spans that begins shown and ends hidden is
    equally likely.
    Source: random_spans_noise_mask in t5/data/preprocessors.py.
    """
    raw = len(tokens)
    noise, spans = (
        example_lengths.num_noise_tokens(config, raw),
        example_lengths.num_noise_spans(config, raw),
    )
    before = random_segment_ends(rng, raw - noise, spans)  # shown tokens before each span
    sizes = random_segment_ends(rng, noise, spans)
    sizes[1:] -= sizes[:-1]
    hidden = np.zeros(raw, bool)
    hidden[before.repeat(sizes) + np.arange(noise)] = True
    return hidden


def random_segment_ends(rng, total: int, parts: int) -> np.ndarray:
    """Where the parts of `total` end, one or more in each, every way equally likely: int[parts]."""
    keys = rng.random(total)
    keys[0] = 1.0  # above all others: no part ends before the first token
    ends = keys.argpartition(parts - 1)[:parts]  # after the parts - 1 smallest keys, in any order
    ends[-1] = total
    ends.sort()
    return ends


def rotated_spans_mask(config, tokens, rng, vocabulary) -> np.ndarray:
    """T5's spans on a ring, turned to any place: every position is hidden equally often.

    A span that then reaches over the end of the text goes on at its start: two spans, and the
    example takes one sentinel more in both halves.
    """
    hidden = random_spans_mask(config, tokens, rng, vocabulary)
    turn = int(rng.random() * len(tokens))
    return np.concatenate((hidden[turn:], hidden[:turn]))


def single_span_mask(config, tokens, rng, vocabulary) -> np.ndarray:
    """A single span, every place of it equally likely."""
    raw = len(tokens)
    noise = example_lengths.num_noise_tokens(config, raw)
    start = rng.integers(raw - noise + 1)
    hidden = np.zeros(raw, bool)
    hidden[start : start + noise] = True
    return hidden


def random_suffix_mask(config, tokens, rng, vocabulary) -> np.ndarray:
    """What follows a cut; every cut with a token on both sides is equally likely.

    Source: random_prefix_noise_mask in t5/data/preprocessors.py.
    """
    return np.arange(len(tokens)) >= rng.integers(1, len(tokens))


def suffix_mask(config, tokens, rng, vocabulary) -> np.ndarray:
    """The last tokens, as many as noise_density says."""
    raw = len(tokens)
    return np.arange(raw) >= raw - example_lengths.num_noise_tokens(config, raw)


def full_mask(config, tokens, rng, vocabulary) -> np.ndarray:
    """The whole text."""
    return np.ones(len(tokens), bool)


# Sentences. ----------------------------------------------------------------------------------


def sentence_ends(tokens: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Whether a token is the last of a sentence: it ends one, and the next does not as well."""
    ends = vocabulary.ends[tokens]
    ends[:-1] &= ~ends[1:]
    return ends


def shared_token_counts(tokens: np.ndarray, sentences: np.ndarray) -> np.ndarray:
    """How many tokens each sentence shares with all the others, counted with repetition.

    sentences: int[L], the number of each token's sentence. Returns int[sentences].
    Two over the length of the text times this is ROUGE-1 F of a sentence against the rest.
    """
    _, words = np.unique(tokens, return_inverse=True)
    size = words.max() + 1
    pairs, counts = np.unique(sentences * size + words, return_counts=True)
    elsewhere = np.bincount(words)[pairs % size] - counts
    return np.bincount(pairs // size, np.minimum(counts, elsewhere)).astype(np.int64)


def random_order(tokens, sentences, rng) -> np.ndarray:
    """Every order of the sentences equally likely."""
    return rng.permutation(sentences[-1] + 1)


def lead_order(tokens, sentences, rng) -> np.ndarray:
    """The sentences as they stand."""
    return np.arange(sentences[-1] + 1)


def principal_order(tokens, sentences, rng) -> np.ndarray:
    """The sentences that say most of what the others say first, each scored independently."""
    return np.argsort(-shared_token_counts(tokens, sentences), kind="stable")


def sentence_mask(order):
    """A placement: whole sentences, taken in `order` while they fit the share to hide.

    A sentence that does not fit what is left is passed over. Where none fits, the last tokens of
    the first one in order are hidden.
    """

    def place(config, tokens, rng, vocabulary) -> np.ndarray:
        ends = sentence_ends(tokens, vocabulary)
        sentences = np.cumsum(ends) - ends
        sizes = np.bincount(sentences)
        noise = room = example_lengths.num_noise_tokens(config, len(tokens))
        chosen, ordered = np.zeros(len(sizes), bool), order(tokens, sentences, rng)
        for sentence, size in zip(ordered.tolist(), sizes[ordered].tolist(), strict=True):
            if size <= room:
                chosen[sentence], room = True, room - size
        hidden = chosen[sentences]
        if room == noise:
            last = sizes[: ordered[0] + 1].sum()
            hidden[last - noise : last] = True
        return hidden

    return place
