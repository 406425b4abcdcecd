"""A file of inputs to a file of answers: in order, in little memory, resumable."""

from __future__ import annotations

import collections
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from lm import checkpoints, decoding, logs, lookup, metrics, runs, sources, storage, tasks
from lm.inference import generate, loading
from lm.sources import formats

CHUNK = 8  # batches that are sorted by length, and then written, at once
COLUMNS = re.compile(r"\.(jsonl|ndjson|json|tsv)(\.gz|\.bz2|\.zst)?", re.I)
NO_LINES = re.compile(r"\.(csv|parquet)(\.gz|\.bz2|\.zst)?$", re.I)
WRITTEN = ("prediction", "predictions", "scores")  # of an answer; of one alone the first
WARNINGS = {
    "cut": "were longer than the model's {most} tokens and were cut",
    "blank": "have nothing in a column of the task, and were asked as an empty text",
    "unasked": "do not begin with {prefix!r}, as what the model learnt does",
    "replaced": "have a column {written} of their own, which is replaced",
}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The rows of a file of inputs, read anew each time that it is iterated, one at a time.

    JSONL and TSV give their columns; any other file {"inputs": line} for each of its lines.
    Raises ValueError for a file or a line that cannot be read, for one of columns of another kind,
    and for a pipe, which gives its lines only once.
    """

    path: str

    def __post_init__(self):
        if NO_LINES.search(self.path):
            raise ValueError(
                f"{self.path} is neither JSONL nor TSV; use a file that ends in .jsonl or .tsv "
                f"(.gz, .bz2 or .zst may follow), or in .txt of an input a line."
            )
        if os.path.exists(self.path) and not os.path.isfile(self.path):
            raise ValueError(
                f"{self.path} is no file that can be read twice; name one, or pipe its lines into "
                f"standard input."
            )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if COLUMNS.search(os.path.basename(self.path)):
            yield from sources.iter_records(self.path)
            return
        try:
            with formats.open_decompressed(self.path) as stream:
                for number, line in enumerate(formats.iter_lines(stream), 1):
                    if isinstance(line, dict):
                        said = line["unreadable"]
                        raise ValueError(f"line {number} of {self.path} is {said}; cut it up.")
                    yield {"inputs": line.decode("utf-8", "replace").removeprefix("\ufeff")}
        except (EOFError, OSError) as error:
            raise ValueError(f"{self.path} cannot be read: {error}.") from None


class Split:
    """The pairs of a split of a run's tasks as rows: inputs, targets, and of several tasks task.

    split: of the tasks' sources; "train" and "heldout" are the run's own. Read anew each time that
    it is iterated. Raises ValueError where there is no such split, and for running text.
    """

    def __init__(self, workdir, split: str):
        self._this = run = runs.read_run(workdir)
        own = dict(zip(("train", "heldout"), runs.splits(run), strict=True))
        self._splits = own.get(split) or dict.fromkeys(run.data.names, split)
        for name in self._splits:
            if not run.data.get_task(name).pairs:
                raise ValueError(
                    f"--split={split} of {name} is running text, which asks nothing; name inputs "
                    f"by --input."
                )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for name, split in self._splits.items():
            task, split = self._this.data.reading(name, split)
            records = sources.records(task.source, split, self._this.data.tfds_dir)
            named = {"task": name} if len(self._splits) > 1 else {}
            for index in range(len(records)):
                yield from (named | text for text in task.to_texts(records[index]))


class Prompt(NamedTuple):
    """What the model is asked for a row: text, its ids, and what there is to warn of."""

    text: str
    ids: np.ndarray
    warnings: tuple[str, ...]


class Prompts:
    """Rows to what the model is asked: by the columns of the run's task, or as they stand.

    written: the columns of the answer, which replace a row's own.
    """

    def __init__(self, run: runs.Run, tokens, written: tuple[str, ...] = WRITTEN[:1]):
        named = {name: run.data.get_task(name) for name in run.data.names}
        # What is missing, is missing in the rows and not in the task's own source.
        self._tasks = {n: dataclasses.replace(t, source="it") for n, t in named.items()}
        self._most, self._tokens = run.data.input_length, tokens
        self._written, names = written, " or ".join(", ".join(written).rsplit(", ", 1))
        self.words = {"most": self._most, "prefix": next(iter(named.values())).prefix}
        self.words |= {"written": names}

    def __call__(self, row: dict[str, Any], number: int) -> Prompt:
        """The question of a row, `number` from 0. Raises ValueError, naming it, if there is none.

        A row with "inputs" is asked just that; of any other the task fills its template in. Of a
        run's several tasks the row's column "task" names one.
        """
        task, warnings = self._task(row), []
        if not row.keys().isdisjoint(self._written):
            warnings.append("replaced")
        try:
            if "inputs" in row:
                text = row["inputs"]
                if not isinstance(text, str):
                    raise ValueError(f"its 'inputs' are {type(text).__name__}, not text")
                if not any(text.startswith(t.prefix) for t in self._tasks.values()):
                    warnings.append("unasked")
            elif task is None or not task.pairs:
                several = f", and no 'task': one of {', '.join(self._tasks)}" if not task else ""
                raise ValueError(f"it has no 'inputs'{several}")
            else:
                text = task.ask(row)
                if not text:
                    warnings.append("blank")
        except ValueError as error:
            raise ValueError(f"input {number + 1}: {str(error).rstrip('.')}.") from None
        ids, cut = tasks.truncate_input(task or generate.PLAIN, text, self._most, self._tokens)
        return Prompt(text, ids, (*warnings, "cut") if cut else tuple(warnings))

    def _task(self, row: dict[str, Any]) -> tasks.Task | None:
        if row.get("task") in self._tasks:
            return self._tasks[row["task"]]
        if len(self._tasks) == 1:
            return next(iter(self._tasks.values()))
        begins = (t for t in self._tasks.values() if t.prefix and "inputs" in row)
        return next((t for t in begins if str(row["inputs"]).startswith(t.prefix)), None)


class InputStats(NamedTuple):
    """What all inputs are before the first is answered."""

    count: int
    digest: str  # of the rows
    warnings: collections.Counter

    def sentences(self, words: dict) -> list[str]:
        """What to warn of, with how many inputs of how many it is true of."""
        return [
            f"{self.warnings[name]} of {self.count} inputs {said.format(**words)}"
            for name, said in WARNINGS.items()
            if self.warnings[name]
        ]


def inspect_inputs(rows: Iterable[dict], questions: Prompts, strict: bool) -> InputStats:
    """Look at all inputs once. Raises ValueError, before anything is decoded or written, for a row
    that cannot be asked, and where it is `strict` for one that would be cut.
    """
    digest, warnings, count = hashlib.sha256(), collections.Counter(), 0
    for row in tqdm.tqdm(rows, desc="reading", unit="input", disable=None, leave=False):
        warnings.update(questions(row, count).warnings)
        count += 1
        if strict and warnings["cut"]:
            raise ValueError(
                f"input {count}: it is longer than the model's {questions.words['most']} tokens; "
                f"shorten it, or leave --strict out to have it cut."
            )
        digest.update(json.dumps(row).encode())
    return InputStats(count, digest.hexdigest(), warnings)


class ResumableWriter:
    """Where lines go: OUT.part, which becomes OUT at the end of the block; without OUT, stdout.

    Beside it lies OUT.part.json, what the lines are made of: whole chunks of them are kept by a
    later call that makes them of the same. Those of a bucket's OUT lie below ~/.cache/lm/gs.
    Raises ValueError where there are lines that were made of something else, and where another
    call writes them.
    """

    def __init__(self, out: str, made_of: dict, chunk: int):
        self.done, self._out = 0, out
        if not out:
            return
        self._part = storage.as_path(f"{out}.part")
        if storage.is_remote(out):
            local = out.removeprefix(storage.SCHEME)
            self._part = pathlib.Path(storage.CACHE_DIR).expanduser() / f"{local}.part"
            self._part.parent.mkdir(parents=True, exist_ok=True)
        self._facts = self._part.with_name(self._part.name + ".json")
        if not self._part.exists():
            logs.write_atomically(self._part, "")
        self._lock = _locked(self._part)
        self.done, size = self._kept(chunk)
        theirs = json.loads(self._facts.read_text()) if self.done else made_of
        if differing := [name for name in made_of if theirs.get(name) != made_of[name]]:
            raise ValueError(
                f"{self._part} has {self.done} answers of another {' and '.join(differing)}; "
                f"remove it, or write to another --out."
            )
        os.truncate(self._part, size)
        if not self.done:
            logs.write_atomically(self._facts, json.dumps(made_of, indent=2) + "\n")
        self._file = logs.AppendedFile(self._part)

    def _kept(self, chunk: int) -> tuple[int, int]:
        """(lines, their bytes) of the whole chunks that are there."""
        done = size = kept = 0
        if self._part.exists() and self._facts.exists():
            with self._part.open("rb") as file:
                for number, line in enumerate(file, 1):
                    size += len(line)
                    if number % chunk == 0 and line.endswith(b"\n"):
                        done, kept = number, size
        return done, kept

    def add(self, rows: Iterable[dict]) -> None:
        """Write rows, on disk when this returns."""
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if self._out:
            self._file.add(lines.encode("utf-8", "backslashreplace"))  # a lone surrogate is none
        else:
            sys.stdout.write(lines)
            sys.stdout.flush()

    def __enter__(self) -> ResumableWriter:
        return self

    def __exit__(self, kind, *error) -> None:
        if not self._out:
            return
        self._file.close()
        if kind is None:
            self._finish()
        elif not self._part.stat().st_size:  # nothing to go on with
            self._part.unlink()
            self._facts.unlink()
        self._lock.close()

    def _finish(self) -> None:
        if storage.is_remote(self._out):
            with self._part.open("rb") as read, storage.as_path(self._out).open("wb") as written:
                shutil.copyfileobj(read, written, storage.COPY_CHUNK_BYTES)
            self._part.unlink()
        else:
            os.replace(self._part, self._out)
        self._facts.unlink()


def _locked(part: pathlib.Path):
    """The file, open, so that no other call writes to it until it is closed."""
    file = part.open("rb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(
            f"{part} is being written by another call; wait for it, or write to another --out."
        ) from None
    return file


def predict(
    workdir,
    rows: Iterable[dict[str, Any]],
    out: str = "",
    *,
    which: str | int = "newest",
    how: str = "",
    seed: int = 0,
    strict: bool = False,
    nearest: str = "",
) -> None:
    """Answer rows with a checkpoint of a run: a line of JSON each, in order, to `out` or stdout.

    rows: iterated twice, as Inputs of a file; see Questions. A line is the row with "inputs" as
    text, "prediction", and where there are several answers "predictions" and "scores". which: as
    in read_params. how: as decoding.parse reads it; empty: the run's evaluate.decoding. seed: of
    sampling. nearest: a metric's word; of several answers the one is written that it finds nearest
    to the row's targets (Kim and Rush 2016, section 3.3, arXiv:1606.07947). A
    call that was interrupted goes on where it was (see Sink), and ends with the same bytes.
    Raises ValueError as `survey` and Sink do, and where `out` is no place for answers.
    """
    _check_out(rows, out)
    run, strategy, tokens, params, step = loading.open_run(workdir, which)
    how = decoding.parse(how or run.config["evaluate"]["decoding"])
    _check_nearest(nearest, how, rows)
    many = how.n_best > 1 and not nearest
    questions = Prompts(run, tokens, WRITTEN if many else WRITTEN[:1])
    found = inspect_inputs(rows, questions, strict)
    for sentence in found.sentences(questions.words):
        print(f"lm: warning: {sentence}.", file=sys.stderr)
    chunk = CHUNK * run.config["data"]["batch_size"]
    made_of = _made_of(found, run, tokens, strategy.fetch(params), how, seed)
    made_of["decoding"] += nearest and f" nearest={nearest}"
    fewest = -(-max(found.count, 1) // strategy.shards) * strategy.shards
    at_once = min(run.data.batch_size, fewest)
    answer = generate.Generator(run, strategy, params, tokens, how, seed=seed, rows=at_once)
    options = {"total": found.count, "desc": "decoding", "unit": "input", "disable": None}
    with (
        ResumableWriter(out, made_of, chunk) as sink,
        tqdm.tqdm(initial=sink.done, **options) as bar,
    ):
        left = itertools.islice(rows, sink.done, None)
        for start in range(sink.done, found.count, chunk):
            some = list(itertools.islice(left, chunk))
            asked = [questions(row, start + place) for place, row in enumerate(some)]
            said = answer.ask([question.ids for question in asked], start, bar.update)
            if nearest:
                said = [_nearest(nearest, *pair) for pair in zip(some, said, strict=True)]
            sink.add(map(_line, some, asked, said, itertools.repeat(many)))


def _check_out(rows: Iterable[dict], out: str) -> None:
    """Refuse, before anything is read, an `out` that would be lost or could not be replaced."""
    if os.path.isdir(out):
        raise ValueError(f"--out={out} is a folder; name a file.")
    if out and not storage.is_remote(out) and not os.path.isdir(os.path.dirname(out) or "."):
        raise ValueError(f"--out={out} is in a folder that is not there; make it, or name another.")
    if isinstance(rows, Inputs) and out and os.path.realpath(rows.path) == os.path.realpath(out):
        raise ValueError(f"--out={out} is the file of inputs, which would be lost; name another.")


def _check_nearest(nearest: str, how, rows: Iterable[dict]) -> None:
    if not nearest:
        return
    lookup.lookup(metrics.METRICS, nearest, "--nearest")
    if how.n_best == 1 or "targets" not in next(iter(rows), {"targets": ""}):
        raise ValueError(
            f"--nearest={nearest} chooses among several answers to inputs with targets; use "
            f"--split, or rows with targets, and n_best=4 in --decoding."
        )


def _nearest(word: str, row: dict, said: tuple[list, list]) -> tuple[list, list]:
    # Of all answers to a row the one that the metric finds nearest to what is right.
    right = row.get("references", row["targets"])
    near = [next(iter(metrics.score(word, [text], [right]).values())) for text in said[0]]
    best = near.index(max(near))
    return [said[0][best]], [said[1][best]]


def _made_of(found: InputStats, run: runs.Run, tokens, params, how, seed: int) -> dict:
    """What answers follow from; the same, and they are the same."""
    sums = [int(x) for x in jax.tree.leaves(jax.device_get(checkpoints.tree_checksums(params)))]
    return {
        "input": found.digest,
        "checkpoint": hashlib.sha256(json.dumps(sums).encode()).hexdigest(),
        "model": hashlib.sha256(f"{run.model} {run.lengths}".encode()).hexdigest(),
        "tokenizer": tokens.fingerprint,
        "decoding": str(how),
        "seed": seed,
    }


def _line(row: dict, question: Prompt, said: tuple[list, list], many: bool) -> dict:
    texts, scores = said
    found = {"inputs": question.text, "prediction": texts[0]}
    found |= {"predictions": texts, "scores": scores} if many else {}
    return found | {name: value for name, value in row.items() if name not in found}
