"""What a step of decoding does not do: move what is cached, copy weights, sort a vocabulary."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import batch, decoding, steps, transformer
from lm.decoding import logits_processors

ROWS, SOURCE, LENGTH, WIDTH, DEPTH, HEAD = 4, 7, 11, 2, 3, 5
MOVES = {"gather", "slice", "dynamic_slice", "concatenate", "pad", "scan", "sort"}
either = pytest.mark.parametrize("kind", ["encoder_decoder", "language_model"])
each = pytest.mark.parametrize(
    "how", ["greedy", "beam num_beams=2", "sample num_return_sequences=2"]
)


def searched(kind, how):
    """A search as jax traces it, not yet run."""
    sizes = dict(d_model=24, d_ff=40, num_heads=4, num_kv_heads=2, head_dim=HEAD, vocab_size=64)
    depth = DEPTH if kind == "encoder_decoder" else 0
    sizes |= dict(num_encoder_layers=depth, num_decoder_layers=DEPTH)
    config = transformer.ModelConfig(architecture=kind, **sizes)
    model, how = transformer.Transformer(config), decoding.parse(how)
    search = functools.partial(steps.decode_step, model=model, length=LENGTH, eos=1, config=how)
    ids = jax.ShapeDtypeStruct((ROWS, SOURCE), jnp.int32)
    asked = batch.Batch(ids, ids, ids, ids)
    addresses = jax.ShapeDtypeStruct((ROWS, 2), jnp.int32)
    return jax.jit(search).trace(transformer.param_shapes(config), asked, addresses)


def operations(jaxpr):
    """All that a jaxpr does, also within what it calls."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from operations(inner)


def shapes(variables):
    return [variable.aval.shape for variable in variables if hasattr(variable, "aval")]


@either
@each
def test_a_step_moves_no_keys_or_values_and_cuts_no_weights_out_of_their_stack(kind, how):
    (loop,) = [
        equation
        for equation in operations(searched(kind, how).jaxpr.jaxpr)
        if equation.primitive.name == "while" and len(equation.outvars) > 2 * DEPTH
    ]
    done = list(operations(loop.params["body_jaxpr"].jaxpr))
    assert sum(one.primitive.name == "dynamic_update_slice" for one in done) >= 2 * DEPTH
    for one in done:
        seen = shapes((*one.invars, *one.outvars))
        cached = any(shape[:1] == (2 * ROWS,) and HEAD in shape[1:] for shape in seen)
        stacked = any(shape[:1] == (DEPTH,) and len(shape) > 1 for shape in seen)
        assert not (one.primitive.name in MOVES and (cached or stacked)), one


@either
@each
def test_the_compiled_loop_writes_keys_and_values_in_place_and_copies_none(kind, how):
    beams = 1 if how == "greedy" else WIDTH
    places = LENGTH * beams + (SOURCE if kind == "language_model" else 0)
    shapes = lambda size: [f"f32[{2 * ROWS},{x},{y}]" for x, y in ((HEAD, size), (size, HEAD))]
    own, cross = shapes(places), shapes(SOURCE)  # of keys, of values
    text = searched(kind, how).lower().compile().as_text()
    parts = {part.lstrip("%").split(" ")[0]: part for part in text.split("\n\n")}
    names = re.findall(r" while\(.*body=%?([\w.\-]+)", text)
    (body,) = [parts[name] for name in names if own[0] in parts[name]]
    made = re.findall(r"%?[\w.\-]+ = (\w+\[[\d,]*\])\S* ([\w\-]+)\((.*)", body)
    made = [(shape, operation, rest) for shape, operation, rest in made if shape in own + cross]
    made = [one for one in made if one[1] not in ("get-tuple-element", "bitcast")]
    assert len(made) == 2 * DEPTH, made
    for shape, operation, rest in made:
        root = operation
        if operation == "fusion":
            called = parts[re.search(r"calls=%?([\w.\-]+)", rest)[1]]
            root = re.search(r"ROOT .*?\]\S* ([\w\-]+)\(", called)[1]
            assert shape in own and not re.search(re.escape(shape) + r"\S* copy\(", called)
        assert root == "dynamic-update-slice"


def test_cross_attention_has_no_matrices_left_to_make_keys_and_values_of():
    config = transformer.ModelConfig(
        d_model=8, d_ff=8, vocab_size=16, num_encoder_layers=1, num_decoder_layers=DEPTH
    )
    ids = jnp.ones((ROWS, SOURCE), jnp.int32)
    start = functools.partial(transformer.Transformer(config).apply, method="start")
    length = lambda params: start({"params": params}, ids, ids, LENGTH)
    cache = jax.eval_shape(length, transformer.param_shapes(config))
    for layer in cache.layers:
        assert layer.cross_key.shape == (ROWS * config.num_kv_heads, config.head_dim, SOURCE)
        assert set(layer.weights["cross_attention"]) == {"query", "out"}


@pytest.mark.parametrize("size", [5, 128, 1024, 1300, 5000])
@pytest.mark.parametrize("count", [1, 4, 5])
def test_the_largest_are_those_of_top_k_and_of_equals_the_first(size, count):
    rng = np.random.default_rng(size)
    level = np.full(size, -np.inf)
    rows = [rng.normal(size=size), rng.integers(0, 3, size), rng.integers(0, 40, size), level]
    rows.append(np.where(rng.random(size) < 3 / size, 1.0, -np.inf))
    x = np.stack(rows).astype(np.float32)
    values, places = logits_processors.fast_top_k(jnp.asarray(x), count)
    order = np.argsort(-x, axis=1, kind="stable")[:, :count]
    np.testing.assert_array_equal(places, order)
    np.testing.assert_array_equal(values, np.take_along_axis(x, order, axis=1))
