"""A file of a teacher's answers, learnt in place of a task's own targets."""

from __future__ import annotations

import dataclasses
import re

from lm.tasks.task import Task, Text

ANSWERS_FILE = re.compile(r"\.(jsonl|ndjson)(\.gz|\.bz2|\.zst)?$")


def is_answers_file(split: str) -> bool:
    """Whether data.train_split names files of answers, by their suffix, and not a split."""
    return bool(ANSWERS_FILE.search(split))


@dataclasses.dataclass(frozen=True)
class TeacherAnswers(Task):
    """A task whose pairs are rows of a file that predict wrote; each answer to a row is a pair.

    name: the name of the task; rows with another name in the column "task" are left out.
    Source: Kim and Rush 2016, section 3.2, arXiv:1606.07947.
    """

    name: str = ""

    def to_texts(self, record: dict) -> list[Text]:
        """The pairs of a row. Raises ValueError for a row without inputs and a prediction."""
        if record.get("task", self.name) != self.name:
            return []
        inputs = record.get("inputs")
        answers = record.get("predictions") or [record.get("prediction")]
        if not all(isinstance(text, str) for text in (inputs, *answers)):
            raise ValueError(
                f"{self.source} has a row without inputs and prediction as text; write it with "
                f"python -m lm predict --workdir=TEACHER --split=train --out={self.source}."
            )
        return [{"inputs": inputs, "targets": t} for t in dict.fromkeys(answers) if t.strip()]


def with_teacher_answers(name: str, task: Task, split: str) -> tuple[Task, str]:
    """(task, split) to read training records by: a file of answers replaces the task's source.

    Raises ValueError if there are answers to a task without inputs.
    """
    if not is_answers_file(split):
        return task, split
    if not task.has_inputs:
        raise ValueError(
            f"data.train_split={split!r} has answers, but {name} is running text; use "
            f"data.train_split='train'."
        )
    fields = {field.name: getattr(task, field.name) for field in dataclasses.fields(task)}
    return TeacherAnswers(**fields | {"source": split}, name=name), "train"
