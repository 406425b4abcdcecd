"""A run as training leaves it, of parameters drawn by a seed: to be read, in a second."""

from __future__ import annotations

import jax

from lm import evaluate, run, steps, transformer


def params(this: run.Run, seed: int = 0) -> dict:
    """Parameters of the run's model, whose answers to different inputs differ."""
    made = transformer.Transformer(this.model).init(jax.random.key(seed), transformer.example())
    return jax.device_get(made["params"])


def write(config: dict, workdir, seed: int = 0, step: int = 0) -> run.Run:
    """The run of a config in a new workdir, or one more checkpoint of it."""
    this = run.make_run(config, workdir)
    tokens = run.make_tokenizer(this)
    with evaluate.open_checkpoints(this) as saved:
        state = steps.State(step, params(this, seed), None, 0)
        saved.save(state, {"tokenizer": tokens.fingerprint, "position": {"next_index": step}})
    if not run.is_claimed(workdir):
        run.claim(this, tokens)
    return this
