"""A run: a checked config and the workdir it claims; the tokenizer and examples they make.

A workdir holds config.json, run.json, metrics.jsonl, checkpoints/, and, unless the config names
other places, tokenizer/ and shards/.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import shutil

from lm import (
    choose,
    distill,
    logs,
    objectives,
    optimizers,
    origin,
    parallel,
    pipeline,
    sources,
    steps,
    tasks,
    tokenizer,
    transformer,
)

STAGES = {"pretrain": "masked language modelling", "finetune": "a task", "distill": "a teacher"}
SECTIONS = {
    "model": transformer.ModelConfig,
    "data": pipeline.DataConfig,
    "objective": objectives.ObjectiveConfig,
    "loss": steps.LossConfig,
    "optimizer": optimizers.OptimizerConfig,
    "parallel": parallel.ParallelConfig,
}


PLAIN_SECTIONS = {
    "tokenizer": ("dir", "pieces", "num_sentinels", "normalization", "character_coverage"),
    "teacher": ("workdir", "init"),
    "every": ("log", "evaluate", "checkpoint"),
    "evaluate": ("examples", "decode"),
}
PLAIN_SECTIONS["tokenizer"] += ("documents", "kind")
KINDS = {"unigram": "pieces learnt from the text", "bytes": "its UTF-8 bytes, as ByT5 has them"}
PLAIN_KEYS = ("name", "stage", "seed", "steps", "init_from", "keep")


@dataclasses.dataclass(frozen=True)
class Run:
    """A checked config, as plain values in `config` and as frozen dataclasses by section."""

    config: dict
    workdir: pathlib.Path
    model: transformer.ModelConfig
    data: pipeline.DataConfig
    objective: objectives.ObjectiveConfig
    loss: steps.LossConfig
    optimizer: optimizers.OptimizerConfig
    parallel: parallel.ParallelConfig

    @property
    def name(self) -> str:
        """The run's role: config.name, or else its stage."""
        return self.config["name"] or self.config["stage"]

    def place(self, key: str, default: str) -> pathlib.Path:
        """The directory that config key "section.key" names, or workdir/default."""
        section, leaf = key.split(".")
        named = self.config[section][leaf]
        return pathlib.Path(named).expanduser() if named else self.workdir / default

    @property
    def lengths(self) -> tuple[int, int]:
        """Columns of a batch's inputs and targets, in tokens."""
        return self.data.lengths(self.objective)


def make_run(config: dict, workdir) -> Run:
    """Check a config, before any device, file or minute is spent.

    config: nested dict, all keys of configs/base.py.
    Raises ValueError: one sentence with the value, the bound and the cure.
    """
    _check_keys(config)
    sections = {name: make(**config[name]) for name, make in SECTIONS.items()}
    run = Run(config, pathlib.Path(workdir), **sections)
    choose.choose(STAGES, config["stage"], "stage")
    choose.choose(KINDS, config["tokenizer"]["kind"], "tokenizer.kind")
    for key, least in _least_values(config):
        section, _, leaf = key.rpartition(".")
        value = config[section][leaf] if section else config[key]
        if value < least:
            raise ValueError(f"{key}={value} is too small; use {least} or more.")
    if config["stage"] == "distill" and not config["teacher"]["workdir"]:
        raise ValueError("stage='distill' needs a teacher; set --config.teacher.workdir=<its run>.")
    if config["stage"] != "distill" and config["teacher"]["workdir"]:
        raise ValueError(
            f"teacher.workdir={config['teacher']['workdir']!r} has no use in "
            f"stage={config['stage']!r}; use stage='distill' or leave it empty."
        )
    if config["stage"] == "distill" and config["init_from"]:
        raise ValueError(
            f"init_from={config['init_from']!r} and teacher.init both say where the student "
            f"starts; leave init_from empty."
        )
    _check_origin(run)
    _check_vocabulary(run)
    return run


def _check_keys(config: dict) -> None:
    """The keys are those of configs/base.py, no more and no fewer."""
    fields = lambda made: tuple(field.name for field in dataclasses.fields(made))
    sections = {name: fields(made) for name, made in SECTIONS.items()} | PLAIN_SECTIONS
    expected = {name: set(keys) for name, keys in sections.items()}
    expected[""] = {*PLAIN_KEYS, *sections}
    for section, keys in sorted(expected.items()):
        found = config.get(section, {}) if section else config
        odd = sorted(set(found) ^ keys)
        if odd:
            where = f"{section}.{odd[0]}" if section else odd[0]
            what = "an unknown key" if odd[0] in found else "no key"
            raise ValueError(
                f"the config has {what} {where}{choose.nearest(odd[0], keys)}; a config of this "
                f"package starts from configs/base.py, and a run is continued by the version of "
                f"this package that began it."
            )


def _check_origin(run: Run) -> None:
    """The model fits the run it starts from or learns from; a claimed workdir has passed this."""
    taken = run.config["init_from"] or run.config["teacher"]["workdir"]
    if not taken or is_claimed(run.workdir):
        return
    model = read_run(taken).model
    if run.config["init_from"]:
        origin.check_origin(run.model, model, taken)
    else:
        distill.check_student(run.config["teacher"]["init"], model, run.model)


def _least_values(config: dict):
    yield from (("steps", 1), ("seed", 0), ("keep", 2))
    yield from ((f"every.{key}", 1) for key in config["every"])
    yield from (("evaluate.examples", 0), ("evaluate.decode", 0), ("tokenizer.documents", 1))
    yield from (("tokenizer.pieces", 1), ("tokenizer.num_sentinels", 0))


def _check_vocabulary(run: Run) -> None:
    """The tokenizer that is there, or that the config would make, fits model and objective."""
    directory = tokenizer_dir(run)
    own = directory.resolve() == (run.workdir / "tokenizer").resolve()
    fresh = own and not is_claimed(run.workdir)
    if (directory / tokenizer.FACTS).exists():
        facts = tokenizer.read(directory)[1]
        for key in ("pieces", "num_sentinels", "normalization") if fresh else ():
            if facts[key] != run.config["tokenizer"][key]:
                raise ValueError(
                    f"tokenizer.{key}={run.config['tokenizer'][key]!r} differs from the "
                    f"{facts[key]!r} of the tokenizer in {directory}; use that, or remove it."
                )
    elif fresh:
        facts = run.config["tokenizer"]
        if facts["kind"] == "bytes" and facts["pieces"] != tokenizer.BYTE_PIECES:
            raise ValueError(
                f"tokenizer.pieces={facts['pieces']} is not the number of bytes and special ids; "
                f"with tokenizer.kind='bytes' use {tokenizer.BYTE_PIECES}."
            )
    else:
        facts = tokenizer.read(directory)[1]  # which says what is missing
    pieces, sentinels = facts["pieces"], facts["num_sentinels"]
    if run.model.vocab_size < pieces + sentinels:
        raise ValueError(
            f"model.vocab_size={run.model.vocab_size} is smaller than the tokenizer's {pieces} "
            f"pieces + {sentinels} sentinels; use {tokenizer.padded_rows(pieces + sentinels)}."
        )
    if not tasks.task_named(run.data.task).pairs:
        objectives.check_sentinels(run.objective, run.data.input_length, sentinels)


def is_claimed(workdir) -> bool:
    """Whether a run's training has begun there."""
    return (pathlib.Path(workdir) / "config.json").exists()


def read_config(workdir) -> dict:
    """The config of a claimed workdir. Raises ValueError where there is none, or it is damaged."""
    path = pathlib.Path(workdir) / "config.json"
    if not path.exists():
        raise ValueError(f"{workdir} holds no run (no config.json); train one there first.")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); restore it from a copy.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no config; restore it from a copy.")
    if "model_type" in config:
        raise ValueError(
            f"{workdir} holds a checkpoint of transformers, no run; make one of it first: "
            f"python -m lm import {workdir} --workdir=..."
        )
    return config


def read_run(workdir) -> Run:
    """The run that a workdir holds, checked again."""
    return make_run(read_config(workdir), workdir)


def differences(ours: dict, theirs: dict, prefix: str = "") -> list[str]:
    """Dotted keys, with both values, in which two nested configs differ."""
    found = []
    for key in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} (here {a!r}, there {b!r})")
    return found


def check_workdir(run: Run) -> None:
    """Raise ValueError, naming the keys that differ, if the workdir is another config's."""
    theirs = read_config(run.workdir) if is_claimed(run.workdir) else run.config
    differing = differences(run.config, theirs)
    if differing:
        raise ValueError(
            f"{run.workdir} holds a run with another config: {', '.join(differing)}; use another "
            f"--workdir, or the config it was made with to continue it."
        )


def claim(run: Run, tokens: tokenizer.Tokenizer) -> None:
    """Make the workdir this config's, with a copy of its tokenizer, so that it stands by itself."""
    own = run.workdir / "tokenizer"
    if own.resolve() != tokens.directory.resolve():
        shutil.copytree(tokens.directory, own, dirs_exist_ok=True)
    logs.write_atomically(run.workdir / "config.json", json.dumps(run.config, indent=2) + "\n")


def tokenizer_dir(run: Run) -> pathlib.Path:
    """Where the run's tokenizer is or will be: its own copy, named, its origin's, or its own."""
    own = run.workdir / "tokenizer"
    if is_claimed(run.workdir):
        return own
    taken = run.config["init_from"] or run.config["teacher"]["workdir"]
    if taken and not run.config["tokenizer"]["dir"]:
        return tokenizer_dir(read_run(taken))
    return run.place("tokenizer.dir", "tokenizer")


def splits(run: Run) -> tuple[str, str]:
    """The TFDS splits to train on and to hold out."""
    dataset = tasks.task_named(run.data.task).dataset
    return sources.held_out(dataset, run.data.train, run.data.heldout, run.data.dir)


def make_tokenizer(run: Run) -> tokenizer.Tokenizer:
    """The run's tokenizer; before the workdir is claimed, trained where there is none yet."""
    directory = tokenizer_dir(run)
    named = directory.resolve() != (run.workdir / "tokenizer").resolve()
    if (directory / tokenizer.FACTS).exists() or named or is_claimed(run.workdir):
        return tokenizer.Tokenizer(directory)
    options = dict(run.config["tokenizer"])
    if options.pop("kind") == "bytes":
        return tokenizer.spell(directory, options["num_sentinels"])
    options.pop("dir")
    task = tasks.task_named(run.data.task)
    records = sources.tfds_records(task.dataset, splits(run)[0], run.data.dir)
    count = min(options.pop("documents"), len(records))
    return tokenizer.train(_Texts(task, records, count), directory, **options)


class _Texts:
    """The texts of the first `count` records, with a length, so that reading them shows an ETA."""

    def __init__(self, task, records, count: int):
        self.task, self.records, self.count = task, records, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        texts = (self.task.to_text(self.records[i]) or {} for i in range(self.count))
        return itertools.chain.from_iterable(text.values() for text in texts)


def make_examples(run: Run, tokens: tokenizer.Tokenizer) -> tuple[pipeline.Examples, ...]:
    """(training examples, held-out examples), their shards prepared where they are not yet."""
    shards = run.place("data.shards", "shards")
    made = (
        pipeline.make_examples(run.data, run.objective, tokens, split, shards / name)
        for name, split in zip(("train", "heldout"), splits(run), strict=True)
    )
    return tuple(made)
