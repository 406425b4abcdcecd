"""The tasks that a config names, with their rates: built-in ones, and those that it defines."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Iterable, Mapping

from lm import lookup
from lm.tasks.table import TASKS
from lm.tasks.task import Task


def is_corpus_dir(name: str) -> bool:
    """Whether a name in data.task is the directory of a finished corpus: only these have a "/"."""
    return "/" in name


def task_from_config(name: str, spec: Mapping) -> Task:
    """The task that an entry of data.custom_tasks defines: fields of Task, with lists or tuples.

    Raises ValueError for an unknown key, a value of the wrong type, and as Task does.
    """
    fields = {field.name: field for field in dataclasses.fields(Task)}
    if not isinstance(spec, Mapping) or not spec.get("source"):
        raise ValueError(
            f"data.custom_tasks.{name} has no source; set it to tfds:name, or to files as "
            f"'data/{{split}}.jsonl'."
        )
    if any(mark in name for mark in "/,= "):
        raise ValueError(f"data.custom_tasks has the name {name!r}; use letters, digits and _.")
    options = {}
    for key, value in spec.items():
        lookup.lookup(fields, key, f"the key of data.custom_tasks.{name}")
        is_tuple = fields[key].type.startswith("tuple")
        if not isinstance(value, (list, tuple) if is_tuple else str):
            kind = "a tuple of words, as ('bleu',)" if is_tuple else "text"
            raise ValueError(f"data.custom_tasks.{name}.{key}={value!r} is not {kind}.")
        options[key] = tuple(value) if is_tuple else value
    try:
        return Task(**options)
    except ValueError as error:
        raise ValueError(f"data.custom_tasks.{name}: {error}") from None


def get_task(name: str, custom_tasks: Mapping = {}) -> Task:  # noqa: B006  (it is not changed)
    """The task of this name: built in, of data.custom_tasks, or the directory of a corpus.

    Raises ValueError, with a list of all names, if there is none.
    """
    if is_corpus_dir(name):
        return Task("")  # running text
    if name in custom_tasks:
        return task_from_config(name, custom_tasks[name])
    if name and pathlib.Path(name).is_dir() and name not in TASKS:
        raise ValueError(
            f"data.task={name!r} is not a task; if you mean the directory, use ./{name}."
        )
    return lookup.lookup(TASKS | dict.fromkeys(custom_tasks), name, "data.task")


def check_mixture(
    pairs: Iterable,
    custom_tasks: Mapping = {},  # noqa: B006  (it is not changed)
) -> tuple[tuple[str, float | None], ...]:
    """Return the (task, rate or None) pairs of data.mixture as tuples.

    Raises ValueError for an unknown or repeated task, a rate that is not a number above 0, rates
    for only some of the tasks, and a rate for a single task.
    """
    mixture, seen = [], set()
    for pair in pairs:
        if isinstance(pair, str) or len(pair) != 2 or not isinstance(pair[0], str):
            raise ValueError(
                f"data.mixture has {pair!r}, which is not a pair of a task and its rate; write it "
                f"as (('a', 3.0), ('b', 1.0)), or with None for rates by the numbers of examples."
            )
        name, rate = pair
        get_task(name, custom_tasks)
        key = os.path.abspath(os.path.expanduser(name)) if is_corpus_dir(name) else name
        if key in seen:
            raise ValueError(f"data.mixture names {name} twice; give it one higher rate.")
        seen.add(key)
        if rate is not None and not (isinstance(rate, int | float) and 0 < rate < math.inf):
            raise ValueError(
                f"data.mixture gives {name} the rate {rate!r}; use a number above 0, or None."
            )
        mixture.append((name, rate if rate is None else float(rate)))
    rates = [rate for _, rate in mixture]
    if 0 < rates.count(None) < len(rates):
        raise ValueError("data.mixture gives some tasks a rate; give all of them one, or none.")
    if len(rates) == 1 and rates != [None]:
        raise ValueError(
            f"data.mixture gives a rate to a single task; use data.task={mixture[0][0]!r}."
        )
    return tuple(mixture)
