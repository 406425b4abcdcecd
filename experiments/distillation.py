"""Which way of distilling serves a student with a quarter of its teacher's parameters?

  python -m experiments.distillation --task=multi30k --data_dir=... [--methods=forward_kl,sequence]

A teacher is pre-trained on English prose and fine-tuned on the task. Every method trains the same
student, which starts in the teacher's layers, for as many updates, three seeds each. Beside them
the student that has no teacher, for as many updates (alone) and for as long as it takes with one
(alone_longer); the one that has the teacher's layers and no more (start); and for LONG times as
many updates the teacher's answers (sequence_long) and no teacher (alone_long). Answer:
distillation.md; every figure: distillation_<task>.jsonl. What is finished is not trained again.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import time
from typing import NamedTuple

from experiments import pipeline, stages
from lm import cli, decoding, inference, logs, lookup, parallel, runs

PRETRAIN = 1500  # updates of the teacher's pre-training
STUDENT = {"d_model": 64, "d_ff": 256, "num_encoder_layers": 4, "num_decoder_layers": 2}
STUDENT |= {"lm_head": "tied", "dropout_rate": 0.0}
INIT = "even sliced"
LONG = 8
LABELS = {"labels": {"weight": 0.2}}
TAUGHT = {"forward_kl": {"weight": 0.8, "temperature": 2.0}}
METHODS = {  # name -> what teacher.loss says; what else a method changes is in `student`
    "start": {"labels": {}},
    "sequence": {"labels": {}},
    "forward_kl": LABELS | TAUGHT,
    "reverse_kl": LABELS | {"reverse_kl": {"weight": 0.8}},
    "jsd": LABELS | {"jsd": {"weight": 0.8, "beta": 0.5}},
    "logit_mse": LABELS | {"logit_mse": {"weight": 0.1}},
    "hidden": LABELS | TAUGHT | {"hidden": {"weight": 0.1}},
    "relations": LABELS | TAUGHT | {"relations": {"weight": 0.1}},
    "cached": LABELS | TAUGHT,
    "sequence_kl": LABELS | TAUGHT,
    "on_policy": LABELS | TAUGHT,
    "sequence_long": {"labels": {}},
}
HOW = "greedy"
INPUTS = 256  # whose decoding is timed
ORDER = ("alone", "alone_longer", *METHODS, "alone_long")


class Task(NamedTuple):
    """What is distilled. steps: updates of a student; split: what is scored, by which scores, the
    first of them compared with the teacher's.
    """

    teacher_steps: int
    flags: tuple[str, ...]
    steps: int
    split: str
    scores: tuple[str, ...]


TEXT = ("--config.data.input_length=128", "--config.data.batch_size=32")
UNPACKED = {  # for as many pairs an update as packed rows hold
    "multi30k": [
        f"--config.data.{key}=48" for key in ("batch_size", "input_length", "target_length")
    ]
}
TASKS = {
    "multi30k": Task(4000, (), 500, "test", ("bleu", "chrf", "nats")),
    "aeslc": Task(3000, TEXT, 150, "validation", ("rougeL", "rouge1", "rouge2", "nats")),
}


def teacher(home: str, data: str, name: str) -> list[list[str]]:
    """Commands that make the teacher, and write its answers to the training split, if not there."""
    task, place = TASKS[name], f"--workdir={home}/{name}/teacher"
    steps = [f"--config.steps={task.teacher_steps}", "--config.name=teacher", place]
    tokens = f"--config.tokenizer.dir={home}/tokens/tokenizer"
    words = ["--config=configs/pretrain.py", f"--config.data.task={home}/prose", tokens]
    words += [f"--config.steps={PRETRAIN}", "--config.data.input_length=128"]
    words += ["--config.data.batch_size=16", f"--workdir={home}/pretrain"]
    made = [*stages.prepared(home, data), ["train", *words]]
    words = [f"--config=configs/{name}.py:{home}/pretrain", *_data(home, data, name)]
    made.append(["train", *words, *steps])
    said = [
        "--split=train",
        f"--out={answers(home, name)}",
        "--decoding=beam num_beams=4 length_penalty=0.6",
    ]
    written = pathlib.Path(answers(home, name)).exists()  # whole, since predict is not done before
    return made if written else [*made, ["predict", place, *said]]


def answers(home: str, name: str) -> str:
    """The file of what the teacher says to the training split."""
    return f"{home}/{name}/answers.jsonl"


def _data(home: str, data: str, name: str) -> list[str]:
    return [
        f"--config.data.tfds_dir={data}",
        f"--config.data.shards_dir={home}/shards/{name}",
        *TASKS[name].flags,
    ]


def student(home: str, data: str, name: str, method: str, seed: int) -> list[list[str]]:
    """Commands that train a student by a method of ORDER."""
    words = [*_data(home, data, name), f"--config.seed={seed}", f"--config.name={method}"]
    words += [f"--config.model.{key}={value}" for key, value in STUDENT.items()]
    words += [f"--config.tokenizer.dir={home}/tokens/tokenizer"]
    words += [f"--config.steps={_updates(home, name, method, seed)}"]
    made, file = [], f"configs/{name}.py"
    if method in METHODS:
        words += ["--config.stage=distill", f"--config.teacher.workdir={home}/{name}/teacher"]
        words += [
            f"--config.teacher.student_init={INIT}",
            f"--config.teacher.loss={METHODS[method]!r}",
        ]
    if method.startswith("sequence"):
        words += [f"--config.data.train_split={answers(home, name)}"]
        words += [f"--config.data.shards_dir={home}/shards/{name}_answers"]
    if method == "on_policy":
        words += ["--config.teacher.on_policy.fraction=0.25", *UNPACKED.get(name, ())]
        words += [
            "--config.data.packing=none",
            f"--config.data.shards_dir={home}/shards/{name}_rows",
        ]
    words.insert(0, f"--config={file}")
    if method == "cached":
        cache = f"{home}/{name}/cache/{seed}"
        made.append(["teacher-cache", *words, f"--out={cache}"])
        words.append(f"--config.teacher.cache={cache}")
    return [*made, ["train", *words, f"--workdir={home}/{name}/{method}/{seed}"]]


def _updates(home: str, name: str, method: str, seed: int) -> int:
    """As many for all, but for the long ways and for the student that has no teacher and as much
    time as with one.
    """
    share = LONG if method.endswith("_long") else 1
    if method == "alone_longer":
        arms = ("forward_kl", "alone")
        taken = [stages.update_seconds(f"{home}/{name}/{arm}/{seed}") for arm in arms]
        share = taken[0] / taken[1]
    return round(TASKS[name].steps * share)


def shorter(method: str) -> str:
    """The method that takes the same updates, and no more of them than all."""
    return method.partition("_long")[0]


def timed(home: str, data: str, name: str, method: str) -> list[list[str]]:
    """The command of a few updates of a method, in a log that tells what one takes: of runs made
    one after another on an otherwise idle machine, as those of the comparison need not be.
    """
    words = student(home, data, name, method, stages.SEEDS[0])[-1][:-1]
    words += ["--config.steps=60", "--config.log_every_steps=5", "--config.eval_every_steps=60"]
    return [[*words, f"--workdir={home}/{name}/timed/{method}"]]


def decoding_seconds(home: str, name: str, method: str, turns: int = 7) -> dict:
    """What teacher and student take for the same inputs, in turn: medians, and every share."""
    asked, seconds = {}, {}
    for arm, place in (("teacher", "teacher"), ("student", f"{method}/{stages.SEEDS[0]}")):
        run = runs.read_run(f"{home}/{name}/{place}")
        tokens = runs.make_tokenizer(run)
        strategy = parallel.make_strategy(run.parallel)
        placed = strategy.place_state(inference.read_params(run, tokens, strategy=strategy)[0])
        how = decoding.parse(HOW)
        asked[arm] = inference.Generator(run, strategy, placed, tokens, how, rows=32)
        seconds[arm] = []
    texts = [row["inputs"] for row in logs.read(answers(home, name))[:INPUTS]]
    for _ in range(turns + 1):  # the first compiles
        for arm, ask in asked.items():
            start = time.perf_counter()
            list(ask(texts))
            seconds[arm].append(time.perf_counter() - start)
    taken = {arm: statistics.median(each[1:]) for arm, each in seconds.items()}
    pairs = zip(seconds["teacher"][1:], seconds["student"][1:], strict=True)
    shares = sorted(student / teacher for teacher, student in pairs)
    return {"arm": "decoding", "method": method, "shares": shares} | taken


def figures(home: str, name: str, methods: list[str]) -> list[dict]:
    """A row a run: teacher and students, scored; of a student the seconds of quiet updates."""
    chosen = {"split": TASKS[name].split, "how": HOW}
    rows = [stages.scored_run(f"{home}/{name}/teacher", "teacher", 0, **chosen)]
    for method in methods:
        each = stages.update_seconds(f"{home}/{name}/timed/{shorter(method)}")
        for row in stages.scored(f"{home}/{name}", method, **chosen):
            rows.append(row | {"seconds": round(row["planned_updates"] * each)})
    return rows


def table(rows: list[dict], speeds: list[dict], names: tuple[str, ...]) -> str:
    """Markdown: the scores; the share of the teacher's, of its time of decoding, and what a way
    takes: updates, and seconds of them.
    """
    first, lines = names[0], [stages.table(rows, names), ""]
    lines += [f"| method | % of the teacher's {first} | updates | seconds of updates | decoding |"]
    lines += ["| --- " * 5 + "|"]
    shares = {row["method"]: row["shares"] for row in speeds}
    for method in dict.fromkeys(row["arm"] for row in rows):
        runs = [row for row in rows if row["arm"] == method]
        share = statistics.mean(row["figures"][first] / rows[0]["figures"][first] for row in runs)
        updates, taken = (
            statistics.mean(row[key] for row in runs) for key in ("planned_updates", "seconds")
        )
        each = shares.get(method, [1.0])
        said = f"{statistics.median(each):.2f} ({each[0]:.2f} to {each[-1]:.2f})"
        lines.append(f"| {method} | {100 * share:.1f} | {updates:.0f} | {taken:.0f} | {said} |")
    return "\n".join(lines)


def main(flags) -> int:
    """Train what is not there, score all, print and keep the figures."""
    home, data, name = flags.workdir, flags.data_dir, flags.task
    lookup.lookup(TASKS, name, "--task")
    methods = flags.methods.split(",") if flags.methods else list(ORDER)
    for method in methods:
        lookup.lookup(dict.fromkeys(ORDER), method, "--methods")
    if flags.dry_run:
        todo = teacher(home, data, name)
        for method in [m for m in methods if m != "alone_longer"]:
            todo += student(home, data, name, method, stages.SEEDS[0])
        return pipeline.show(todo)
    if code := pipeline.run(teacher(home, data, name)):
        return code
    for method in sorted(methods, key=lambda method: method == "alone_longer"):
        for seed in stages.SEEDS:
            if code := pipeline.run(student(home, data, name, method, seed)):
                return code
    for method in dict.fromkeys(map(shorter, methods)):
        if code := pipeline.run(timed(home, data, name, method)):
            return code
    rows = figures(home, name, methods)
    speeds = [decoding_seconds(home, name, method) for method in methods]
    stages.keep(f"distillation_{name}", [*rows, *speeds])
    print(table(rows, speeds, TASKS[name].scores))
    return 0


def arguments(words=None) -> argparse.Namespace:
    """The flags of this program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="multi30k", help=", ".join(TASKS))
    parser.add_argument("--workdir", default="runs/distillation", help="folder of the runs")
    parser.add_argument("--data_dir", default="", help="TFDS's directory")
    parser.add_argument("--methods", default="", help=f"of {', '.join(ORDER)}; empty: all")
    parser.add_argument("--dry_run", action="store_true", help="print the first seed's commands")
    return parser.parse_args(words)


if __name__ == "__main__":
    flags = arguments()
    raise SystemExit(cli.run_guarded(lambda: main(flags)))
