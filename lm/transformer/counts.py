"""Parameters and FLOPs of a model, from its config alone."""

from __future__ import annotations

import jax

from lm import layers
from lm.transformer import model
from lm.transformer.config import ModelConfig


def param_shapes(config: ModelConfig) -> dict:
    """Return the parameter tree as shapes and dtypes; allocates no parameters."""
    init = lambda: model.Transformer(config).init(jax.random.key(0), model.dummy_batch())["params"]
    return jax.eval_shape(init)


def parameter_count(config: ModelConfig) -> int:
    """Count the numbers in a model's parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(param_shapes(config)))


def forward_flops(config: ModelConfig, inputs: int, targets: int) -> int:
    """Count the FLOPs of one row's forward pass, matrix products only; training takes 3 times that.

    inputs, targets: tokens of the row.
    """
    encoder, decoder = config.tower("encoder"), config
    head = config.d_model * config.vocab_size * targets
    if config.architecture == "encoder_decoder":
        encode = _attend(encoder, inputs, inputs) + _feed(encoder, inputs)
        decode = _attend(decoder, targets, targets) + _feed(decoder, targets)
        decode += _attend(decoder, targets, inputs, encoder.d_model)
    else:
        tokens = inputs + targets
        encode, decode = 0, _attend(decoder, tokens, tokens) + _feed(decoder, tokens)
    return 2 * (config.num_encoder_layers * encode + config.num_decoder_layers * decode + head)


def _attend(config: ModelConfig, queries: int, keys: int, source: int = 0) -> int:
    # Multiply-adds of one attention layer; source: d_model of the keys' input if it differs.
    width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    projections = 2 * config.d_model * width * queries
    projections += 2 * (source or config.d_model) * kv_width * keys
    return projections + 2 * queries * keys * width


def _feed(config: ModelConfig, tokens: int) -> int:
    matrices = 3 if layers.ACTIVATIONS[config.activation][1] else 2
    return matrices * config.d_model * config.d_ff * tokens
