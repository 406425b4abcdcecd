"""What a task is: a source, templates from a record to a pair of texts, and metrics."""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Sequence
from typing import Any

from lm import choose, metrics

# {"text"} to denoise, or {"inputs", "targets"} to learn a mapping; "references" beside these where
# several answers are right.
Text = dict[str, Any]

NUMBER = re.compile(r"-?\d+(\.0+)?")  # of a label, also as TSV has it
SPEAKERS = ("user", "system")  # of a dialogue, in turns; the second one's are learnt


@dataclasses.dataclass(frozen=True)
class Task:
    """Strings alone, so that a config can hold one; columns of a record in braces.

    source: tfds:name, or files of JSONL or TSV, where {split} stands for train, validation, ..; ""
    is a finished corpus. inputs, targets: templates, as "translate English to German: {en}" and
    "{de}"; {answers[text]} is a column in a column, and of a list the first counts. Without inputs
    it is running text. metrics: words of METRICS. labels: what the numbers of the targets' column
    stand for. turns: the column that holds a dialogue, an utterance a line or a list of them, the
    user's first; it makes a pair of each reply and all that was said before it.
    Raises ValueError for a template without a column, and for words that are not known.
    """

    source: str
    inputs: str = ""
    targets: str = "{text}"
    metrics: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    turns: str = ""

    def __post_init__(self):
        for field in ("inputs", "targets"):
            template = getattr(self, field)
            if (template or field == "targets") and not _columns(template, field):
                raise ValueError(
                    f"{field}={template!r} of a task has no column; write one as "
                    f"'summarize: {{body}}', and a brace that stands for itself twice."
                )
        for word in self.metrics:
            choose.choose(metrics.METRICS, word, "the metric of a task")
        if self.turns and self.turns not in _columns(self.inputs, "inputs"):
            raise ValueError(
                f"turns={self.turns!r} of a task is not in inputs={self.inputs!r}; write it there, "
                f"as 'respond: {{{self.turns}}}'."
            )

    @property
    def pairs(self) -> bool:
        """Whether it makes inputs and targets, not running text."""
        return bool(self.inputs)

    @property
    def prefix(self) -> str:
        """How every input begins."""
        return next(string.Formatter().parse(self.inputs))[0] if self.inputs else ""

    def to_texts(self, record: dict) -> list[Text]:
        """What a record makes: one text, a pair for each reply of a dialogue, or nothing.

        A record is dropped where a column is blank, or a label unknown (below 0).
        Raises ValueError for a column that the record does not have or that is an object, and for
        the number of a label that there is not.
        """
        if self.turns:
            return self._replies(record)
        inputs, answers = self._filled(self.inputs, record), self._answers(record)
        if not (answers and answers[0].strip() and (inputs or not self.pairs)):
            return []
        if not self.pairs:
            return [{"text": answers[0]}]
        several = {"references": answers} if len(answers) > 1 else {}
        return [{"inputs": inputs, "targets": answers[0], **several}]

    def ask(self, record: dict) -> str:
        """The input of a record whose answer is not known; "" where a column of it is blank.

        Raises ValueError for a column that the record does not have.
        """
        if self.turns:
            return self.history(self._turns(record))
        return self._filled(self.inputs, record) or ""

    def history(self, turns: Sequence[str]) -> str:
        """The input that asks for what follows these turns of a dialogue."""
        named = (f"{SPEAKERS[i % 2]}: {turn}" for i, turn in enumerate(turns))
        return self.prefix + "\n".join(named)

    def _replies(self, record: dict) -> list[Text]:
        turns = self._turns(record)
        return [
            {"inputs": self.history(turns[:number]), "targets": turns[number]}
            for number in range(1, len(turns), 2)
        ]

    def _turns(self, record: dict) -> list[str]:
        value = self._value(record, self.turns)
        lines = value.splitlines() if isinstance(value, str) else value or []
        turns = [" ".join(str(line).split()) for line in lines]
        return [turn for turn in turns if turn]

    def _filled(self, template: str, record: dict) -> str | None:
        # The template with its columns in place; None where one of them is blank.
        parts = []
        for literal, column, *_ in string.Formatter().parse(template):
            parts.append(literal)
            if column is None:
                continue
            value = self._value(record, column)
            value = value[0] if isinstance(value, list) and value else value
            if value == [] or _is_blank(value):
                return None
            if isinstance(value, dict):
                raise ValueError(
                    f"{self.source} has an object in the column {column!r}; name a column of it, "
                    f"as {{{column}[{next(iter(value), 'text')}]}}."
                )
            parts.append(str(value))
        return "".join(parts)

    def _answers(self, record: dict) -> list[str]:
        # All right answers, each once: of a lone column that holds a list, every item of it.
        columns = _columns(self.targets, "targets")
        value = self._value(record, columns[0])
        if self.labels and (isinstance(value, bool) or NUMBER.fullmatch(str(value))):
            return self._label(int(float(value)))
        if isinstance(value, list) and self.targets == f"{{{columns[0]}}}":
            return list(dict.fromkeys(str(item) for item in value if not _is_blank(item)))
        filled = self._filled(self.targets, record)
        return [] if filled is None else [filled]

    def _label(self, number: int) -> list[str]:
        if number >= len(self.labels):
            raise ValueError(
                f"{self.source} has the label {number}, but the task names {len(self.labels)}, "
                f"from 0; name them all in labels, in order."
            )
        return [self.labels[number]] if number >= 0 else []

    def _value(self, record: dict, column: str) -> Any:
        value: Any = record
        for word in re.findall(r"[^.\[\]]+", column):
            if not isinstance(value, dict) or word not in value:
                names = value if isinstance(value, dict) else ()
                raise ValueError(
                    f"{self.source} has no column {column!r}, which the task's templates name; "
                    f"it has {', '.join(names) or 'none there'}"
                    f"{choose.nearest(word, names) or '.'}"
                )
            value = value[word]
        return value


def _is_blank(value: Any) -> bool:
    return value is None or not str(value).strip()


def _columns(template: str, what: str) -> list[str]:
    """The columns that a template names."""
    try:
        return [column for _, column, *_ in string.Formatter().parse(template) if column]
    except ValueError as error:
        raise ValueError(
            f"{what}={template!r} of a task is no template ({error}); write a column as {{name}}, "
            f"and a brace that stands for itself twice."
        ) from None
