"""States to save, numbered by step, and checks of a directory of their checkpoints."""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from lm import checkpoints, optimizers, steps

FACTS = {"config": {"steps": 3, "peak": 0.1}, "tokenizer": "é", "position": {"next_index": 2}}
SHAPES = {"head": (130, 140), "scale": (7,), "layers": (2, 129, 3)}


@functools.cache
def updater(name: str):
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    config, length = optimizers.OptimizerConfig(name=name), optimizers.RunLength(10.0, 100)
    optimizer, _ = optimizers.make_optimizer(config, 10, shapes, length)
    return jax.jit(lambda grads, params: optimizer.update(grads, optimizer.init(params), params))


@functools.cache
def make_state(step: int, name: str = "adamw") -> steps.State:
    """A state after `step` updates with random gradients; its bits depend on the step."""
    rng = np.random.default_rng(step)
    normal = lambda: {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}
    params, average = (jax.tree.map(jnp.asarray, normal()) for _ in range(2))
    _, opt_state = updater(name)(normal(), params)
    counts = jnp.asarray(step, jnp.int32), jnp.asarray(step % 2, jnp.int32)
    return steps.State(counts[0], {"tower": params}, opt_state, counts[1], {"tower": average})


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def bits(tree) -> list[tuple]:
    """Structure and bits: equal for equal trees, -0.0 and every NaN are distinct."""
    leaves = [(x.dtype.name, x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]
    return [jax.tree.structure(tree), *leaves]


def save(directory, *states, facts=FACTS, **options) -> None:
    with checkpoints.Checkpoints(directory, **options) as saved:
        for state in states:
            saved.save(state, facts)


def restore(directory, like=None, accept=lambda facts: True, **options):
    with checkpoints.Checkpoints(directory, **options) as saved:
        return saved.restore(abstract(make_state(0)) if like is None else like, accept)


def facts_of(step: int) -> dict:
    """The facts that `restore` returns with a state of `save`."""
    return FACTS | {"step": step, "skipped": step % 2, "figures": {}}


def names(directory) -> list[str]:
    return sorted(path.name for path in pathlib.Path(directory).iterdir())


def files(step: pathlib.Path) -> list[pathlib.Path]:
    """The files of a step, the greatest first."""
    paths = [path for path in step.rglob("*") if path.is_file()]
    return sorted(paths, key=lambda path: (-path.stat().st_size, str(path)))


def check_fallback(directory: pathlib.Path) -> bool:
    """Restore steps 1 and 2 after damage to 2: True if 1 was restored and 2 set aside."""
    state, facts = restore(directory)
    step = int(state.step)
    assert bits(state) == bits(make_state(step)), f"silently wrong at step {step}"
    assert facts == facts_of(step)
    if step == 2:
        assert names(directory) == ["1", "2"]
        return False
    assert step == 1
    aside, rest = names(directory)[1], names(directory)[:1]
    assert rest == ["1"] and aside.startswith("2.corrupt-")
    return True
