"""The evaluation of a run: losses, baselines and scores, written into its workdir."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import shlex
from collections.abc import Sequence

from lm import logs, parallel, pipeline, runs, sources, tasks
from lm.evaluate import curve, heldout, scores
from lm.inference import loading

FILE_NAMES = str.maketrans({"[": "-", "]": "", ":": "to", "%": "percent", "+": "-and-", " ": ""})


def evaluate(workdir, step: str | int = "newest", **chosen) -> dict:
    """Evaluate a checkpoint of a run; step: as in read_params; chosen: as of Evaluation.

    Writes evaluate.json and, for tasks of pairs,
    predictions.jsonl into the workdir; of the split test, evaluate-test.json and so on. Of several
    tasks, the figures of each stand under its name, and those of all together above. What an
    earlier call wrote for the same checkpoint, limits, decoding and data is returned as it is.
    Of several hosts all call this and the first writes.
    Raises ValueError for a split that is not there, and for a loss that is not finite.
    """
    asked = Evaluation(workdir, **chosen)
    chosen_step = step
    params, step = asked.read(step)
    path = asked.path("evaluate", ".json")
    if path.exists() and (done := json.loads(path.read_text())) | asked.made_of(step) == done:
        return done
    figures, rows = asked.figures(params, step)
    figures["command"] = asked.command(chosen_step)
    if rows:
        _write(asked.path("predictions", ".jsonl"), rows)
    if not parallel.host_index_and_count()[0]:
        logs.write_atomically(path, json.dumps(figures, indent=2) + "\n")
    return figures


def evaluate_all(workdir, steps: Sequence[int] = (), **chosen) -> list[dict]:
    """Evaluate these checkpoints of a run, by default all that it keeps: a row each, by step.

    chosen, errors: as of evaluate. Writes predictions-<step>.jsonl and evaluate.jsonl after each of
    them, and at the end curve.png: every score over the updates. Rows that are there already stay,
    those of checkpoints since deleted among them, if they are of the same split, limits, decoding
    and data.
    """
    asked = Evaluation(workdir, **chosen)
    path = asked.path("evaluate", ".jsonl")
    rows = {row["step"]: row for row in logs.read(path)}
    rows = {step: row for step, row in rows.items() if row | asked.made_of(step) == row}
    if not steps:
        with loading.open_checkpoints(asked.run, read_only=True) as saved:
            steps = saved.steps()
    for step in sorted(set(steps) - rows.keys()):
        rows[step], said = asked.figures(*asked.read(step))
        rows[step]["command"] = asked.command(step)
        if said:
            _write(asked.path(f"predictions-{step}", ".jsonl"), said)
        _write(path, [rows[step] for step in sorted(rows)])
    found = [rows[step] for step in sorted(rows)]
    if found and not parallel.host_index_and_count()[0]:
        curve.draw(found, asked.path("curve", ".png"), asked.run.name)
    return found


def _write(path: pathlib.Path, rows: Sequence[dict]) -> None:
    """A JSONL file of these rows, by the first host."""
    if not parallel.host_index_and_count()[0]:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        logs.write_atomically(path, text)


class Evaluation:
    """What is the same for all checkpoints of a run on a split; read and compiled when needed.

    split: of the tasks' sources; empty: what the run holds out. decoding: in the words of
    lm.decoding;
    empty: the run's own. max_examples: examples of each task, 0 for all; None: of what the
    run holds out as its evaluate.max_examples and evaluate.max_decoded_examples say, of another
    split all.
    """

    def __init__(
        self,
        workdir,
        *,
        split: str = "",
        decoding: str = "",
        max_examples: int | None = None,
    ):
        run, self.strategy, self.tokens = loading.open_workdir(workdir)
        self.run = run
        self.split = run.data.heldout_split if split in ("", "heldout") else split
        limits, config = run.evaluate, loading.decoding_config(run, decoding)
        if max_examples is not None or not self._is_heldout:
            limits = runs.EvaluateConfig(max_examples or 0, max_examples or 0)
        self.run = dataclasses.replace(run, evaluate=limits, decoding=config)
        self._flags = {"workdir": workdir, "decoding": decoding}
        self._flags |= {"split": "" if self._is_heldout else split}
        self._flags |= {"examples": "" if max_examples is None else max_examples}

    @property
    def _is_heldout(self) -> bool:
        return self.split == self.run.data.heldout_split

    @functools.cached_property
    def _splits(self) -> dict[str, str]:
        held = runs.splits(self.run)[1] if self._is_heldout else {}
        return held or dict.fromkeys(self.run.data.names, self.split)

    @functools.cached_property
    def _data(self) -> dict[str, str]:
        # A hash of what each task's split is read from; a corpus never changes.
        task, place = self.run.data.get_task, self.run.data.tfds_dir
        return {
            name: sources.source_fingerprint(task(name).source, split, place)
            for name, split in self._splits.items()
            if not tasks.is_corpus_dir(name)
        }

    def path(self, stem: str, suffix: str) -> pathlib.Path:
        """Where a result of this split lies: those of the held-out split have the plain names."""
        named = "" if self._is_heldout else "-" + self.split.translate(FILE_NAMES)
        return self.run.workdir / f"{stem}{named}{suffix}"

    def made_of(self, step: int) -> dict:
        """What the figures of a checkpoint follow from."""
        limits = {"decode": self.run.evaluate.max_decoded_examples}  # the names of old files
        limits |= {"decoding": str(self.run.decoding), "examples": self.run.evaluate.max_examples}
        return {"step": step, "split": self.split, "limits": limits, "data": self._data}

    def command(self, which: str | int) -> str:
        """The command line that makes these figures."""
        flags = self._flags | {"step": "" if which == "newest" else which}
        said = (f"--{name}={shlex.quote(str(v))}" for name, v in flags.items() if v != "")
        return " ".join(["python -m lm evaluate", *said])

    def read(self, which: str | int):
        """(placed parameters, step) of a checkpoint."""
        params, step = loading.read_params(self.run, self.tokens, which, self.strategy)
        return self.strategy.place_state(params), step

    @functools.cached_property
    def _examples(self) -> tuple[pipeline.Examples, pipeline.Examples]:
        # (training examples, those of the split), made by the first host while others wait.
        def prepare():
            train, held = runs.make_examples(self.run, self.tokens)
            if self._is_heldout:
                return train, held
            # Not plainly the split's name: train is of the training, and a file may change.
            made_of = hashlib.sha256(json.dumps(self._data).encode()).hexdigest()[:8]
            folder = f"evaluate-{self.split.translate(FILE_NAMES)}-{made_of}"
            return train, runs.make_split(self.run, self.tokens, self._splits, folder)

        made = None if parallel.host_index_and_count()[0] else prepare()
        parallel.barrier("examples to evaluate")
        return made or prepare()

    @functools.cached_property
    def _losses(self) -> heldout.HeldOut:
        return heldout.HeldOut(self.run, self.strategy, self._examples[1], self.tokens)

    @functools.cached_property
    def _judge(self) -> scores.TaskScorer:
        return scores.TaskScorer(self.run, self.strategy, self.tokens, self._splits)

    @functools.cached_property
    def _baselines(self) -> dict[str, dict]:
        # By task, and under "" those of all together.
        train, held = self._examples
        text_bytes = self.tokens.piece_bytes(self.run.model.vocab_size)
        known = {"": (self._losses, train.frequencies)} if len(held.parts) > 1 else {}
        for part, learnt in zip(held.parts, train.parts, strict=True):
            own = pipeline.Examples((learnt,)).frequencies
            known[part.name] = self._losses.of(part), own
        return {name: heldout.unigram_baselines(*of, text_bytes) for name, of in known.items()}

    def figures(self, params, step: int) -> tuple[dict, list[dict]]:
        """(all figures of placed parameters as JSON has them, the rows of predictions.jsonl)."""
        by_task, rows, label = {}, [], f"loss of {self.run.name} at {step}"
        several = len(self.run.data.names) > 1
        parts = self._examples[1].parts
        each = {part.name: self._losses.of(part).by_example(params, label) for part in parts}
        sizes = {part.name: len(part) for part in parts}
        whole = scores.joined(list(each.values()))
        if not math.isfinite(whole["nats"].sum()):
            raise ValueError(
                f"the loss of {self.run.workdir} at update {step} on {self.split} is not finite; "
                "choose another checkpoint by --step, or train with a lower "
                f"optimizer.learning_rate."
            )
        for name, examples in each.items():
            found = scores.score_losses(examples) | self._baselines[name]
            if name in self._judge.tasks:
                pairs, given = self._judge.pairs[name], self._judge.answers(params, name)
                said = [answer.texts[0] for answer in given]
                judged = scores.score_answers(self._judge.tasks[name], pairs, said)
                counts = {"inputs_cut": sum(answer.is_truncated for answer in given)}
                counts |= {"examples_in_split": sizes[name]}
                surest = {"intervals": found["intervals"] | judged["intervals"]}
                found |= judged | counts | surest
                named = {"task": name} if several else {}
                rows += [named | row for row in scores.rows(pairs, given)]
            by_task[name] = found
        if several:
            found = scores.score_losses(whole) | self._baselines[""] | {"tasks": by_task}
        return json.loads(json.dumps(self.made_of(step) | found)), rows
