"""A run as training leaves it, of parameters drawn by a seed: to be read, in a second."""

from __future__ import annotations

import jax

from lm import inference, runs, steps, transformer


def params(run: runs.Run, seed: int = 0) -> dict:
    """Parameters of the run's model, whose answers to different inputs differ."""
    made = transformer.Transformer(run.model).init(jax.random.key(seed), transformer.dummy_batch())
    return jax.device_get(made["params"])


def write(config: dict, workdir, seed: int = 0, step: int = 0) -> runs.Run:
    """The run of a config in a new workdir, or one more checkpoint of it."""
    run = runs.make_run(config, workdir)
    tokens = runs.make_tokenizer(run)
    with inference.open_checkpoints(run) as saved:
        state = steps.State(step, params(run, seed), None, 0)
        saved.save(state, {"tokenizer": tokens.fingerprint, "position": {"next_index": step}})
    if not runs.is_claimed(workdir):
        runs.claim(run, tokens)
    return run
