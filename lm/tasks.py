"""Tasks: where records come from, how a record becomes text, how answers are judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from lm import choose

Text = dict[str, str]  # {"text"} to denoise, or {"inputs", "targets"} to learn a mapping


@dataclasses.dataclass(frozen=True)
class Task:
    """dataset: a TFDS name. to_text: record -> Text, or None to drop it. metrics: words of METRICS.

    pairs says which of the two forms of Text to_text makes; prefix is how its inputs begin.
    """

    dataset: str
    to_text: Callable[[dict], Text | None]
    pairs: bool = False
    prefix: str = ""
    metrics: tuple[str, ...] = ()


def text(record: dict) -> Text | None:
    """The document as it stands."""
    return {"text": record["text"]} if record["text"].strip() else None


def summarize_docstring(record: dict) -> Text | None:
    """A docstring's body to its summary line; None where it has not both."""
    if not (record["body"] and record["summary"]):
        return None
    return {"inputs": SUMMARIZE + record["body"], "targets": record["summary"]}


SUMMARIZE = "summarize: "
TASKS = {
    "wikipedia": Task("wikipedia/20230601.en", text),
    "pydocs": Task("pydocs", text),
    "docstring_summary": Task("pydocs", summarize_docstring, True, SUMMARIZE, ("rouge",)),
}


def task_named(name: str) -> Task:
    """The task of this name, or an error that lists them."""
    return choose.choose(TASKS, name, "data.task")
