"""Do the demo's three claims hold over three seeds, and which objective serves it better?

  python -m experiments.claims --config=configs/demo.py --config.workdir=runs/claims

Runs the demo for seeds 0, 1 and 2 on one dataset and tokenizer, and once more its student, which
starts from the teacher's layers, without the teacher's loss (untaught). Then, for seed 0, it trains
with token masking. Answer: claims.md; every figure: claims.jsonl.
"""

from __future__ import annotations

import json
import pathlib
import sys

from experiments import pipeline, verdicts
from lm import cli, logs, report

SEEDS = (0, 1, 2)
ARMS = {  # the other objective, at the density of configs/pretrain.py
    "token_masking": ["objective.name=token_masking"],
}
HERE = pathlib.Path(__file__).parent


def of_seed(config, seed: int):
    """The demo's config for one seed, in a folder of its own, on the first seed's corpus."""
    home = pathlib.Path(config.workdir)
    made = config.copy_and_resolve_references()
    made.workdir, made.seed = str(home / f"seed{seed}"), seed
    made.data_dir = str(home / "tfds")
    made.tokenizer = str(home / "seed0/pretrain/tokenizer") if seed else ""
    return made


def untaught(config, seed: int) -> list[list[str]]:
    """Commands of the student that starts as the distilled one does and has the labels alone."""
    made = of_seed(config, seed)
    home = f"--workdir={made.workdir}"
    lines = pipeline.commands(made)
    (student,) = [line for line in lines if line[0] == "train" and line[-1] == f"{home}/distill"]
    changes = [
        "--config.teacher.loss={'labels': {'weight': 1.0}}",
        "--config.name=untaught",
        f"{home}/untaught",
    ]
    return [[*student[:-1], *changes], ["evaluate", f"{home}/untaught"]]


def arm(config, name: str) -> list[list[str]]:
    """Commands that pre-train with another objective and fine-tune from it, all else equal."""
    made = of_seed(config, SEEDS[0])
    made.tokenizer = f"{made.workdir}/pretrain/tokenizer"
    made.workdir = f"{config.workdir}/{name}"
    wanted = {f"--workdir={made.workdir}/{role}" for role in ("pretrain", "finetune")}
    chosen = [
        line for line in pipeline.commands(made) if wanted & set(line) and line[0] != "corpus"
    ]
    pretrain = chosen[0]
    pretrain += [f"--config.{change}" for change in ARMS[name]]
    return chosen


def table(runs: list[report.RunFolder]) -> str:
    """A row a run: role, parameters, updates, scores."""
    keys = ("nats", "bits_per_byte", "text_nats", "unigram_entropy", "rouge1", "rouge2", "rougeL")
    lines = ["| run | parameters | updates | " + " | ".join(keys) + " |"]
    lines.append("|" + " --- |" * (3 + len(keys)))
    for run in runs:
        scores = [f"{run.scores[key]:.3f}" if key in run.scores else "" for key in keys]
        name = f"{run.role}, {run.path.parent.name}"
        facts = [name, f"{run.manifest['params']:,}", f"{run.updates:,}"]
        lines.append(f"| {' | '.join(facts + scores)} |")
    return "\n".join(lines)


def claims_text(claims: list[report.Claim]) -> str:
    """Each claim in a line: sentence, figure, baseline, verdict."""
    return "\n".join(
        f"- {claim.sentence} {claim.figure:.3f} against {claim.baseline:.3f} "
        f"({claim.unit}): {claim.verdict}."
        for claim in claims
    )


def run(config, dry_run: bool = False) -> int:
    """Run all, then write claims.jsonl and print what claims.md quotes."""
    home = pathlib.Path(config.workdir)
    commands = [pipeline.commands(of_seed(config, seed)) + untaught(config, seed) for seed in SEEDS]
    for group in [*commands, *(arm(config, name) for name in ARMS)]:
        if code := pipeline.show(group) if dry_run else pipeline.run(group):
            return code
    if dry_run:
        return 0
    folders = [home / f"seed{seed}" / name for seed in SEEDS for name in pipeline.RUNS]
    others = [home / f"seed{seed}" / "untaught" for seed in SEEDS]
    others += [home / name / role for name in ARMS for role in ("pretrain", "finetune")]
    ours, theirs = report.read_run_folders(folders), report.read_run_folders(others)
    rows = [
        {"run": f"{r.path.parent.name}/{r.path.name}", "seed": r.seed, "config": r.config}
        | {"manifest": r.manifest, "scores": r.scores}
        for r in (*ours, *theirs)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    logs.write_atomically(HERE / "claims.jsonl", lines)
    claims = verdicts.demo_claims(ours)
    title = "The claims over three seeds"
    report.write(folders, home / "report.html", title=title, claims=claims)
    print(f"{claims_text(claims)}\n\n{table([*ours, *theirs])}")
    return 0


def main(arguments: list[str]) -> int:
    """The command line: --config, and --dry_run to print the commands alone."""
    values = cli.parse_flags("claims", ("config", "dry_run"), arguments)
    return run(values.config, values.dry_run)


if __name__ == "__main__":
    raise SystemExit(cli.run_guarded(lambda: main(sys.argv[1:])))
