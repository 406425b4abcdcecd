"""Evaluate a run and write losses, baselines and scores into its workdir."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import shlex
from collections.abc import Sequence

from lm import logs, parallel, pipeline, runs, sources, tasks
from lm.evaluate import curve, heldout, scores
from lm.inference import loading

FILE_NAMES = str.maketrans({"[": "-", "]": "", ":": "to", "%": "percent", "+": "-and-", " ": ""})


def evaluate(workdir: str | os.PathLike, step: str | int = "newest", **options) -> dict:
    """Evaluate a checkpoint of a run.

    Writes evaluate.json and, for tasks of pairs, predictions.jsonl into the workdir; for the split
    test, evaluate-test.json and so on. With several tasks, "tasks" has the figures of each task.
    Results for the same checkpoint, limits, decoding and data are reused. All hosts call this; the
    first writes.

    Args: step: as in read_params. options: as in Evaluation.
    Raises ValueError for an unknown split, and for a loss that is not finite.
    """
    evaluation = Evaluation(workdir, **options)
    params, number = evaluation.read(step)
    path = evaluation.path("evaluate", ".json")
    if path.exists():
        figures = json.loads(path.read_text())
        if figures | evaluation.dependencies(number) == figures:
            return figures
    figures, rows = evaluation.figures(params, number)
    figures["command"] = evaluation.command(step)
    if rows:
        _write_jsonl(evaluation.path("predictions", ".jsonl"), rows)
    if not parallel.host_index_and_count()[0]:
        logs.write_atomically(path, json.dumps(figures, indent=2) + "\n")
    return figures


def evaluate_all(workdir: str | os.PathLike, steps: Sequence[int] = (), **options) -> list[dict]:
    """Evaluate several checkpoints of a run, by default all; returns a row for each, by step.

    Writes predictions-<step>.jsonl and evaluate.jsonl after each, and curve.png at the end. Rows of
    an earlier call with the same split, limits, decoding and data are reused, also for deleted
    checkpoints. Options and errors: as in evaluate.
    """
    evaluation = Evaluation(workdir, **options)
    path = evaluation.path("evaluate", ".jsonl")
    rows = {row["step"]: row for row in logs.read(path)}
    rows = {step: row for step, row in rows.items() if row | evaluation.dependencies(step) == row}
    if not steps:
        with loading.open_checkpoints(evaluation.run, read_only=True) as checkpoints:
            steps = checkpoints.steps()
    for step in sorted(set(steps) - rows.keys()):
        rows[step], answers = evaluation.figures(*evaluation.read(step))
        rows[step]["command"] = evaluation.command(step)
        if answers:
            _write_jsonl(evaluation.path(f"predictions-{step}", ".jsonl"), answers)
        _write_jsonl(path, [rows[step] for step in sorted(rows)])
    figures = [rows[step] for step in sorted(rows)]
    if figures and not parallel.host_index_and_count()[0]:
        curve.draw(figures, evaluation.path("curve", ".png"), evaluation.run.name)
    return figures


def _write_jsonl(path: pathlib.Path, rows: Sequence[dict]) -> None:
    if not parallel.host_index_and_count()[0]:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        logs.write_atomically(path, text)


class Evaluation:
    """Evaluates checkpoints of a run on a split; reads data and compiles once, on demand.

    Args:
      split: of the tasks' sources; empty: the run's held-out split.
      decoding: the short form, see decoding.parse; empty: the run's decoding.
      max_examples: of each task, 0 for all; None: the config's limits for the held-out split, all
        for other splits.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
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
        self._flags |= {"max_examples": "" if max_examples is None else max_examples}

    @property
    def _is_heldout(self) -> bool:
        return self.split == self.run.data.heldout_split

    @functools.cached_property
    def _splits(self) -> dict[str, str]:
        heldout_splits = runs.splits(self.run)[1] if self._is_heldout else {}
        return heldout_splits or dict.fromkeys(self.run.data.names, self.split)

    @functools.cached_property
    def _data(self) -> dict[str, str]:
        # Fingerprints of the tasks' sources; a corpus never changes.
        data = self.run.data
        return {
            name: sources.source_fingerprint(data.get_task(name).source, split, data.tfds_dir)
            for name, split in self._splits.items()
            if not tasks.is_corpus_dir(name)
        }

    def path(self, stem: str, suffix: str) -> pathlib.Path:
        """Return the path of a result; it contains the split's name unless held out."""
        name = "" if self._is_heldout else "-" + self.split.translate(FILE_NAMES)
        return self.run.workdir / f"{stem}{name}{suffix}"

    def dependencies(self, step: int) -> dict:
        """Describe what the figures of a checkpoint depend on."""
        config = self.run.evaluate
        limits = {  # the file's keys predate the config's
            "decode": config.max_decoded_examples,
            "decoding": str(self.run.decoding),
            "examples": config.max_examples,
        }
        return {"step": step, "split": self.split, "limits": limits, "data": self._data}

    def command(self, step: str | int) -> str:
        """Return the command line that computes these figures."""
        flags = self._flags | {"step": "" if step == "newest" else step}
        words = (f"--{name}={shlex.quote(str(v))}" for name, v in flags.items() if v != "")
        return " ".join(["python -m lm evaluate", *words])

    def read(self, step: str | int) -> tuple[dict, int]:
        """Return (placed parameters, step) of a checkpoint."""
        params, number = loading.read_params(self.run, self.tokens, step, self.strategy)
        return self.strategy.place_state(params), number

    @functools.cached_property
    def _examples(self) -> tuple[pipeline.Examples, pipeline.Examples]:
        # Training examples and the split's; the first host writes them while the others wait.
        def prepare():
            train, heldout_examples = runs.make_examples(self.run, self.tokens)
            if self._is_heldout:
                return train, heldout_examples
            # With a digest: files may change, and "train" is the folder of training examples.
            digest = hashlib.sha256(json.dumps(self._data).encode()).hexdigest()[:8]
            folder = f"evaluate-{self.split.translate(FILE_NAMES)}-{digest}"
            return train, runs.make_split(self.run, self.tokens, self._splits, folder)

        examples = None if parallel.host_index_and_count()[0] else prepare()
        parallel.barrier("examples to evaluate")
        return examples or prepare()

    @functools.cached_property
    def _losses(self) -> heldout.HeldOut:
        return heldout.HeldOut(self.run, self.strategy, self._examples[1], self.tokens)

    @functools.cached_property
    def _scorer(self) -> scores.TaskScorer:
        return scores.TaskScorer(self.run, self.strategy, self.tokens, self._splits)

    @functools.cached_property
    def _baselines(self) -> dict[str, dict]:
        # By task; "" is the mixture of several tasks.
        train, examples = self._examples
        text_bytes = self.tokens.piece_bytes(self.run.model.vocab_size)
        pairs = {"": (self._losses, train.frequencies)} if len(examples.splits) > 1 else {}
        for split, train_split in zip(examples.splits, train.splits, strict=True):
            counts = pipeline.Examples((train_split,)).frequencies
            pairs[split.name] = self._losses.for_task(split), counts
        return {name: heldout.unigram_baselines(*pair, text_bytes) for name, pair in pairs.items()}

    def figures(self, params, step: int) -> tuple[dict, list[dict]]:
        """Return (figures of evaluate.json, rows of predictions.jsonl) of parameters."""
        by_task, rows, label = {}, [], f"loss of {self.run.name} at {step}"
        several = len(self.run.data.names) > 1
        splits = {split.name: split for split in self._examples[1].splits}
        sums = {
            name: self._losses.for_task(split).by_example(params, label)
            for name, split in splits.items()
        }
        total = scores.concatenate(list(sums.values()))
        if not math.isfinite(total["nats"].sum()):
            raise ValueError(
                f"the loss of {self.run.workdir} at update {step} on {self.split} is not finite; "
                f"choose another checkpoint by --step, or train with a lower "
                f"optimizer.learning_rate."
            )
        for name, examples in sums.items():
            figures = scores.score_losses(examples) | self._baselines[name]
            if name in self._scorer.tasks:
                pairs, answers = self._scorer.pairs[name], self._scorer.answers(params, name)
                texts = [answer.texts[0] for answer in answers]
                task_scores = scores.score_answers(self._scorer.tasks[name], pairs, texts)
                intervals = figures["intervals"] | task_scores["intervals"]
                figures |= task_scores
                figures["inputs_cut"] = sum(answer.is_truncated for answer in answers)
                figures["examples_in_split"] = len(splits[name])
                figures["intervals"] = intervals
                columns = {"task": name} if several else {}
                rows += [columns | row for row in scores.rows(pairs, answers)]
            by_task[name] = figures
        if several:
            figures = scores.score_losses(total) | self._baselines[""] | {"tasks": by_task}
        return json.loads(json.dumps(self.dependencies(step) | figures)), rows
