"""Optimizers equal references over ten updates: transformers', torch's, and two papers'."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm import optimizers

UPDATES = 10
D, N, H = 128, 2, 64
SHAPES = {
    "head": (D, 150),
    "encoder": {
        "norm": {"scale": (D,)},
        "layers": {"query": {"kernel": (2, D, N, H)}, "out": {"kernel": (2, N, H, D)}},
    },
}


def draw(scale, seed):
    rng = np.random.default_rng(seed)
    random_array = lambda shape: scale * rng.normal(size=shape) * np.exp(rng.normal(size=shape[-1]))
    return jax.tree.map(random_array, SHAPES, is_leaf=lambda x: type(x) is tuple)


PARAMS = draw(0.3, 0)
# Of growing sizes, so that the epsilon in a root matters.
GRADIENTS = [draw(size, t + 1) for t, size in enumerate(np.logspace(-4, -1, UPDATES))]


def by_matrix(tree) -> dict[str, np.ndarray]:
    """The tree's matrices and vectors by name: layers separate, heads joined."""
    layers = tree["encoder"]["layers"]
    matrices = {"head": tree["head"], "scale": tree["encoder"]["norm"]["scale"]}
    for layer in range(2):
        matrices[f"query{layer}"] = layers["query"]["kernel"][layer].reshape(D, N * H)
        matrices[f"out{layer}"] = layers["out"]["kernel"][layer].reshape(N * H, D)
    return {name: np.asarray(x, np.float64) for name, x in matrices.items()}


def actual_params(**fields) -> dict[str, np.ndarray]:
    """Our parameters after ten updates, in float32; the rate warms up, then falls."""
    config = optimizers.OptimizerConfig(
        schedule="cosine", warmup={"steps": 3}, grad_clip_norm=0.0, **fields
    )
    as_float32 = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
    length = optimizers.RunLength(1.0, 1)
    optimizer, _ = optimizers.make_optimizer(config, UPDATES, as_float32(PARAMS), length)
    return by_matrix(run(optimizer, as_float32(PARAMS), as_float32(GRADIENTS)))


def run(optimizer, params, gradients):
    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for grads in gradients:
        params, state = step(params, state, grads)
    return params


def rate(peak: float, n: int) -> float:
    return peak * (n / 3 if n < 3 else (1 + np.cos(np.pi * (n - 3) / (UPDATES - 3))) / 2)


def by_torch(make, peak, gradients=GRADIENTS, names=None) -> dict[str, np.ndarray]:
    """A torch optimizer's parameters in float64, those named or all. make: parameters -> it."""
    torch = pytest.importorskip("torch")
    start = {k: x for k, x in by_matrix(PARAMS).items() if names is None or k in names}
    params = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in start.items()}
    optimizer = make(list(params.values()))
    for n, grads in enumerate(gradients):
        for name, x in params.items():
            x.grad = torch.tensor(by_matrix(grads)[name])
        optimizer.param_groups[0]["lr"] = rate(peak, n)
        optimizer.step()
    return {name: x.detach().numpy() for name, x in params.items()}


def assert_equal_moves(actual, reference, rtol=1e-4):
    """Both moved by the same difference, up to float32's error of the parameters."""
    start = by_matrix(PARAMS)
    for name, x in reference.items():
        moved, expected = actual[name] - start[name], x - start[name]
        error = np.abs(moved - expected).max()
        assert error < rtol * np.abs(expected).max() + 1e-6, name
        assert np.abs(expected).max() > 1e-2  # they were moved


def test_adafactor_equals_transformers():
    transformers = pytest.importorskip("transformers")
    make = lambda params: transformers.Adafactor(
        params, scale_parameter=True, relative_step=False, warmup_init=False, lr=1.0
    )
    assert_equal_moves(actual_params(name="adafactor", learning_rate=0.1), by_torch(make, 0.1))


def test_adafactor_with_small_matrices_factored_equals_transformers():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=(3, 5)), rng.normal(size=(UPDATES, 3, 5))
    reference = torch.nn.Parameter(torch.tensor(start))
    optimizer = transformers.Adafactor([reference], lr=0.1, relative_step=False)
    for grad in grads:
        reference.grad = torch.tensor(grad)
        optimizer.step()
    config = optimizers.OptimizerConfig()
    moves = lambda min_dim: run(
        optax.chain(optimizers.adafactor(config, min_dim), optax.scale_by_learning_rate(0.1)),
        {"w": jnp.float32(start)},
        [{"w": jnp.float32(grad)} for grad in grads],
    )["w"]
    np.testing.assert_allclose(moves(3), reference.detach().numpy(), rtol=1e-5, atol=1e-6)
    assert np.abs(moves(4) - reference.detach().numpy()).max() > 1e-3  # not factored: another one


def test_adamw_equals_torch():
    torch = pytest.importorskip("torch")
    make = lambda params: torch.optim.AdamW(params, betas=(0.8, 0.95), weight_decay=0.3)
    actual = actual_params(
        name="adamw",
        learning_rate=0.02,
        beta1=0.8,
        beta2=0.95,
        weight_decay=0.3,
        weight_decay_multipliers=((".*", 1.0),),
    )
    assert_equal_moves(actual, by_torch(make, 0.02))


def test_adamw_rms_equals_nanot5():
    """As published: 1e-6 is added to the root, and the step size has the bias correction."""
    beta1, beta2 = 0.9, 0.999

    def exact(x, *grads):
        mean = square = 0.0
        for t, g in enumerate(grads, start=1):
            mean, square = beta1 * mean + (1 - beta1) * g, beta2 * square + (1 - beta2) * g * g
            size = rate(0.05, t - 1) * np.sqrt(1 - beta2**t) / (1 - beta1**t)
            size *= max(1e-3, np.linalg.norm(x) / np.sqrt(x.size))
            x = x - size * mean / (np.sqrt(square) + 1e-6)
        return x

    expected = jax.tree.map(exact, by_matrix(PARAMS), *map(by_matrix, GRADIENTS))
    assert_equal_moves(actual_params(name="adamw_rms", learning_rate=0.05, beta2=beta2), expected)


def test_lion_equals_its_paper():
    def exact(x, *grads):
        mean = 0.0
        for n, g in enumerate(grads):
            step = np.sign(0.9 * mean + 0.1 * g)
            x = x - rate(0.01, n) * (step + 0.3 * x)
            mean = 0.98 * mean + 0.02 * g
        return x

    expected = jax.tree.map(exact, by_matrix(PARAMS), *map(by_matrix, GRADIENTS))
    actual = actual_params(
        name="lion", learning_rate=0.01, weight_decay=0.3, weight_decay_multipliers=((".*", 1.0),)
    )
    assert_equal_moves(actual, expected)


def test_muon_equals_torch_for_kernels_and_adamw_for_other_parameters(monkeypatch):
    """Torch's iteration, scale and decay in float64, applied to optax's momentum."""
    torch = pytest.importorskip("torch", minversion="2.9")
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x)  # what torch iterates in
    beta, momenta, mean = 0.9, [], 0.0
    for t, grads in enumerate(GRADIENTS, start=1):
        mean = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, mean or draw(0, 0), grads)
        ahead = lambda m, g, t=t: beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
        momenta.append(jax.tree.map(ahead, mean, grads))
    kernels = {f"{name}{layer}" for name in ("query", "out") for layer in range(2)}
    orthogonal = lambda params: torch.optim.Muon(
        params, momentum=0.0, nesterov=False, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"
    )
    rest = lambda params: torch.optim.AdamW(params, betas=(0.9, 0.98), weight_decay=0.3)
    actual = actual_params(
        name="muon", learning_rate=0.02, weight_decay=0.3, weight_decay_multipliers=((".*", 1.0),)
    )
    assert_equal_moves(actual, by_torch(orthogonal, 0.02, momenta, kernels), rtol=1e-3)
    assert_equal_moves(actual, by_torch(rest, 0.02, names={"head", "scale"}))
