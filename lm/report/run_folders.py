"""Read run folders: config, manifest, logs, scores and predictions."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
import statistics
from collections.abc import Iterable

from lm import logs, storage

ROLES = {  # role of a run: heading of its figures
    "pretrain": "Pre-training",
    "finetune": "Fine-tuning",
    "scratch": "Fine-tuning",
    "distill": "Distillation",
    "alone": "Distillation",
}
SCORES = {  # key of evaluate.json: heading
    "nats": "nats per token",
    "bits_per_byte": "bits per byte",
    "text_nats": "nats per text token",
    "perplexity": "perplexity",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "bleu": "BLEU",
    "chrf": "chrF",
    "exact_match": "exact match",
    "f1": "F1",
    "accuracy": "accuracy",
}


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The contents of a run folder; missing files are empty."""

    path: pathlib.Path
    role: str  # config.name, or the stage; the seeds of one experiment share it
    config: dict
    manifest: dict
    rows: list[dict]  # of metrics.jsonl
    scores: dict  # of evaluate.json
    samples: list[dict]  # of predictions.jsonl
    events: list[dict] = dataclasses.field(default_factory=list)  # of events.jsonl
    goodput: dict = dataclasses.field(default_factory=dict)  # as in logs.goodput
    curve: bytes = b""  # of curve.png

    @property
    def seed(self) -> int:
        """The seed of the config."""
        return self.config.get("seed", 0)

    @property
    def label(self) -> str:
        """Role and seed: unique on a page."""
        return f"{self.role}, seed {self.seed}"

    @property
    def updates(self) -> int:
        """The update that was evaluated, or else the last that was logged."""
        return self.scores.get("step", max((row["step"] for row in self.rows), default=0))

    def series(self, split: str, name: str) -> tuple[list[int], list[float]]:
        """Return the steps and values of a logged scalar; split: "train" or "heldout"."""
        points = [(r["step"], r[name]) for r in self.rows if r["split"] == split and name in r]
        return [step for step, _ in points], [value for _, value in points]

    @property
    def tokens_per_second(self) -> float | None:
        """The median of the logged rates; None if there are none."""
        rates = self.series("train", "tokens_per_second")[1]
        return statistics.median(rates) if rates else None

    @property
    def training_seconds(self) -> float | None:
        """The sum of all updates' step times, without compilation, evaluation and checkpoints.

        The first updates after each start have no measured time and count as the median.
        """
        measured = self.series("train", "step_seconds")[1]
        if not measured:
            return None
        seconds, previous, median = 0.0, 0, statistics.median(measured)
        for row in self.rows:
            if row["split"] == "train":
                seconds += (row["step"] - previous) * row.get("step_seconds", median)
                previous = row["step"]
        return seconds


def _read_json(path: pathlib.Path) -> dict:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); write it again.") from None


def read_run_folder(path: str | os.PathLike) -> RunFolder:
    """Read a run folder. Raises ValueError if it has no config.json or a damaged file."""
    path = storage.as_path(path)
    curve = path / "curve.png"
    config = _read_json(path / "config.json")
    if not config:
        raise ValueError(f"{path} has no config.json, so it is not a run folder; give a workdir.")
    return RunFolder(
        path=path,
        role=config.get("name") or config.get("stage") or "run",
        config=config,
        manifest=_read_json(path / logs.MANIFEST),
        rows=logs.read(path / logs.METRICS),
        scores=_read_json(path / "evaluate.json"),
        samples=logs.read(path / "predictions.jsonl"),
        events=logs.read(path / logs.EVENTS),
        goodput=logs.goodput(path),
        curve=curve.read_bytes() if curve.exists() else b"",
    )


def read_run_folders(rundirs: Iterable[str | os.PathLike]) -> list[RunFolder]:
    """Read run folders and sort them by ROLES; plain files are skipped.

    Runs with equal role and seed are different experiments: their role then contains the folder.
    Raises ValueError if there are no folders, or as read_run_folder.
    """
    folders = [path for path in map(storage.as_path, rundirs) if not path.is_file()]
    if not folders:
        raise ValueError("no run folder to report on; give some with --runs=runs/demo/*")
    runs = [read_run_folder(path) for path in folders]
    counts = collections.Counter((run.role, run.seed) for run in runs)
    ambiguous = {role for (role, _), count in counts.items() if count > 1}
    for number, run in enumerate(runs):
        if run.role in ambiguous:
            role = f"{run.role} ({run.path.as_posix()})"
            runs[number] = dataclasses.replace(run, role=role)
    order = {role: number for number, role in enumerate(ROLES)}
    return sorted(runs, key=lambda run: (order.get(run.role, len(order)), run.role, run.seed))
