"""Which tasks a config names, at which rates; those of the table, and a user's own."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping

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


def mixture(words: str, own: Mapping = {}) -> dict[str, float | None]:  # noqa: B006
    """The tasks that are mixed, in order, each with its fixed rate or None: "a,b" or "a=3,b=1".

    Raises ValueError for an unknown task, one named twice, a rate of no use or that is no number
    above 0.
    """
    found: dict[str, float | None] = {}
    for word in words.split(","):
        name, is_given, rate = word.strip().partition("=")
        get_task(name, own)
        if _same(name) in map(_same, found):
            raise ValueError(f"data.task={words!r} names {name} twice; give it one higher rate.")
        try:
            found[name] = float(rate) if is_given else None
        except ValueError:
            found[name] = math.nan
        if is_given and not 0 < found[name] < math.inf:
            raise ValueError(
                f"data.task={words!r} gives {name} the rate {rate!r}; use a number above 0."
            )
    if 0 < sum(rate is None for rate in found.values()) < len(found):
        raise ValueError(
            f"data.task={words!r} gives some tasks a rate; give all of them one, or none."
        )
    if len(found) == 1 and None not in found.values():
        raise ValueError(f"data.task={words!r} gives a rate to one task alone; leave it out.")
    return found
