"""The toy run of every stage: a hundred docstrings, 400 pieces, 0.1 M parameters, 30 updates."""

from __future__ import annotations

import pathlib

from lm import cli

STEPS, SAVE = 30, 4
STAGES = ("pretrain", "finetune", "distill")
SIZES = """
    model.vocab_size=512 model.d_model=32 model.d_ff=64 model.num_heads=4 model.num_kv_heads=4
    model.head_dim=8 model.num_encoder_layers=2 model.num_decoder_layers=2 model.scan_layers=True
    model.dropout_rate=0.1 tokenizer.vocab_size=400 tokenizer.num_extra_ids=10
    data.train_split=train[:120] data.heldout_split=validation[:16] data.input_length=32
    data.target_length=16 data.batch_size=8 evaluate.max_examples=8 eval_every_steps=10
"""
OWN = {  # stage -> optimizer and interval of the log
    "pretrain": "optimizer.name=adafactor optimizer.ema_decay=0.9 log_every_steps=1",
    "finetune": "optimizer.name=adamw optimizer.learning_rate=1e-3 log_every_steps=3",
    "distill": "optimizer.name=adamw optimizer.learning_rate=1e-3 log_every_steps=1 "
    "model.num_encoder_layers=1",
}
LOG = {"pretrain": 1, "finetune": 3, "distill": 1}  # updates between rows


def unbroken(home: pathlib.Path, stage: str) -> pathlib.Path:
    """The workdir of a stage's unbroken run; the next stage starts from it."""
    return home / "unbroken" / stage


def flags(home: pathlib.Path, stage: str, changes: tuple[str, ...] = ()) -> list[str]:
    """The config of a stage as flags of lm; changes, as "key=value", override it."""
    keys = [*SIZES.split(), *OWN[stage].split()]
    keys += [f"steps={STEPS}", f"checkpoint.every_steps={SAVE}", f"data.tfds_dir={home}/tfds"]
    keys += [f"data.shards_dir={home}/shards/{'text' if stage == 'pretrain' else 'pairs'}"]
    if stage == "pretrain":
        keys.append(f"tokenizer.dir={home}/made/tokenizer")
    if stage == "finetune":
        keys.append(f"init_from={unbroken(home, 'pretrain')}")
    if stage == "distill":
        keys.append(f"teacher.workdir={unbroken(home, 'finetune')}")
    settled = dict(key.partition("=")[::2] for key in [*keys, *changes])
    return [f"--config=configs/{stage}.py", *(f"--config.{k}={v}" for k, v in settled.items())]


def make(home: pathlib.Path) -> None:
    """Builds the toy corpus and its tokenizer unless they exist."""
    if (home / "made" / "tokenizer" / "tokenizer.json").exists():
        return
    keys = flags(home, "pretrain", ("tokenizer.dir=",))
    if cli.main(["corpus", *keys, f"--workdir={home}/made"]):
        raise ValueError(f"the toy corpus could not be made in {home}; see the line before.")
