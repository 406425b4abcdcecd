"""The parts of a block: norm, attention with an explicit cache, feed-forward, relative bias."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm import attention, choose

Array = jax.Array

ACTIVATIONS = {
    "relu": (nn.relu, False),
    "gelu": (nn.gelu, False),
    "geglu": (nn.gelu, True),  # T5 1.1: GELU (tanh) times a linear gate
    "swiglu": (nn.silu, True),
}


def dense(features, axis, variance: float, name: str, dtype, distribution="normal"):
    """A matrix without bias; the initial variance is variance / fan-in, as in T5X."""
    init = nn.initializers.variance_scaling(variance, "fan_in", distribution)
    return nn.DenseGeneral(
        features, axis=axis, use_bias=False, kernel_init=init, dtype=dtype, name=name
    )


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis; statistics in float32, the result in `dtype`.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """

    dtype: str
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return (wide * scale).astype(self.dtype)


class Dropout(nn.Module):
    """T5's dropout: the same units along the length axis `shared`; the identity at rate 0."""

    rate: float
    shared: int = -2

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        return nn.Dropout(self.rate, broadcast_dims=(self.shared,))(x, deterministic)


class RelativeBias(nn.Module):
    """One learned number per head and distance bucket, added to the scores: float32 [N, T, S].

    Source: Raffel et al. 2020, section 2.1, arXiv:1910.10683.
    """

    num_heads: int
    bidirectional: bool
    buckets: int
    limit: int

    @nn.compact
    def __call__(self, distance: Array) -> Array:
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        table = self.param("relative_bias", init, (self.buckets, self.num_heads))
        bucket = attention.relative_bucket(
            distance, bidirectional=self.bidirectional, buckets=self.buckets, limit=self.limit
        )
        return jnp.moveaxis(table[bucket], -1, 0)


class Attention(nn.Module):
    """Multi-head or grouped-query attention of x [B, T, D] to keys and values made elsewhere."""

    config: object  # a transformer.ModelConfig

    def setup(self):
        config = self.config
        width, kv_width = (
            (config.num_heads, config.head_dim),
            (config.num_kv_heads, config.head_dim),
        )
        # T5 does not divide scores by sqrt(H); its query starts smaller by that factor instead.
        self.query = dense(width, -1, 1 / config.head_dim, "query", config.dtype)
        self.key = dense(kv_width, -1, 1.0, "key", config.dtype)
        self.value = dense(kv_width, -1, 1.0, "value", config.dtype)
        self.out = dense(config.d_model, (-2, -1), 1.0, "out", config.dtype)
        self.dropout = Dropout(config.dropout_rate)

    def keys_values(self, source: Array) -> tuple[Array, Array]:
        """[B, S, D] -> keys and values, each [B, S, K, H]."""
        return self.key(source), self.value(source)

    def __call__(self, x, keys_values, mask, bias, deterministic) -> Array:
        drop = lambda weights: self.dropout(weights, deterministic)
        return self.out(attention.attend(self.query(x), *keys_values, mask, bias, drop))


class FeedForward(nn.Module):
    """down(act(gate x) * up x), or down(act(up x)) where the activation has no gate."""

    config: object

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        config = self.config
        activation, gated = choose.choose(ACTIVATIONS, config.activation, "model.activation")
        hidden = dense(config.d_ff, -1, 1.0, "up", config.dtype, "truncated_normal")(x)
        if gated:
            gate = dense(config.d_ff, -1, 1.0, "gate", config.dtype, "truncated_normal")(x)
            hidden *= activation(gate)
        else:
            hidden = activation(hidden)
        hidden = Dropout(config.dropout_rate)(hidden, deterministic)
        return dense(config.d_model, -1, 1.0, "down", config.dtype, "truncated_normal")(hidden)
