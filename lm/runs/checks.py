"""Checks of a whole config: what one section alone cannot check."""

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
    """Check a config, before any device, file or minute is spent.

    Args:
      config: nested dict with all keys of configs/base.py.
      directory: the workdir.

    Raises: ValueError, one sentence with the value, the bound and the fix.
    """
    config = json.loads(json.dumps(config))  # as config.json has it: lists for tuples
    extensions.check(config.pop("extensions", {}), str(directory))
    check_renamed(config)
    _check_keys(config, schema.KEYS)
    fields = {key: value for key, value in config.items() if key not in schema.SECTIONS}
    for name, section in schema.SECTIONS.items():
        try:
            fields[name] = lookup.as_section(section, config[name], name)
        except ValueError as error:  # of a duration, which does not know its own name
            prefix = "duration." if name == "duration" and name not in str(error) else ""
            raise ValueError(f"{prefix}{error}") from None
    if fields["parallel"].fixed_shards:  # rows in turn have other bits on one device
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
    """Return the run that a workdir holds, checked again."""
    return make_run(workdir.read_config(directory), directory)


def _check_keys(config: Mapping, fields: Mapping[str, Any], path: str = "") -> None:
    """Raise ValueError unless the keys are those of configs/base.py, no more and no fewer."""
    if wrong := sorted(config.keys() ^ fields.keys()):
        problem = "an unknown key" if wrong[0] in config else "no key"
        raise ValueError(
            f"the config has {problem} {path}{wrong[0]}{lookup.nearest(wrong[0], fields)}; start "
            f"from configs/base.py, and continue a run with the version of this package that began "
            f"it."
        )
    for key, kind in fields.items():
        if dataclasses.is_dataclass(kind) and isinstance(config[key], Mapping):
            _check_keys(config[key], typing.get_type_hints(kind), f"{path}{key}.")


def _check_schedule(run: Run) -> None:
    """Check that warm-up and cool-down fit in the run, if their updates are known."""
    schema.total_updates(run, run.data.batch_size)  # raises for a duration that is too long
    optimizer = run.optimizer
    if run.steps and not (optimizer.warmup.epochs or optimizer.cooldown.epochs):
        optimizer.schedule_config(run.steps, schema.run_length(run, 0))


def _check_distillation(run: Run) -> None:
    """Check that the section teacher suits the stage and the tasks."""
    teacher = run.teacher
    if run.stage == "distill":
        if not teacher.workdir:
            raise ValueError("stage='distill' needs a teacher; set teacher.workdir to its run.")
        if run.init_from:
            raise ValueError(
                f"init_from={run.init_from!r} and teacher.student_init both set where the student "
                f"starts; leave init_from empty."
            )
    else:
        for key, value in (("workdir", teacher.workdir), ("cache", teacher.cache)):
            if value:
                raise ValueError(
                    f"teacher.{key}={value!r} has no effect in stage={run.stage!r}; use "
                    f"stage='distill' or leave it empty."
                )
        if teacher.on_policy:
            raise ValueError(
                f"teacher.on_policy.fraction={teacher.on_policy.fraction} has no effect in "
                f"stage={run.stage!r}; use stage='distill' or set it to 0."
            )
    options = {"packing": run.data.packing, "length": run.lengths[1]}
    options["pairs"] = all(run.data.get_task(name).pairs for name in run.data.names)
    on_policy.check(teacher.on_policy, teacher.terms, **options)


def score_names(run: Run) -> list[str]:
    """Return the scores of the run's tasks; with several tasks, task/score."""
    names, has_several = [], len(run.data.names) > 1
    for name in run.data.names:
        task = run.data.get_task(name)
        scores = [score for metric in task.metrics for score in metrics.METRICS[metric].names]
        names += [f"{name}/{score}" if has_several else score for score in scores if task.pairs]
    return names


def _check_best_metric(run: Run) -> None:
    """Check that each checkpoint has the figure checkpoint.best_metric."""
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
            "orders checkpoints alike."
        )
    choices = dict.fromkeys((*HELDOUT_METRICS, *score_names(run)))
    lookup.lookup(choices, metric, "checkpoint.best_metric")
    if every_steps % run.eval_every_steps:
        raise ValueError(
            f"checkpoint.best_metric={metric!r} needs an evaluation at each checkpoint, but "
            f"checkpoint.every_steps={every_steps} is no multiple of eval_every_steps="
            f"{run.eval_every_steps}; make it one."
        )


def _check_lora(run: Run) -> None:
    """Check that LoRA adapts trained kernels, none of them shared with the teacher."""
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
            f"lora.rank={run.lora.rank} needs a pre-trained model, and would leave random "
            f"parameters as they are; set init_from, or lora.rank=0."
        )
    _ = run.shapes  # raises for a rank or pattern that suits no kernel


def init_source(run: Run) -> tuple[str, str | int]:
    """Return the workdir of init_from, and which checkpoint, as read_params takes it."""
    return _split_source(run.init_from)


def teacher_source(run: Run) -> tuple[str, str | int]:
    """Return the workdir of the teacher, and which checkpoint, as read_params takes it."""
    return _split_source(run.teacher.workdir)


def _split_source(text: str) -> tuple[str, str | int]:
    match = re.fullmatch(r"(.+)@(newest|best|\d+)", text)
    if not match:
        return text, "newest"
    return match[1], int(match[2]) if match[2].isdecimal() else match[2]


def _check_source(run: Run) -> None:
    """Check the model against the run it starts or learns from, before the workdir is claimed."""
    source = init_source(run)[0] or teacher_source(run)[0]
    if not source or workdir.is_claimed(run.workdir):
        return
    model = read_run(source).model
    if run.init_from:
        initialization.check_origin(run.model, model, source)
    else:
        _check_same_tokenizer(run, source)
        distill.check_student(run.teacher.student_init, model, run.model)


def _check_same_tokenizer(run: Run, teacher: str) -> None:
    """Check that teacher and student have the same ids."""
    directories = tokenizer_dir(run), tokenizer_dir(read_run(teacher))
    if directories[0].resolve() == directories[1].resolve():
        return
    fingerprints = [tokenizers.read(directory)[1]["fingerprint"] for directory in directories]
    if fingerprints[0] != fingerprints[1]:
        raise ValueError(
            f"{directories[0]} is another tokenizer than the teacher's {directories[1]}, so its "
            f"ids stand for other pieces; leave tokenizer.dir empty, or learn from the teacher's "
            f"answers: stage='finetune' and data.train_split=FILE of `python -m lm predict "
            f"--workdir={teacher} --split=train --out=FILE`."
        )


def _check_vocabulary(run: Run) -> None:
    """Check the tokenizer, existing or to be trained, against model and objective."""
    directory, stored = tokenizer_dir(run), run.tokenizer.stored
    is_own = directory.resolve() == (run.workdir / "tokenizer").resolve()
    is_new = is_own and not workdir.is_claimed(run.workdir)
    if (directory / tokenizers.METADATA_FILE).exists() or not is_new:
        metadata = tokenizers.read(directory)[1]  # raises where there is none
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
    if not all(run.data.get_task(name).pairs for name in run.data.names):
        objectives.check_sentinels(run.objective, run.data.input_length, sentinels)


def tokenizer_dir(run: Run) -> pathlib.Path:
    """Return the directory of the run's tokenizer, which may not exist yet.

    That of a claimed workdir is its own; else tokenizer.dir, that of init_from or the teacher, or
    of the first corpus.
    """
    own, named = run.workdir / "tokenizer", run.tokenizer.dir
    if workdir.is_claimed(run.workdir):
        return own
    if named:
        return storage.as_path(named).expanduser()
    if source := init_source(run)[0] or teacher_source(run)[0]:
        return tokenizer_dir(read_run(source))
    corpora = [name for name in run.data.names if tasks.is_corpus_dir(name)]
    return shards.corpus_tokenizer_dir(corpora[0]) if corpora else own
