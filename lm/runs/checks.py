"""A config checked, before any device, file or minute is spent."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re

from lm import (
    decoding,
    distill,
    initialization,
    lookup,
    metrics,
    objectives,
    shards,
    storage,
    tasks,
    tokenizer,
    transformer,
)
from lm.distill import on_policy
from lm.runs import schema, workdir
from lm.runs.schema import Run

STAGES = {"pretrain": "masked language modelling", "finetune": "a task", "distill": "a teacher"}
FIGURES = ("loss", "nats", "text_nats", "bits_per_byte", "token_accuracy")  # of held-out examples

TOKENIZER_KEYS = {  # a key of the section tokenizer: its name in tokenizer.json
    "kind": "kind",
    "vocab_size": "pieces",
    "num_extra_ids": "num_sentinels",
    "normalization": "normalization",
    "character_coverage": "character_coverage",
}


def make_run(config: dict, place) -> Run:
    """Check a config, before any device, file or minute is spent.

    config: nested dict, all keys of configs/base.py. place: the workdir.
    Raises ValueError: one sentence with the value, the bound and the cure.
    """
    config = json.loads(json.dumps(config))  # as it is read back: lists for tuples
    _check_keys(config)
    sections = {name: make(**config[name]) for name, make in schema.SECTIONS.items()}
    if sections["parallel"].fixed_shards:  # rows in turn have other bits on one device
        sections["model"] = sections["model"].replace({"attention.implementation": "einsum"})
    run = Run(config, storage.as_path(place), **sections)
    lookup.lookup(STAGES, config["stage"], "stage")
    lookup.lookup(tokenizer.KINDS, config["tokenizer"]["kind"], "tokenizer.kind")
    for key, least in _least_values(config):
        section, _, leaf = key.rpartition(".")
        value = config[section][leaf] if section else config[key]
        if not value >= least:  # NaN is not
            raise ValueError(f"{key}={value} is too small; use {least} or more.")
    coverage = config["tokenizer"]["character_coverage"]
    if not 0.98 <= coverage <= 1:
        raise ValueError(
            f"tokenizer.character_coverage={coverage} is no share of all; use 0.98 to 1."
        )
    decoding.parse(config["evaluate"]["decoding"])
    distill.parse(config["teacher"]["loss"])
    lookup.lookup(dict.fromkeys(transformer.DTYPES), config["teacher"]["dtype"], "teacher.dtype")
    _check_length(run)
    _check_cache(run)
    _check_policy(run)
    _check_best(run)
    _check_lora(run)
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
            f"init_from={config['init_from']!r} and teacher.student_init both say where the student "
            f"starts; leave init_from empty."
        )
    _check_origin(run)
    _check_vocabulary(run)
    return run


def read_run(place) -> Run:
    """The run that a workdir holds, checked again."""
    return make_run(workdir.read_config(place), place)


def _check_keys(config: dict) -> None:
    """The keys are those of configs/base.py, no more and no fewer."""
    fields = lambda made: tuple(field.name for field in dataclasses.fields(made))
    sections = {name: fields(made) for name, made in schema.SECTIONS.items()}
    sections |= schema.PLAIN_SECTIONS
    expected = {name: set(keys) for name, keys in sections.items()}
    expected[""] = {*schema.PLAIN_KEYS, *sections}
    for section, keys in sorted(expected.items()):
        found = config.get(section, {}) if section else config
        odd = sorted(set(found) ^ keys)
        if odd:
            where = f"{section}.{odd[0]}" if section else odd[0]
            what = "an unknown key" if odd[0] in found else "no key"
            raise ValueError(
                f"the config has {what} {where}{lookup.nearest(odd[0], keys)}; a config of this "
                f"package starts from configs/base.py, and a run is continued by the version of "
                f"this package that began it."
            )


def _check_length(run: Run) -> None:
    """Updates or a duration, not both; warm-up and cool-down fit in, where that is known."""
    steps, duration = run.config["steps"], run.config["duration"]
    if bool(steps) == bool(duration):
        which = "both say how long" if steps else "say nothing of how long"
        raise ValueError(
            f"steps={steps} and duration={duration!r} {which} to train; set one of them, and leave "
            f"the other at 0 or empty."
        )
    schema.total_updates(run, run.data.batch_size)  # which says what is wrong with a duration
    optimizer = run.optimizer
    if steps and "epoch" not in optimizer.warmup_duration + optimizer.cooldown_duration:
        optimizer.span(steps, schema.pace(run, 0))


def _check_cache(run: Run) -> None:
    """A teacher that is cached, and does not run, is asked for nothing but what it said."""
    cache, asked = run.config["teacher"]["cache"], run.config["teacher"]["on_policy"]
    if not cache:
        return
    terms = distill.parse(run.config["teacher"]["loss"])
    lacking = distill.uncached(terms)
    why = f"what the teacher.loss {', '.join(lacking)} needs" if lacking else ""
    if asked:
        why = f"the student's own answers, which teacher.on_policy={asked!r} asks for"
    if run.config["stage"] != "distill":
        raise ValueError(
            f"teacher.cache={cache!r} has no use in stage={run.config['stage']!r}; leave it empty."
        )
    if why:
        raise ValueError(
            f"teacher.cache={cache!r} has not {why}; leave teacher.cache empty, so that the "
            f"teacher runs beside."
        )
    distill.shared_temperature(terms)  # raises where there are several


def _check_policy(run: Run) -> None:
    """What the student is to write itself, it can."""
    asked = run.config["teacher"]["on_policy"]
    if asked and run.config["stage"] != "distill":
        raise ValueError(
            f"teacher.on_policy={asked!r} has no use in stage={run.config['stage']!r}; leave it "
            f"empty."
        )
    terms = distill.parse(run.config["teacher"]["loss"])
    pairs = all(run.data.get_task(name).pairs for name in run.data.names)
    length, packing = run.lengths[1], run.data.packing
    on_policy.check(asked, terms, packing=packing, pairs=pairs, length=length)


def score_names(run: Run) -> list[str]:
    """The scores of the run's tasks, of several tasks as task/score, that checkpoint.best_metric may name."""
    names, several = [], len(run.data.names) > 1
    for name in run.data.names:
        task = run.data.get_task(name)
        words = [score for word in task.metrics for score in metrics.METRICS[word].names]
        names += [f"{name}/{word}" if several else word for word in words if task.pairs]
    return names


def _check_best(run: Run) -> None:
    """There is a figure of every checkpoint, to tell the best of them."""
    config = run.config
    if not config["checkpoint"]["best_metric"]:
        if config["early_stopping_patience"]:
            raise ValueError(
                f"early_stopping_patience={config['early_stopping_patience']} has no figure to go by; set checkpoint.best_metric as well, "
                f"to nats or a score of the task."
            )
        return
    if config["checkpoint"]["best_metric"] == "perplexity":
        raise ValueError(
            "checkpoint.best_metric='perplexity' is no figure of training; use nats, which orders checkpoints "
            "alike."
        )
    known = dict.fromkeys((*FIGURES, *score_names(run)))
    lookup.lookup(known, config["checkpoint"]["best_metric"], "checkpoint.best_metric")
    every, checkpoint = config["eval_every_steps"], config["checkpoint"]["every_steps"]
    if checkpoint % every:
        raise ValueError(
            f"checkpoint.best_metric={config['checkpoint']['best_metric']!r} needs an evaluation at each checkpoint, but "
            f"checkpoint.every_steps={checkpoint} is no multiple of eval_every_steps="
            f"{every}; make it one."
        )


def _check_lora(run: Run) -> None:
    """The adapters have kernels to adapt, which have learnt something, and none is shared."""
    if not run.lora.rank:
        return
    config = run.config
    if config["stage"] == "distill" and distill.frozen(
        config["teacher"]["student_init"], run.model
    ):
        raise ValueError(
            f"lora.rank={run.lora.rank} would adapt the encoder that teacher.student_init="
            f"{config['teacher']['init']!r} leaves the teacher's; use lora.rank=0, or another init."
        )
    from_teacher = config["stage"] == "distill" and config["teacher"]["student_init"] != "random"
    if not (config["init_from"] or from_teacher):
        raise ValueError(
            f"lora.rank={run.lora.rank} would leave random parameters as they are; set init_from "
            f"to the run to start from, or lora.rank=0."
        )
    _ = run.shapes  # which says what is wrong with rank and match


def init_source(run: Run) -> tuple[str, str | int]:
    """What init_from names: a workdir, and which of its checkpoints, as of read_params."""
    return _named(run.config["init_from"])


def teacher_source(run: Run) -> tuple[str, str | int]:
    """What teacher.workdir names: a workdir, and which of its checkpoints, as of read_params."""
    return _named(run.config["teacher"]["workdir"])


def _named(text: str) -> tuple[str, str | int]:
    named = re.fullmatch(r"(.+)@(newest|best|\d+)", text)
    if not named:
        return text, "newest"
    which = named[2]
    return named[1], int(which) if which.isdecimal() else which


def _check_origin(run: Run) -> None:
    """The model fits the run it starts from or learns from; a claimed workdir has passed this."""
    taken = init_source(run)[0] or teacher_source(run)[0]
    if not taken or workdir.is_claimed(run.workdir):
        return
    model = read_run(taken).model
    if run.config["init_from"]:
        initialization.check_origin(run.model, model, taken)
    else:
        _check_tokens(run, taken)
        distill.check_student(run.config["teacher"]["student_init"], model, run.model)


def _check_tokens(run: Run, taught_by: str) -> None:
    """Teacher and student have the same ids; a student of other ids learns from answers alone."""
    ours, theirs = tokenizer_dir(run), tokenizer_dir(read_run(taught_by))
    if ours.resolve() == theirs.resolve():
        return
    prints = [tokenizer.read(place)[1]["fingerprint"] for place in (ours, theirs)]
    if prints[0] != prints[1]:
        raise ValueError(
            f"{ours} is another tokenizer than the teacher's {theirs}, whose ids stand for other "
            f"pieces; leave tokenizer.dir empty, or learn from the teacher's answers: stage="
            f"'finetune' and data.train_split=FILE of `python -m lm predict --workdir={taught_by} "
            f"--split=train --out=FILE`."
        )


def _least_values(config: dict):
    yield from (("steps", 0), ("seed", 0), ("checkpoint.max_to_keep", 2))
    yield from (("checkpoint.keep_period", 0), ("early_stopping_patience", 0))
    yield from (
        ("guard.max_bad_steps", 1),
        ("guard.max_rollbacks", 0),
        ("guard.spike_threshold", 0),
    )
    yield ("guard.hang_timeout_seconds", 0)
    yield from (("log_every_steps", 1), ("eval_every_steps", 1), ("checkpoint.every_steps", 1))
    yield from (
        ("evaluate.max_examples", 0),
        ("evaluate.max_decoded_examples", 0),
        ("tokenizer.max_documents", 1),
    )
    yield from (("tokenizer.vocab_size", 1), ("tokenizer.num_extra_ids", 0))


def _check_vocabulary(run: Run) -> None:
    """The tokenizer that is there, or that the config would make, fits model and objective."""
    directory = tokenizer_dir(run)
    own = directory.resolve() == (run.workdir / "tokenizer").resolve()
    fresh = own and not workdir.is_claimed(run.workdir)
    if (directory / tokenizer.METADATA_FILE).exists():
        facts = tokenizer.read(directory)[1]
        made = facts | facts.get("training", {})
        for key, stored in TOKENIZER_KEYS.items():
            asked = run.config["tokenizer"][key]
            if fresh and made.get(stored, asked) != asked:
                raise ValueError(
                    f"tokenizer.{key}={asked!r} differs from the {made[stored]!r} of the tokenizer "
                    f"in {directory}; use that, or remove it."
                )
    elif fresh:
        options = run.config["tokenizer"]
        facts = {stored: options[key] for key, stored in TOKENIZER_KEYS.items()}
        lookup.lookup(tokenizer.NORMALIZATIONS, facts["normalization"], "tokenizer.normalization")
        if facts["kind"] == "bytes" and facts["normalization"] != "identity":
            raise ValueError(
                f"tokenizer.normalization={facts['normalization']!r} has no use for bytes, which "
                f"stand for the text as it is; with tokenizer.kind='bytes' use identity."
            )
        if facts["kind"] == "bytes" and facts["pieces"] != tokenizer.BYTE_VOCAB_SIZE:
            raise ValueError(
                f"tokenizer.vocab_size={facts['pieces']} is not the number of bytes and special ids; "
                f"with tokenizer.kind='bytes' use {tokenizer.BYTE_VOCAB_SIZE}."
            )
    else:
        facts = tokenizer.read(directory)[1]  # which says what is missing
    pieces, sentinels = facts["pieces"], facts["num_sentinels"]
    if run.model.vocab_size < pieces + sentinels:
        raise ValueError(
            f"model.vocab_size={run.model.vocab_size} is smaller than the tokenizer's {pieces} "
            f"pieces + {sentinels} sentinels; use {tokenizer.padded_rows(pieces + sentinels)}."
        )
    if not all(run.data.get_task(name).pairs for name in run.data.names):
        objectives.check_sentinels(run.objective, run.data.input_length, sentinels)


def tokenizer_dir(run: Run) -> pathlib.Path:
    """Where the run's tokenizer is or will be: its own copy, named, its origin's, or its own."""
    own = run.workdir / "tokenizer"
    if workdir.is_claimed(run.workdir):
        return own
    taken = init_source(run)[0] or teacher_source(run)[0]
    if taken and not run.config["tokenizer"]["dir"]:
        return tokenizer_dir(read_run(taken))
    corpora = [name for name in run.data.names if tasks.is_corpus_dir(name)]
    if corpora and not run.config["tokenizer"]["dir"]:
        return shards.corpus_tokenizer_dir(corpora[0])
    return run.place("tokenizer.dir", "tokenizer")
