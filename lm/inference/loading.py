"""Open a workdir for reading: checkpoints, parameters, tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import os

import jax

from lm import checkpoints, decoding, parallel, runs, tokenizer
from lm.distill import features
from lm.transformer import lora


def open_checkpoints(run: runs.Run, *, read_only: bool = False) -> checkpoints.Checkpoints:
    """Open the checkpoints of a run, with its retention options."""
    return checkpoints.Checkpoints(
        run.workdir / "checkpoints",
        read_only=read_only,
        max_to_keep=run.checkpoint.max_to_keep,
        keep_period=run.checkpoint.keep_period,
        best_metric=run.checkpoint.best_metric,
    )


def read_params(
    run: runs.Run,
    tokens: tokenizer.Tokenizer,
    step: str | int = "newest",
    strategy: parallel.Pmap | parallel.Mesh | None = None,
) -> tuple[dict, int]:
    """Read (parameters, step) of a checkpoint; LoRA factors are merged into the kernels.

    Args:
      tokens: the tokenizer that the checkpoint must have been trained with.
      step: "newest", "best" (by the run's metric), or the number of an update.
      strategy: that will place the parameters; with a mesh each device reads only its shards.

    Returns the exponential moving average of the weights if the run has one.
    """
    params, step = read_trainable_params(run, tokens, step, strategy)
    if run.lora.rank:
        params = jax.jit(functools.partial(lora.merge_lora, run.lora))(params)
    return params, step


def read_trainable_params(
    run: runs.Run,
    tokens: tokenizer.Tokenizer,
    step: str | int = "newest",
    strategy: parallel.Pmap | parallel.Mesh | None = None,
) -> tuple[dict, int]:
    """Read (parameters, step) as training stores them, with separate LoRA factors."""
    shapes = strategy.abstract_state(run.shapes) if strategy else run.shapes
    shapes = shapes | {features.PROJECTIONS: None}  # a student's projections are not read
    with open_checkpoints(run, read_only=True) as run_checkpoints:
        params, metadata = run_checkpoints.restore_params(shapes, step)
    params = features.model_params(params)
    if metadata["tokenizer"] != tokens.fingerprint:
        raise ValueError(
            f"{run.workdir} was trained with another tokenizer than {tokens.directory}; leave "
            f"--config.tokenizer.dir empty to use the run's tokenizer, or restore it from a copy."
        )
    return params, metadata["step"]


def open_workdir(
    workdir: str | os.PathLike,
) -> tuple[runs.Run, parallel.Pmap | parallel.Mesh, tokenizer.Tokenizer]:
    """Return (run, strategy, tokenizer) of a workdir, for all devices of all hosts.

    The batch size is rounded up to a multiple of the devices, which may differ from training's.
    """
    run = runs.read_run(workdir)
    strategy = parallel.reading_strategy(run.parallel)
    rows = -(-run.data.batch_size // strategy.shards) * strategy.shards
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, batch_size=rows))
    return run, strategy, runs.make_tokenizer(run)


def open_run(workdir: str | os.PathLike, step: str | int = "newest") -> tuple:
    """Return (run, strategy, tokenizer, placed parameters, step) of a workdir's checkpoint."""
    run, strategy, tokens = open_workdir(workdir)
    params, step = read_params(run, tokens, step, strategy)
    return run, strategy, tokens, strategy.place_state(params), step


def decoding_config(run: runs.Run, text: str = "") -> decoding.DecodingConfig:
    """Parse --decoding, which replaces the run's decoding as a whole; empty: the run's."""
    return decoding.parse(text) if text else run.decoding
