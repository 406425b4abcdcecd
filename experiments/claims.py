"""Do the demo's three claims hold over three seeds, and which objective serves it better?

  python -m experiments.claims --config=configs/demo.py --config.workdir=runs/claims

Runs the demo for seeds 0, 1 and 2 on one dataset and tokenizer, and for each seed the student with
the teacher's layers but without the teacher's loss (untaught). Then it pre-trains and fine-tunes
seed 0 with token masking. Answer: claims.md; all scores: claims.jsonl.
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


def seed_config(config, seed: int):
    """The demo's config for one seed, in its own folder, on the first seed's corpus."""
    home = pathlib.Path(config.workdir)
    seed_demo = config.copy_and_resolve_references()
    seed_demo.workdir, seed_demo.seed = str(home / f"seed{seed}"), seed
    seed_demo.data_dir = str(home / "tfds")
    seed_demo.tokenizer = str(home / "seed0/pretrain/tokenizer") if seed else ""
    return seed_demo


def untaught(config, seed: int) -> list[list[str]]:
    """Commands that train the distilled student's initialization on the labels only."""
    seed_demo = seed_config(config, seed)
    home = f"--workdir={seed_demo.workdir}"
    lines = pipeline.commands(seed_demo)
    (student,) = [line for line in lines if line[0] == "train" and line[-1] == f"{home}/distill"]
    changes = [
        "--config.teacher.loss={'labels': {'weight': 1.0}}",
        "--config.name=untaught",
        f"{home}/untaught",
    ]
    return [[*student[:-1], *changes], ["evaluate", f"{home}/untaught"]]


def arm(config, name: str) -> list[list[str]]:
    """Commands that pre-train with another objective and fine-tune, all else equal."""
    seed_demo = seed_config(config, SEEDS[0])
    seed_demo.tokenizer = f"{seed_demo.workdir}/pretrain/tokenizer"
    seed_demo.workdir = f"{config.workdir}/{name}"
    workdirs = {f"--workdir={seed_demo.workdir}/{role}" for role in ("pretrain", "finetune")}
    commands = [
        line
        for line in pipeline.commands(seed_demo)
        if workdirs & set(line) and line[0] != "corpus"
    ]
    pretrain = commands[0]
    pretrain += [f"--config.{change}" for change in ARMS[name]]
    return commands


def table(runs: list[report.RunFolder]) -> str:
    """A Markdown row for each run: role, parameters, updates, scores."""
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
    """A line for each claim: sentence, figure, baseline, verdict."""
    return "\n".join(
        f"- {claim.sentence} {claim.figure:.3f} against {claim.baseline:.3f} "
        f"({claim.unit}): {claim.verdict}."
        for claim in claims
    )


def run(config, dry_run: bool = False) -> int:
    """Runs all, writes claims.jsonl and prints the claims and the table of claims.md."""
    home = pathlib.Path(config.workdir)
    commands = [
        pipeline.commands(seed_config(config, seed)) + untaught(config, seed) for seed in SEEDS
    ]
    for group in [*commands, *(arm(config, name) for name in ARMS)]:
        if code := pipeline.show(group) if dry_run else pipeline.run(group):
            return code
    if dry_run:
        return 0
    folders = [home / f"seed{seed}" / name for seed in SEEDS for name in pipeline.RUNS]
    other_folders = [home / f"seed{seed}" / "untaught" for seed in SEEDS]
    other_folders += [home / name / role for name in ARMS for role in ("pretrain", "finetune")]
    demo_runs, other_runs = report.read_run_folders(folders), report.read_run_folders(other_folders)
    rows = [
        {"run": f"{r.path.parent.name}/{r.path.name}", "seed": r.seed, "config": r.config}
        | {"manifest": r.manifest, "scores": r.scores}
        for r in (*demo_runs, *other_runs)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    logs.write_atomically(HERE / "claims.jsonl", lines)
    claims = verdicts.demo_claims(demo_runs)
    title = "The claims over three seeds"
    report.write(folders, home / "report.html", title=title, claims=claims)
    print(f"{claims_text(claims)}\n\n{table([*demo_runs, *other_runs])}")
    return 0


def main(arguments: list[str]) -> int:
    """Parses --config and --dry_run, which only prints the commands, and runs."""
    values = cli.parse_flags("claims", ("config", "dry_run"), arguments)
    return run(values.config, values.dry_run)


if __name__ == "__main__":
    raise SystemExit(cli.run_guarded(lambda: main(sys.argv[1:])))
