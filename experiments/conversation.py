"""Does a small model find the next turn of a dialogue better than retrieval? SGD.

  python -m experiments.conversation --data_dir=...

The pre-trained models of `experiments.translation`, fine-tuned, three seeds, against
the reply to the most similar history by tf-idf. Answer: conversation.md; every figure:
conversation.jsonl.
"""

from __future__ import annotations

from experiments import demo, stages

STEPS = 1000


def commands(home: str, data: str) -> list[list[str]]:
    """The training of all seeds as arguments of `python -m lm`, in order."""
    made = stages.prepared(home, data)
    for seed in stages.SEEDS:
        made += [stages.pretrained(home, seed)]
        made += [stages.tuned(home, data, "sgd_dialogues", seed, STEPS)]
    return made


if __name__ == "__main__":
    flags = stages.arguments(__doc__, "runs/tasks")
    raise SystemExit(demo.run(commands(flags.workdir, flags.data_dir)))
