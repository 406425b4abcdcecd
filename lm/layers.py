"""The modules of a block: norms, dropout, relative bias, attention, feed-forward."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm import attention, cpu_kernels

Array = jax.Array

INTERMEDIATES = "intermediates"  # flax's collection of activations; empty unless it is mutable

ACTIVATIONS = {  # name: (function, whether it multiplies a linear gate)
    "relu": (nn.relu, False),
    "gelu": (nn.gelu, False),
    "geglu": (nn.gelu, True),  # T5 1.1: GELU (tanh)
    "swiglu": (nn.silu, True),
}
ATTENTION = {"fast_cpu": cpu_kernels.attend, "einsum": attention.attend}
BUILT_IN_ATTENTION = tuple(ATTENTION)  # these compute the same function


def dense(
    features: int | tuple[int, ...],
    axis: int | tuple[int, ...],
    variance: float,
    name: str | None,
    dtype: str,
    distribution: str = "normal",
) -> nn.DenseGeneral:
    """Return a linear layer without bias, initialized with variance / fan-in, as in T5X."""
    return nn.DenseGeneral(
        features,
        axis,
        use_bias=False,
        kernel_init=nn.initializers.variance_scaling(variance, "fan_in", distribution),
        dtype=dtype,
        name=name,
        dot_general=cpu_kernels.dense_general_2d,
    )


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + scale) over the last axis; statistics in float32, result in `dtype`.

    initial_scale: the initial value of `scale`.
    Source: Zhang and Sennrich 2019, arXiv:1910.07467; with offset 1, Gemma's.
    """

    dtype: str
    epsilon: float = 1e-6
    offset: float = 0.0
    initial_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.constant(self.initial_scale)
        scale = self.param("scale", init, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        scale = scale + self.offset if self.offset else scale
        return (wide * scale).astype(self.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std * scale + bias over the last axis; statistics in float32.

    Source: Ba et al. 2016, arXiv:1607.06450.
    """

    dtype: str
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide -= jnp.mean(wide, axis=-1, keepdims=True)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return (wide * scale + bias).astype(self.dtype)


NORMS = {
    "rms": RMSNorm,
    "rms_offset": lambda dtype, name: RMSNorm(dtype, offset=1.0, initial_scale=0.0, name=name),
    "layer": LayerNorm,
}


class Dropout(nn.Module):
    """T5's dropout: one mask for all positions of a row (axis -2); the identity at rate 0."""

    rate: float

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        return nn.Dropout(self.rate, broadcast_dims=(-2,))(x, deterministic)


class RelativeBias(nn.Module):
    """A learned bias of the scores per head and distance bucket.

    distance: int [T, S] or [B, T, S] -> float32 [N, T, S] or [B, N, T, S].
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
        return jnp.moveaxis(table[bucket], -1, -3)


class Attention(nn.Module):
    """Multi-head or grouped-query attention of x [B, T, D] to keys and values of `keys_values`."""

    config: Any  # a transformer.ModelConfig

    def setup(self):
        config = self.config
        heads = (config.num_heads, config.head_dim)
        kv_heads = (config.num_kv_heads, config.head_dim)
        # The initial scores have variance 1: T5 multiplies them by attention.scale=1, so its
        # initial query is smaller by sqrt(H).
        query_std = config.head_dim**-0.5 / config.attention.scale
        has_norm = config.attention.query_key_norm != "none"
        query_variance = 1.0 if has_norm else query_std**2
        self.query = dense(heads, -1, query_variance, "query", config.dtype)
        self.key = dense(kv_heads, -1, 1.0, "key", config.dtype)
        self.value = dense(kv_heads, -1, 1.0, "value", config.dtype)
        self.out = dense(config.d_model, (-2, -1), 1.0, "out", config.dtype)
        if has_norm:
            self.query_norm = RMSNorm(config.dtype, initial_scale=query_std)
            self.key_norm = RMSNorm(config.dtype)
        self.dropout = Dropout(config.dropout_rate)

    def keys_values(self, source: Array, positions: Array | None = None) -> tuple[Array, Array]:
        """[B, S, D] -> keys and values, each [B, S, K, H]; `positions` rotate the keys."""
        config, key = self.config, self.key(source)
        if config.attention.query_key_norm != "none":
            key = self.key_norm(key)
        if positions is not None:
            key = attention.rotate(key, positions, config.position.rotary_base)
        return key, self.value(source)

    def __call__(self, x, keys_values, mask, bias, deterministic, positions=None) -> Array:
        config, (key, value) = self.config, keys_values
        query, keep = self._query(x, positions), self._dropout_mask(mask, deterministic)
        if self.is_mutable_collection(INTERMEDIATES):
            self.sow(INTERMEDIATES, "queries", query)
            self.sow(INTERMEDIATES, "keys", key)
            self.sow(INTERMEDIATES, "values", value)
            scores = attention.scores(query, key, mask, bias, self._score_config())
            self.sow(INTERMEDIATES, "scores", scores)
        attend = ATTENTION[config.attention.implementation]
        return self.out(attend(query, key, value, mask, bias, keep, self._score_config()))

    def attend_to_cache(self, x, keys_values, mask, bias, positions=None) -> Array:
        """The same without dropout, for keys and values in the layout of attention.to_cache."""
        query, config = self._query(x, positions), self._score_config()
        implementation = self.config.attention.implementation
        if implementation in BUILT_IN_ATTENTION:
            return self.out(attention.attend_to_cache(query, *keys_values, mask, bias, config))
        keys_values = attention.from_cache(*keys_values, len(x))
        mask = jnp.broadcast_to(mask, (*query.shape[:2], keys_values[0].shape[1]))
        return self.out(ATTENTION[implementation](query, *keys_values, mask, bias, None, config))

    def _query(self, x, positions):
        config, query = self.config, self.query(x)
        if config.attention.query_key_norm != "none":
            query = self.query_norm(query)
        if positions is not None:
            query = attention.rotate(query, positions, config.position.rotary_base)
        return query

    def _score_config(self):
        config = self.config.attention
        return attention.ScoreConfig(config.scale, config.logits_soft_cap)

    def _dropout_mask(self, mask, deterministic):
        """Dropout's factor for the weights, the same for all queries of a row; None: no dropout."""
        config = self.config
        if deterministic or not config.dropout_rate:
            return None
        groups, (rows, _, sources) = config.num_kv_heads, mask.shape
        ones = jnp.ones((rows, groups, config.num_heads // groups, 1, sources))
        return self.dropout(ones, deterministic)


class FeedForward(nn.Module):
    """down(act(gate x) * up x), or down(act(up x)) if the activation has no gate."""

    config: Any  # a transformer.ModelConfig

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        config = self.config
        activation, has_gate = ACTIVATIONS[config.activation]
        project = lambda size, name: dense(size, -1, 1.0, name, config.dtype, "truncated_normal")
        hidden = project(config.d_ff, "up")(x)
        if has_gate:
            hidden *= activation(project(config.d_ff, "gate")(x))
        else:
            hidden = activation(hidden)
        hidden = Dropout(config.dropout_rate)(hidden, deterministic)
        return project(config.d_model, "down")(hidden)
