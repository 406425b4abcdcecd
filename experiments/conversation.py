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
MAX_EXAMPLES = 2000  # first examples of validation


def main(flags: argparse.Namespace) -> int:
    """Trains all seeds, scores them and two retrieval baselines, prints and saves the scores.

    The baselines retrieve by the whole history, and by the user's last turn alone (the stronger).
    """
    home, data = flags.workdir, flags.data_dir
    commands = stages.commands(home, data, "sgd_dialogues", STEPS)
    if flags.dry_run:
        return pipeline.show(commands)
    if code := pipeline.run(commands):
        return code
    rows = []
    for decoding_text in ("greedy", "beam num_beams=4 length_penalty=0.6"):
        rows += stages.score_seeds(
            home,
            "sgd_dialogues",
            split="validation",
            decoding=decoding_text,
            max_examples=MAX_EXAMPLES,
        )
    task = tasks.TASKS["sgd_dialogues"]
    records = sources.records(task.source, "train[:98%]", data)
    train_pairs = [text for record in records for text in task.to_texts(record)]
    answers = rows[0]["answers"]
    references = [pair["targets"] for pair in answers]
    for name, shorten in {
        "retrieval, whole history": lambda text: text,
        "retrieval, last turn": lambda text: text.rpartition("\n")[2],
    }.items():
        replies = [text["targets"] for text in train_pairs]
        search = retrieval.Retrieval([shorten(text["inputs"]) for text in train_pairs], replies)
        predictions = search([shorten(pair["inputs"]) for pair in answers])
        rows.append(stages.baseline(name, task.metrics, predictions, references))
    stages.save("conversation", rows)
    print(stages.table(rows, ("bleu", "exact_match", "nats")))
    return 0


if __name__ == "__main__":
    flags = stages.arguments(__doc__, "runs/tasks")
    raise SystemExit(cli.run_guarded(lambda: main(flags)))
