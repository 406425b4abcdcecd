"""Does a small model beat the lead baseline at subject lines of emails? AESLC.

  python -m experiments.summarization --data_dir=...

The pre-trained models of `experiments.translation`, fine-tuned, three seeds, against the first
words of the body. Answer: summarization.md; every figure: summarization.jsonl.
"""

from __future__ import annotations

from experiments import demo, stages

STEPS = 600


def commands(home: str, data: str) -> list[list[str]]:
    """The training of all seeds as arguments of `python -m lm`, in order."""
    made = stages.prepared(home, data)
    for seed in stages.SEEDS:
        made += [stages.pretrained(home, seed)]
        made += [stages.tuned(home, data, "aeslc", seed, STEPS)]
    return made


if __name__ == "__main__":
    flags = stages.arguments(__doc__, "runs/tasks")
    raise SystemExit(demo.run(commands(flags.workdir, flags.data_dir)))
