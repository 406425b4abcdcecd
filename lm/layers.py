"""The parts of a block: norms, attention with an explicit cache, feed-forward, relative bias."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm import attention

Array = jax.Array

INTERMEDIATES = (
    "intermediates"  # what a model has computed on its way, where apply is told to keep it
)

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
        features,
        axis,
        use_bias=False,
        kernel_init=init,
        dtype=dtype,
        name=name,
        dot_general=dense_general_2d,
    )


def dense_general_2d(
    x: Array, kernel: Array, dimensions=(((-1,), (0,)), ((), ())), **kwargs
) -> Array:
    """x [.., I] times kernel [I, O ..] as a product of two matrices: [.., O ..].

    I stands for one axis or, as dimensions (lax.dot_general's) tell, the last few of x and the
    first few of the kernel. kwargs are jnp.dot's.
    The gradient of a product of more axes is computed transposed, which costs a CPU copies.
    """
    count = len(dimensions[0][0])
    rows, size = x.shape[: x.ndim - count], math.prod(kernel.shape[:count])
    made = jnp.dot(x.reshape(-1, size), kernel.reshape(size, -1), **kwargs)
    return made.reshape(*rows, *kernel.shape[count:])


def head_variance(vocab_size: int) -> float:
    """The initial variance of an untied head times d_model: T5X's 1, or 1/4 for few rows.

    Logits of variance 1 start half a nat above ln V, which is 5 % of it only from e^10 rows on.
    """
    return 1.0 if vocab_size > math.exp(10) else 0.25


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + scale) over the last axis; statistics in float32, result in `dtype`.

    start: the scale's initial value.
    Source: Zhang and Sennrich 2019, arXiv:1910.07467; with offset 1, Gemma's.
    """

    dtype: str
    epsilon: float = 1e-6
    offset: float = 0.0
    start: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.constant(self.start), (x.shape[-1],))
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
    "rms_offset": lambda dtype, name: RMSNorm(dtype, offset=1.0, start=0.0, name=name),
    "layer": LayerNorm,
}


class Dropout(nn.Module):
    """T5's dropout: the same units along the length axis `shared`; the identity at rate 0."""

    rate: float
    shared: int = -2

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        return nn.Dropout(self.rate, broadcast_dims=(self.shared,))(x, deterministic)


class RelativeBias(nn.Module):
    """One learned number per head and distance bucket, added to the scores.

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
    """Multi-head or grouped-query attention of x [B, T, D] to keys and values made elsewhere."""

    config: object  # a transformer.ModelConfig

    def setup(self):
        config = self.config
        width, kv_width = (
            (config.num_heads, config.head_dim),
            (config.num_kv_heads, config.head_dim),
        )
        # Scores start with variance 1: what attention_scale does not divide by, the query's start
        # does. T5 scales by 1, so its query starts smaller by sqrt(H).
        start = config.head_dim**-0.5 / config.attention.scale
        normed = config.attention.query_key_norm != "none"
        variance = 1.0 if normed else start**2
        self.query = dense(width, -1, variance, "query", config.dtype)
        self.key = dense(kv_width, -1, 1.0, "key", config.dtype)
        self.value = dense(kv_width, -1, 1.0, "value", config.dtype)
        self.out = dense(config.d_model, (-2, -1), 1.0, "out", config.dtype)
        if normed:
            self.query_norm = RMSNorm(config.dtype, start=start)
            self.key_norm = RMSNorm(config.dtype)
        self.dropout = Dropout(config.dropout_rate)

    def keys_values(self, source: Array, positions: Array | None = None) -> tuple[Array, Array]:
        """[B, S, D] -> keys and values, each [B, S, K, H]; rotated where positions are given."""
        config, key = self.config, self.key(source)
        if config.attention.query_key_norm != "none":
            key = self.key_norm(key)
        if positions is not None:
            key = attention.rotate(key, positions, config.position.rotary_base)
        return key, self.value(source)

    def __call__(self, x, keys_values, mask, bias, deterministic, positions=None) -> Array:
        query, keep = self._query(x, positions), self._keep(mask, deterministic)
        if self.is_mutable_collection(INTERMEDIATES):
            key, value = keys_values
            self.sow(INTERMEDIATES, "queries", query)
            self.sow(INTERMEDIATES, "keys", key)
            self.sow(INTERMEDIATES, "values", value)
            self.sow(
                INTERMEDIATES, "scores", attention.scores(query, key, mask, bias, self._scores())
            )
        return self.out(attention.attend(query, *keys_values, mask, bias, keep, self._scores()))

    def by_heads(self, x, keys_values, mask, bias, positions=None) -> Array:
        """The same without dropout, of keys and values as a cache has them: each [B * K, S, H]."""
        query = self._query(x, positions)
        return self.out(attention.attend_by_heads(query, *keys_values, mask, bias, self._scores()))

    def _query(self, x, positions):
        config, query = self.config, self.query(x)
        if config.attention.query_key_norm != "none":
            query = self.query_norm(query)
        if positions is not None:
            query = attention.rotate(query, positions, config.position.rotary_base)
        return query

    def _scores(self):
        config = self.config
        by_rows = config.attention.implementation == "fast_cpu"
        return attention.Scores(config.attention.scale, config.attention.logits_soft_cap, by_rows)

    def _keep(self, mask, deterministic):
        # What dropout multiplies weights by, the same for all queries of a row; None: by nothing.
        config = self.config
        if deterministic or not config.dropout_rate:
            return None
        groups, (rows, _, sources) = config.num_kv_heads, mask.shape
        ones = jnp.ones((rows, groups, config.num_heads // groups, 1, sources))
        return self.dropout(ones, deterministic)


class FeedForward(nn.Module):
    """down(act(gate x) * up x), or down(act(up x)) where the activation has no gate."""

    config: object

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        config = self.config
        activation, gated = ACTIVATIONS[config.activation]
        hidden = dense(config.d_ff, -1, 1.0, "up", config.dtype, "truncated_normal")(x)
        if gated:
            gate = dense(config.d_ff, -1, 1.0, "gate", config.dtype, "truncated_normal")(x)
            hidden *= activation(gate)
        else:
            hidden = activation(hidden)
        hidden = Dropout(config.dropout_rate)(hidden, deterministic)
        return dense(config.d_model, -1, 1.0, "down", config.dtype, "truncated_normal")(hidden)
