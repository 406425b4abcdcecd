"""What is hidden, written as inputs and targets, and each way of writing beside its inverse.

Writers: (config, tokens int[L], hidden bool[L], rng, vocabulary) -> inputs, targets, both int32
with eos. Fillers: (config, inputs, targets, hidden or None, vocabulary) -> int32[L], all without
eos; the targets may be a model's, so that any answer may be missing, wrong or too much.
"""

from __future__ import annotations

import numpy as np

from lm.objectives import noise_masks

# Of token masking: the share that becomes the mask token, and that or a random token; the rest
# stays as it is. "bert" is Devlin et al. 2019, "mask_or_random" the BERT-style of T5.
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
    """Sentinels in the inputs, in order; in the targets, each before what it stands for.

    Raises ValueError where there are more runs than sentinels.
    """
    raw = len(tokens)
    text = np.empty(raw + 2, np.int32)  # a place before the text, and eos
    text[1:-1], text[-1] = tokens, vocabulary.eos
    kept = np.empty(raw + 2, bool)
    kept[0], kept[1:-1], kept[-1] = False, hidden, True
    before = (kept[1:-1] > kept[:-2]).nonzero()[0]  # the place before each run
    if len(before) > len(vocabulary.sentinels):
        raise ValueError(
            f"an example hides {len(before)} spans, but there are {len(vocabulary.sentinels)} "
            f"sentinels; objectives.check_sentinels says how many a config needs."
        )
    names = vocabulary.sentinels[: len(before)]
    shown, first = ~kept, before + 1
    shown[0], shown[-1], shown[first] = False, True, True
    answers = text.copy()
    text[first], answers[before] = names, names
    kept[before] = True  # there stands a shown token, which the targets do not need
    return text[shown], answers[kept]


def fill_runs(config, inputs, targets, hidden, vocabulary):
    """Each sentinel of the inputs gives way to what follows it in the targets."""
    starts = np.flatnonzero(is_sentinel(targets, vocabulary))
    answers = {int(part[0]): part[1:] for part in np.split(targets, starts)[1:]}
    head, *parts = np.split(inputs, np.flatnonzero(is_sentinel(inputs, vocabulary)))
    filled = [np.append(answers.get(int(part[0]), part[:1]), part[1:]) for part in parts]
    return np.concatenate([head, *filled])


# Each hidden token behind the same mask token. -------------------------------------------------


def write_masks(config, tokens, hidden, rng, vocabulary):
    """The mask token, a random one or the token itself at each hidden place, as config says."""
    inputs = with_eos(tokens, vocabulary.eos)
    if config.replacement == "mask":
        inputs[:-1][hidden] = vocabulary.sentinels[0]
    else:
        masked, changed = REPLACEMENTS[config.replacement]
        places = hidden.nonzero()[0]
        draw = rng.random(len(places))
        random = places[draw < changed]
        inputs[random] = vocabulary.words[rng.integers(len(vocabulary.words), size=len(random))]
        inputs[places[draw < masked]] = vocabulary.sentinels[0]
    asked = tokens if config.target == "whole" else tokens[hidden]
    return inputs, with_eos(asked, vocabulary.eos)


def fill_masks(config, inputs, targets, hidden, vocabulary):
    """Each mask token, or each hidden place, gives way to the next target."""
    if config.target == "whole":
        return targets
    if config.replacement != "mask":
        hidden = places_of(config, hidden, len(inputs))
    else:
        hidden = is_sentinel(inputs, vocabulary)
    places, tokens = np.flatnonzero(hidden), inputs.copy()
    tokens[places[: len(targets)]] = targets[: len(places)]
    return tokens


def places_of(config, hidden, length: int, shown_only: bool = False) -> np.ndarray:
    """`hidden`, checked. Raises ValueError where it is missing or does not fit the inputs."""
    if hidden is None:
        raise ValueError(
            f"objective.name={config.name!r} with objective.replacement={config.replacement!r} "
            "does not write down which tokens it hid; give restore "
            f"hidden=objectives.noise_mask(..) of "
            f"the same text and seed."
        )
    expected = np.count_nonzero(~hidden) if shown_only else len(hidden)
    if length != expected:
        raise ValueError(
            f"inputs of {length} tokens are not those of a text of {len(hidden)}, of which "
            f"{np.count_nonzero(hidden)} are hidden; give restore the mask of the same text."
        )
    return hidden


# Shown tokens and hidden ones, apart. ----------------------------------------------------------


def write_parts(config, tokens, hidden, rng, vocabulary):
    """The shown tokens, and the hidden ones."""
    return with_eos(tokens[~hidden], vocabulary.eos), with_eos(tokens[hidden], vocabulary.eos)


def fill_dropped(config, inputs, targets, hidden, vocabulary):
    """The targets at the hidden places; one without a target becomes the mask token."""
    hidden = places_of(config, hidden, len(inputs), shown_only=True)
    tokens = np.full(len(hidden), vocabulary.sentinels[0], np.int32)
    tokens[~hidden] = inputs
    places = np.flatnonzero(hidden)
    tokens[places[: len(targets)]] = targets[: len(places)]
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
    """Each mask token gives way to the next sentence of the targets."""
    ends = np.flatnonzero(noise_masks.sentence_ends(targets, vocabulary)) + 1
    answers = [part for part in np.split(targets, ends) if len(part)]
    head, *parts = np.split(inputs, np.flatnonzero(is_sentinel(inputs, vocabulary)))
    answers += [part[:1] for part in parts[len(answers) :]]
    filled = [np.append(answer, part[1:]) for answer, part in zip(answers, parts, strict=False)]
    return np.concatenate([head, *filled])


# The whole text, in another order. -------------------------------------------------------------


def write_shuffled(config, tokens, hidden, rng, vocabulary):
    """The tokens in any order, and as they stand."""
    return with_eos(rng.permutation(tokens), vocabulary.eos), with_eos(tokens, vocabulary.eos)


def fill_whole(config, inputs, targets, hidden, vocabulary):
    """The targets."""
    return targets
