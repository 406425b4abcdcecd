"""Does pre-training help a small model to translate captions? English to German, Multi30k.

  python -m experiments.translation --data_dir=...

Pre-trained on English prose and then fine-tuned, against trained from scratch for as many updates,
three seeds each. Answer: translation.md; every figure: translation.jsonl.
"""

from __future__ import annotations

import argparse

from experiments import pipeline, stages
from lm import cli, metrics

STEPS = 1200


def main(flags: argparse.Namespace) -> int:
    """Train all arms, score them on the test split, print and keep the figures."""
    home, data = flags.workdir, flags.data_dir
    commands = stages.commands(home, data, "multi30k", STEPS, scratch=True)
    if flags.dry_run:
        return pipeline.show(commands)
    if code := pipeline.run(commands):
        return code
    rows, differences = [], []
    for how in ("greedy", "beam num_beams=4 length_penalty=0.6"):
        arms = [
            stages.scored(home, arm, split="test", how=how)
            for arm in ("multi30k", "multi30k_scratch")
        ]
        rows += [row for arm in arms for row in arm]
        for ours, theirs in zip(*arms, strict=True):
            said = [[row["prediction"] for row in arm["answers"]] for arm in (ours, theirs)]
            truth = [row["targets"] for row in ours["answers"]]
            ends = metrics.difference_intervals("bleu", *said, truth)["bleu"]
            differences.append(f"| {how} | {ours['seed']} | {ends[0]:.2f} to {ends[1]:.2f} |")
    stages.keep("translation", rows)
    print(stages.table(rows, ("bleu", "chrf", "nats")))
    print("\n| decoding | seed | pre-trained - scratch, BLEU, 95 % |\n| --- | --- | --- |")
    print("\n".join(differences))
    return 0


if __name__ == "__main__":
    flags = stages.arguments(__doc__, "runs/tasks")
    raise SystemExit(cli.run_guarded(lambda: main(flags)))
