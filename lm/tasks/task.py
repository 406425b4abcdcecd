"""Task: a source of records, templates that turn a record into texts, and metrics."""

from __future__ import annotations

import dataclasses
import functools
import re
import reprlib
import string
from collections.abc import Sequence
from typing import Any

from lm import lookup, metrics

# {"text"} for denoising, or {"inputs", "targets"}, with "references" if several answers are right.
Text = dict[str, Any]

CLASS_NUMBER = re.compile(r"-?\d+(\.0+)?")  # as an integer, or as TSV files write it
SPEAKERS = ("user", "system")  # take turns in a dialogue; the model learns the second one's turns
RUNNING_TEXT = "{text}"


@dataclasses.dataclass(frozen=True)
class Task:
    """A task, described by strings alone, so that a config can hold it.

    A template is text with columns of the record in braces, as "translate to German: {en}"; double
    braces stand for themselves. {answers[text]} is the column of that name, or else a column in a
    column. If a column holds a list, its first item is used.

    Attributes:
      source: tfds:name, or JSONL or TSV files, where {split} stands for train, validation, ..; ""
        for a finished corpus.
      inputs: the template of inputs; "" for running text, of which targets is the template.
      targets: the template of targets. If it is a single column that holds a list, every item is a
        right answer, and the first is the target.
      metrics: keys of metrics.METRICS.
      labels: the words for the class numbers 0, 1, .. in the first column of targets.
      turns: the column of a dialogue: a list of utterances or a text with one a line, the user's
        first. Each reply is a target; its input is `prefix` and all turns before it.
    Raises ValueError for an invalid template, an unknown metric, and what a dialogue cannot use.
    """

    source: str
    inputs: str = ""
    targets: str = RUNNING_TEXT
    metrics: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    turns: str = ""

    def __post_init__(self):
        for field in ("inputs", "targets"):
            template = getattr(self, field)
            if (template or field == "targets") and not _columns(template, field):
                raise ValueError(
                    f"{field}={template!r} of a task has no column; write one in braces, as "
                    f"'summarize: {{body}}', and double each brace that is text."
                )
        for name in self.metrics:
            if name == "perplexity":
                raise ValueError(
                    "metrics of a task has 'perplexity', which is always reported; leave it out."
                )
            lookup.lookup(metrics.METRICS, name, "the metric of a task")
        if self.turns:
            self._check_dialogue()

    def _check_dialogue(self) -> None:
        column = f"{{{self.turns}}}"
        if self.labels:
            raise ValueError(
                f"labels={self.labels!r} of a task stand for class numbers, but "
                f"turns={self.turns!r} are texts; leave labels out."
            )
        is_last = self.inputs.endswith(column) and _columns(self.inputs) == [self.turns]
        if not is_last or self.targets not in (column, RUNNING_TEXT):
            raise ValueError(
                f"turns={self.turns!r} of a task needs inputs that end in {column}, without "
                f"another column, and targets={column}; they are inputs={self.inputs!r} and "
                f"targets={self.targets!r}; write 'respond: {column}' and leave targets out."
            )

    @property
    def has_inputs(self) -> bool:
        """Whether it makes pairs of inputs and targets, not running text."""
        return bool(self.inputs)

    @property
    def prefix(self) -> str:
        """The start of every input: the text before the first column."""
        literals = []
        for literal, column in _parse_template(self.inputs):
            literals.append(literal)
            if column is not None:  # a double brace ends a literal, too
                break
        return "".join(literals)

    def to_texts(self, record: dict) -> list[Text]:
        """The texts of a record: one, a pair for each reply of a dialogue, or none.

        A record with a blank column or an unknown label (below 0) has none.
        Raises ValueError for a missing column, a column that is an object, a class number without
        a label, and a turn that is not text.
        """
        if self.turns:
            turns = self._read_turns(record)
            return [
                {"inputs": self.format_dialogue(turns[:i]), "targets": turns[i]}
                for i in range(1, len(turns), 2)
            ]
        inputs, answers = self._fill(self.inputs, record), self._read_answers(record)
        if not answers or not answers[0].strip() or (self.has_inputs and not inputs):
            return []
        if not self.has_inputs:
            return [{"text": answers[0]}]
        references = {"references": answers} if len(answers) > 1 else {}
        return [{"inputs": inputs, "targets": answers[0]} | references]

    def format_input(self, record: dict) -> str:
        """The input of a record without targets; "" if one of its columns is blank.

        Raises ValueError for a missing column and a turn that is not text.
        """
        if self.turns:
            return self.format_dialogue(self._read_turns(record))
        return self._fill(self.inputs, record) or ""

    def format_dialogue(self, turns: Sequence[str]) -> str:
        """The input whose target is the turn after these."""
        lines = (f"{SPEAKERS[i % 2]}: {turn}" for i, turn in enumerate(turns))
        return self.prefix + "\n".join(lines)

    def _read_turns(self, record: dict) -> list[str]:
        """The turns of a dialogue, each on one line; blank ones are left out."""
        value = self._column(record, self.turns)
        lines = value.splitlines() if isinstance(value, str) else [] if value is None else value
        for line in lines if isinstance(lines, list | tuple) else [lines]:
            if not isinstance(line, str):
                raise ValueError(
                    f"{self.source} has the turn {reprlib.repr(line)} in the column "
                    f"{self.turns!r}, which is not text; make it a list of texts, or one text with "
                    f"a turn a line."
                )
        return [turn for line in lines if (turn := " ".join(line.split()))]

    def _fill(self, template: str, record: dict, labelled_column: str = "") -> str | None:
        """The template with the columns of a record; None if one of them is blank."""
        pieces = []
        for literal, column in _parse_template(template):
            pieces.append(literal)
            if column is None:
                continue
            value = self._column(record, column)
            value = value[0] if isinstance(value, list) and value else value
            text = self._to_text(value, column, column == labelled_column)
            if not text.strip():
                return None
            pieces.append(text)
        return "".join(pieces)

    def _read_answers(self, record: dict) -> list[str]:
        """All right answers, each once."""
        column = _columns(self.targets)[0]
        value = self._column(record, column)
        if isinstance(value, list) and self.targets == f"{{{column}}}":
            texts = [self._to_text(item, column, True) for item in value]
            return list(dict.fromkeys(text for text in texts if text.strip()))
        text = self._fill(self.targets, record, column)
        return [] if text is None else [text]

    def _to_text(self, value: Any, column: str, is_labelled: bool) -> str:
        """A column's value as text; "" for no value and for an unknown label."""
        if isinstance(value, dict):
            raise ValueError(
                f"{self.source} has an object in the column {column!r}; name a column of it, "
                f"as {{{column}[{next(iter(value), 'text')}]}}."
            )
        is_number = isinstance(value, bool) or CLASS_NUMBER.fullmatch(str(value))
        if not (is_labelled and self.labels and is_number):
            return "" if value in (None, []) else str(value)
        number = int(float(value))
        if number >= len(self.labels):
            raise ValueError(
                f"{self.source} has the class number {number}, but the task has "
                f"{len(self.labels)} labels, from 0; name them all in labels, in order."
            )
        return self.labels[number] if number >= 0 else ""

    def _column(self, record: dict, column: str) -> Any:
        """The value of a column, or of a path into a column."""
        if column in record:  # the name itself may contain dots and brackets
            return record[column]
        value: Any = record
        for name in re.findall(r"[^.\[\]]+", column):
            names = value if isinstance(value, dict) else ()
            if name not in names:
                raise ValueError(
                    f"{self.source} has no column {column!r}, which the task's templates name; "
                    f"it has {', '.join(names) or 'no columns'}{lookup.nearest(name, names) or '.'}"
                )
            value = value[name]
        return value


@functools.lru_cache
def _parse_template(template: str, field: str = "template") -> list[tuple[str, str | None]]:
    """The literals of a template, each with the column after it; None at an end or a double brace.

    Raises ValueError for braces that hold anything but a column.
    """
    try:
        pieces = list(string.Formatter().parse(template))
        is_valid = not any(p[1] == "" or p[2] or p[3] for p in pieces)  # name, format, conversion
    except ValueError:
        is_valid = False
    if not is_valid:
        raise ValueError(
            f"{field}={template!r} of a task is not a template; write columns as {{name}}, without "
            f"! or : after the name, and double each brace that is text."
        )
    return [(literal, column) for literal, column, *_ in pieces]


def _columns(template: str, field: str = "template") -> list[str]:
    return [column for _, column in _parse_template(template, field) if column is not None]
