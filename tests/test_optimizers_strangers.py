"""Our optimizers and those of others over ten updates: transformers', torch's, and two papers'."""

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
    one = lambda shape: scale * rng.normal(size=shape) * np.exp(rng.normal(size=shape[-1]))
    return jax.tree.map(one, SHAPES, is_leaf=lambda x: type(x) is tuple)


PARAMS = draw(0.3, 0)
# Of all sizes, so that what is added to a root for safety is seen, and growing at last.
GRADIENTS = [draw(size, t + 1) for t, size in enumerate(np.logspace(-4, -1, UPDATES))]


def apart(tree) -> dict[str, np.ndarray]:
    """The tree's matrices and vectors as T5 has them: a layer each, heads joined."""
    layers = tree["encoder"]["layers"]
    found = {"head": tree["head"], "scale": tree["encoder"]["norm"]["scale"]}
    for layer in range(2):
        found[f"query{layer}"] = layers["query"]["kernel"][layer].reshape(D, N * H)
        found[f"out{layer}"] = layers["out"]["kernel"][layer].reshape(N * H, D)
    return {name: np.asarray(x, np.float64) for name, x in found.items()}


def ours(**fields) -> dict[str, np.ndarray]:
    """Our parameters after ten updates, in float32; the rate warms up, then falls."""
    config = optimizers.OptimizerConfig(
        schedule="cosine", warmup={"steps": 3}, grad_clip_norm=0.0, **fields
    )
    as_float32 = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
    pace = optimizers.RunLength(1.0, 1)
    optimizer, _ = optimizers.make_optimizer(config, UPDATES, as_float32(PARAMS), pace)
    return apart(run(optimizer, as_float32(PARAMS), as_float32(GRADIENTS)))


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
    start = {k: x for k, x in apart(PARAMS).items() if names is None or k in names}
    params = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in start.items()}
    optimizer = make(list(params.values()))
    for n, grads in enumerate(gradients):
        for name, x in params.items():
            x.grad = torch.tensor(apart(grads)[name])
        optimizer.param_groups[0]["lr"] = rate(peak, n)
        optimizer.step()
    return {name: x.detach().numpy() for name, x in params.items()}


def assert_equal_moves(ours, theirs, rtol=1e-4):
    """What was moved is equal, up to float32's error of the parameters themselves."""
    start = apart(PARAMS)
    for name, x in theirs.items():
        moved, expected = ours[name] - start[name], x - start[name]
        error = np.abs(moved - expected).max()
        assert error < rtol * np.abs(expected).max() + 1e-6, name
        assert np.abs(expected).max() > 1e-2  # they were moved


def test_adafactor_is_transformers():
    transformers = pytest.importorskip("transformers")
    make = lambda params: transformers.Adafactor(
        params, scale_parameter=True, relative_step=False, warmup_init=False, lr=1.0
    )
    assert_equal_moves(ours(name="adafactor", learning_rate=0.1), by_torch(make, 0.1))


def test_adafactor_with_small_matrices_factored_is_transformers_too():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=(3, 5)), rng.normal(size=(UPDATES, 3, 5))
    theirs = torch.nn.Parameter(torch.tensor(start))
    stranger = transformers.Adafactor([theirs], lr=0.1, relative_step=False)
    for grad in grads:
        theirs.grad = torch.tensor(grad)
        stranger.step()
    config = optimizers.OptimizerConfig()
    moves = lambda min_dim: run(
        optax.chain(optimizers.adafactor(config, min_dim), optax.scale_by_learning_rate(0.1)),
        {"w": jnp.float32(start)},
        [{"w": jnp.float32(grad)} for grad in grads],
    )["w"]
    np.testing.assert_allclose(moves(3), theirs.detach().numpy(), rtol=1e-5, atol=1e-6)
    assert np.abs(moves(4) - theirs.detach().numpy()).max() > 1e-3  # not factored: another one


def test_adamw_is_torchs():
    torch = pytest.importorskip("torch")
    make = lambda params: torch.optim.AdamW(params, betas=(0.8, 0.95), weight_decay=0.3)
    mine = ours(
        name="adamw",
        learning_rate=0.02,
        beta1=0.8,
        beta2=0.95,
        weight_decay=0.3,
        weight_decay_multipliers=((".*", 1.0),),
    )
    assert_equal_moves(mine, by_torch(make, 0.02))


def test_adamw_rms_is_nanot5s():
    """As published: 1e-6 beside the root, the correction of bias in the size of the step."""
    beta1, beta2 = 0.9, 0.999

    def exact(x, *grads):
        mean = square = 0.0
        for t, g in enumerate(grads, start=1):
            mean, square = beta1 * mean + (1 - beta1) * g, beta2 * square + (1 - beta2) * g * g
            size = rate(0.05, t - 1) * np.sqrt(1 - beta2**t) / (1 - beta1**t)
            size *= max(1e-3, np.linalg.norm(x) / np.sqrt(x.size))
            x = x - size * mean / (np.sqrt(square) + 1e-6)
        return x

    theirs = jax.tree.map(exact, apart(PARAMS), *map(apart, GRADIENTS))
    assert_equal_moves(ours(name="adamw_rms", learning_rate=0.05, beta2=beta2), theirs)


def test_lion_is_its_papers():
    def exact(x, *grads):
        mean = 0.0
        for n, g in enumerate(grads):
            step = np.sign(0.9 * mean + 0.1 * g)
            x = x - rate(0.01, n) * (step + 0.3 * x)
            mean = 0.98 * mean + 0.02 * g
        return x

    theirs = jax.tree.map(exact, apart(PARAMS), *map(apart, GRADIENTS))
    mine = ours(
        name="lion", learning_rate=0.01, weight_decay=0.3, weight_decay_multipliers=((".*", 1.0),)
    )
    assert_equal_moves(mine, theirs)


def test_muon_is_torchs_for_kernels_and_torchs_adamw_for_all_else(monkeypatch):
    """Torch's iteration, size and decay, in float64, of optax's momentum, which is written out."""
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
    mine = ours(
        name="muon", learning_rate=0.02, weight_decay=0.3, weight_decay_multipliers=((".*", 1.0),)
    )
    assert_equal_moves(mine, by_torch(orthogonal, 0.02, momenta, kernels), rtol=1e-3)
    assert_equal_moves(mine, by_torch(rest, 0.02, names={"head", "scale"}))
