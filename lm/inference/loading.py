"""A finished run, or one under way, opened to be read: its checkpoints, parameters, tokens."""

from __future__ import annotations

import dataclasses
import functools

import jax

from lm import checkpoints, parallel, runs
from lm.distill import features
from lm.transformer import lora


def open_checkpoints(run: runs.Run, *, read_only: bool = False) -> checkpoints.Checkpoints:
    """The checkpoints of a run, kept as its config says."""
    config = run.config["checkpoint"]
    kept = {"keep": config["max_to_keep"], "keep_every": config["keep_period"]}
    kept["keep_best"] = config["best_metric"]
    return checkpoints.Checkpoints(run.workdir / "checkpoints", read_only=read_only, **kept)


def read_params(
    run: runs.Run, tokens, which: str | int = "newest", strategy=None
) -> tuple[dict, int]:
    """(parameters, step) of a good checkpoint of the run, which must be of these tokens.

    The average of weights, where the run keeps one. which: "newest", "best" (by keep_best), or an
    update's number. strategy: who will place them; under mesh no device then reads more than its
    part. What LoRA has learnt is merged into the kernels.
    """
    params, step = read_trained(run, tokens, which, strategy)
    if run.lora.rank:
        params = jax.jit(functools.partial(lora.merge_lora, run.lora))(params)
    return params, step


def read_trained(
    run: runs.Run, tokens, which: str | int = "newest", strategy=None
) -> tuple[dict, int]:
    """What read_params gives as training holds it: LoRA's factors beside the kernels."""
    shapes = strategy.abstract_state(run.shapes) if strategy else run.shapes
    shapes = shapes | {features.PROJECTIONS: None}  # what a student had beside it stays unread
    with open_checkpoints(run, read_only=True) as saved:
        params, facts = saved.restore_params(shapes, which)
    params = features.plain(params)
    if facts["tokenizer"] != tokens.fingerprint:
        raise ValueError(
            f"{run.workdir} was trained with another tokenizer than {tokens.directory}; leave "
            f"--config.tokenizer.dir empty to use its own, or restore that from a copy."
        )
    return params, facts["step"]


def open_workdir(workdir):
    """(run, strategy, its tokenizer) over whatever devices are here, those of all hosts.

    The batch is made a multiple of the devices: a run may be read on another machine.
    """
    run = runs.read_run(workdir)
    strategy = parallel.reading_strategy(run.parallel)
    rows = -(-run.data.batch_size // strategy.shards) * strategy.shards
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, batch_size=rows))
    return run, strategy, runs.make_tokenizer(run)


def open_run(workdir, which: str | int = "newest"):
    """(run, strategy, its tokenizer, placed parameters, step). which: as in read_params."""
    run, strategy, tokens = open_workdir(workdir)
    params, step = read_params(run, tokens, which, strategy)
    return run, strategy, tokens, strategy.place_state(params), step
