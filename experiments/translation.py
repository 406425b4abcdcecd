"""Does pre-training help a small model to translate captions? English to German, Multi30k.

  python -m experiments.translation --data_dir=...

Pre-trained on English prose and then fine-tuned, against trained from scratch for as many updates,
three seeds each. Answer: translation.md; every figure: translation.jsonl.
"""

from __future__ import annotations

from experiments import demo, stages

STEPS = 1200


def commands(home: str, data: str) -> list[list[str]]:
    """The training of all arms as arguments of `python -m lm`, in order."""
    made = stages.prepared(home, data)
    for seed in stages.SEEDS:
        made.append(stages.pretrained(home, seed))
        for scratch in (False, True):
            made.append(stages.tuned(home, data, "multi30k", seed, STEPS, scratch))
    return made


if __name__ == "__main__":
    flags = stages.arguments(__doc__, "runs/tasks")
    raise SystemExit(demo.run(commands(flags.workdir, flags.data_dir)))
