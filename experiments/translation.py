"""Does pre-training help a small model to translate captions? English to German, Multi30k.

  python -m experiments.translation --data_dir=...

Compares fine-tuning after pre-training on English prose with training from scratch for equal
updates, three seeds each. Answer: translation.md; all scores: translation.jsonl.
"""

from __future__ import annotations

import argparse

from experiments import pipeline, stages
from lm import cli, metrics

STEPS = 1200


def main(flags: argparse.Namespace) -> int:
    """Trains all arms, scores them on the test split, prints and saves the scores."""
    home, data = flags.workdir, flags.data_dir
    commands = stages.commands(home, data, "multi30k", STEPS, scratch=True)
    if flags.dry_run:
        return pipeline.show(commands)
    if code := pipeline.run(commands):
        return code
    rows, differences = [], []
    for decoding_text in ("greedy", "beam num_beams=4 length_penalty=0.6"):
        arms = [
            stages.score_seeds(home, arm, split="test", decoding=decoding_text)
            for arm in ("multi30k", "multi30k_scratch")
        ]
        rows += [row for arm in arms for row in arm]
        for pretrained, scratch in zip(*arms, strict=True):
            predictions = [
                [row["prediction"] for row in arm["answers"]] for arm in (pretrained, scratch)
            ]
            references = [row["targets"] for row in pretrained["answers"]]
            ends = metrics.difference_intervals("bleu", *predictions, references)["bleu"]
            differences.append(
                f"| {decoding_text} | {pretrained['seed']} | {ends[0]:.2f} to {ends[1]:.2f} |"
            )
    stages.save("translation", rows)
    print(stages.table(rows, ("bleu", "chrf", "nats")))
    print("\n| decoding | seed | pre-trained - scratch, BLEU, 95 % |\n| --- | --- | --- |")
    print("\n".join(differences))
    return 0


if __name__ == "__main__":
    flags = stages.arguments(__doc__, "runs/tasks")
    raise SystemExit(cli.run_guarded(lambda: main(flags)))
