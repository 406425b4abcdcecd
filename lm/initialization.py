"""Starting from another run's parameters: which config keys must agree, and what is copied."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from lm import transformer

Config = transformer.ModelConfig
Params = dict[str, np.ndarray]  # path -> array

# The last key of a parameter's path -> the axis of the vocabulary.
VOCABULARY_AXES = {"embedding": 0, "head": 1}


def check_same(
    config: Config, reference: Config, fields: Iterable[str], owner: str, cure: str = ""
) -> None:
    """Raise ValueError if a field differs. owner: the reference's. cure: ends the message."""
    for field in fields:
        value, expected = config.to_flat()[field], reference.to_flat()[field]
        if value != expected:
            raise ValueError(
                f"model.{field}={value!r} differs from {owner} {expected!r}, so its parameters "
                f"cannot be copied; use {expected!r}{cure}."
            )


def check_init_from(config: Config, reference: Config, workdir: str) -> None:
    """Raise ValueError unless two models agree in all but the vocabulary. workdir: init_from."""
    fields = ["num_encoder_layers", "num_decoder_layers"]
    fields += [field for field in transformer.SHARED_KEYS if field != "vocab_size"]
    cure = f", or the folder as the config's preset (--config=....py:{workdir})"
    check_same(config, reference, fields, f"init_from={workdir}'s", cure)


def rows_by_name(names: list[str], source_names: list[str], count: int) -> np.ndarray:
    """For each of `count` rows, the source's row of the same unique name, or -1: int [count]."""
    index = {name: row for row, name in enumerate(source_names)}
    rows = [index.get(name, -1) for name in names]
    return np.array(rows + [-1] * (count - len(rows)))


def carry_over(random: Params, source: Params, rows: np.ndarray) -> tuple[Params, str]:
    """(the source's parameters, with random rows for new pieces, a summary). rows: rows_by_name."""
    exists, params, num_whole, summary = rows >= 0, {}, 0, []
    for path, leaf in random.items():
        axis = VOCABULARY_AXES.get(path.split(".")[-1])
        if axis is None:
            params[path], num_whole = source[path], num_whole + 1
            continue
        params[path] = np.array(leaf)
        copied = np.take(np.asarray(source[path]), rows[exists], axis)
        params[path][(slice(None),) * axis + (exists,)] = copied
        new = f"{exists.sum():,} of {len(rows):,} rows by piece, {(~exists).sum():,} new and random"
        summary.append(f"{path}: {new}")
    return params, "; ".join([f"{num_whole} parameters whole", *summary])
