"""Tiny runs, trained once a module, and readers of their workdirs."""

from __future__ import annotations

import functools
import itertools
import pathlib

import jax
import numpy as np
import pytest

from lm import (
    checkpoints,
    logs,
    optimizers,
    pipeline,
    runs,
    steps,
    train,
    transformer,
)

ROOT = pathlib.Path(__file__).parents[1]

STEPS = 6

T5 = {"objective.placement": "t5"}  # all examples have equally many targets

# Pairs of the shape that span corruption gives, so that one program serves both stages.
PAIRS = {"data.task": "docstring_summary", "data.target_length": 8, "tokenizer.dir": ""}


@pytest.fixture(scope="module")
def go(tiny_config, tmp_path_factory):
    """(workdir or None for a new one, **changes of the config) -> workdir, trained to the end."""

    def go(workdir=None, *, allow=(), profile=None, **changes) -> pathlib.Path:
        changes = {"checkpoint.every_steps": 2, "evaluate.max_examples": 16, **T5, **changes}
        workdir = workdir or tmp_path_factory.mktemp("run") / "run"
        run = runs.make_run(tiny_config(**changes), workdir)
        train.train(run, jax.devices()[:1], allow=allow, profile=profile)
        return workdir

    return go


@pytest.fixture(scope="module")
def pretrained(go):
    return go()


@pytest.fixture(scope="module")
def interrupted(go, tmp_path_factory):
    """A workdir like `pretrained`, interrupted in update 6, with checkpoints of updates 2 and 4."""
    workdir = tmp_path_factory.mktemp("interrupted") / "run"
    whole = pipeline.train_batches

    def batches(*arguments, **options):
        yield from itertools.islice(whole(*arguments, **options), 5)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "train_batches", batches)
        go(workdir)
    assert int(last(workdir)[0].step) == 4
    return workdir


def last(workdir: pathlib.Path, accept=lambda facts: True):
    """(state, facts) of the newest accepted checkpoint."""
    run = runs.read_run(workdir)
    optimizer, _ = optimizers.make_optimizer(
        run.trained, STEPS, run.shapes, optimizers.RunLength(1.0, 1)
    )
    step_config = steps.StepConfig(ema_decay=run.optimizer.ema_decay)
    make = functools.partial(
        steps.init_state, transformer.Transformer(run.model), optimizer, step_config
    )
    shapes = jax.eval_shape(make, run.shapes)
    with checkpoints.Checkpoints(workdir / "checkpoints", read_only=True) as saved:
        return saved.restore(shapes, accept)


def assert_same_bits(actual, expected) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def rows(workdir: pathlib.Path, split: str) -> list[dict]:
    return [row for row in logs.read(workdir / logs.METRICS) if row["split"] == split]


def as_flags(config: dict, prefix: str = "--config.") -> list[str]:
    """A nested config as flags that override configs/base.py; None and () are its defaults."""
    arguments = []
    for key, value in config.items():
        if isinstance(value, dict):
            arguments += as_flags(value, f"{prefix}{key}.")
        elif value not in (None, ()):
            arguments.append(f"{prefix}{key}={value}")
    return arguments
