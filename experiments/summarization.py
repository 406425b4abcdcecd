"""Does a small model beat the lead baseline at subject lines of emails? AESLC.

  python -m experiments.summarization --data_dir=...

Fine-tunes the pre-trained models of `experiments.translation`, three seeds, and compares with the
first words of the body. Answer: summarization.md; all scores: summarization.jsonl.
"""

from __future__ import annotations

import argparse

import numpy as np

from experiments import pipeline, stages
from lm import cli, metrics, tasks

STEPS = 600


def main(flags: argparse.Namespace) -> int:
    """Trains all seeds, scores them and two lead baselines, prints and saves the scores.

    The baselines: as many first words as subject lines have on average, and the first sentence.
    """
    home, data = flags.workdir, flags.data_dir
    commands = stages.commands(home, data, "aeslc", STEPS)
    if flags.dry_run:
        return pipeline.show(commands)
    if code := pipeline.run(commands):
        return code
    rows = []
    for decoding_text in ("greedy", "beam num_beams=4 length_penalty=0.6"):
        rows += stages.score_seeds(home, "aeslc", split="validation", decoding=decoding_text)
    pairs = rows[0]["answers"]
    references = [pair["targets"] for pair in pairs]
    prefix = tasks.TASKS["aeslc"].prefix
    for words in (round(np.mean([len(line.split()) for line in references])), 1000):
        predictions = [metrics.lead(pair["inputs"].removeprefix(prefix), words) for pair in pairs]
        name = f"first {words} words" if words < 1000 else "first sentence"
        rows.append(stages.baseline(name, ("rouge",), predictions, references))
    stages.save("summarization", rows)
    print(stages.table(rows, ("rouge1", "rouge2", "rougeL", "nats")))
    return 0


if __name__ == "__main__":
    flags = stages.arguments(__doc__, "runs/tasks")
    raise SystemExit(cli.run_guarded(lambda: main(flags)))
