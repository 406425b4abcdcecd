"""Laws of the model's numbers: parameters, FLOPs, initial variances and the first loss."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base, models
from lm import batch, losses, transformer

T5_SMALL = dict(
    d_ff=2048,
    num_heads=8,
    num_kv_heads=8,
    num_encoder_layers=6,
    num_decoder_layers=6,
    activation="relu",
    head="tied",
)
XXL = dict(d_model=4096, d_ff=10240, num_heads=64, num_kv_heads=64)
BYT5 = dict(vocab_size=384, d_model=1472, d_ff=3584)
# Fields that differ from T5 1.1 small, and the count that reference.md derives.
COUNTS = {
    "t5_small": (T5_SMALL, 60_506_624),
    "t5_1_1_xxl": (XXL | dict(num_encoder_layers=24, num_decoder_layers=24), 11_135_332_352),
    "mt5_small": (dict(vocab_size=250_112), 300_176_768),
    "byt5_small": (BYT5 | dict(num_encoder_layers=12, num_decoder_layers=4), 299_637_760),
}


def preset(name, **fields):
    """The model of a preset, as a run would build it."""
    config = models.apply(base.get_config().unlock(), name)
    return dataclasses.replace(transformer.ModelConfig(**config.model), **fields)


# Parameters. ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, count", [("t5_1_1_small", 76_961_152), ("t5_1_1_base", 247_577_856)]
)
def test_a_preset_has_the_parameters_of_its_namesake(name, count):
    assert transformer.parameter_count(preset(name)) == count


@pytest.mark.parametrize("name", COUNTS)
def test_any_t5_has_its_number_of_parameters(name):
    fields, count = COUNTS[name]
    assert transformer.parameter_count(transformer.ModelConfig(**fields)) == count


def test_the_default_model_is_the_smallest_t5_preset():
    assert transformer.ModelConfig() == preset("t5_1_1_small")


# Where training starts. ----------------------------------------------------------------------

WIDE = transformer.ModelConfig(
    vocab_size=256,
    d_model=64,
    d_ff=160,
    num_heads=8,
    num_kv_heads=8,
    head_dim=16,
    num_encoder_layers=3,
    num_decoder_layers=3,
    layers="scanned",
)
# T5X's variances, by the end of the path, and the largest draw in standard deviations; but the head
# has a quarter of T5X's, so that the first loss is near ln V.
TRUNCATED, UNIFORM, NORMAL = 2 / 0.87962566, 3**0.5, np.inf
DRAWN = {
    "embed/embedding": (1.0, NORMAL),
    "query/kernel": (1 / 64 / 16, NORMAL),
    "key/kernel": (1 / 64, NORMAL),
    "value/kernel": (1 / 64, NORMAL),
    "out/kernel": (1 / 128, NORMAL),
    "up/kernel": (1 / 64, TRUNCATED),
    "gate/kernel": (1 / 64, TRUNCATED),
    "down/kernel": (1 / 160, TRUNCATED),
    "relative/relative_bias": (1 / ((32 + 8) / 2), UNIFORM),
    "head": (0.25 / 64, TRUNCATED),
}


@pytest.fixture(scope="module")
def drawn():
    """The initial parameters of WIDE by path."""
    init = jax.jit(transformer.Transformer(WIDE).init)
    params = init(jax.random.key(0, impl="rbg"), transformer.example())["params"]
    named = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(entry.key for entry in path): np.asarray(x) for path, x in named}


def test_every_tensor_is_drawn_as_in_t5x(drawn):
    for path, x in drawn.items():
        if path.endswith("/scale"):
            assert (x == 1).all(), path
            continue
        end = path if path in DRAWN else "/".join(path.split("/")[-2:])
        variance, widest = DRAWN[end]
        std, error = variance**0.5, 5 / np.sqrt(2 * x.size)  # five standard errors
        assert abs(x.std() / std - 1) < error, f"{path}: {x.std()} where {std} was meant"
        assert abs(x.mean() / std) < 5 / np.sqrt(x.size), path
        assert np.abs(x).max() <= widest * std * 1.0001, path
        assert widest < np.inf or np.abs(x).max() > TRUNCATED * std, path


def test_no_two_layers_start_alike(drawn):
    for path, x in drawn.items():
        if path.endswith("kernel"):
            assert len({layer.tobytes() for layer in x}) == len(x) == 3, path


def first_loss(config, rows=16, length=32):
    """Nats per random target of a fresh model."""
    rng = np.random.default_rng(0)
    tokens = lambda: rng.integers(2, config.vocab_size, (rows, length), dtype=np.int32)
    ones = np.ones((rows, length), np.int32)
    examples = batch.Batch(tokens(), ones, tokens(), ones)

    def loss(key):
        model = transformer.Transformer(config)
        logits = model.apply(model.init(key, transformer.example()), examples)
        return losses.cross_entropy(logits, examples.targets, jnp.asarray(ones, jnp.float32))

    total, weight = jax.jit(loss)(jax.random.key(0, impl="rbg"))
    return total / weight


NARROW = dict(d_model=32, d_ff=64, num_encoder_layers=1, num_decoder_layers=1)


@pytest.mark.parametrize(
    "name, fields", [(name, {} if name == "tiny" else NARROW) for name in models.PRESETS]
)
def test_the_first_loss_is_near_ln_v(name, fields):
    config = preset(name, layers="scanned", **fields)
    loss, uniform = first_loss(config), np.log(config.vocab_size)
    assert loss < 1.05 * uniform
    # Logits of variance 1/4 cost half of that above ln V; the rest is the noise of 512 targets.
    assert loss == pytest.approx(uniform + 1 / 8, abs=0.08)


# FLOPs. --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(num_kv_heads=1, activation="relu", head="tied"),
        dict(num_encoder_layers=3, num_decoder_layers=1, num_kv_heads=2, d_ff=640),
    ],
)
def test_flops_are_those_of_the_compiled_model(fields):
    sizes = dict(vocab_size=2048, d_model=512, d_ff=1024, num_heads=2, num_kv_heads=2, head_dim=512)
    depth = dict(num_encoder_layers=1, num_decoder_layers=2)
    config = transformer.ModelConfig(**sizes | depth | fields)
    rows, inputs, targets = 2, 96, 64
    compiled = (
        jax.jit(transformer.Transformer(config).apply)
        .lower(
            {"params": transformer.shapes(config)},
            jax.eval_shape(lambda: transformer.example(inputs, targets, rows)),
        )
        .compile()
    )
    counted = rows * transformer.forward_flops(config, inputs, targets)
    assert compiled.cost_analysis()["flops"] == pytest.approx(counted, rel=0.02)
