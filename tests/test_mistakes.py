"""Errors in a config or a flag: exit 2, one sentence with key, value and fix, and no device."""

from __future__ import annotations

import re

import jax
import pytest

from lm import cli
from lm import train as trained

FIX = r"\b(use|set|choose|leave|give|did you mean|lower|raise|make|write|say|takes|needs?|must)\b"
UNKNOWN = [
    "stepz=1",
    "model.d_modle=3",
    "optimizer.learning_rat=1",
    "checkpoint.evry_steps=5",
    "teecher.student_init=x",
]
TYPES = [
    "steps=many",
    "steps=1e3",
    "model.d_model=1.5",
    "model.dropout_rate=some",
    "optimizer.learning_rate=fast",
    "guard.spike_threshold=high",
    "checkpoint.max_to_keep=two",
    "data=pydocs",
    "guard=5",
]  # text for a number, a fraction for a count, a value for a section
BOUNDS = [
    "steps=-1",
    "seed=-1",
    "seed=4294967296",
    "checkpoint.max_to_keep=0",
    "checkpoint.keep_period=-1",
    "log_every_steps=0",
    "checkpoint.every_steps=-5",
    "eval_every_steps=0",
    "evaluate.max_examples=-1",
    "tokenizer.vocab_size=0",
    "model.dropout_rate=1.5",
    "model.dropout_rate=-0.1",
    "model.dropout_rate=nan",
    "model.d_model=0",
    "model.num_heads=-4",
    "model.position.relative_attention_num_buckets=0",
    "model.final_logits_soft_cap=-1",
    "optimizer.learning_rate=inf",
    "optimizer.learning_rate=-1",
    "optimizer.grad_clip_norm=-1",
    "optimizer.beta2=1.0",
    "optimizer.grad_clip_norm=nan",
    "optimizer.weight_decay=nan",
    "optimizer.ema_decay=1.0",
    "optimizer.warmup.steps=-1",
    "optimizer.final_learning_rate_fraction=2",
    "optimizer.ema_decay=-0.5",
    "optimizer.beta1=nan",
    "loss.z_loss=-1",
    "loss.z_loss=inf",
    "loss.label_smoothing=1.5",
    "objective.noise_density=0",
    "objective.noise_density=1",
    "objective.noise_density=nan",
    "objective.mean_noise_span_length=0.5",
    "data.batch_size=0",
    "data.batch_size=-8",
    "data.input_length=0",
    "data.target_length=0",
    "data.mixing_temperature=0",
    "data.mixing_temperature=nan",
    "data.max_examples_per_task=-1",
    "data.num_workers=-1",
    "data.max_bad_records=-1",
    "guard.max_bad_steps=0",
    "guard.max_rollbacks=-1",
    "guard.spike_threshold=nan",
    "guard.spike_threshold=-1",
    "guard.hang_timeout_seconds=-1",
    "guard.hang_timeout_seconds=nan",
    "parallel.data=0",
    "parallel.tensor=0",
    "parallel.num_microbatches=0",
    "parallel.reduction_shards=3",
    "tokenizer.character_coverage=2",
]
WORDS = [
    "stage=training",
    "optimizer.name=adam",
    "optimizer.schedule=cosin",
    "model.dtype=fp16",
    "parallel.strategy=ddp",
    "model.norm.kind=rmss",
    "data.packing=first",
    "data.task=wiki",
    "tokenizer.kind=unigrams",
    "objective.name=mask",
    "checkpoint.best_metric=nats!",
]
PAIRS = {  # options that exclude each other, and the keys that the sentence names
    "steps=10 duration.epochs=3": "steps duration",
    "steps=0": "steps duration",
    "steps=0 duration.epochs=3 duration.tokens=1e9": "duration epochs tokens",
    "steps=0 duration.epochs=nan": "duration.epochs",
    "optimizer.warmup.steps=20 optimizer.warmup.percent=2": "optimizer.warmup steps percent",
    "optimizer.warmup.steps=0 optimizer.warmup.epochs=1 optimizer.warmup.percent=2": (
        "epochs percent"
    ),
    "optimizer.schedule=cosine optimizer.cooldown.steps=10": "optimizer.cooldown schedule='wsd'",
    "optimizer.schedule=constant optimizer.final_learning_rate_fraction=0.5": "final",
    "optimizer.weight_decay_multipliers=(('[',0),)": "weight_decay_multipliers",
    "optimizer.learning_rate_multipliers=(('encoder','fast'),)": "learning_rate_multipliers",
    "parallel.fsdp=2": "parallel.fsdp mesh",
    "parallel.deterministic_reduction=True parallel.strategy=mesh": "deterministic_reduction pmap",
    "teacher.workdir=here": "teacher.workdir stage",
    "stage=distill teacher.workdir=here init_from=there": "init_from teacher",
}
FLAGS = {
    "--dryrun": "dryrun dry_run",
    "--hosts=2": "hosts coordinator",
    "--hosts=2 --host=2 --coordinator=localhost:1": "host=2",
    "--hosts=2 --host=-1 --coordinator=localhost:1": "--host= pass",
    "--hosts=two": "hosts two",
    "--coordinator=localhost:1": "coordinator hosts",
    "--profile=15:10": "profile 15:10",
    "--profile=ten": "profile ten",
    "--profile=0:3": "profile 0:3",
    "--allow_change=optimizer.learning_rat": "optimizer.learning_rat optimizer.learning_rate",
}
KEYED = {line: line.partition("=")[0].rpartition(".")[2] for line in [*TYPES, *BOUNDS, *WORDS]}


def sentence(arguments: list[str], capsys) -> str:
    """Run a command that must exit with 2, and return its error."""
    assert cli.main(arguments) == 2
    message = capsys.readouterr().err.strip().splitlines()
    assert len(message) == 1 and message[0].startswith("lm: "), message
    return message[0]


@pytest.fixture(autouse=True)
def no_device(monkeypatch):
    """Make every use of a jax device an error that the command line does not catch."""

    def refuse(*_, **__):
        raise RuntimeError("a device was used before the config was checked")

    for name in ("devices", "local_devices", "device_count", "local_device_count"):
        monkeypatch.setattr(jax, name, refuse)


def train(tmp_path, *changes: str) -> list[str]:
    assert trained.train, "imported before devices are refused"
    tfds_dir = () if "data=pydocs" in changes else (f"data.tfds_dir={tmp_path}",)
    flags = [f"--config.{change}" for change in (*tfds_dir, *changes)]
    return ["train", "--config=configs/pretrain.py", *flags, f"--workdir={tmp_path / 'run'}"]


@pytest.mark.parametrize("change", UNKNOWN)
def test_the_error_of_an_unknown_key_names_the_nearest(change, tmp_path, capsys):
    message = sentence(train(tmp_path, change), capsys)
    assert re.search(r"no key '(\w+)'; did you mean '\w+'", message)[1] in change, message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", KEYED)
def test_the_error_of_a_bad_value_names_key_value_and_fix(change, tmp_path, capsys):
    message = sentence(train(tmp_path, change), capsys)
    value = change.partition("=")[2]
    assert re.search(rf"\b{KEYED[change]}\b", message), message
    assert value in message and re.search(FIX, message), message
    assert "literal" not in message and "Traceback" not in message, message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", PAIRS)
def test_the_error_of_conflicting_options_names_both(changes, tmp_path, capsys):
    message = sentence(train(tmp_path, *changes.split()), capsys)
    assert all(word in message for word in PAIRS[changes].split()), message
    assert re.search(FIX, message), message


@pytest.mark.parametrize("flags", FLAGS)
def test_the_error_of_a_bad_flag_names_it_and_the_fix(flags, tmp_path, capsys):
    message = sentence([*train(tmp_path), *flags.split()], capsys)
    assert all(word in message for word in FLAGS[flags].split()), message
    assert not (tmp_path / "run").exists()
