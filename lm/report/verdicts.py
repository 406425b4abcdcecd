"""What the project claims, decided by figures and never by words: pure functions of runs."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from lm.report import run_folders

COMPARED = {"nats": True, "rougeL": False}  # the scores that claims compare; is lower better?


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


def _score(run: run_folders.RunFolder, key: str) -> float:
    if key not in run.scores:
        raise ValueError(f"{run.path}/evaluate.json has no {key}; evaluate that run first.")
    return float(run.scores[key])


def claim_pretraining(runs: Sequence[run_folders.RunFolder]) -> Claim:
    """Nats per text token of held-out text, against the unigram entropy of the same tokens.

    runs: one a seed. Raises ValueError for a run that is not evaluated.
    """
    return Claim(
        "Pre-training predicts held-out text better than its unigram entropy, which no model "
        "without context can beat.",
        run_folders.SCORES["text_nats"],
        lower_is_better=True,
        seeds=tuple(run.seed for run in runs),
        figures=tuple(_score(run, "text_nats") for run in runs),
        baselines=tuple(_score(run, "unigram_entropy") for run in runs),
    )


def claim_finetuning(
    runs: Sequence[run_folders.RunFolder],
    scratch: Sequence[run_folders.RunFolder],
    measure: str = "nats",
) -> Claim:
    """The score after fine-tuning the pre-trained weights, against fine-tuning fresh ones.

    runs, scratch: one a seed; seeds in both are compared. measure: a key of COMPARED.
    Raises ValueError where two runs differ in updates, parameters or held-out tokens.
    """
    sentence = "Fine-tuning the pre-trained weights beats fine-tuning from scratch"
    return _compared(sentence, runs, scratch, measure)


def claim_distillation(
    runs: Sequence[run_folders.RunFolder],
    alone: Sequence[run_folders.RunFolder],
    measure: str = "nats",
) -> Claim:
    """The score of students with a teacher, against the same students without; as above."""
    sentence = "The distilled student beats the same student trained without a teacher"
    return _compared(sentence, runs, alone, measure)


def _compared(
    sentence: str,
    runs: Sequence[run_folders.RunFolder],
    others: Sequence[run_folders.RunFolder],
    measure: str,
) -> Claim:
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
        run_folders.SCORES[measure],
        lower_is_better=COMPARED[measure],
        seeds=tuple(run.seed for run, _ in pairs),
        figures=tuple(_score(run, measure) for run, _ in pairs),
        baselines=tuple(_score(other, measure) for _, other in pairs),
    )


def demo_claims(runs: Sequence[run_folders.RunFolder]) -> list[Claim]:
    """Every claim that the evaluated runs among these decide, by their roles (ROLES).

    Raises ValueError where two runs that a claim compares are not comparable.
    """

    def scored(role, *keys):
        return [r for r in runs if r.role == role and all(key in r.scores for key in keys)]

    pretrained = scored("pretrain", "text_nats", "unigram_entropy")
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
