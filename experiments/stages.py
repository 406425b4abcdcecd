"""Shared by the studies of three tasks: tokenizer, pre-training and fine-tuning for each seed.

The model has 2 + 2 layers, so that three seeds of every arm take an hour or two on two CPU cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import statistics

from lm import evaluate, logs, metrics

HERE = pathlib.Path(__file__).parent
SEEDS = (0, 1, 2)
SIZE = ["--config.model.num_encoder_layers=2", "--config.model.num_decoder_layers=2"]
PRETRAIN = 800  # updates, of 16 rows of 128 tokens


def arguments(text: str, workdir: str, argv=None) -> argparse.Namespace:
    """Parses a study's flags: the folder of the runs and TFDS's directory."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--workdir", default=workdir, help="folder of the runs")
    parser.add_argument("--data_dir", default="", help="TFDS's directory")
    parser.add_argument("--dry_run", action="store_true", help="only print the commands")
    return parser.parse_args(argv)


def data_commands(home: str, data: str) -> list[list[str]]:
    """Commands that train a tokenizer on Multi30k and Wikipedia, and build the corpus."""
    tokens = [
        "--config.data.mixture=(('multi30k_en_de', None), ('wikipedia', None))",
        "--config.data.packing=none",
    ]
    tokens += [f"--config.data.tfds_dir={data}", f"--workdir={home}/tokens"]
    texts = ["--source=tfds:english_prose,tfds:wikipedia/20230601.en", f"--data_dir={data}"]
    texts += [f"--tokenizer={home}/tokens/tokenizer", f"--out={home}/prose"]
    return [["tokenizer", "--config=configs/multi30k.py", *tokens], ["corpus", *texts]]


def pretrain_command(home: str, seed: int) -> list[str]:
    """The command that pre-trains the model of a seed by span corruption."""
    flags = [f"--config.data.task={home}/prose", f"--config.seed={seed}", *SIZE]
    flags += [f"--config.steps={PRETRAIN}", "--config.data.input_length=128"]
    flags += ["--config.data.batch_size=16", "--config.eval_every_steps=400"]
    return ["train", "--config=configs/pretrain.py", *flags, f"--workdir={home}/pretrain/{seed}"]


def finetune_command(
    home: str, data: str, config: str, seed: int, steps: int, scratch=False
) -> list[str]:
    """The command that fine-tunes the model of a seed, or trains it from scratch."""
    name = config if not scratch else f"{config}_scratch"
    init, flags = f":{home}/pretrain/{seed}", []
    if scratch:
        init, flags = "", [*SIZE, f"--config.tokenizer.dir={home}/tokens/tokenizer"]
    flags += [f"--config.data.tfds_dir={data}", f"--config.seed={seed}", f"--config.steps={steps}"]
    flags += [f"--config.data.shards_dir={home}/shards/{config}"]
    flags += [f"--config.name={name}", f"--workdir={home}/{name}/{seed}"]
    return ["train", f"--config=configs/{config}.py{init}", *flags]


def commands(home: str, data: str, config: str, steps: int, scratch=False) -> list[list[str]]:
    """All training runs in order, as arguments of `python -m lm`; scratch: also from scratch."""
    todo = data_commands(home, data)
    for seed in SEEDS:
        todo.append(pretrain_command(home, seed))
        for from_scratch in (False, True)[: 1 + scratch]:
            todo.append(finetune_command(home, data, config, seed, steps, from_scratch))
    return todo


def score_seeds(
    home: str, arm: str, *, split: str, decoding: str, max_examples: int = 0
) -> list[dict]:
    """Scores the run of every seed of an arm on a split; a row per seed, with the predictions.

    decoding: its short form. max_examples: number of first examples; 0: all.
    """
    chosen = {"split": split, "decoding": decoding, "max_examples": max_examples}
    return [score_run(pathlib.Path(home, arm, str(seed)), arm, seed, **chosen) for seed in SEEDS]


def score_run(
    workdir, arm: str, seed: int, *, split: str, decoding: str, max_examples: int = 0
) -> dict:
    """Scores one run; see score_seeds."""
    workdir = pathlib.Path(workdir)
    figures = evaluate.evaluate(workdir, split=split, decoding=decoding, max_examples=max_examples)
    answers = logs.read(workdir / f"predictions-{split}.jsonl")
    manifest = json.loads((workdir / "run.json").read_text())
    row = {"arm": arm, "seed": seed, "split": split, "decoding": decoding, "answers": answers}
    row |= {"commit": manifest["commit"], "params": manifest["params"]}
    row |= {key: manifest[key] for key in ("planned_updates", "planned_tokens")}
    row |= {"seconds": round(manifest["planned_updates"] * update_seconds(workdir))}
    return row | {"figures": {k: v for k, v in figures.items() if k != "command"}}


def update_seconds(workdir) -> float:
    """Seconds per update, evaluation and saving included: the median over the log's intervals."""
    rows = logs.read(pathlib.Path(workdir) / "metrics.jsonl")
    points = [(row["step"], row["time"]) for row in rows if row["split"] == "train"]
    pairs = [
        (next_step - step, next_time - time)
        for (step, time), (next_step, next_time) in itertools.pairwise(points)
    ]
    return statistics.median(seconds / steps for steps, seconds in pairs)


def baseline(
    arm: str, metric_names: tuple[str, ...], predictions: list[str], references: list[str]
) -> dict:
    """The row of predictions made without a model. metric_names: names of lm.metrics."""
    figures = {"intervals": {}}
    for name in metric_names:
        figures |= metrics.score(name, predictions, references)
        figures["intervals"] |= metrics.confidence_intervals(name, predictions, references)
    return {"arm": arm, "seed": 0, "decoding": "", "figures": figures}


def table(rows: list[dict], names: tuple[str, ...]) -> str:
    """Returns a Markdown table with a line for each arm and decoding.

    A cell has the mean over seeds, the value of each seed and the first seed's 95 % interval.
    """
    lines = ["| arm | decoding | " + " | ".join(names) + " |", "| --- " * (2 + len(names)) + "|"]
    for (arm, decoding), group in _grouped(rows):
        cells = []
        for name in names:
            values = [row["figures"][name] for row in group if name in row["figures"]]
            if not values:
                cells.append("")
                continue
            values_text = f" ({', '.join(f'{value:.2f}' for value in values)})" * (len(values) > 1)
            low, high = group[0]["figures"]["intervals"][name]
            cells.append(f"{sum(values) / len(values):.2f}{values_text} [{low:.2f}, {high:.2f}]")
        lines.append(f"| {arm} | {decoding} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _grouped(rows: list[dict]):
    return [
        (key, list(group))
        for key, group in itertools.groupby(rows, lambda row: (row["arm"], row["decoding"]))
    ]


def save(name: str, rows: list[dict]) -> None:
    """Writes the rows without predictions to experiments/<name>.jsonl, with commit and versions."""
    provenance = {"scored_by": {"commit": logs.commit(), "versions": logs.versions()}}
    lines = ({k: v for k, v in row.items() if k != "answers"} | provenance for row in rows)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    logs.write_atomically(HERE / f"{name}.jsonl", text)
