"""Laws of decoding speed: no step moves the cache, copies weights or sorts the vocabulary."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import batch, cpu_kernels, decoding, steps, transformer

ROWS, SOURCE, LENGTH, WIDTH, DEPTH, HEAD = 4, 7, 11, 2, 3, 5
MOVES = {"gather", "slice", "dynamic_slice", "concatenate", "pad", "scan", "sort"}
every_architecture = pytest.mark.parametrize("kind", ["encoder_decoder", "language_model"])
every_method = pytest.mark.parametrize(
    "method", ["greedy", "beam num_beams=2", "sample num_return_sequences=2"]
)


def traced_search(kind, method):
    """Trace a search."""
    sizes = dict(d_model=24, d_ff=40, num_heads=4, num_kv_heads=2, head_dim=HEAD, vocab_size=64)
    depth = DEPTH if kind == "encoder_decoder" else 0
    sizes |= dict(num_encoder_layers=depth, num_decoder_layers=DEPTH)
    config = transformer.ModelConfig(architecture=kind, **sizes)
    model = transformer.Transformer(config)
    search = functools.partial(
        steps.decode_step, model=model, length=LENGTH, eos=1, config=decoding.parse(method)
    )
    ids = jax.ShapeDtypeStruct((ROWS, SOURCE), jnp.int32)
    examples = batch.Batch(ids, ids, ids, ids)
    addresses = jax.ShapeDtypeStruct((ROWS, 2), jnp.int32)
    return jax.jit(search).trace(transformer.param_shapes(config), examples, addresses)


def operations(jaxpr):
    """Yield all equations of a jaxpr, also of nested ones."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from operations(inner)


def shapes(variables):
    return [variable.aval.shape for variable in variables if hasattr(variable, "aval")]


@every_architecture
@every_method
def test_a_step_moves_no_keys_or_values_and_slices_no_stacked_weights(kind, method):
    (loop,) = [
        equation
        for equation in operations(traced_search(kind, method).jaxpr.jaxpr)
        if equation.primitive.name == "while" and len(equation.outvars) > 2 * DEPTH
    ]
    equations = list(operations(loop.params["body_jaxpr"].jaxpr))
    assert sum(e.primitive.name == "dynamic_update_slice" for e in equations) >= 2 * DEPTH
    for equation in equations:
        variables = shapes((*equation.invars, *equation.outvars))
        is_cached = any(shape[:1] == (2 * ROWS,) and HEAD in shape[1:] for shape in variables)
        is_stacked = any(shape[:1] == (DEPTH,) and len(shape) > 1 for shape in variables)
        assert not (equation.primitive.name in MOVES and (is_cached or is_stacked)), equation


@every_architecture
@every_method
def test_the_compiled_loop_writes_keys_and_values_in_place_without_copies(kind, method):
    beams = 1 if method == "greedy" else WIDTH
    num_slots = LENGTH * beams + (SOURCE if kind == "language_model" else 0)
    shapes = lambda size: [f"f32[{2 * ROWS},{x},{y}]" for x, y in ((HEAD, size), (size, HEAD))]
    self_shapes, cross_shapes = shapes(num_slots), shapes(SOURCE)  # of keys, of values
    text = traced_search(kind, method).lower().compile().as_text()
    computations = {c.lstrip("%").split(" ")[0]: c for c in text.split("\n\n")}
    names = re.findall(r" while\(.*body=%?([\w.\-]+)", text)
    (body,) = [computations[name] for name in names if self_shapes[0] in computations[name]]
    outputs = re.findall(r"%?[\w.\-]+ = (\w+\[[\d,]*\])\S* ([\w\-]+)\((.*)", body)
    outputs = [
        (shape, operation, rest)
        for shape, operation, rest in outputs
        if shape in self_shapes + cross_shapes
    ]
    outputs = [output for output in outputs if output[1] not in ("get-tuple-element", "bitcast")]
    assert len(outputs) == 2 * DEPTH, outputs
    for shape, operation, rest in outputs:
        root = operation
        if operation == "fusion":
            called = computations[re.search(r"calls=%?([\w.\-]+)", rest)[1]]
            root = re.search(r"ROOT .*?\]\S* ([\w\-]+)\(", called)[1]
            assert shape in self_shapes and not re.search(re.escape(shape) + r"\S* copy\(", called)
        assert root == "dynamic-update-slice"


def test_decoding_keeps_no_weights_of_cross_attention_keys_and_values():
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
def test_fast_top_k_equals_top_k_and_prefers_the_first_of_equals(size, count):
    rng = np.random.default_rng(size)
    level = np.full(size, -np.inf)
    rows = [rng.normal(size=size), rng.integers(0, 3, size), rng.integers(0, 40, size), level]
    rows.append(np.where(rng.random(size) < 3 / size, 1.0, -np.inf))
    x = np.stack(rows).astype(np.float32)
    values, indices = cpu_kernels.fast_top_k(jnp.asarray(x), count)
    order = np.argsort(-x, axis=1, kind="stable")[:, :count]
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_array_equal(values, np.take_along_axis(x, order, axis=1))
