"""What the three tasks' experiments share: a tokenizer, a pre-trained model a seed, fine-tuning.

A model of 2 + 2 layers, so that three seeds of every arm take two CPU cores an hour or two.
"""

from __future__ import annotations

import argparse

SEEDS = (0, 1, 2)
SIZE = ["--config.model.num_encoder_layers=2", "--config.model.num_decoder_layers=2"]
PRETRAIN = 800  # updates, of 16 rows of 128 tokens


def arguments(text: str, workdir: str) -> argparse.Namespace:
    """The flags of a program: where runs lie and TFDS's directory."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--workdir", default=workdir, help="folder of the runs")
    parser.add_argument("--data_dir", default="", help="TFDS's directory")
    return parser.parse_args()


def prepared(home: str, data: str) -> list[list[str]]:
    """Commands that make the tokenizer, of both languages and encyclopedic text, and the corpus."""
    tokens = ["--config.data.task=multi30k_en_de,wikipedia", "--config.data.packing=none"]
    tokens += [f"--config.data.dir={data}", f"--workdir={home}/tokens"]
    texts = ["--source=tfds:english_prose,tfds:wikipedia/20230601.en", f"--data_dir={data}"]
    texts += [f"--tokenizer={home}/tokens/tokenizer", f"--out={home}/prose"]
    return [["tokenizer", "--config=configs/multi30k.py", *tokens], ["corpus", *texts]]


def pretrained(home: str, seed: int) -> list[str]:
    """The command that pre-trains a seed's model by span corruption."""
    flags = [f"--config.data.task={home}/prose", f"--config.seed={seed}", *SIZE]
    flags += [f"--config.steps={PRETRAIN}", "--config.data.input_length=128"]
    flags += ["--config.data.batch_size=16", "--config.every.evaluate=400"]
    return ["train", "--config=configs/pretrain.py", *flags, f"--workdir={home}/pretrain/{seed}"]


def tuned(home: str, data: str, config: str, seed: int, steps: int, scratch=False) -> list[str]:
    """The command that fine-tunes a seed's model with a config, or trains it from scratch."""
    name = config if not scratch else f"{config}_scratch"
    start, flags = f":{home}/pretrain/{seed}", []
    if scratch:
        start, flags = "", [*SIZE, f"--config.tokenizer.dir={home}/tokens/tokenizer"]
    flags += [f"--config.data.dir={data}", f"--config.seed={seed}", f"--config.steps={steps}"]
    flags += [f"--config.data.shards={home}/shards/{config}"]
    flags += [f"--config.name={name}", f"--workdir={home}/{name}/{seed}"]
    return ["train", f"--config=configs/{config}.py{start}", *flags]
