"""Checks of a whole config that span several sections."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import typing
from collections.abc import Mapping
from typing import Any

from lm import (
    distill,
    extensions,
    initialization,
    lookup,
    metrics,
    objectives,
    shards,
    storage,
    tasks,
)
from lm import tokenizer as tokenizers
from lm.distill import on_policy
from lm.runs import schema, workdir
from lm.runs.renamed_keys import check_renamed
from lm.runs.schema import Run

HELDOUT_METRICS = ("loss", "nats", "text_nats", "bits_per_byte", "token_accuracy")


def make_run(config: Mapping[str, Any], directory: str | pathlib.Path) -> Run:
    """Check a config before any device is used or file is written.

    Args:
      config: nested dict with all keys of configs/base.py.
      directory: the workdir.

    Raises: ValueError, one sentence with the value, the bound and the fix.
    """
    config = json.loads(json.dumps(config))  # as in config.json: tuples become lists
    extensions.check(config.pop("extensions", {}), str(directory))
    check_renamed(config)
    _check_keys(config, schema.KEYS)
    fields = {key: value for key, value in config.items() if key not in schema.SECTIONS}
    for name, section in schema.SECTIONS.items():
        try:
            fields[name] = lookup.as_section(section, config[name], name)
        except ValueError as error:  # DurationConfig serves several keys and names none
            prefix = "duration." if name == "duration" and name not in str(error) else ""
            raise ValueError(f"{prefix}{error}") from None
    if fields["parallel"].fixed_shards:  # only einsum has the same bits on any number of devices
        fields["model"] = fields["model"].replace({"attention.implementation": "einsum"})
    fields["name"] = config["name"] or config["stage"]
    if origins := extensions.record(config):
        config["extensions"] = origins
    run = Run(config_dict=config, workdir=storage.as_path(directory), **fields)
    _check_schedule(run)
    _check_distillation(run)
    _check_best_metric(run)
    _check_lora(run)
    _check_source(run)
    _check_vocabulary(run)
    return run


def read_run(directory: str | pathlib.Path) -> Run:
    """Read and check the run of a workdir."""
    return make_run(workdir.read_config(directory), directory)


def _check_keys(config: Mapping, fields: Mapping[str, Any], path: str = "") -> None:
    """Raise ValueError unless the keys are exactly those of configs/base.py."""
    if wrong := sorted(config.keys() ^ fields.keys()):
        problem = "an unknown key" if wrong[0] in config else "no key"
        raise ValueError(
            f"the config has {problem} {path}{wrong[0]}{lookup.nearest(wrong[0], fields)}; start "
            f"from configs/base.py, and continue a run with the version of this package that "
            f"started it."
        )
    for key, kind in fields.items():
        if dataclasses.is_dataclass(kind) and isinstance(config[key], Mapping):
            _check_keys(config[key], typing.get_type_hints(kind), f"{path}{key}.")


def _check_schedule(run: Run) -> None:
    """Check that warm-up and cool-down fit in the run, unless that depends on the data."""
    schema.total_updates(run, run.data.batch_size)  # raises for a duration that is too long
    optimizer = run.optimizer
    if run.steps and not (optimizer.warmup.epochs or optimizer.cooldown.epochs):
        optimizer.schedule_config(run.steps, schema.run_length(run, 0))


def _check_distillation(run: Run) -> None:
    """Check the section teacher against the stage and the tasks."""
    teacher = run.teacher
    if run.stage != "distill":
        unused = {"workdir": teacher.workdir, "cache": teacher.cache}
        unused["on_policy.fraction"] = teacher.on_policy.fraction
        for key, value in unused.items():
            if value:
                raise ValueError(
                    f"teacher.{key}={value!r} has no effect in stage={run.stage!r}; use "
                    f"stage='distill' or leave it {'empty' if isinstance(value, str) else '0'}."
                )
    elif not teacher.workdir:
        raise ValueError("stage='distill' needs a teacher; set teacher.workdir to its run.")
    elif run.init_from:
        raise ValueError(
            f"init_from={run.init_from!r} and teacher.student_init both initialize the student; "
            f"leave init_from empty."
        )
    on_policy.check(
        teacher.on_policy,
        teacher.terms,
        packing=run.data.packing,
        length=run.lengths[1],
        pairs=all(run.data.get_task(name).has_inputs for name in run.data.names),
    )


def _score_names(run: Run) -> list[str]:
    """Return the names of the tasks' scores, as task/score if there are several tasks."""
    names, several = [], len(run.data.names) > 1
    for name in run.data.names:
        task = run.data.get_task(name)
        scores = [score for metric in task.metrics for score in metrics.METRICS[metric].names]
        names += [f"{name}/{score}" if several else score for score in scores if task.has_inputs]
    return names


def _check_best_metric(run: Run) -> None:
    """Check that checkpoint.best_metric is measured at each checkpoint."""
    metric, every_steps = run.checkpoint.best_metric, run.checkpoint.every_steps
    if not metric:
        if run.early_stopping_patience:
            raise ValueError(
                f"early_stopping_patience={run.early_stopping_patience} needs a metric; set "
                f"checkpoint.best_metric to nats or a score of the task."
            )
        return
    if metric == "perplexity":
        raise ValueError(
            "checkpoint.best_metric='perplexity' is not measured in training; use nats, which "
            "ranks checkpoints equally."
        )
    choices = dict.fromkeys((*HELDOUT_METRICS, *_score_names(run)))
    lookup.lookup(choices, metric, "checkpoint.best_metric")
    if every_steps % run.eval_every_steps:
        raise ValueError(
            f"checkpoint.best_metric={metric!r} needs an evaluation at each checkpoint; make "
            f"checkpoint.every_steps={every_steps} a multiple of eval_every_steps="
            f"{run.eval_every_steps}."
        )


def _check_lora(run: Run) -> None:
    """Check that LoRA adapts pre-trained kernels that are not shared with the teacher."""
    if not run.lora.rank:
        return
    init, is_student = run.teacher.student_init, run.stage == "distill"
    if is_student and distill.frozen(init, run.model):
        raise ValueError(
            f"lora.rank={run.lora.rank} would adapt the encoder that teacher.student_init="
            f"{init!r} shares with the teacher; use lora.rank=0, or another student_init."
        )
    if not (run.init_from or (is_student and init != "random")):
        raise ValueError(
            f"lora.rank={run.lora.rank} needs a pre-trained model; set init_from, or lora.rank=0."
        )
    _ = run.shapes  # raises for a rank or pattern that fits no kernel


def init_source(run: Run) -> tuple[str, str | int]:
    """Return the workdir in init_from, and which of its checkpoints: newest, best or a step."""
    return _split_source(run.init_from)


def teacher_source(run: Run) -> tuple[str, str | int]:
    """Return the teacher's workdir, and which of its checkpoints: newest, best or a step."""
    return _split_source(run.teacher.workdir)


def _split_source(text: str) -> tuple[str, str | int]:
    match = re.fullmatch(r"(.+)@(newest|best|\d+)", text)
    if not match:
        return text, "newest"
    return match[1], int(match[2]) if match[2].isdecimal() else match[2]


def _check_source(run: Run) -> None:
    """Check the model against that of init_from or the teacher, before the workdir is claimed."""
    source = init_source(run)[0] or teacher_source(run)[0]
    if not source or workdir.is_claimed(run.workdir):
        return
    model = read_run(source).model
    if run.init_from:
        initialization.check_init_from(run.model, model, source)
    else:
        _check_same_tokenizer(run, source)
        distill.check_student(run.teacher.student_init, model, run.model)


def _check_same_tokenizer(run: Run, teacher: str) -> None:
    """Raise ValueError unless the teacher's tokenizer is the run's."""
    directories = tokenizer_dir(run), tokenizer_dir(read_run(teacher))
    if directories[0].resolve() == directories[1].resolve():
        return
    fingerprints = [tokenizers.read(directory)[1]["fingerprint"] for directory in directories]
    if fingerprints[0] != fingerprints[1]:
        raise ValueError(
            f"the tokenizer {directories[0]} differs from the teacher's {directories[1]}; leave "
            f"tokenizer.dir empty, or train on the teacher's answers: stage='finetune' and "
            f"data.train_split=FILE, written by `python -m lm predict --workdir={teacher} "
            f"--split=train --out=FILE`."
        )


def _check_vocabulary(run: Run) -> None:
    """Check the tokenizer, existing or to be trained, against model and objective."""
    directory, stored = tokenizer_dir(run), run.tokenizer.stored
    is_own = directory.resolve() == (run.workdir / "tokenizer").resolve()
    is_new = is_own and not workdir.is_claimed(run.workdir)
    if (directory / tokenizers.METADATA_FILE).exists() or not is_new:
        metadata = tokenizers.read(directory)[1]  # raises if there is none
        actual = metadata | metadata.get("training", {})
        for key, name in tokenizers.STORED_NAMES.items():
            if is_new and actual.get(name, stored[name]) != stored[name]:
                raise ValueError(
                    f"tokenizer.{key}={stored[name]!r} differs from the {actual[name]!r} of the "
                    f"tokenizer in {directory}; use that, or remove it."
                )
        stored = metadata
    pieces, sentinels = stored["pieces"], stored["num_sentinels"]
    if run.model.vocab_size < pieces + sentinels:
        raise ValueError(
            f"model.vocab_size={run.model.vocab_size} is smaller than the tokenizer's {pieces} "
            f"pieces + {sentinels} sentinels; use {tokenizers.padded_rows(pieces + sentinels)}."
        )
    if not all(run.data.get_task(name).has_inputs for name in run.data.names):
        objectives.check_sentinels(run.objective, run.data.input_length, sentinels)


def tokenizer_dir(run: Run) -> pathlib.Path:
    """Return the directory of the run's tokenizer, which may not exist yet.

    A claimed workdir has its own. Otherwise it is tokenizer.dir, or the tokenizer of init_from, of
    the teacher, or of the first corpus.
    """
    directory = run.workdir / "tokenizer"
    if workdir.is_claimed(run.workdir):
        return directory
    if run.tokenizer.dir:
        return storage.as_path(run.tokenizer.dir).expanduser()
    if source := init_source(run)[0] or teacher_source(run)[0]:
        return tokenizer_dir(read_run(source))
    corpora = [name for name in run.data.names if tasks.is_corpus_dir(name)]
    return shards.corpus_tokenizer_dir(corpora[0]) if corpora else directory
