"""Read inputs and make prompts of them: files, splits of a task, rows."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tqdm

from lm import runs, sources, tasks, tokenizer
from lm.inference import generate
from lm.sources import formats

TABLE_SUFFIX = re.compile(r"\.(jsonl|ndjson|json|tsv)(\.gz|\.bz2|\.zst)?", re.I)
UNSUPPORTED_SUFFIX = re.compile(r"\.(csv|parquet)(\.gz|\.bz2|\.zst)?$", re.I)
ANSWER_COLUMNS = ("prediction", "predictions", "scores")  # the last two with several answers
WARNINGS = {
    "truncated": "were longer than the model's {input_length} tokens and were truncated",
    "empty": "have an empty column of the task, and became an empty text",
    "no_prefix": "do not begin with {prefix!r}, as the model's training inputs do",
    "overwritten": "have a column {columns}, which is replaced",
}


@dataclasses.dataclass(frozen=True)
class InputFile:
    """The rows of a file, read anew at each iteration, one at a time.

    JSONL and TSV give their columns, other files {"inputs": line} for each line.
    Raises ValueError for unsupported and unreadable files, and for pipes, which cannot be reread.
    """

    path: str

    def __post_init__(self):
        if UNSUPPORTED_SUFFIX.search(self.path):
            raise ValueError(
                f"{self.path} is neither JSONL nor TSV; use a file that ends in .jsonl or .tsv "
                f"(.gz, .bz2 or .zst may follow), or a .txt with one input a line."
            )
        if os.path.exists(self.path) and not os.path.isfile(self.path):
            raise ValueError(
                f"{self.path} is not a regular file and cannot be read twice; name a file, or pipe "
                f"its lines into standard input."
            )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if TABLE_SUFFIX.search(os.path.basename(self.path)):
            yield from sources.iter_records(self.path)
            return
        try:
            with formats.open_decompressed(self.path) as stream:
                for number, line in enumerate(formats.iter_lines(stream), 1):
                    if isinstance(line, dict):
                        reason = line["unreadable"]
                        raise ValueError(f"line {number} of {self.path} is {reason}; split it.")
                    yield {"inputs": line.decode("utf-8", "replace").removeprefix("\ufeff")}
        except (EOFError, OSError) as error:
            raise ValueError(f"{self.path} cannot be read: {error}.") from None


class SplitInputs:
    """The pairs of a split of a run's tasks as rows, read anew at each iteration.

    Rows have inputs, targets, and with several tasks the task. split: of the tasks' sources;
    "train" and "heldout" are those of the run. Raises ValueError for an unknown split and for
    running text.
    """

    def __init__(self, workdir: str | os.PathLike, split: str):
        self._run = run = runs.read_run(workdir)
        run_splits = dict(zip(("train", "heldout"), runs.splits(run), strict=True))
        self._splits = run_splits.get(split) or dict.fromkeys(run.data.names, split)
        for name in self._splits:
            if not run.data.get_task(name).has_inputs:
                raise ValueError(
                    f"--split={split} of {name} is running text and has no inputs; give --input."
                )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for name, split in self._splits.items():
            task, split = self._run.data.task_and_split(name, split)
            records = sources.records(task.source, split, self._run.data.tfds_dir)
            columns = {"task": name} if len(self._splits) > 1 else {}
            for index in range(len(records)):
                yield from (columns | text for text in task.to_texts(records[index]))


class Prompt(NamedTuple):
    """The model's input for a row: text, ids, and the keys of WARNINGS that apply."""

    text: str
    ids: np.ndarray
    warnings: tuple[str, ...]


class Prompts:
    """Makes prompts of rows: their "inputs" unchanged, else the filled template of the run's task.

    columns: the columns of the answer, which replace those of the row.
    """

    def __init__(
        self,
        run: runs.Run,
        tokens: tokenizer.Tokenizer,
        columns: tuple[str, ...] = ANSWER_COLUMNS[:1],
    ):
        # Errors must name the row, not the task's source.
        self._tasks = {
            name: dataclasses.replace(run.data.get_task(name), source="it")
            for name in run.data.names
        }
        self._tokens, self._columns, self.input_length = tokens, columns, run.data.input_length

    def __call__(self, row: dict[str, Any], number: int) -> Prompt:
        """Make the prompt of row `number`, from 0; with several tasks, its column "task" names one.

        Raises ValueError, naming the row, if it has no input.
        """
        task, warnings = self._find_task(row), []
        if not row.keys().isdisjoint(self._columns):
            warnings.append("overwritten")
        try:
            if "inputs" in row:
                text = row["inputs"]
                if not isinstance(text, str):
                    raise ValueError(f"its 'inputs' are {type(text).__name__}, not text")
                if not any(text.startswith(task.prefix) for task in self._tasks.values()):
                    warnings.append("no_prefix")
            elif task is None or not task.has_inputs:
                choices = f", and no 'task': one of {', '.join(self._tasks)}" if not task else ""
                raise ValueError(f"it has no 'inputs'{choices}")
            else:
                text = task.format_input(row)
                if not text:
                    warnings.append("empty")
        except ValueError as error:
            raise ValueError(f"input {number + 1}: {str(error).rstrip('.')}.") from None
        task = task or generate.PLAIN
        ids, is_truncated = tasks.truncate_input(task, text, self.input_length, self._tokens)
        return Prompt(text, ids, (*warnings, *["truncated"] * is_truncated))

    def _find_task(self, row: dict[str, Any]) -> tasks.Task | None:
        if row.get("task") in self._tasks:
            return self._tasks[row["task"]]
        if len(self._tasks) == 1:
            return next(iter(self._tasks.values()))
        for task in self._tasks.values():
            if task.prefix and str(row.get("inputs", "")).startswith(task.prefix):
                return task
        return None

    def sentences(self, warnings: collections.Counter, count: int) -> list[str]:
        """Describe the warnings of `count` inputs, with the number of inputs of each."""
        prefix = next(iter(self._tasks.values())).prefix
        columns = " or ".join(", ".join(self._columns).rsplit(", ", 1))
        words = {"input_length": self.input_length, "prefix": prefix, "columns": columns}
        return [
            f"{warnings[name]} of {count} inputs {text.format(**words)}"
            for name, text in WARNINGS.items()
            if warnings[name]
        ]


class InputStats(NamedTuple):
    """Statistics of all inputs."""

    count: int
    digest: str  # of the rows
    warnings: list[str]  # sentences


def inspect_inputs(rows: Iterable[dict], prompts: Prompts, strict: bool) -> InputStats:
    """Read all inputs once, before anything is decoded or written.

    Raises ValueError for a row without an input, and with `strict` for one that is too long.
    """
    digest, warnings, count = hashlib.sha256(), collections.Counter(), 0
    for row in tqdm.tqdm(rows, desc="reading", unit="input", disable=None, leave=False):
        warnings.update(prompts(row, count).warnings)
        count += 1
        if strict and warnings["truncated"]:
            raise ValueError(
                f"input {count}: it is longer than the model's {prompts.input_length} tokens; "
                f"shorten it, or omit --strict to truncate it."
            )
        digest.update(json.dumps(row).encode())
    return InputStats(count, digest.hexdigest(), prompts.sentences(warnings, count))
