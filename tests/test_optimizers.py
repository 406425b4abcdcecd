"""Laws of updates: descent, Adafactor in float64, stacked layers, memory, clipping, sharding."""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lm import optimizers, transformer

STEPS = 50
RUN_LENGTH = optimizers.RunLength(1.0, 1)
every_optimizer = pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
# A tower's kernels: wide enough to be factored, once heads are joined.
KERNELS = {"query": (3, 128, 2, 64), "out": (3, 2, 64, 130), "up": (3, 128, 132), "down": (3, 9, 4)}
TOWER = {"encoder": {"layers": {name: {"kernel": shape} for name, shape in KERNELS.items()}}}
TOWER["encoder"]["layers"] |= {"norm": {"scale": (3, 5)}, "relative": {"relative_bias": (3, 4, 2)}}


def make(params, steps=STEPS, **fields):
    """An optimizer at a constant rate of 0.02, without clipping, by default."""
    defaults = dict(
        learning_rate=0.02, schedule="constant", warmup={"steps": 0}, grad_clip_norm=0.0
    )
    config = optimizers.OptimizerConfig(**defaults | fields)
    return optimizers.make_optimizer(config, steps, params, RUN_LENGTH)[0]


def draw(shapes, count=3, seed=0):
    """Parameters of these shapes, of RMS 0.5, and `count` ever smaller gradients, in float64."""
    rng = np.random.default_rng(seed)
    random_tree = lambda scale: jax.tree.map(
        lambda shape: scale * rng.normal(size=shape), shapes, is_leaf=lambda x: type(x) is tuple
    )
    return random_tree(0.5), [random_tree(10.0 ** -(i + 1)) for i in range(count)]


def params_and_gradients(count=3):
    """`draw` for a factored and a small matrix, a scale and a bias."""
    small = {"norm": {"scale": (5,)}, "relative": {"relative_bias": (4, 2)}}
    return draw({"wide": (128, 130), "narrow": (3, 4)} | small, count)


@functools.cache
def step_of(optimizer):
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


def train(optimizer, params, gradients):
    """Parameters after one update per gradient."""
    as_float32 = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
    params = as_float32(params)
    state = optimizer.init(params)
    for grads in gradients:
        params, state = step_of(optimizer)(params, state, as_float32(grads))
    return params


def assert_close(ours, theirs, rtol=2e-5):
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7)
    jax.tree.map(compare, ours, theirs)


# Updates. ------------------------------------------------------------------------------------


@every_optimizer
def test_every_optimizer_lowers_a_quadratic(name):
    """The squared distance of every parameter to its target falls to a hundredth."""
    shapes = {"encoder": {"layers": {"up": {"kernel": (2, 6, 8)}, "norm": {"scale": (2, 6)}}}}
    params, (target,) = draw(shapes | {"head": (6, 8)}, 1)
    loss = lambda params: optax.tree.norm(optax.tree.sub(params, target), squared=True)
    optimizer = make(
        params, 100, name=name, learning_rate=0.1, schedule="linear", grad_clip_norm=1.0
    )

    @jax.jit
    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    (last, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), None, 100)
    for before, after, aim in zip(*map(jax.tree.leaves, (params, last, target)), strict=True):
        assert np.sum((after - aim) ** 2) < 0.01 * np.sum((before - aim) ** 2)


def test_an_update_uses_the_learning_rate_of_its_step():
    """A constant gradient moves AdamW by the rate itself, so the path shows the schedule."""
    params, ones = {"w": jnp.zeros(())}, {"w": jnp.ones(())}
    config = optimizers.OptimizerConfig(
        name="adamw", schedule="linear", warmup={"steps": 3}, learning_rate=0.01
    )
    optimizer, rate = optimizers.make_optimizer(config, STEPS, params, RUN_LENGTH)
    moved = [-train(optimizer, params, [ones] * n)["w"] for n in range(6)]
    np.testing.assert_allclose(np.diff(moved), [rate(n) for n in range(5)], rtol=1e-4, atol=1e-8)


def test_adafactor_equals_its_paper_in_float64():
    params, gradients = params_and_gradients()
    actual = train(make(params, name="adafactor", learning_rate=0.01), params, gradients)
    rms = lambda x: np.sqrt(np.mean(x * x))

    def exact(x, *grads):
        square = rows = columns = 0.0
        for t, g in enumerate(grads, start=1):
            beta, new = 1 - t**-0.8, g * g + 1e-30
            if min(g.shape) >= 128:
                rows = beta * rows + (1 - beta) * new.mean(1, keepdims=True)
                columns = beta * columns + (1 - beta) * new.mean(0, keepdims=True)
                square = rows * columns / rows.mean()
            else:
                square = beta * square + (1 - beta) * new
            step = g / np.sqrt(square)
            x = x - 0.01 * max(1e-3, rms(x)) * step / max(1.0, rms(step))
        return x

    assert_close(actual, jax.tree.map(exact, params, *gradients), rtol=1e-4)


@pytest.mark.parametrize("name", ["adafactor", "adamw_rms"])
def test_the_first_step_is_the_rate_times_the_rms_of_the_parameter(name):
    params, gradients = params_and_gradients(1)
    params["norm"]["scale"] *= 0  # below 1e-3, that is the size
    rms = lambda x: np.sqrt(np.mean(np.square(x)))
    optimizer = make(params, name=name, learning_rate=0.01)
    moved = jax.tree.map(lambda a, b: rms(a - b), train(optimizer, params, gradients), params)
    expected = jax.tree.map(lambda x: 0.01 * max(rms(x), 1e-3), params)
    assert_close(moved, expected, rtol=1e-3)
    # LoRA's b starts at 0: factors take the rate as it is.
    params, gradients = {"adapters": params}, [{"adapters": tree} for tree in gradients]
    optimizer = make(params, name=name, learning_rate=0.01)
    moved = jax.tree.map(lambda a, b: rms(a - b), train(optimizer, params, gradients), params)
    assert_close(moved, jax.tree.map(lambda _: 0.01, params), rtol=1e-3)


@every_optimizer
def test_weight_decay_is_proportional_to_the_rate_and_skips_scales_and_biases(name):
    params, _ = params_and_gradients(0)
    zero = jax.tree.map(np.zeros_like, params)
    optimizer = make(params, name=name, weight_decay=0.1, learning_rate=0.01)
    decayed = train(optimizer, params, [zero, zero])
    for key, share in {"wide": 0.999**2, "narrow": 0.999**2, "norm": 1, "relative": 1}.items():
        expected = jax.tree.map(lambda x, share=share: share * x, params[key])
        assert_close(decayed[key], expected, rtol=1e-6)


# Layers. -------------------------------------------------------------------------------------


@every_optimizer
def test_stacked_layers_are_updated_like_separate_parameters(name):
    """Layers of different scales get the same updates stacked and alone."""
    params, gradients = draw(TOWER, 4)
    rescale = lambda x: x * np.logspace(-1, 1, 3).reshape(-1, *[1] * (x.ndim - 1))
    params, *gradients = (jax.tree.map(rescale, tree) for tree in (params, *gradients))
    optimizer = make(params, name=name, weight_decay=0.1)
    together = train(optimizer, params, gradients)
    for layer in range(3):
        select = lambda tree, layer=layer: jax.tree.map(lambda x: x[layer : layer + 1], tree)
        alone = train(optimizer, select(params), [select(grads) for grads in gradients])
        assert_close(select(together), alone, rtol=1e-5)


@pytest.mark.parametrize("name", ["adafactor", "adamw_rms", "muon"])
def test_attention_kernels_are_updated_as_matrices_with_joined_heads(name):
    """[D, N, H] is trained as [D, N*H], and [N, H, D] as [N*H, D]."""
    params, gradients = draw(TOWER, 3)

    def flat(tree):
        layers = dict(tree["encoder"]["layers"])
        query, out = layers["query"]["kernel"], layers["out"]["kernel"]
        joined = {"query": query.reshape(3, 128, 128), "out": out.reshape(3, 128, 130)}
        kernels = {name: {"kernel": x} for name, x in joined.items()}
        return {"encoder": {"layers": layers | kernels}}

    actual = flat(train(make(params, name=name), params, gradients))
    expected = train(make(params, name=name), flat(params), [flat(tree) for tree in gradients])
    assert_close(actual, expected, rtol=1e-5)


def test_adafactor_stores_rows_and_columns_of_wide_matrices_only():
    params = draw(TOWER, 0)[0] | {"embed": {"embedding": np.zeros((1000, 128))}}
    state = jax.eval_shape(make(params, name="adafactor").init, params)
    sizes = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        name = re.search(r"(\w+)/(kernel|scale|relative_bias|embedding)$", path)
        if name:
            assert leaf.dtype == jnp.float32
            sizes.setdefault(name[1], []).append(leaf.size)
    # Both sides of each wide matrix, with heads joined; every number of all else.
    assert sizes == {
        "query": [3 * 128, 3 * 128],
        "out": [3 * 128, 3 * 130],
        "up": [3 * 128, 3 * 132],
        "embed": [1000, 128],
        "down": [3 * 9 * 4],
        "norm": [3 * 5],
        "relative": [3 * 4 * 2],
    }


def test_muon_orthogonalizes_the_kernels_of_layers_only():
    config = transformer.ModelConfig(
        vocab_size=64, d_model=16, d_ff=24, head_dim=4, norm=dict(kind="layer")
    )
    shapes = transformer.param_shapes(config)
    state = jax.eval_shape(make(shapes, name="muon").init, shapes)
    moments = {"muon": set(), "adamw": set()}
    for keys, _ in jax.tree_util.tree_leaves_with_path(state):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        match = re.search(r"inner_states/(muon|adamw)/.*/(mu|nu)/(.*)", path)
        if match:
            moments[match[1]].add((match[2], match[3]))
    paths = {
        jax.tree_util.keystr(keys, simple=True, separator="/")
        for keys, _ in jax.tree_util.tree_leaves_with_path(shapes)
    }
    kernels = {path for path in paths if path.endswith("/kernel")}
    assert moments["muon"] == {("mu", path) for path in kernels}
    others = paths - kernels
    assert moments["adamw"] == {(name, path) for path in others for name in ("mu", "nu")}


def test_muons_steps_are_nearly_orthogonal_and_as_large_as_adamws():
    params, gradients = draw(TOWER, 1)
    moved = jax.tree.map(np.subtract, params, train(make(params, name="muon"), params, gradients))
    layers = moved["encoder"]["layers"]
    step = np.asarray(layers["query"]["kernel"], np.float64).reshape(3, 128, 128)
    # Of N x N, an orthogonal matrix times 0.2 sqrt(N): RMS 0.2. Five iterations come near it.
    values = np.linalg.svd(step, compute_uv=False) / (0.02 * 0.2 * math.sqrt(128))
    assert np.quantile(values, 0.1) > 0.6 and values.max() < 1.3
    adamw = np.sqrt(np.mean(np.square(layers["norm"]["scale"]))) / 0.02
    muon = np.sqrt(np.mean(np.square(step))) / 0.02
    assert muon == pytest.approx(0.2, rel=0.15) and adamw == pytest.approx(1, rel=1e-3)


# Sharding. -----------------------------------------------------------------------------------

SPECS = {
    "query": (None, "fsdp", "tensor", None),
    "out": (None, "tensor", None, "fsdp"),
    "up": (None, "fsdp", "tensor"),
    "down": (),
}


@every_optimizer
def test_sharded_parameters_get_the_same_updates_and_stay_sharded(name):
    """Adafactor gathers no matrix."""
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    params, (grads,) = draw({"layers": {k: {"kernel": KERNELS[k]} for k in SPECS}}, 1)
    lay = lambda keys, x: jax.device_put(
        np.float32(x), NamedSharding(mesh, PartitionSpec(*SPECS[keys[1].key]))
    )
    path = lambda tree: jax.tree_util.tree_map_with_path(lay, tree)
    optimizer = make(params, name=name, weight_decay=0.1, grad_clip_norm=1.0)

    def update(grads, params):
        updates, state = optimizer.update(grads, optimizer.init(params), params)
        return optax.apply_updates(params, updates), state

    placed = path(params)
    layout = jax.tree.map(lambda x: x.sharding, placed)
    compiled = jax.jit(update, out_shardings=(layout, None)).lower(path(grads), placed).compile()
    sharded, _ = compiled(path(grads), placed)
    assert_close(jax.device_get(sharded), train(optimizer, params, [grads]), rtol=1e-4)
    if name == "adafactor":
        gathered = re.findall(r"f32\[([\d,]+)\]\S* all-gather\(", compiled.as_text())
        largest = max([math.prod(map(int, shape.split(","))) for shape in gathered], default=0)
        assert largest <= 3 * 132, gathered  # no more than a side of its matrices


# Clipping. -----------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_norm", [0.5, 1e-3])
def test_clipping_scales_the_whole_gradient_to_its_norm(clip_norm):
    params, gradients = params_and_gradients()
    norms = [math.sqrt(sum(np.sum(g * g) for g in jax.tree.leaves(tree))) for tree in gradients]
    assert max(norms) > clip_norm
    by_hand = [
        jax.tree.map(lambda g, n=norm: g * min(1, clip_norm / n), tree)
        for tree, norm in zip(gradients, norms, strict=True)
    ]
    optimizer = lambda clip: make(params, name="adamw", grad_clip_norm=clip)
    actual = train(optimizer(clip_norm), params, gradients)
    assert_close(actual, train(optimizer(0.0), params, by_hand), rtol=1e-4)


def test_a_small_gradient_and_a_norm_of_zero_are_not_clipped():
    params, (grads,) = params_and_gradients(1)
    params, grads = jax.tree.map(jnp.float32, (params, grads))
    optimizers_of = [make(params, name="adamw", grad_clip_norm=clip) for clip in (0.0, 1e6)]
    unclipped, large = (each.update(grads, each.init(params), params)[0] for each in optimizers_of)
    jax.tree.map(np.testing.assert_array_equal, unclipped, large)
