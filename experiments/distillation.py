"""Which distillation method suits a student with a quarter of its teacher's parameters?

  python -m experiments.distillation --task=multi30k --data_dir=... [--methods=forward_kl,sequence]

A teacher is pre-trained on English prose and fine-tuned on the task. Every method trains the same
student, initialized from the teacher's layers, for equal updates and three seeds. Baselines: no
teacher for equal updates (alone) and for equal time (alone_longer); the teacher's layers and labels
only (start); and LONG times the updates on the teacher's answers (sequence_long) and without a
teacher (alone_long). Answer: distillation.md; all scores: distillation_<task>.jsonl. Finished runs
are not trained again.
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
WITH_TEACHER = {"forward_kl": {"weight": 0.8, "temperature": 2.0}}
METHODS = {  # name -> teacher.loss; `student` makes a method's other changes
    "start": {"labels": {}},
    "sequence": {"labels": {}},
    "forward_kl": LABELS | WITH_TEACHER,
    "reverse_kl": LABELS | {"reverse_kl": {"weight": 0.8}},
    "jsd": LABELS | {"jsd": {"weight": 0.8, "beta": 0.5}},
    "logit_mse": LABELS | {"logit_mse": {"weight": 0.1}},
    "hidden": LABELS | WITH_TEACHER | {"hidden": {"weight": 0.1}},
    "relations": LABELS | WITH_TEACHER | {"relations": {"weight": 0.1}},
    "cached": LABELS | WITH_TEACHER,
    "sequence_kl": LABELS | WITH_TEACHER,
    "on_policy": LABELS | WITH_TEACHER,
    "sequence_long": {"labels": {}},
}
DECODING = "greedy"
NUM_INPUTS = 256  # to time decoding with
ORDER = ("alone", "alone_longer", *METHODS, "alone_long")


class Task(NamedTuple):
    """A task to distill.

    steps: updates of a student. split: the split to score. scores: the first is compared with the
    teacher's.
    """

    teacher_steps: int
    flags: tuple[str, ...]
    steps: int
    split: str
    scores: tuple[str, ...]


TEXT = ("--config.data.input_length=128", "--config.data.batch_size=32")
UNPACKED = {  # as many pairs per update as packed rows hold
    "multi30k": [
        f"--config.data.{key}=48" for key in ("batch_size", "input_length", "target_length")
    ]
}
TASKS = {
    "multi30k": Task(4000, (), 500, "test", ("bleu", "chrf", "nats")),
    "aeslc": Task(3000, TEXT, 150, "validation", ("rougeL", "rouge1", "rouge2", "nats")),
}


def teacher(home: str, data: str, name: str) -> list[list[str]]:
    """Commands that train the teacher, and write its answers to the training split if missing."""
    task, workdir_flag = TASKS[name], f"--workdir={home}/{name}/teacher"
    steps = [f"--config.steps={task.teacher_steps}", "--config.name=teacher", workdir_flag]
    tokens = f"--config.tokenizer.dir={home}/tokens/tokenizer"
    words = ["--config=configs/pretrain.py", f"--config.data.task={home}/prose", tokens]
    words += [f"--config.steps={PRETRAIN}", "--config.data.input_length=128"]
    words += ["--config.data.batch_size=16", f"--workdir={home}/pretrain"]
    commands = [*stages.data_commands(home, data), ["train", *words]]
    words = [f"--config=configs/{name}.py:{home}/pretrain", *_data(home, data, name)]
    commands.append(["train", *words, *steps])
    file = answers(home, name)
    if pathlib.Path(file).exists():  # complete: predict renames it when done
        return commands
    words = ["--split=train", f"--out={file}", "--decoding=beam num_beams=4 length_penalty=0.6"]
    return [*commands, ["predict", workdir_flag, *words]]


def answers(home: str, name: str) -> str:
    """The file with the teacher's answers to the training split."""
    return f"{home}/{name}/answers.jsonl"


def _data(home: str, data: str, name: str) -> list[str]:
    return [
        f"--config.data.tfds_dir={data}",
        f"--config.data.shards_dir={home}/shards/{name}",
        *TASKS[name].flags,
    ]


def student(home: str, data: str, name: str, method: str, seed: int) -> list[list[str]]:
    """Commands that train a student with a method of ORDER."""
    words = [*_data(home, data, name), f"--config.seed={seed}", f"--config.name={method}"]
    words += [f"--config.model.{key}={value}" for key, value in STUDENT.items()]
    words += [f"--config.tokenizer.dir={home}/tokens/tokenizer"]
    words += [f"--config.steps={_updates(home, name, method, seed)}"]
    commands, file = [], f"configs/{name}.py"
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
        commands.append(["teacher-cache", *words, f"--out={cache}"])
        words.append(f"--config.teacher.cache={cache}")
    return [*commands, ["train", *words, f"--workdir={home}/{name}/{method}/{seed}"]]


def _updates(home: str, name: str, method: str, seed: int) -> int:
    """Updates of a method: equal for all but the long ones and alone_longer (equal time)."""
    share = LONG if method.endswith("_long") else 1
    if method == "alone_longer":
        arms = ("forward_kl", "alone")
        seconds = [stages.update_seconds(f"{home}/{name}/{arm}/{seed}") for arm in arms]
        share = seconds[0] / seconds[1]
    return round(TASKS[name].steps * share)


def shorter(method: str) -> str:
    """The method without _long, whose updates take the same time."""
    return method.partition("_long")[0]


def timed(home: str, data: str, name: str, method: str) -> list[list[str]]:
    """The command of a short run of a method, to time its updates on an otherwise idle machine."""
    words = student(home, data, name, method, stages.SEEDS[0])[-1][:-1]
    words += ["--config.steps=60", "--config.log_every_steps=5", "--config.eval_every_steps=60"]
    return [[*words, f"--workdir={home}/{name}/timed/{method}"]]


def decoding_seconds(home: str, name: str, method: str, turns: int = 7) -> dict:
    """Median decoding seconds of teacher and student in turns, and the ratio of every turn."""
    generators, seconds = {}, {}
    for arm, workdir_flag in (("teacher", "teacher"), ("student", f"{method}/{stages.SEEDS[0]}")):
        run = runs.read_run(f"{home}/{name}/{workdir_flag}")
        tokens = runs.make_tokenizer(run)
        strategy = parallel.make_strategy(run.parallel)
        params = strategy.place_state(inference.read_params(run, tokens, strategy=strategy)[0])
        config = decoding.parse(DECODING)
        generators[arm] = inference.Generator(run, strategy, params, tokens, config, rows=32)
        seconds[arm] = []
    texts = [row["inputs"] for row in logs.read(answers(home, name))[:NUM_INPUTS]]
    for _ in range(turns + 1):  # the first compiles
        for arm, generate in generators.items():
            start = time.perf_counter()
            list(generate(texts))
            seconds[arm].append(time.perf_counter() - start)
    medians = {arm: statistics.median(seconds_list[1:]) for arm, seconds_list in seconds.items()}
    pairs = zip(seconds["teacher"][1:], seconds["student"][1:], strict=True)
    shares = sorted(student / teacher for teacher, student in pairs)
    return {"arm": "decoding", "method": method, "shares": shares} | medians


def figures(home: str, name: str, methods: list[str]) -> list[dict]:
    """Scores the teacher and all students; a student's seconds are those of its timed run."""
    chosen = {"split": TASKS[name].split, "decoding": DECODING}
    rows = [stages.score_run(f"{home}/{name}/teacher", "teacher", 0, **chosen)]
    for method in methods:
        seconds_list = stages.update_seconds(f"{home}/{name}/timed/{shorter(method)}")
        for row in stages.score_seeds(f"{home}/{name}", method, **chosen):
            rows.append(row | {"seconds": round(row["planned_updates"] * seconds_list)})
    return rows


def table(rows: list[dict], speeds: list[dict], names: tuple[str, ...]) -> str:
    """Returns Markdown: the scores; shares of the teacher's score and decoding time; updates."""
    first, lines = names[0], [stages.table(rows, names), ""]
    lines += [f"| method | % of the teacher's {first} | updates | seconds of updates | decoding |"]
    lines += ["| --- " * 5 + "|"]
    shares = {row["method"]: row["shares"] for row in speeds}
    for method in dict.fromkeys(row["arm"] for row in rows):
        runs = [row for row in rows if row["arm"] == method]
        share = statistics.mean(row["figures"][first] / rows[0]["figures"][first] for row in runs)
        updates = statistics.mean(row["planned_updates"] for row in runs)
        seconds = statistics.mean(row["seconds"] for row in runs)
        times = shares.get(method, [1.0])
        time_cell = f"{statistics.median(times):.2f} ({times[0]:.2f} to {times[-1]:.2f})"
        cells = [method, f"{100 * share:.1f}", f"{updates:.0f}", f"{seconds:.0f}", time_cell]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(flags) -> int:
    """Trains missing runs, scores all, prints and saves the scores."""
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
    stages.save(f"distillation_{name}", [*rows, *speeds])
    print(table(rows, speeds, TASKS[name].scores))
    return 0


def arguments(words=None) -> argparse.Namespace:
    """Parses the flags of this program."""
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
