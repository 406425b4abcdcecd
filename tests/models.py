"""Tiny models of every option, their parameters, batches, and compiled losses and gradients."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import batch, losses, transformer
from lm.transformer import config as words

ROWS, SOURCE, TARGET, VOCAB = 6, 12, 10, 32

SIZES = dict(vocab_size=VOCAB, d_model=16, d_ff=24, num_heads=4, num_kv_heads=4, head_dim=4)

SIZES |= {
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "position.relative_attention_num_buckets": 8,
    "position.relative_attention_max_distance": 10,
}

ALONE = dict(num_encoder_layers=0)

T5GEMMA = {
    "shared_params": "none",
    "position.kind": "rotary",
    "norm.kind": "rms_offset",
    "norm.placement": "both",
    "attention.scale": 0.6,
    "attention.logits_soft_cap": 1.5,
    "final_logits_soft_cap": 2.0,
    "attention.pattern": "local_global_1_1",
    "attention.window_size": 3,
    "lm_head": "tied_unscaled",
    "embedding_scale": "sqrt_d_model",
    "decoder_start_token_id": 2,
    "num_kv_heads": 2,
}

OTHER_SHAPE = dict(d_model=24, d_ff=20, num_heads=6, num_kv_heads=3, head_dim=6)

# 2017: the first Transformer, post-norm. `local` has windows that are smaller than the rows.
ATTENTION_2017 = {
    "position.kind": "sinusoidal",
    "norm.kind": "layer",
    "norm.placement": "post",
    "activation": "relu",
    "embedding_scale": "sqrt_d_model",
    "lm_head": "tied_unscaled",
    "attention.scale": 0.5,
}

WORDS = {
    "t5_1_1": {},
    "t5_1_0": dict(activation="relu", lm_head="tied", scan_layers=True),
    "umt5": {"position.kind": "relative_per_layer", "scan_layers": True},
    "byt5": {
        "num_encoder_layers": 3,
        "num_decoder_layers": 1,
        "remat_policy": "full",
        "attention.implementation": "einsum",
    },
    "ul2": dict(activation="swiglu", num_kv_heads=2, remat_policy="dots", decoder_start_token_id=3),
    "t5gemma": T5GEMMA,
    "t5gemma_unequal": T5GEMMA | dict(encoder=OTHER_SHAPE, num_encoder_layers=1),
    "2017": ATTENTION_2017,
    "no_position": {
        "position.kind": "none",
        "activation": "gelu",
        "norm.kind": "layer",
        "num_kv_heads": 1,
    },
    "normed": {
        "attention.query_key_norm": "rms",
        "attention.pattern": "local",
        "attention.window_size": 3,
        "num_kv_heads": 2,
    },
    "five_local": {
        "attention.pattern": "local_global_5_1",
        "attention.window_size": 2,
        "num_decoder_layers": 7,
        "scan_layers": True,
        "position.kind": "rotary",
    },
    "shared": {"shared_params": "all", "attention.logits_soft_cap": 1.0, "norm.placement": "both"},
    "prefix_lm": ALONE | {"architecture": "prefix_lm", "attention.logits_soft_cap": 1.0},
    "prefix_t5gemma": T5GEMMA | ALONE | dict(architecture="prefix_lm", shared_params="embeddings"),
    "language_model": ALONE | dict(architecture="language_model", lm_head="tied"),
    "language_2017": ALONE | ATTENTION_2017 | dict(architecture="language_model", scan_layers=True),
    "language_umt5": ALONE
    | {
        "architecture": "language_model",
        "position.kind": "relative_per_layer",
        "attention.pattern": "local",
        "attention.window_size": 4,
    },
}

every_word = pytest.mark.parametrize("name", WORDS)

ENCODED = [name for name, word in WORDS.items() if "architecture" not in word]

ONE_TOWER = [name for name in WORDS if name not in ENCODED]

# (inputs, targets) tokens of each example, and which of them share a row where they are packed.
EXAMPLES = ((5, 4), (6, 5), (12, 10), (1, 2), (7, 3), (3, 5))

PACKED = ((0, 1), (2,), (3, 4, 5), (), (), ())

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def model_of(name, **fields):
    """The config of a word, with other fields."""
    return transformer.ModelConfig.from_flat(SIZES | WORDS[name] | fields)


@functools.cache
def drawn(config):
    """Random parameters unlike the initial ones: no scale is 1, no bias 0, no two leaves equal."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        *_, holder, end = ["", *(key.key for key in path)]
        shape, values = leaf.shape, rng.normal(size=leaf.shape)
        if end == "scale":
            offset = config.norm.kind == "rms_offset" and holder not in ("query_norm", "key_norm")
            values = rng.uniform(0.5, 1.5, shape) - offset
        elif end == "kernel":
            axes = shape[1:3] if holder == "out" else shape[1:2]
            values /= math.prod(axes) ** 0.5
        elif end in ("head", "embedding"):
            values *= 0.4
        return values.astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, transformer.param_shapes(config))
    return jax.tree.map(jnp.asarray, params)


@functools.cache
def trained(config):
    """(params, Batch) -> the summed loss, the logits [B, T, V], and the loss's gradient."""
    model = transformer.Transformer(config)

    def total(params, examples):
        logits = model.apply({"params": params}, examples)
        weights = batch.loss_weights(examples)
        return losses.cross_entropy(logits, examples.targets, weights)[0], logits

    return jax.jit(jax.value_and_grad(total, has_aux=True), compiler_options=QUICK)


def outcome(config, examples, params=None):
    """Loss, logits and gradient as numpy; params: by default `drawn`."""
    params = drawn(config) if params is None else params
    (total, logits), grads = trained(config)(params, jax.tree.map(jnp.asarray, examples))
    return jax.tree.map(np.asarray, (total, logits, grads))


@functools.cache
def texts(seed=0):
    """The tokens of EXAMPLES: [(inputs, targets), ...]."""
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(2, VOCAB, size) for size in sizes) for sizes in EXAMPLES]


def laid_out(rows, late=(), seed=1):
    """A batch of EXAMPLES by their numbers, and {number: (row, slice of its targets)}.

    Rows in `late` begin with padding, the others end with it. Padding holds random ids.
    """
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(2, VOCAB, (ROWS, n), dtype=np.int32) for n in (SOURCE, TARGET)]
    segments = [np.zeros((ROWS, n), np.int32) for n in (SOURCE, TARGET)]
    places = {}
    for row, numbers in enumerate(rows):
        for side, length in enumerate((SOURCE, TARGET)):
            used = sum(EXAMPLES[number][side] for number in numbers)
            at = length - used if row in late else 0
            for segment, number in enumerate(numbers, start=1):
                path = slice(at, at := at + EXAMPLES[number][side])
                tokens[side][row, path] = texts()[number][side]
                segments[side][row, path] = segment
                places[number] = (row, path)
    return batch.Batch(tokens[0], segments[0], tokens[1], segments[1]), places


def close(actual, expected, part=3e-5):
    """Equal within float32 rounding: a fraction `part` of the largest entry of each leaf."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=part * max(np.abs(b).max(), 0.1))


ONE_A_ROW = tuple((number,) for number in range(ROWS))


def exact_bucket(distance: int, bidirectional: bool, buckets: int, limit: int) -> int:
    """T5's bucket in whole numbers: (d/e)^m >= (limit/e)^k  iff  d^m e^k >= limit^k e^m."""
    base = 0
    if bidirectional:
        buckets //= 2
        base, distance = (buckets if distance > 0 else 0), abs(distance)
    else:
        distance = max(-distance, 0)
    near = buckets // 2
    if distance < near:
        return base + distance
    far = buckets - near
    reached = lambda k: distance**far * near**k >= limit**k * near**far
    return base + near + sum(reached(k) for k in range(1, far))


CHOICES = {  # the values that a key may have, by the key
    f"{prefix}{field.name}": field.metadata["choices"]
    for prefix, section in {
        "": transformer.ModelConfig,
        **{f"{name}.": section for name, section in words.SECTIONS.items()},
    }.items()
    for field in dataclasses.fields(section)
    if "choices" in field.metadata
}
