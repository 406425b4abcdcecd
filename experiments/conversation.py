"""Does a small model find the next turn of a dialogue better than retrieval? SGD.

  python -m experiments.conversation --data_dir=...

The pre-trained models of `experiments.translation`, fine-tuned, three seeds, against
the reply to the most similar history by tf-idf. Answer: conversation.md; every figure:
conversation.jsonl.
"""

from __future__ import annotations

import argparse

from experiments import pipeline, retrieval, stages
from lm import cli, sources, tasks

STEPS = 1000
MOST = 2000  # examples of validation that are answered, the first


def main(flags: argparse.Namespace) -> int:
    """Train all seeds, score them and retrieval on validation, print and keep the figures.

    Retrieval by the whole history, and by the user's last turn alone, which is the stronger one.
    """
    home, data = flags.workdir, flags.data_dir
    commands = stages.commands(home, data, "sgd_dialogues", STEPS)
    if flags.dry_run:
        return pipeline.show(commands)
    if code := pipeline.run(commands):
        return code
    rows = []
    for how in ("greedy", "beam num_beams=4 length_penalty=0.6"):
        rows += stages.scored(home, "sgd_dialogues", split="validation", how=how, most=MOST)
    task = tasks.TASKS["sgd_dialogues"]
    records = sources.records(task.source, "train[:98%]", data)
    known = [text for record in records for text in task.to_texts(record)]
    asked = rows[0]["answers"]
    truth = [pair["targets"] for pair in asked]
    for name, part in {
        "retrieval, whole history": lambda text: text,
        "retrieval, last turn": lambda text: text.rpartition("\n")[2],
    }.items():
        replies = [text["targets"] for text in known]
        search = retrieval.Retrieval([part(text["inputs"]) for text in known], replies)
        said = search([part(pair["inputs"]) for pair in asked])
        rows.append(stages.baseline(name, task.metrics, said, truth))
    stages.keep("conversation", rows)
    print(stages.table(rows, ("bleu", "exact_match", "nats")))
    return 0


if __name__ == "__main__":
    flags = stages.arguments(__doc__, "runs/tasks")
    raise SystemExit(cli.run_guarded(lambda: main(flags)))
