"""Run folders to one page: the claims, the curves, the table, samples, and what made each row.

The page is one self-contained HTML file: styles and curves are inline, it loads nothing and runs no
script, and it depends on nothing but the folders, so the same folders give the same bytes.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import html
import io
import json
import math
import os
import pathlib
import re
import statistics
from collections.abc import Iterable, Sequence

from lm import logs

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
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
}
COMPARED = {"nats": True, "rougeL": False}  # the scores that claims compare; is lower better?
SAMPLES, ABRIDGED = 5, 420  # samples a group of models; characters of a text shown


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder, read. role: config.name, or the stage where it has none; seeds share a role."""

    path: pathlib.Path
    role: str
    config: dict
    manifest: dict
    rows: list[dict]  # of metrics.jsonl
    scores: dict  # of evaluate.json; {} where there is none
    samples: list[dict]  # of predictions.jsonl

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


def read_run(path: str | os.PathLike) -> Run:
    """One run folder.

    Raises ValueError where it has no config.json or a file in it is damaged.
    """
    path = pathlib.Path(path)
    config = _object(path / "config.json")
    if not config:
        raise ValueError(f"{path} has no config.json, so it is no run folder; give a --workdir.")
    return Run(
        path=path,
        role=config.get("name") or config.get("stage") or "run",
        config=config,
        manifest=_object(path / logs.MANIFEST),
        rows=logs.read(path / logs.METRICS),
        scores=_object(path / "evaluate.json"),
        samples=logs.read(path / "predictions.jsonl"),
    )


def read_runs(rundirs: Iterable[str | os.PathLike]) -> list[Run]:
    """The runs of some folders, in the order of the stages; plain files among them are passed over.

    Runs that share role and seed answer different questions: their role is then told by the folder,
    and no claim is made of it.
    Raises ValueError where there is no folder, or one is no run folder.
    """
    folders = [path for path in map(pathlib.Path, rundirs) if not path.is_file()]
    if not folders:
        raise ValueError("no run folder to report on; give some with --runs=runs/demo/*")
    runs = [read_run(path) for path in folders]
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


# Claims


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence that figures decide: figures[i] against baselines[i], both of seeds[i]."""

    sentence: str
    unit: str
    lower_is_better: bool
    seeds: tuple[int, ...]
    figures: tuple[float, ...]
    baselines: tuple[float, ...]

    @property
    def figure(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.figures)

    @property
    def baseline(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.baselines)

    @property
    def difference(self) -> float:
        """Figure minus baseline."""
        return self.figure - self.baseline

    @property
    def holds(self) -> bool:
        """Whether the mean figure beats the mean baseline; a tie, or one not finite, does not."""
        return self._beats(self.figure, self.baseline)

    @property
    def seeds_held(self) -> int:
        """In how many seeds the figure beats its baseline."""
        return sum(map(self._beats, self.figures, self.baselines))

    @property
    def verdict(self) -> str:
        """Whether it holds, in plain words, and in how many seeds."""
        word = "holds" if self.holds else "does not hold"
        many = len(self.seeds) > 1
        return f"{word} (in {self.seeds_held} of {len(self.seeds)} seeds)" if many else word

    def _beats(self, figure: float, baseline: float) -> bool:
        gain = baseline - figure if self.lower_is_better else figure - baseline
        return math.isfinite(gain) and gain > 0


def _score(run: Run, key: str) -> float:
    if key not in run.scores:
        raise ValueError(f"{run.path}/evaluate.json has no {key}; evaluate that run first.")
    return float(run.scores[key])


def claim_pretraining(runs: Sequence[Run]) -> Claim:
    """Nats per text token of held-out text, against a unigram model of the same tokens.

    runs: one a seed. Raises ValueError for a run that is not evaluated.
    """
    return Claim(
        "Pre-training predicts held-out text better than a unigram model of its tokens.",
        SCORES["text_nats"],
        lower_is_better=True,
        seeds=tuple(run.seed for run in runs),
        figures=tuple(_score(run, "text_nats") for run in runs),
        baselines=tuple(_score(run, "unigram_nats") for run in runs),
    )


def claim_finetuning(runs: Sequence[Run], scratch: Sequence[Run], measure: str = "nats") -> Claim:
    """The score after fine-tuning the pre-trained weights, against fine-tuning fresh ones.

    runs, scratch: one a seed; seeds in both are compared. measure: a key of COMPARED.
    Raises ValueError where two runs differ in updates, parameters or held-out tokens.
    """
    sentence = "Fine-tuning the pre-trained weights beats fine-tuning from scratch"
    return _compared(sentence, runs, scratch, measure)


def claim_distillation(runs: Sequence[Run], alone: Sequence[Run], measure: str = "nats") -> Claim:
    """The score of students with a teacher, against the same students without; as above."""
    sentence = "The distilled student beats the same student trained without a teacher"
    return _compared(sentence, runs, alone, measure)


def _compared(sentence: str, runs: Sequence[Run], others: Sequence[Run], measure: str) -> Claim:
    by_seed = {run.seed: run for run in others}
    pairs = [(run, by_seed[run.seed]) for run in runs if run.seed in by_seed]
    if not pairs:
        ours, theirs = ([run.seed for run in group] for group in (runs, others))
        raise ValueError(f"seeds {ours} and {theirs} share none; run both with the same seeds.")
    for run, other in pairs:
        for what, mine, its in (
            ("updates", run.updates, other.updates),
            ("parameters", run.manifest.get("params"), other.manifest.get("params")),
            ("held-out tokens", run.scores.get("tokens"), other.scores.get("tokens")),
        ):
            if mine != its and None not in (mine, its):
                message = f"{run.path} has {mine:,} {what}, {other.path} {its:,}; make them equal."
                raise ValueError(message)
    updates = "/".join(f"{n:,}" for n in sorted({run.updates for run, _ in pairs}))
    return Claim(
        f"{sentence}, at equal updates ({updates}).",
        SCORES[measure],
        lower_is_better=COMPARED[measure],
        seeds=tuple(run.seed for run, _ in pairs),
        figures=tuple(_score(run, measure) for run, _ in pairs),
        baselines=tuple(_score(other, measure) for _, other in pairs),
    )


def demo_claims(runs: Sequence[Run]) -> list[Claim]:
    """Every claim that the evaluated runs among these decide, by their roles (ROLES).

    Raises ValueError where two runs that a claim compares are not comparable.
    """

    def scored(role, *keys):
        return [r for r in runs if r.role == role and all(key in r.scores for key in keys)]

    pretrained = scored("pretrain", "text_nats", "unigram_nats")
    claims = [claim_pretraining(pretrained)] if pretrained else []
    for claim, ours, theirs in (
        (claim_finetuning, "finetune", "scratch"),
        (claim_distillation, "distill", "alone"),
    ):
        for measure in COMPARED:
            pair = scored(ours, measure), scored(theirs, measure)
            if all(pair):
                claims.append(claim(*pair, measure))
    return claims
