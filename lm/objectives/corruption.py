"""From a noise mask to inputs and targets, and the inverse of each corruption.

write_*: (config, tokens int[L], hidden bool[L], rng, vocabulary) -> inputs, targets, both int32
with eos. fill_*: (config, inputs, targets, hidden or None, vocabulary) -> int32[L], all without
eos; the targets may be a model's, with missing, wrong or superfluous tokens.
"""

from __future__ import annotations

import numpy as np

from lm.objectives import noise_masks

# Cumulative shares of noise tokens replaced by the mask token, and by a random token; the rest is
# unchanged. "bert" is Devlin et al. 2019, "mask_or_random" the BERT-style of T5.
REPLACEMENTS = {"mask": (1.0, 1.0), "mask_or_random": (0.9, 1.0), "bert": (0.8, 0.9)}


def with_eos(ids: np.ndarray, eos: int) -> np.ndarray:
    """The ids, then eos: int32[len(ids) + 1]."""
    out = np.empty(len(ids) + 1, np.int32)
    out[:-1], out[-1] = ids, eos
    return out


def is_sentinel(ids: np.ndarray, vocabulary: noise_masks.Vocabulary) -> np.ndarray:
    """Which ids are sentinels: bool[...]."""
    return np.isin(ids, vocabulary.sentinels)


# Each run of hidden tokens behind a sentinel of its own. --------------------------------------


def write_runs(config, tokens, hidden, rng, vocabulary):
    """A sentinel for each noise span in the inputs; in the targets, each before its span.

    Raises ValueError for more spans than sentinels.
    """
    raw = len(tokens)
    text = np.empty(raw + 2, np.int32)  # one position before the text, and eos
    text[1:-1], text[-1] = tokens, vocabulary.eos
    in_targets = np.empty(raw + 2, bool)
    in_targets[0], in_targets[1:-1], in_targets[-1] = False, hidden, True
    marks = (in_targets[1:-1] > in_targets[:-2]).nonzero()[0]  # the position before each span
    if len(marks) > len(vocabulary.sentinels):
        raise ValueError(
            f"an example hides {len(marks)} spans, but there are {len(vocabulary.sentinels)} "
            f"sentinels; objectives.check_sentinels says how many a config needs."
        )
    names = vocabulary.sentinels[: len(marks)]
    in_inputs, first = ~in_targets, marks + 1
    in_inputs[0], in_inputs[-1], in_inputs[first] = False, True, True
    answers = text.copy()
    text[first], answers[marks] = names, names
    in_targets[marks] = True  # a visible token, replaced by the sentinel in the targets
    return text[in_inputs], answers[in_targets]


def fill_runs(config, inputs, targets, hidden, vocabulary):
    """Replace each sentinel of the inputs by what follows it in the targets."""
    starts = np.flatnonzero(is_sentinel(targets, vocabulary))
    answers = {int(piece[0]): piece[1:] for piece in np.split(targets, starts)[1:]}
    head, *pieces = np.split(inputs, np.flatnonzero(is_sentinel(inputs, vocabulary)))
    filled = [np.append(answers.get(int(piece[0]), piece[:1]), piece[1:]) for piece in pieces]
    return np.concatenate([head, *filled])


# Each hidden token behind the same mask token. -------------------------------------------------


def write_masks(config, tokens, hidden, rng, vocabulary):
    """The mask token, a random token or the token itself at each noise position."""
    inputs = with_eos(tokens, vocabulary.eos)
    if config.replacement == "mask":
        inputs[:-1][hidden] = vocabulary.sentinels[0]
    else:
        masked, changed = REPLACEMENTS[config.replacement]
        positions = hidden.nonzero()[0]
        draw = rng.random(len(positions))
        random = positions[draw < changed]
        inputs[random] = vocabulary.words[rng.integers(len(vocabulary.words), size=len(random))]
        inputs[positions[draw < masked]] = vocabulary.sentinels[0]
    answer = tokens if config.target == "whole" else tokens[hidden]
    return inputs, with_eos(answer, vocabulary.eos)


def fill_masks(config, inputs, targets, hidden, vocabulary):
    """Replace each mask token, or each noise position, by the next target."""
    if config.target == "whole":
        return targets
    if config.replacement != "mask":
        hidden = check_hidden(config, hidden, len(inputs))
    else:
        hidden = is_sentinel(inputs, vocabulary)
    positions, tokens = np.flatnonzero(hidden), inputs.copy()
    tokens[positions[: len(targets)]] = targets[: len(positions)]
    return tokens


def check_hidden(config, hidden, length: int, visible_only: bool = False) -> np.ndarray:
    """Check `hidden`. Raises ValueError if it is missing or does not fit the inputs."""
    if hidden is None:
        raise ValueError(
            f"objective.name={config.name!r} with objective.replacement={config.replacement!r} "
            f"does not write down which tokens it hid; give restore "
            f"hidden=objectives.noise_mask(..) of the same text and seed."
        )
    expected = np.count_nonzero(~hidden) if visible_only else len(hidden)
    if length != expected:
        raise ValueError(
            f"inputs of {length} tokens are not those of a text of {len(hidden)}, of which "
            f"{np.count_nonzero(hidden)} are hidden; give restore the mask of the same text."
        )
    return hidden


# Shown tokens and hidden ones, apart. ----------------------------------------------------------


def write_parts(config, tokens, hidden, rng, vocabulary):
    """The visible tokens, and the noise tokens."""
    return with_eos(tokens[~hidden], vocabulary.eos), with_eos(tokens[hidden], vocabulary.eos)


def fill_dropped(config, inputs, targets, hidden, vocabulary):
    """The targets at the noise positions; the mask token where one is missing."""
    hidden = check_hidden(config, hidden, len(inputs), visible_only=True)
    tokens = np.full(len(hidden), vocabulary.sentinels[0], np.int32)
    tokens[~hidden] = inputs
    positions = np.flatnonzero(hidden)
    tokens[positions[: len(targets)]] = targets[: len(positions)]
    return tokens


def fill_suffix(config, inputs, targets, hidden, vocabulary):
    """The inputs, then the targets."""
    return np.concatenate([inputs, targets])


# Each hidden sentence behind the same mask token. ----------------------------------------------


def write_gaps(config, tokens, hidden, rng, vocabulary):
    """A mask token for each hidden sentence; the hidden sentences in order."""
    begins = hidden.copy()
    ends = noise_masks.sentence_ends(tokens, vocabulary)
    begins[1:] &= ~hidden[:-1] | ends[:-1]
    inputs = np.where(begins, vocabulary.sentinels[0], tokens)[~hidden | begins]
    return with_eos(inputs, vocabulary.eos), with_eos(tokens[hidden], vocabulary.eos)


def fill_gaps(config, inputs, targets, hidden, vocabulary):
    """Replace each mask token by the next sentence of the targets."""
    ends = np.flatnonzero(noise_masks.sentence_ends(targets, vocabulary)) + 1
    answers = [piece for piece in np.split(targets, ends) if len(piece)]
    head, *pieces = np.split(inputs, np.flatnonzero(is_sentinel(inputs, vocabulary)))
    answers += [piece[:1] for piece in pieces[len(answers) :]]
    filled = [np.append(answer, piece[1:]) for answer, piece in zip(answers, pieces, strict=False)]
    return np.concatenate([head, *filled])


# The whole text, in another order. -------------------------------------------------------------


def write_shuffled(config, tokens, hidden, rng, vocabulary):
    """The tokens in random order, and in order."""
    return with_eos(rng.permutation(tokens), vocabulary.eos), with_eos(tokens, vocabulary.eos)


def fill_whole(config, inputs, targets, hidden, vocabulary):
    """The targets."""
    return targets
