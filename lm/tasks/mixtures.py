"""Which tasks a config names, at which rates; those of the table, and a user's own."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Iterable, Mapping

from lm import lookup
from lm.tasks.table import TASKS
from lm.tasks.task import Task

CORPUS = Task("")  # a finished corpus is running text


def is_corpus_dir(name: str) -> bool:
    """Whether a word of data.task is a finished corpus's directory: it has a slash, no task has."""
    return "/" in name


def task_from_config(name: str, spec: Mapping) -> Task:
    """A user's own task from a section of the config: the fields of Task, lists for tuples.

    Raises ValueError for an unknown key, one of the wrong kind, and whatever Task refuses.
    """
    fields = {field.name: field for field in dataclasses.fields(Task)}
    if not isinstance(spec, Mapping) or not spec.get("source"):
        raise ValueError(
            f"data.custom_tasks.{name} names no source; set it to tfds:name, or to files as "
            f"'data/{{split}}.jsonl'."
        )
    if any(mark in name for mark in "/,= "):
        raise ValueError(
            f"data.custom_tasks has the name {name!r}; use letters, digits and _ alone."
        )
    given = {}
    for key, value in spec.items():
        lookup.lookup(fields, key, f"the key of data.custom_tasks.{name}")
        several = fields[key].type.startswith("tuple")
        fits = isinstance(value, list | tuple) if several else isinstance(value, str)
        if not fits:
            kind = "a tuple of words, as ('bleu',)" if several else "text"
            raise ValueError(f"data.custom_tasks.{name}.{key}={value!r} is not {kind}.")
        given[key] = tuple(value) if several else value
    try:
        return Task(**given)
    except ValueError as error:
        raise ValueError(f"data.custom_tasks.{name}: {error}") from None


def get_task(name: str, own: Mapping = {}) -> Task:  # noqa: B006  (it is not changed)
    """The task of this name, or an error that lists them. own: data.custom_tasks of the config."""
    if is_corpus_dir(name):
        return CORPUS
    if name in own:
        return task_from_config(name, own[name])
    if name and pathlib.Path(name).is_dir() and name not in TASKS:
        raise ValueError(f"data.task={name!r} is no task; if you mean the directory, use ./{name}.")
    return lookup.lookup(TASKS | dict.fromkeys(own), name, "data.task")


def _same(name: str) -> str:
    """One spelling for all spellings of a corpus's directory."""
    return os.path.abspath(os.path.expanduser(name)) if is_corpus_dir(name) else name


def check_mixture(
    pairs: Iterable,
    own: Mapping = {},  # noqa: B006  (it is not changed)
) -> tuple[tuple[str, float | None], ...]:
    """Return the (task, rate or None) pairs of data.mixture as tuples; own: data.custom_tasks.

    Raises ValueError for an unknown task, one named twice, and a rate that is unused or not a
    number above 0.
    """
    mixture: list[tuple[str, float | None]] = []
    for pair in pairs:
        if isinstance(pair, str) or len(pair) != 2 or not isinstance(pair[0], str):
            raise ValueError(
                f"data.mixture has {pair!r}, which is no pair of a task and its rate; write it as "
                f"(('a', 3.0), ('b', 1.0)), or with None for rates by the numbers of examples."
            )
        name, rate = pair
        get_task(name, own)
        if _same(name) in {_same(other) for other, _ in mixture}:
            raise ValueError(f"data.mixture names {name} twice; give it one higher rate.")
        if rate is not None and not (isinstance(rate, int | float) and 0 < rate < math.inf):
            raise ValueError(
                f"data.mixture gives {name} the rate {rate!r}; use a number above 0, or None."
            )
        mixture.append((name, rate if rate is None else float(rate)))
    rates = [rate for _, rate in mixture]
    if 0 < rates.count(None) < len(rates):
        raise ValueError("data.mixture gives some tasks a rate; give all of them one, or none.")
    if len(rates) == 1 and None not in rates:
        raise ValueError(
            f"data.mixture gives a rate to one task alone; use data.task={mixture[0][0]!r}."
        )
    return tuple(mixture)
