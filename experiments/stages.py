"""What the three tasks' experiments share: a tokenizer, a pre-trained model a seed, fine-tuning.

A model of 2 + 2 layers, so that three seeds of every arm take two CPU cores an hour or two.
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


def arguments(text: str, workdir: str, words=None) -> argparse.Namespace:
    """The flags of a program: where runs lie and TFDS's directory."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--workdir", default=workdir, help="folder of the runs")
    parser.add_argument("--data_dir", default="", help="TFDS's directory")
    parser.add_argument("--dry_run", action="store_true", help="print the commands alone")
    return parser.parse_args(words)


def prepared(home: str, data: str) -> list[list[str]]:
    """Commands that make the tokenizer, of both languages and encyclopedic text, and the corpus."""
    tokens = [
        "--config.data.mixture=(('multi30k_en_de', None), ('wikipedia', None))",
        "--config.data.packing=none",
    ]
    tokens += [f"--config.data.tfds_dir={data}", f"--workdir={home}/tokens"]
    texts = ["--source=tfds:english_prose,tfds:wikipedia/20230601.en", f"--data_dir={data}"]
    texts += [f"--tokenizer={home}/tokens/tokenizer", f"--out={home}/prose"]
    return [["tokenizer", "--config=configs/multi30k.py", *tokens], ["corpus", *texts]]


def pretrained(home: str, seed: int) -> list[str]:
    """The command that pre-trains a seed's model by span corruption."""
    flags = [f"--config.data.task={home}/prose", f"--config.seed={seed}", *SIZE]
    flags += [f"--config.steps={PRETRAIN}", "--config.data.input_length=128"]
    flags += ["--config.data.batch_size=16", "--config.eval_every_steps=400"]
    return ["train", "--config=configs/pretrain.py", *flags, f"--workdir={home}/pretrain/{seed}"]


def tuned(home: str, data: str, config: str, seed: int, steps: int, scratch=False) -> list[str]:
    """The command that fine-tunes a seed's model with a config, or trains it from scratch."""
    name = config if not scratch else f"{config}_scratch"
    start, flags = f":{home}/pretrain/{seed}", []
    if scratch:
        start, flags = "", [*SIZE, f"--config.tokenizer.dir={home}/tokens/tokenizer"]
    flags += [f"--config.data.tfds_dir={data}", f"--config.seed={seed}", f"--config.steps={steps}"]
    flags += [f"--config.data.shards_dir={home}/shards/{config}"]
    flags += [f"--config.name={name}", f"--workdir={home}/{name}/{seed}"]
    return ["train", f"--config=configs/{config}.py{start}", *flags]


def commands(home: str, data: str, config: str, steps: int, scratch=False) -> list[list[str]]:
    """The training of all seeds as arguments of `python -m lm`, in order; with `scratch` also that
    from random weights.
    """
    made = prepared(home, data)
    for seed in SEEDS:
        made.append(pretrained(home, seed))
        for anew in (False, True)[: 1 + scratch]:
            made.append(tuned(home, data, config, seed, steps, anew))
    return made


def scored(home: str, arm: str, *, split: str, how: str, most: int = 0) -> list[dict]:
    """A row a seed: the scores of an arm's runs on a split, and the answers they were made of.

    how: the decoding in words. most: examples, the first; 0: all.
    """
    chosen = {"split": split, "how": how, "most": most}
    return [scored_run(pathlib.Path(home, arm, str(seed)), arm, seed, **chosen) for seed in SEEDS]


def scored_run(workdir, arm: str, seed: int, *, split: str, how: str, most: int = 0) -> dict:
    """The row of one run, as of scored."""
    workdir = pathlib.Path(workdir)
    figures = evaluate.evaluate(workdir, split=split, decoding=how, max_examples=most)
    answers = logs.read(workdir / f"predictions-{split}.jsonl")
    made_by = json.loads((workdir / "run.json").read_text())
    row = {"arm": arm, "seed": seed, "split": split, "decoding": how, "answers": answers}
    row |= {"commit": made_by["commit"], "params": made_by["params"]}
    row |= {key: made_by[key] for key in ("planned_updates", "planned_tokens")}
    row |= {"seconds": round(made_by["planned_updates"] * update_seconds(workdir))}
    return row | {"figures": {k: v for k, v in figures.items() if k != "command"}}


def update_seconds(workdir) -> float:
    """What an update of a run takes, with all beside it: the median of the log's intervals."""
    rows = logs.read(pathlib.Path(workdir) / "metrics.jsonl")
    at = [(row["step"], row["time"]) for row in rows if row["split"] == "train"]
    pairs = [(more - step, then - time) for (step, time), (more, then) in itertools.pairwise(at)]
    return statistics.median(taken / steps for steps, taken in pairs)


def baseline(arm: str, words: tuple[str, ...], said: list[str], truth: list[str]) -> dict:
    """The row of answers that no model gave. words: of METRICS."""
    figures = {"intervals": {}}
    for word in words:
        figures |= metrics.score(word, said, truth)
        figures["intervals"] |= metrics.confidence_intervals(word, said, truth)
    return {"arm": arm, "seed": 0, "decoding": "", "figures": figures}


def table(rows: list[dict], names: tuple[str, ...]) -> str:
    """Markdown, a line an arm and decoding: the mean over seeds of each score, every seed's value,
    and the first seed's 95 % interval.
    """
    lines = ["| arm | decoding | " + " | ".join(names) + " |", "| --- " * (2 + len(names)) + "|"]
    for (arm, how), group in _grouped(rows):
        cells = []
        for name in names:
            values = [row["figures"][name] for row in group if name in row["figures"]]
            if not values:
                cells.append("")
                continue
            each = f" ({', '.join(f'{value:.2f}' for value in values)})" * (len(values) > 1)
            low, high = group[0]["figures"]["intervals"][name]
            cells.append(f"{sum(values) / len(values):.2f}{each} [{low:.2f}, {high:.2f}]")
        lines.append(f"| {arm} | {how} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _grouped(rows: list[dict]):
    return [
        (key, list(group))
        for key, group in itertools.groupby(rows, lambda row: (row["arm"], row["decoding"]))
    ]


def keep(name: str, rows: list[dict]) -> None:
    """Write the rows without their answers to experiments/<name>.jsonl, with what scored them."""
    known = {"scored_by": {"commit": logs.commit(), "versions": logs.versions()}}
    lines = ({k: v for k, v in row.items() if k != "answers"} | known for row in rows)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    logs.write_atomically(HERE / f"{name}.jsonl", text)
