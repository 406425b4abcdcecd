"""What a task is: a source, templates from a record to a pair of texts, and metrics."""

from __future__ import annotations

import dataclasses
import re
import reprlib
import string
from collections.abc import Sequence
from typing import Any

from lm import lookup, metrics

# {"text"} to denoise, or {"inputs", "targets"} to learn a mapping; "references" beside these where
# several answers are right.
Text = dict[str, Any]

NUMBER = re.compile(r"-?\d+(\.0+)?")  # of a label, also as TSV has it
SPEAKERS = ("user", "system")  # of a dialogue, in turns; the second one's are learnt
TEXT = "{text}"  # what running text is made of


@dataclasses.dataclass(frozen=True)
class Task:
    """Strings alone, so that a config can hold one; columns of a record in braces.

    source: tfds:name, or files of JSONL or TSV, where {split} stands for train, validation, ..; ""
    is a finished corpus. inputs, targets: templates, as "translate English to German: {en}" and
    "{de}"; {answers[text]} is a column of that name or else a column in a column, and of a list the
    first counts. Without inputs it is running text. metrics: words of METRICS. labels: what the
    numbers of the targets' first column stand for. turns: the column that holds a dialogue, an
    utterance a line or a list of them, the user's first; it makes a pair of each reply and all that
    was said before it, behind what inputs say before the column.
    Raises ValueError for a template without a column or with more than it uses, and for words that
    are not known.
    """

    source: str
    inputs: str = ""
    targets: str = TEXT
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
            if word == "perplexity":
                raise ValueError(
                    "the metric of a task='perplexity' needs no word; evaluate writes it of every "
                    "task, so leave it out."
                )
            lookup.lookup(metrics.METRICS, word, "the metric of a task")
        if self.turns:
            self._check_dialogue()

    def _check_dialogue(self) -> None:
        # The templates of a dialogue say nothing that its history and replies would leave out.
        hole = f"{{{self.turns}}}"
        if self.labels:
            raise ValueError(
                f"labels={self.labels!r} of a task stand for numbers, and turns={self.turns!r} are "
                f"texts; leave labels out."
            )
        ends = _columns(self.inputs, "inputs") == [self.turns] and self.inputs.endswith(hole)
        if not ends or self.targets not in (hole, TEXT):
            raise ValueError(
                f"turns={self.turns!r} of a task is asked with words and {hole} at their end and "
                f"answered with {hole}, not with inputs={self.inputs!r} and "
                f"targets={self.targets!r}; write 'respond: {hole}' and leave targets out."
            )

    @property
    def pairs(self) -> bool:
        """Whether it makes inputs and targets, not running text."""
        return bool(self.inputs)

    @property
    def prefix(self) -> str:
        """How every input begins: what stands before its first column."""
        words = []
        for literal, column, *_ in string.Formatter().parse(self.inputs):
            words.append(literal)
            if column is not None:  # a brace that stands for itself ends a literal, too
                break
        return "".join(words)

    def to_texts(self, record: dict) -> list[Text]:
        """What a record makes: one text, a pair for each reply of a dialogue, or nothing.

        A record is dropped where a column is blank, or a label unknown (below 0).
        Raises ValueError for a column that the record does not have or that is an object, for the
        number of a label that there is not, and for a turn that is no text.
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

        Raises ValueError for a column that the record does not have, and a turn that is no text.
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
        value = value.splitlines() if isinstance(value, str) else value
        lines = value if isinstance(value, list | tuple) else [] if value is None else [value]
        for line in lines:
            if not isinstance(line, str):
                raise ValueError(
                    f"{self.source} has the turn {reprlib.repr(line)} in the column "
                    f"{self.turns!r}, which is no text; make it a list of texts, or one text with "
                    f"a turn a line."
                )
        turns = [" ".join(line.split()) for line in lines]
        return [turn for turn in turns if turn]

    def _filled(self, template: str, record: dict, labelled: str = "") -> str | None:
        # The template with its columns in place; None where one of them is blank. labelled: the
        # column whose numbers are those of labels.
        parts = []
        for literal, column, *_ in string.Formatter().parse(template):
            parts.append(literal)
            if column is None:
                continue
            value = self._value(record, column)
            value = value[0] if isinstance(value, list) and value else value
            text = self._text(value, column, column == labelled)
            if not text.strip():
                return None
            parts.append(text)
        return "".join(parts)

    def _answers(self, record: dict) -> list[str]:
        # All right answers, each once: of a lone column that holds a list, every item of it.
        column = _columns(self.targets, "targets")[0]
        value = self._value(record, column)
        if isinstance(value, list) and self.targets == f"{{{column}}}":
            texts = [self._text(item, column, True) for item in value]
            return list(dict.fromkeys(text for text in texts if text.strip()))
        filled = self._filled(self.targets, record, column)
        return [] if filled is None else [filled]

    def _text(self, value: Any, column: str, labelled: bool) -> str:
        # What a value of a column is as text; "" of none, and of an unknown label.
        if isinstance(value, dict):
            raise ValueError(
                f"{self.source} has an object in the column {column!r}; name a column of it, "
                f"as {{{column}[{next(iter(value), 'text')}]}}."
            )
        if labelled and self.labels and (isinstance(value, bool) or NUMBER.fullmatch(str(value))):
            return self._label(int(float(value)))
        return "" if value in (None, []) else str(value)

    def _label(self, number: int) -> str:
        if number >= len(self.labels):
            raise ValueError(
                f"{self.source} has the label {number}, but the task names {len(self.labels)}, "
                f"from 0; name them all in labels, in order."
            )
        return self.labels[number] if number >= 0 else ""

    def _value(self, record: dict, column: str) -> Any:
        if column in record:  # a name may hold a dot or brackets itself
            return record[column]
        value: Any = record
        for word in re.findall(r"[^.\[\]]+", column):
            if not isinstance(value, dict) or word not in value:
                names = value if isinstance(value, dict) else ()
                raise ValueError(
                    f"{self.source} has no column {column!r}, which the task's templates name; "
                    f"it has {', '.join(names) or 'none there'}"
                    f"{lookup.nearest(word, names) or '.'}"
                )
            value = value[word]
        return value


def _columns(template: str, what: str) -> list[str]:
    """The columns that a template names. Raises ValueError for braces that hold anything else."""
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(
            f"{what}={template!r} of a task is no template ({error}); write a column as {{name}}, "
            f"and a brace that stands for itself twice."
        ) from None
    for _, column, spec, conversion in parts:
        if spec or conversion or not column:
            said = column + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise ValueError(
                f"{what}={template!r} of a task has {{{said}}}, and a column is filled in as it "
                f"stands, by a name without ! and :; write {{{column or 'name'}}}."
            )
    return [column for _, column, *_ in parts]
