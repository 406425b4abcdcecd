"""A file of answers as a task's training split: what a teacher said, to be learnt instead."""

from __future__ import annotations

import dataclasses
import re

from lm.tasks.task import Task, Text

FILE = re.compile(r"\.(jsonl|ndjson)(\.gz|\.bz2|\.zst)?$")


def is_answers_file(split: str) -> bool:
    """Whether data.train_split names files of answers, no split: they end in .jsonl."""
    return bool(FILE.search(split))


@dataclasses.dataclass(frozen=True)
class TeacherAnswers(Task):
    """A task whose pairs are in a file that predict wrote: inputs as asked, targets as said.

    name: of the task; rows whose column "task" says another are left out. Of several answers to a
    row each is a pair, once.
    Source: Kim and Rush 2016, section 3.2, arXiv:1606.07947.
    """

    name: str = ""

    def to_texts(self, record: dict) -> list[Text]:
        """As of a Task. Raises ValueError for a row that is no answer to an input."""
        if record.get("task", self.name) != self.name:
            return []
        asked = record.get("inputs")
        said = record.get("predictions") or [record.get("prediction")]
        if not isinstance(asked, str) or not all(isinstance(text, str) for text in said):
            raise ValueError(
                f"{self.source} has a row without inputs and prediction as text; write it with "
                f"python -m lm predict --workdir=TEACHER --split=train --out={self.source}."
            )
        return [{"inputs": asked, "targets": text} for text in dict.fromkeys(said) if text.strip()]


def with_teacher_answers(name: str, task: Task, split: str) -> tuple[Task, str]:
    """What to read a task's records by: (the task, the split), or of files of answers their rows.

    Raises ValueError for answers of a task that asks nothing.
    """
    if not is_answers_file(split):
        return task, split
    if not task.pairs:
        raise ValueError(
            f"data.train_split={split!r} has answers, but {name} is running text; use "
            f"data.train_split='train'."
        )
    fields = {field.name: getattr(task, field.name) for field in dataclasses.fields(task)}
    return TeacherAnswers(**fields | {"source": split}, name=name), "train"
