"""Block, Tower and Transformer: batch to logits, and one token at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lm import attention, batch, layers
from lm.transformer.config import LAYERS, WINDOWS, ModelConfig

Array = jax.Array

REMAT = {  # what the backward pass finds instead of computing it again
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def anywhere(x: Array) -> Array:
    """Activations as they are: on one device, or where each has rows of its own."""
    return x


class Cache(NamedTuple):
    """What decoding remembers: a pytree of printable shapes, made by `Transformer.start`."""

    key: Array  # [L, B, length, K, H]: self-attention, filled up to `index`
    value: Array
    cross_key: Array | None  # [L, B, S, K, H]: computed once a sequence; None without an encoder,
    cross_value: Array | None  # whose key and value hold the S inputs first
    inputs_segment_ids: Array  # [B, S]
    index: Array  # [], the number of tokens decoded so far


def take_rows(cache: Cache, rows: Array) -> Cache:
    """The cache of these rows, int [R] below B, in this order; a row may be taken repeatedly."""
    take = lambda x: jnp.take(x, rows, axis=1)
    segments = jnp.take(cache.inputs_segment_ids, rows, axis=0)
    return Cache(*jax.tree.map(take, cache[:4]), segments, cache.index)


class Sight(NamedTuple):
    """What is the same for every layer of a tower: who sees whom, how far apart, and what else."""

    mask: Array  # bool [B, T, S]
    distance: Array  # int [T, S] or [B, T, S]
    positions: Array  # int [B, T], of the queries
    bias: Array | None = None  # [N, T, S] or [B, N, T, S]
    cross_mask: Array | None = None  # None: no cross-attention
    encoded: Array | None = None  # None once the cache holds the cross-attention's keys and values
    index: Array | None = None  # the cache's first place to fill, when there is a cache


class Block(nn.Module):
    """Residual block: self-attention, cross-attention where there is an encoder to see, and FF."""

    config: ModelConfig  # the tower's
    causal: bool
    deterministic: bool
    place: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Array, own, sight: Sight):
        """x [B, T, D] and this layer's own (cache or None, is it local) -> x, new cache.

        The cache of a layer is (key, value, cross_key, cross_value).
        """
        config, deterministic, (cache, local) = self.config, self.deterministic, own
        self_attention = layers.Attention(config, name="self_attention")
        places = sight.positions if config.position == "rotary" else None

        def see_own(x):
            keys, values = self_attention.keys_values(x, places)
            if cache is not None:
                put = lambda old, new: jax.lax.dynamic_update_slice(
                    old, new, (0, sight.index, 0, 0)
                )
                keys, values = put(cache[0], keys), put(cache[1], values)
            mask, bias = sight.mask, sight.bias
            if config.windows != "global":
                mask &= (jnp.abs(sight.distance) < config.window) | ~local
            if config.position == "relative_per_layer":
                bias = _relative_bias(config, self.causal)(sight.distance)
            seen = keys, values
            return self_attention(x, seen, mask, bias, deterministic, places), seen

        def see_encoder(x):
            cross_attention = layers.Attention(config, name="cross_attention")
            if sight.encoded is None:
                seen = cache[2:]
            else:
                seen = cross_attention.keys_values(sight.encoded)
            return cross_attention(x, seen, sight.cross_mask, None, deterministic), seen

        def feed(x):
            return layers.FeedForward(config, name="feed_forward")(x, deterministic), None

        x, kept = self.add(self.place(x), "self", see_own)
        crossed = None, None
        if sight.cross_mask is not None:
            x, crossed = self.add(x, "cross", see_encoder)
        x, _ = self.add(x, "ff", feed)
        return x, None if cache is None else (*kept, *crossed)

    def add(self, x: Array, name: str, change) -> tuple:
        """x plus what a sub-layer makes of it, normed before, after, or on both sides.

        change: x -> (what it makes, what it saw). Returns the sum and what was seen.
        """
        config = self.config
        norm = lambda end: layers.NORMS[config.norm](config.dtype, name=f"{name}_{end}")
        drop = lambda x: layers.Dropout(config.dropout_rate)(x, self.deterministic)
        if config.norm_placement == "post":
            changed, seen = change(x)
            return norm("post_norm")(x + drop(changed)), seen
        changed, seen = change(norm("norm")(x))
        if config.norm_placement == "both":
            changed = norm("post_norm")(changed)
        return x + drop(changed), seen


def _relative_bias(config: ModelConfig, causal: bool) -> layers.RelativeBias:
    # A tower that plays both parts has a table for each: their bins mean other things.
    name = "causal_relative" if causal and config.shared == "all" else "relative"
    buckets, limit = config.relative_buckets, config.relative_limit
    return layers.RelativeBias(config.num_heads, not causal, buckets, limit, name=name)


class Tower(nn.Module):
    """A stack of blocks with one relative bias, final norm and dropout; parameters lead with L."""

    config: ModelConfig  # the tower's
    depth: int
    place: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Array, sight: Sight, causal: bool, deterministic: bool, cache=None):
        """x [B, T, D] -> [B, T, D] and the layers' new cache (None without one)."""
        config = self.config
        drop = layers.Dropout(config.dropout_rate)
        if config.position == "relative":
            sight = sight._replace(bias=_relative_bias(config, causal)(sight.distance))
        pattern = WINDOWS[config.windows]
        local = np.array([pattern[i % len(pattern)] == "l" for i in range(self.depth)])
        block = Block
        if config.remat != "none":
            # Inside a loop nothing can be merged; unrolled, XLA would undo what is computed again.
            unrolled = LAYERS[config.layers]
            block = nn.remat(Block, policy=REMAT[config.remat], prevent_cse=unrolled)
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=self.depth,
            unroll=self.depth if LAYERS[config.layers] else 1,
        )(config, causal, deterministic, self.place, name="layers")
        x, layer_cache = blocks(drop(x, deterministic), (cache, jnp.array(local)), sight)
        x = self.place(x)
        if config.norm_placement != "post":
            x = layers.NORMS[config.norm](config.dtype, name="norm")(x)
        return drop(x, deterministic), layer_cache


class Transformer(nn.Module):
    """Batch to logits: `__call__` for training; `encode`, `start`, `decode_step` to decode.

    With model.arrangement prefix_lm or language_model there is no encoder: the decoder reads the
    inputs and then the targets, and only the latter's logits are returned. place: x [B, T, D] -> x,
    says of activations between blocks where their rows lie; a mesh's compiler is to be told.
    """

    config: ModelConfig
    place: Callable[[Array], Array] = anywhere

    def setup(self):
        config, ours = self.config, self.config.side("encoder")
        self.embed = _embedding(config)
        if config.shared == "nothing":
            self.encoder_embed = _embedding(ours)
        if config.arrangement == "encoder_decoder":
            self.encoder = Tower(ours, config.num_encoder_layers, self.place)
        if config.shared != "all":
            self.decoder = Tower(config, config.num_decoder_layers, self.place)
        if config.head == "untied":
            variance = layers.head_variance(config.vocab_size)
            init = nn.initializers.variance_scaling(variance, "fan_in", "truncated_normal")
            self.head = self.param("head", init, (config.d_model, config.vocab_size))

    def logits(self, x: Array) -> Array:
        """[B, T, D] -> float32 [B, T, V]."""
        config = self.config
        if config.head == "tied":
            x = x * config.d_model**-0.5
        kernel = self.head if config.head == "untied" else self.embed.embedding.T
        kernel = kernel.astype(config.dtype)
        logits = layers.flat(x, kernel, preferred_element_type=jnp.float32)
        return attention.soft_cap(logits, config.logits_cap)

    def tokens(self, ids: Array, positions: Array, side: str = "decoder") -> Array:
        """int [B, T], int [B, T] -> embeddings [B, T, D] in the activations' dtype."""
        config = self.config.side(side)
        own = side == "encoder" and config.shared == "nothing"
        x = (self.encoder_embed if own else self.embed)(ids).astype(config.dtype)
        if config.embedding_scale == "sqrt_d_model":
            x *= jnp.asarray(config.d_model**0.5, config.dtype)
        if config.position == "sinusoidal":
            x += attention.sinusoids(positions, config.d_model).astype(config.dtype)
        return x

    def encode(self, inputs: Array, segment_ids: Array, deterministic: bool = True) -> Array:
        """int [B, S], int [B, S] -> [B, S, D]."""
        positions = attention.positions(segment_ids)
        distance = attention.distance(inputs.shape[1], inputs.shape[1])
        sight = Sight(attention.same_segment(segment_ids, segment_ids), distance, positions)
        x = self.tokens(inputs, positions, "encoder")
        return self.encoder(x, sight, False, deterministic)[0]

    def decode(self, x: Array, sight: Sight, deterministic: bool, cache=None):
        """Embeddings [B, T, D] through the decoder -> [B, T, D] and the layers' new cache."""
        tower = self.encoder if self.config.shared == "all" else self.decoder
        causal = self.config.arrangement != "prefix_lm"
        return tower(x, sight, causal, deterministic, cache)

    def __call__(self, examples: batch.Batch, deterministic: bool = True) -> Array:
        """A Batch, packed or not -> float32 logits [B, T, V], teacher-forced."""
        segments = examples.targets_segment_ids
        ids = batch.shift_right(examples.targets, segments, self.config.start_id)
        if self.config.arrangement != "encoder_decoder":
            return self._one_tower(examples, ids, deterministic)
        encoded = self.encode(examples.inputs, examples.inputs_segment_ids, deterministic)
        distance = attention.distance(segments.shape[1], segments.shape[1])
        mask = attention.same_segment(segments, segments) & (distance <= 0)
        cross_mask = attention.same_segment(segments, examples.inputs_segment_ids)
        positions = attention.positions(segments)
        sight = Sight(mask, distance, positions, None, cross_mask, encoded)
        return self.logits(self.decode(self.tokens(ids, positions), sight, deterministic)[0])

    def _one_tower(self, examples, ids, deterministic):
        sources, ours, theirs = examples.inputs.shape[1], examples[3], examples[1]
        before = jnp.sum(attention.same_segment(ours, theirs), axis=-1)
        positions = (attention.positions(theirs), attention.positions(ours) + before)
        positions, segments = (jnp.concatenate(p, 1) for p in (positions, (theirs, ours)))
        sight = self._sight(positions, positions, segments, segments, sources)
        x = self.tokens(jnp.concatenate([examples.inputs, ids], axis=1), positions)
        return self.logits(self.decode(x, sight, deterministic)[0][:, sources:])

    def _sight(self, positions, key_positions, segments, key_segments, sources):
        # The key is no later than the query, or, for a prefix LM, among the first `sources`.
        distance = key_positions[:, None, :] - positions[:, :, None]
        visible = distance <= 0
        if self.config.arrangement == "prefix_lm":
            visible |= jnp.arange(key_positions.shape[1]) < sources
        return Sight(attention.same_segment(segments, key_segments) & visible, distance, positions)

    def start(self, inputs: Array, segment_ids: Array, length: int) -> Cache:
        """A cache for `length` tokens, with the inputs' keys and values in place."""
        config, (rows, sources), zero = self.config, inputs.shape, jnp.zeros([], jnp.int32)
        alone = config.arrangement != "encoder_decoder"
        depth, heads = config.num_decoder_layers, (config.num_kv_heads, config.head_dim)
        room = lambda length: jnp.zeros((depth, rows, length, *heads), config.dtype)
        own, cross = room(length + sources * alone), None if alone else room(sources)
        cache = Cache(own, own, cross, cross, segment_ids, zero)
        if alone:
            x = self.tokens(inputs, attention.positions(segment_ids))
            return self._advance(x, cache, segment_ids, zero)[1]
        # Of this pass at a dummy token only the cross keys and values are kept.
        encoded = self.encode(inputs, segment_ids)
        x = self.tokens(jnp.zeros((rows, 1), jnp.int32), jnp.zeros((rows, 1), jnp.int32))
        cache = self._advance(x, cache, jnp.ones((rows, 1), jnp.int32), zero, encoded)[1]
        return cache._replace(index=zero)

    def decode_step(self, token: Array, cache: Cache) -> tuple[Array, Cache]:
        """The previous token int [B] and the cache -> logits [B, V] of the next, and new cache."""
        ones, place = jnp.ones((len(token), 1), jnp.int32), cache.index
        if cache.cross_key is None:
            place += cache.inputs_segment_ids.shape[1]
        x = self.tokens(token[:, None], self._positions(cache, place, 1))
        x, cache = self._advance(x, cache, ones, place)
        return self.logits(x)[:, 0], cache._replace(index=cache.index + 1)

    def _positions(self, cache, place, count):
        # Of the cache's places from `place` on: decoded tokens follow on the row's own inputs.
        segments, length = cache.inputs_segment_ids, cache.key.shape[2]
        decoded = jnp.broadcast_to(jnp.arange(length), (len(segments), length))
        if cache.cross_key is None:
            sources = segments.shape[1]
            after = jnp.sum(segments > 0, axis=1, keepdims=True) + decoded[:, : length - sources]
            decoded = jnp.concatenate([attention.positions(segments), after], axis=1)
        return jax.lax.dynamic_slice_in_dim(decoded, place, count, axis=1)

    def _advance(self, x, cache, segments, place, encoded=None):
        # x [B, T, D] takes the cache's places from `place` on.
        length, sources = cache.key.shape[2], cache.inputs_segment_ids.shape[1]
        alone = cache.cross_key is None
        decoded = jnp.ones((len(x), length - sources * alone), jnp.int32)
        key_segments = [cache.inputs_segment_ids, decoded] if alone else [decoded]
        sight = self._sight(
            self._positions(cache, place, x.shape[1]),
            self._positions(cache, 0, length),
            segments,
            jnp.concatenate(key_segments, axis=1),
            sources,
        )
        cross_mask = None if alone else (cache.inputs_segment_ids > 0)[:, None, :]
        sight = sight._replace(cross_mask=cross_mask, encoded=encoded, index=place)
        x, kept = self.decode(x, sight, True, cache[:4])
        return x, Cache(*kept, cache.inputs_segment_ids, cache.index)


def _embedding(config: ModelConfig) -> nn.Embed:
    # What leaves the embedding has variance 1; so have the logits where it is an unscaled head too.
    small = config.embedding_scale == "sqrt_d_model" or config.head == "tied_unscaled"
    init = nn.initializers.normal(config.d_model**-0.5 if small else 1.0)
    return nn.Embed(config.vocab_size, config.d_model, embedding_init=init)


def example(inputs: int = 1, targets: int = 1, rows: int = 1) -> batch.Batch:
    """A batch of pad tokens of this shape: enough to initialise or to evaluate shapes."""
    ones = lambda length: jnp.ones((rows, length), jnp.int32)
    return batch.Batch(ones(inputs), ones(inputs), ones(targets), ones(targets))
