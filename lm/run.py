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
    corpus,
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
from lm.corpus import overlap

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
    "tokenizer": (
        *("dir", "kind", "pieces", "num_sentinels"),
        *("normalization", "character_coverage", "documents"),
    ),
    "teacher": ("workdir", "init"),
    "every": ("log", "evaluate", "checkpoint"),
    "evaluate": ("examples", "decode"),
    "guard": ("patience", "rollbacks", "spike", "hang"),
}
OPERATIONAL = {"workers"}  # keys of data that a resumed run may change
PLAIN_KEYS = ("name", "stage", "seed", "steps", "duration", "init_from")
PLAIN_KEYS += ("keep", "keep_every", "keep_best")


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
    choose.choose(tokenizer.KINDS, config["tokenizer"]["kind"], "tokenizer.kind")
    for key, least in _least_values(config):
        section, _, leaf = key.rpartition(".")
        value = config[section][leaf] if section else config[key]
        if value < least:
            raise ValueError(f"{key}={value} is too small; use {least} or more.")
    if config["seed"] >= 1 << 32:
        raise ValueError(f"seed={config['seed']} has more than 32 bits; use one below {1 << 32}.")
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
        made = facts | facts.get("training", {})
        for key in ("kind", "pieces", "num_sentinels", "normalization", "character_coverage"):
            asked = run.config["tokenizer"][key]
            if fresh and made.get(key, asked) != asked:
                raise ValueError(
                    f"tokenizer.{key}={asked!r} differs from the {made[key]!r} of the tokenizer "
                    f"in {directory}; use that, or remove it."
                )
    elif fresh:
        facts = run.config["tokenizer"]
        choose.choose(tokenizer.NORMALIZATIONS, facts["normalization"], "tokenizer.normalization")
        if facts["kind"] == "bytes" and facts["normalization"] != "identity":
            raise ValueError(
                f"tokenizer.normalization={facts['normalization']!r} has no use for bytes, which "
                f"stand for the text as it is; with tokenizer.kind='bytes' use identity."
            )
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
    if not all(tasks.task_named(name).pairs for name in run.data.names):
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


def settled(config: dict) -> dict:
    """The config without what may change from one call to the next: it decides no number."""
    return config | {"data": {k: v for k, v in config["data"].items() if k not in OPERATIONAL}}


def check_workdir(run: Run) -> None:
    """Raise ValueError, naming the keys that differ, if the workdir is another config's."""
    theirs = read_config(run.workdir) if is_claimed(run.workdir) else run.config
    differing = differences(settled(run.config), settled(theirs))
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
    corpora = [name for name in run.data.names if tasks.is_corpus(name)]
    if corpora and not run.config["tokenizer"]["dir"]:
        return corpus.tokenizer_of(corpora[0])
    return run.place("tokenizer.dir", "tokenizer")


def splits(run: Run) -> tuple[dict[str, str], dict[str, str]]:
    """The splits to train on and to hold out, by task."""
    train, heldout = {}, {}
    for name in run.data.names:
        named = run.data.train, run.data.heldout
        if tasks.is_corpus(name):
            for split in named:
                corpus.find(name, split)
            if len({*named}) == 1:
                raise ValueError(
                    f"data.train and data.heldout of {name} are both {named[0]!r}; leave them at "
                    f"train and validation."
                )
        else:
            named = sources.held_out(tasks.task_named(name).dataset, *named, run.data.dir)
        train[name], heldout[name] = named
    return train, heldout


def make_tokenizer(run: Run) -> tokenizer.Tokenizer:
    """The run's tokenizer; before the workdir is claimed, trained where there is none yet."""
    directory = tokenizer_dir(run)
    named = directory.resolve() != (run.workdir / "tokenizer").resolve()
    if (directory / tokenizer.FACTS).exists() or named or is_claimed(run.workdir):
        return tokenizer.Tokenizer(directory)
    options = dict(run.config["tokenizer"])
    if options["kind"] == "bytes":
        return tokenizer.spell(directory, options["num_sentinels"])
    options.pop("dir")
    texts = Texts(run, splits(run)[0], options.pop("documents"))
    return tokenizer.train(texts, directory, **options)


class Texts:
    """The texts of the first `most` records, as many of each task; with a length, so that reading
    shows an ETA.

    splits: by task. Raises ValueError, with the cure, where a dataset is absent.
    """

    def __init__(self, run: Run, splits: dict[str, str], most: int):
        self.found = [_texts_of(run, name, split) for name, split in splits.items()]
        self.most = -(-most // len(splits))

    def __len__(self) -> int:
        return sum(min(self.most, count) for count, _ in self.found)

    def __iter__(self):
        for _, records in self.found:
            for text in itertools.islice(records(), self.most):
                yield from text


def _texts_of(run: Run, name: str, split: str):
    """(records of a task's split, a function to the texts of each of them, one after the other)."""
    task = tasks.task_named(name)
    if tasks.is_corpus(name):
        manifest, directory = corpus.find(name, split), pathlib.Path(name).expanduser()
        parts = overlap.pieces_of(str(directory), split, "", "file", "")
        documents = lambda: itertools.chain.from_iterable(
            ((part.document(raw).text,) for raw in part.raw()) for part in parts
        )
        return manifest["counts"]["documents"], documents
    records = sources.tfds_records(task.dataset, split, run.data.dir)
    return len(records), lambda: (
        (task.to_text(records[i]) or {}).values() for i in range(len(records))
    )


def make_examples(run: Run, tokens: tokenizer.Tokenizer) -> tuple[pipeline.Examples, ...]:
    """(training examples, held-out examples), their shards prepared where they are not yet."""
    whole = dataclasses.replace(run.data, packing="none")  # each held-out pair counts by itself
    return tuple(
        pipeline.make_examples(data, run.objective, tokens, by_task, shards_of(run, name, by_task))
        for name, data, by_task in zip(
            ("train", "heldout"), (run.data, whole), splits(run), strict=True
        )
    )


def shards_of(run: Run, name: str, splits: dict[str, str]) -> dict[str, pathlib.Path]:
    """Where the shards of "train" or "heldout" lie, by task: a corpus's own, or in data.shards."""
    shards, found = run.place("data.shards", "shards"), {}
    for task, split in splits.items():
        if tasks.is_corpus(task):
            found[task] = pathlib.Path(task).expanduser() / split
        else:
            found[task] = shards / task / name if len(splits) > 1 else shards / name
    return found
