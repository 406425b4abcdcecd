"""Where training starts: what two models must have in common, and what is carried over."""

from __future__ import annotations

import numpy as np

from lm import transformer

# The axis that counts embedding rows, by the end of a parameter's path.
VOCABULARY = {"embedding": 0, "head": 1}


def check_same(config, other, fields, whose: str, cure: str = "") -> None:
    """Raise ValueError, naming the first of these ModelConfig fields that differs from `whose`."""
    ours_by_key, theirs_by_key = config.to_flat(), other.to_flat()
    for field in fields:
        ours, theirs = ours_by_key[field], theirs_by_key[field]
        if ours != theirs:
            raise ValueError(
                f"model.{field}={ours!r} differs from {whose} {theirs!r}, so parameters cannot be "
                f"taken over; use {theirs!r}{cure}."
            )


def check_origin(config, other, origin: str) -> None:
    """Raise ValueError unless a model can start from another's parameters: all but the vocabulary.

    origin: the run's folder, for the sentence.
    """
    depths = ("num_encoder_layers", "num_decoder_layers")
    fields = [field for field in transformer.SHARED_KEYS if field != "vocab_size"]
    cure = f", or the folder as the config's preset (--config=....py:{origin})"
    check_same(config, other, (*depths, *fields), f"init_from={origin}'s", cure)


def rows_by_name(ours: list[str], theirs: list[str], count: int) -> np.ndarray:
    """For each of `count` rows, the row of the same name, or -1: int [count].

    ours, theirs: the names of the ids of two tokenizers, each once.
    """
    index = {name: row for row, name in enumerate(theirs)}
    named = [index.get(name, -1) for name in ours]
    return np.array(named + [-1] * (count - len(named)))


def carry_over(fresh: dict, theirs: dict, rows: np.ndarray) -> tuple[dict, str]:
    """(parameters to start from, an account of them): theirs, but new rows of the vocabulary fresh.

    fresh, theirs: {path: array}, of models that check_origin lets pass. rows: int [V], for each of
    our rows theirs that stands for the same piece, or -1.
    """
    known, carried, whole, said = rows >= 0, {}, 0, []
    for path, ours in fresh.items():
        axis = VOCABULARY.get(path.split(".")[-1])
        if axis is None:
            carried[path], whole = theirs[path], whole + 1
            continue
        ours, taken = np.array(ours), np.take(np.asarray(theirs[path]), rows[known], axis)
        ours[(slice(None),) * axis + (known,)] = taken
        carried[path] = ours
        new = f"{known.sum():,} of {len(rows):,} rows by piece, {(~known).sum():,} new and random"
        said.append(f"{path}: {new}")
    return carried, "; ".join([f"{whole} parameters whole", *said])
