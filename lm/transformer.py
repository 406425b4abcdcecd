"""The encoder-decoder: one block, two towers, one embedding; T5 1.1 unless told otherwise."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm import attention, batch, choose, layers

Array = jax.Array

HEADS = ("untied", "tied")
LAYERS = {"unrolled": True, "scanned": False}  # one parameter layout, two ways to compile it
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture in words and sizes; keys as in configs/base.py, checked when built."""

    vocab_size: int = 32128
    d_model: int = 512
    d_ff: int = 1024
    num_heads: int = 6
    num_kv_heads: int = 6
    head_dim: int = 64
    num_encoder_layers: int = 8
    num_decoder_layers: int = 8
    dropout_rate: float = 0.0
    activation: str = "geglu"
    head: str = "untied"
    relative_buckets: int = 32
    relative_limit: int = 128
    dtype: str = "float32"
    layers: str = "unrolled"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and value < 1:
                raise ValueError(f"model.{field.name}={value} is too small; use 1 or more.")
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(
                f"model.dropout_rate={self.dropout_rate} is no probability; use 0 to below 1."
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} is not a multiple of "
                f"model.num_kv_heads={self.num_kv_heads}; use a divisor, or "
                f"num_kv_heads={self.num_heads} for ordinary multi-head attention."
            )
        if self.relative_buckets % 4 or self.relative_limit <= self.relative_buckets // 2:
            raise ValueError(
                f"model.relative_buckets={self.relative_buckets} and "
                f"model.relative_limit={self.relative_limit} do not make bins; use a multiple of 4 "
                f"for the first and more than its half for the second (T5: 32 and 128)."
            )
        choose.choose(layers.ACTIVATIONS, self.activation, "model.activation")
        choose.choose(dict.fromkeys(HEADS), self.head, "model.head")
        choose.choose(LAYERS, self.layers, "model.layers")
        choose.choose(dict.fromkeys(DTYPES), self.dtype, "model.dtype")


class Cache(NamedTuple):
    """What decoding remembers: a pytree of printable shapes, made by `empty_cache`."""

    key: Array  # [L, B, length, K, H]: self-attention, filled up to `index`
    value: Array
    cross_key: Array  # [L, B, S, K, H]: computed once a sequence
    cross_value: Array
    inputs_segment_ids: Array  # [B, S]
    index: Array  # [], the number of tokens decoded so far


def empty_cache(config: ModelConfig, inputs_segment_ids: Array, length: int) -> Cache:
    """Room for `length` decoded tokens of rows whose inputs have these segment ids [B, S]."""
    (rows, sources), depth = inputs_segment_ids.shape, config.num_decoder_layers
    ours = jnp.zeros((depth, rows, length, config.num_kv_heads, config.head_dim), config.dtype)
    cross = jnp.zeros((depth, rows, sources, config.num_kv_heads, config.head_dim), config.dtype)
    return Cache(ours, ours, cross, cross, inputs_segment_ids, jnp.zeros([], jnp.int32))


class Sight(NamedTuple):
    """What is the same for every layer of a tower: masks, bias, the encoder's output, the index."""

    mask: Array  # bool [B, T, S]
    bias: Array  # [N, T, S]
    cross_mask: Array | None = None
    encoded: Array | None = None  # None once the cache holds the cross-attention's keys and values
    index: Array | None = None  # the first decoded position when there is a cache


class Block(nn.Module):
    """Pre-norm residual block; with `cross` it also looks at the encoder: all that differs."""

    config: ModelConfig
    cross: bool
    deterministic: bool

    @nn.compact
    def __call__(self, x: Array, cache, sight: Sight):
        """x [B, T, D], this layer's cache (key, value, cross_key, cross_value) or None -> same."""
        config, deterministic = self.config, self.deterministic
        norm = lambda name: layers.RMSNorm(config.dtype, name=name)
        drop = lambda x: layers.Dropout(config.dropout_rate)(x, deterministic)

        normed = norm("self_norm")(x)
        self_attention = layers.Attention(config, name="self_attention")
        keys, values = self_attention.keys_values(normed)
        if cache is not None:
            put = lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, sight.index, 0, 0))
            keys, values = put(cache[0], keys), put(cache[1], values)
        x += drop(self_attention(normed, (keys, values), sight.mask, sight.bias, deterministic))

        if self.cross:
            normed = norm("cross_norm")(x)
            cross_attention = layers.Attention(config, name="cross_attention")
            if sight.encoded is None:
                seen = cache[2], cache[3]
            else:
                seen = cross_attention.keys_values(sight.encoded)
            x += drop(cross_attention(normed, seen, sight.cross_mask, None, deterministic))
            cache = None if cache is None else (keys, values, *seen)

        fed = layers.FeedForward(config, name="feed_forward")(norm("ff_norm")(x), deterministic)
        return x + drop(fed), cache


class Tower(nn.Module):
    """A stack of blocks with one relative bias, final norm and dropout; parameters lead with L."""

    config: ModelConfig
    depth: int
    cross: bool

    @nn.compact
    def __call__(self, x, mask, distance, deterministic, cache=None, cross_mask=None, encoded=None):
        """x [B, T, D] -> [B, T, D] and the layers' new cache (None without one)."""
        config = self.config
        drop = layers.Dropout(config.dropout_rate)
        bias = layers.RelativeBias(
            config.num_heads,
            bidirectional=not self.cross,
            buckets=config.relative_buckets,
            limit=config.relative_limit,
            name="relative",
        )(distance)
        index = None if cache is None else cache.index
        sight = Sight(mask, bias, cross_mask, encoded, index)
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=self.depth,
            unroll=self.depth if LAYERS[config.layers] else 1,
        )(config, self.cross, deterministic, name="layers")
        x, layer_cache = blocks(drop(x, deterministic), cache and cache[:4], sight)
        return drop(layers.RMSNorm(config.dtype, name="norm")(x), deterministic), layer_cache


class Transformer(nn.Module):
    """Batch to logits: `__call__` for training; `encode`, `start`, `decode_step` to decode."""

    config: ModelConfig

    def setup(self):
        config = self.config
        self.embed = nn.Embed(
            config.vocab_size, config.d_model, embedding_init=nn.initializers.normal(1.0)
        )
        self.encoder = Tower(config, config.num_encoder_layers, cross=False)
        self.decoder = Tower(config, config.num_decoder_layers, cross=True)
        if config.head == "untied":
            # Half T5X's std: logits of variance 1 would start 0.5 nats above ln V, of 1/4, 0.125.
            init = nn.initializers.variance_scaling(0.25, "fan_in", "truncated_normal")
            self.head = self.param("head", init, (config.d_model, config.vocab_size))

    def logits(self, x: Array) -> Array:
        """[B, T, D] -> float32 [B, T, V]."""
        config = self.config
        if config.head == "tied":
            kernel, x = self.embed.embedding.T, x * config.d_model**-0.5
        else:
            kernel = self.head
        kernel = kernel.astype(config.dtype)
        return jnp.einsum("btd,dv->btv", x, kernel, preferred_element_type=jnp.float32)

    def tokens(self, ids: Array) -> Array:
        """int [B, T] -> embeddings [B, T, D] in the activations' dtype."""
        return self.embed(ids).astype(self.config.dtype)

    def encode(self, inputs: Array, segment_ids: Array, deterministic: bool = True) -> Array:
        """int [B, S], int [B, S] -> [B, S, D]."""
        mask = attention.same_segment(segment_ids, segment_ids)
        distance = attention.distance(inputs.shape[1], inputs.shape[1])
        return self.encoder(self.tokens(inputs), mask, distance, deterministic)[0]

    def __call__(self, examples: batch.Batch, deterministic: bool = True) -> Array:
        """A Batch, packed or not -> float32 logits [B, T, V], teacher-forced."""
        encoded = self.encode(examples.inputs, examples.inputs_segment_ids, deterministic)
        segments = examples.targets_segment_ids
        distance = attention.distance(segments.shape[1], segments.shape[1])
        mask = attention.same_segment(segments, segments) & (distance <= 0)
        cross_mask = attention.same_segment(segments, examples.inputs_segment_ids)
        x = self.tokens(batch.shift_right(examples.targets, segments))
        x, _ = self.decoder(x, mask, distance, deterministic, None, cross_mask, encoded)
        return self.logits(x)

    def start(self, inputs: Array, segment_ids: Array, length: int) -> Cache:
        """A cache for `length` tokens, with the cross-attention's keys and values in place."""
        encoded = self.encode(inputs, segment_ids)
        cache = empty_cache(self.config, segment_ids, length)
        # Of this pass at a dummy token only the cross keys and values are kept.
        _, cache = self._advance(jnp.zeros(inputs.shape[0], jnp.int32), cache, encoded)
        return cache._replace(index=jnp.zeros([], jnp.int32))

    def decode_step(self, token: Array, cache: Cache) -> tuple[Array, Cache]:
        """The previous token int [B] and the cache -> logits [B, V] of the next, and new cache."""
        x, cache = self._advance(token, cache, None)
        return self.logits(x)[:, 0], cache

    def _advance(self, token, cache, encoded):
        length = cache.key.shape[2]
        distance = attention.distance(1, length, cache.index)
        mask = jnp.broadcast_to(distance <= 0, (token.shape[0], 1, length))
        cross_mask = (cache.inputs_segment_ids > 0)[:, None, :]
        x = self.tokens(token[:, None])
        x, kept = self.decoder(x, mask, distance, True, cache, cross_mask, encoded)
        return x, Cache(*kept, cache.inputs_segment_ids, cache.index + 1)


def example(inputs: int = 1, targets: int = 1, rows: int = 1) -> batch.Batch:
    """A batch of pad tokens of this shape: enough to initialise or to evaluate shapes."""
    ones = lambda length: jnp.ones((rows, length), jnp.int32)
    return batch.Batch(ones(inputs), ones(inputs), ones(targets), ones(targets))


def shapes(config: ModelConfig) -> dict:
    """The parameter tree as shapes and dtypes, without using memory for it."""
    init = lambda: Transformer(config).init(jax.random.key(0), example())["params"]
    return jax.eval_shape(init)


def parameter_count(config: ModelConfig) -> int:
    """The number of trained numbers."""
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(config)))


def forward_flops(config: ModelConfig, inputs: int, targets: int) -> int:
    """FLOPs of one row's forward pass, matrix products only; training takes 3 times that."""
    width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    matrices = 3 if layers.ACTIVATIONS[config.activation][1] else 2

    def attend(queries, keys):
        projections = config.d_model * (2 * width * queries + 2 * kv_width * keys)
        return projections + 2 * queries * keys * width

    feed = matrices * config.d_model * config.d_ff
    encoder = config.num_encoder_layers * (attend(inputs, inputs) + feed * inputs)
    decoder = config.num_decoder_layers * (
        attend(targets, targets) + attend(targets, inputs) + feed * targets
    )
    return 2 * (encoder + decoder + config.d_model * config.vocab_size * targets)
