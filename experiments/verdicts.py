"""The demo's claims, decided by the scores of its runs, and the page that shows them.

python -m experiments.verdicts --runs='runs/demo/*' --out=runs/demo/report.html
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lm import cli, report

COMPARED = {"nats": True, "rougeL": False}  # scores of a comparison: is lower better?


def _score(run: report.RunFolder, key: str) -> float:
    if key not in run.scores:
        raise ValueError(f"{run.path}/evaluate.json has no {key}; evaluate that run first.")
    return float(run.scores[key])


def claim_pretraining(runs: Sequence[report.RunFolder]) -> report.Claim:
    """Compare nats per held-out text token with the unigram entropy of the same tokens.

    runs: one for each seed. Raises ValueError for a run that is not evaluated.
    """
    return report.Claim(
        "Pre-training predicts held-out text better than its unigram entropy, which no model "
        "without context can beat.",
        report.SCORES["text_nats"],
        lower_is_better=True,
        seeds=tuple(run.seed for run in runs),
        figures=tuple(_score(run, "text_nats") for run in runs),
        baselines=tuple(_score(run, "unigram_entropy") for run in runs),
    )


def claim_finetuning(
    runs: Sequence[report.RunFolder], scratch: Sequence[report.RunFolder], score: str = "nats"
) -> report.Claim:
    """Compare fine-tuning pre-trained weights with fine-tuning random ones.

    Args:
      runs, scratch: one for each seed; the seeds in both are compared.
      score: a key of COMPARED.

    Raises ValueError where two runs differ in updates, parameters or held-out tokens.
    """
    sentence = "Fine-tuning the pre-trained weights beats fine-tuning from scratch"
    return _compare(sentence, runs, scratch, score)


def claim_distillation(
    runs: Sequence[report.RunFolder], alone: Sequence[report.RunFolder], score: str = "nats"
) -> report.Claim:
    """Compare students with the same students without a teacher; as claim_finetuning."""
    sentence = "The distilled student beats the same student trained without a teacher"
    return _compare(sentence, runs, alone, score)


def _compare(
    sentence: str,
    runs: Sequence[report.RunFolder],
    baselines: Sequence[report.RunFolder],
    score: str,
) -> report.Claim:
    by_seed = {run.seed: run for run in baselines}
    pairs = [(run, by_seed[run.seed]) for run in runs if run.seed in by_seed]
    if not pairs:
        first, second = ([run.seed for run in group] for group in (runs, baselines))
        raise ValueError(f"seeds {first} and {second} share none; run both with the same seeds.")
    for run, baseline in pairs:
        _check_comparable(run, baseline)
    updates = "/".join(f"{n:,}" for n in sorted({run.updates for run, _ in pairs}))
    return report.Claim(
        f"{sentence}, at equal updates ({updates}).",
        report.SCORES[score],
        lower_is_better=COMPARED[score],
        seeds=tuple(run.seed for run, _ in pairs),
        figures=tuple(_score(run, score) for run, _ in pairs),
        baselines=tuple(_score(baseline, score) for _, baseline in pairs),
    )


def _check_comparable(run: report.RunFolder, baseline: report.RunFolder) -> None:
    for quantity, first, second in (
        ("updates", run.updates, baseline.updates),
        ("parameters", run.manifest.get("params"), baseline.manifest.get("params")),
        ("held-out tokens", run.scores.get("tokens"), baseline.scores.get("tokens")),
    ):
        if first != second and None not in (first, second):
            raise ValueError(
                f"{run.path} has {first:,} {quantity}, {baseline.path} {second:,}; make them equal."
            )


def demo_claims(runs: Sequence[report.RunFolder]) -> list[report.Claim]:
    """List every claim that the evaluated runs among these decide, by their roles.

    Raises ValueError where two runs that a claim compares are not comparable.
    """

    def select(role: str, *keys: str) -> list[report.RunFolder]:
        return [r for r in runs if r.role == role and all(key in r.scores for key in keys)]

    pretrained = select("pretrain", "text_nats", "unigram_entropy")
    claims = [claim_pretraining(pretrained)] if pretrained else []
    for claim, role, baseline in (
        (claim_finetuning, "finetune", "scratch"),
        (claim_distillation, "distill", "alone"),
    ):
        for score in COMPARED:
            pair = select(role, score), select(baseline, score)
            if all(pair):
                claims.append(claim(*pair, score))
    return claims


def main(arguments: list[str]) -> int:
    """Write the page of some runs with the claims that they decide."""
    flags = cli.parse_flags("verdicts", ("runs", "out", "title"), arguments)
    folders = cli.find_run_folders(flags.runs)
    claims = demo_claims(report.read_run_folders(folders))
    out = flags.out or f"{folders[0]}/report.html"
    report.write(folders, out, title=flags.title, claims=claims)
    print(out)
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run_guarded(lambda: main(sys.argv[1:])))
