"""A run folder, read: its config, manifest, log, scores and predictions."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
import statistics
from collections.abc import Iterable

from lm import logs, storage

ROLES = {  # a run's role, and what the page calls the panel that it is drawn in
    "pretrain": "Pre-training",
    "finetune": "Fine-tuning",
    "scratch": "Fine-tuning",
    "distill": "Distillation",
    "alone": "Distillation",
}
SCORES = {  # a key of evaluate.json, and its heading
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
    """A run folder, read. role: config.name, or the stage where it has none; seeds share a role."""

    path: pathlib.Path
    role: str
    config: dict
    manifest: dict
    rows: list[dict]  # of metrics.jsonl
    scores: dict  # of evaluate.json; {} where there is none
    samples: list[dict]  # of predictions.jsonl
    events: list[dict] = dataclasses.field(default_factory=list)  # of events.jsonl
    spent: dict = dataclasses.field(default_factory=dict)  # what its wall time went to, by the logs
    curve: bytes = b""  # of curve.png, its scores over the updates; empty where there is none

    @property
    def seed(self) -> int:
        """The seed of its config."""
        return self.config.get("seed", 0)

    @property
    def label(self) -> str:
        """Role and seed, which no two runs of a page share."""
        return f"{self.role}, seed {self.seed}"

    @property
    def updates(self) -> int:
        """Updates behind its scores; without scores, those logged."""
        return self.scores.get("step", max((row["step"] for row in self.rows), default=0))

    def series(self, split: str, name: str) -> tuple[list[int], list[float]]:
        """The steps and values of one logged scalar."""
        points = [(r["step"], r[name]) for r in self.rows if r["split"] == split and name in r]
        return [step for step, _ in points], [value for _, value in points]

    @property
    def tokens_per_second(self) -> float | None:
        """The median over the log points; None where none was measured."""
        rates = self.series("train", "tokens_per_second")[1]
        return statistics.median(rates) if rates else None

    @property
    def training_seconds(self) -> float | None:
        """Updates times their step time: no compilation, evaluation or checkpoint is in it.

        Updates without a measured step time, the first after each start, count the median.
        """
        measured = self.series("train", "step_seconds")[1]
        if not measured:
            return None
        seconds, before, usual = 0.0, 0, statistics.median(measured)
        for row in self.rows:
            if row["split"] == "train":
                seconds += (row["step"] - before) * row.get("step_seconds", usual)
                before = row["step"]
        return seconds


def _object(path: pathlib.Path) -> dict:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); write it again.") from None


def read_run_folder(path: str | os.PathLike) -> RunFolder:
    """One run folder.

    Raises ValueError where it has no config.json or a file in it is damaged.
    """
    path = storage.as_path(path)
    curve = path / "curve.png"
    config = _object(path / "config.json")
    if not config:
        raise ValueError(f"{path} has no config.json, so it is no run folder; give a --workdir.")
    return RunFolder(
        path=path,
        role=config.get("name") or config.get("stage") or "run",
        config=config,
        manifest=_object(path / logs.MANIFEST),
        rows=logs.read(path / logs.METRICS),
        scores=_object(path / "evaluate.json"),
        samples=logs.read(path / "predictions.jsonl"),
        events=logs.read(path / logs.EVENTS),
        spent=logs.goodput(path),
        curve=curve.read_bytes() if curve.exists() else b"",
    )


def read_run_folders(rundirs: Iterable[str | os.PathLike]) -> list[RunFolder]:
    """The runs of some folders, in the order of the stages; plain files among them are passed over.

    Runs that share role and seed answer different questions: their role is then told by the folder,
    and no claim is made of it.
    Raises ValueError where there is no folder, or one is no run folder.
    """
    folders = [path for path in map(storage.as_path, rundirs) if not path.is_file()]
    if not folders:
        raise ValueError("no run folder to report on; give some with --runs=runs/demo/*")
    runs = [read_run_folder(path) for path in folders]
    counts = collections.Counter((run.role, run.seed) for run in runs)
    shared = {role for (role, _), count in counts.items() if count > 1}
    runs = [
        dataclasses.replace(run, role=f"{run.role} ({run.path.as_posix()})")
        if run.role in shared
        else run
        for run in runs
    ]
    order = list(ROLES)
    return sorted(
        runs,
        key=lambda run: (
            order.index(run.role) if run.role in ROLES else len(order),
            run.role,
            run.seed,
        ),
    )
