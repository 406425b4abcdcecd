"""Block, Tower and Transformer: batch to logits, and one token at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lm import attention, batch, cpu_kernels, layers
from lm.transformer.cache import Cache, Layer
from lm.transformer.config import ModelConfig

Array = jax.Array

REMAT = {  # model.remat_policy: which activations are stored for the backward pass
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def no_constraint(x: Array) -> Array:
    """Return x unchanged: activations need no sharding constraint."""
    return x


class AttentionContext(NamedTuple):
    """The inputs that all layers of a tower share: masks, distances, positions, encoder states."""

    mask: Array  # bool [B, T, S]
    distance: Array  # int [T, S] or [B, T, S]
    positions: Array  # int [B, T], of the queries
    bias: Array | None = None  # [N, T, S] or [B, N, T, S]
    cross_mask: Array | None = None  # None: no cross-attention
    encoded: Array | None = None  # None if the cache holds the cross-attention's keys and values
    write_index: Array | None = None  # slot of the cache for the new keys and values


class Block(nn.Module):
    """Residual block: self-attention, cross-attention if there is an encoder, feed-forward."""

    config: ModelConfig  # the tower's
    causal: bool
    deterministic: bool
    shard_activations: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Array, layer_inputs: tuple, context: AttentionContext):
        """x [B, T, D] and (the layer's cache or None, whether it is local) -> x, the new cache.

        A cache without keys stores those of x, [B, T, K, H]; otherwise they are written into it at
        context.write_index, and x attends to all cached keys.
        """
        cache, is_local = layer_inputs
        x = self.shard_activations(x)

        attended, cache = self._self_attention(self._pre_norm(x, "self"), cache, is_local, context)
        x = self._add(x, attended, "self")

        if context.cross_mask is not None:
            attended = self._cross_attention(self._pre_norm(x, "cross"), cache, context)
            x = self._add(x, attended, "cross")

        feed_forward = layers.FeedForward(self.config, name="feed_forward")
        x = self._add(x, feed_forward(self._pre_norm(x, "ff"), self.deterministic), "ff")

        self.sow(layers.INTERMEDIATES, "hidden", x)
        return x, cache

    def _pre_norm(self, x: Array, sublayer: str) -> Array:
        return x if self.config.norm.placement == "post" else self._norm(x, f"{sublayer}_norm")

    def _add(self, x: Array, change: Array, sublayer: str) -> Array:
        """The residual sum, with dropout, and the norm of the change or of the sum."""
        placement = self.config.norm.placement
        if placement == "both":
            change = self._norm(change, f"{sublayer}_post_norm")
        x = x + layers.Dropout(self.config.dropout_rate)(change, self.deterministic)
        return self._norm(x, f"{sublayer}_post_norm") if placement == "post" else x

    def _norm(self, x: Array, name: str) -> Array:
        return layers.NORMS[self.config.norm.kind](self.config.dtype, name=name)(x)

    def _self_attention(self, x: Array, cache: Layer | None, is_local, context: AttentionContext):
        config, module = self.config, layers.Attention(self.config, name="self_attention")
        positions = context.positions if config.position.kind == "rotary" else None
        key, value = module.keys_values(x, positions)
        mask, bias = context.mask, context.bias
        if config.attention.pattern != "global":
            mask &= (jnp.abs(context.distance) < config.attention.window_size) | ~is_local
        if config.position.kind == "relative_per_layer":
            bias = _relative_bias(config, self.causal)(context.distance)
        if cache is None or cache.key is None:
            out = module(x, (key, value), mask, bias, self.deterministic, positions)
        else:
            key, value = attention.to_cache(key, value)
            index, update = context.write_index, jax.lax.dynamic_update_slice
            key = update(cache.key, key, (0, 0, index))
            value = update(cache.value, value, (0, index, 0))
            out = module.attend_to_cache(x, (key, value), mask, bias, positions)
        return out, None if cache is None else cache._replace(key=key, value=value)

    def _cross_attention(self, x: Array, cache: Layer | None, context: AttentionContext) -> Array:
        module = layers.Attention(self.config, name="cross_attention")
        if context.encoded is None:
            keys_values = cache.cross_key, cache.cross_value
            return module.attend_to_cache(x, keys_values, context.cross_mask, None)
        keys_values = module.keys_values(context.encoded)
        return module(x, keys_values, context.cross_mask, None, self.deterministic)


def _relative_bias(config: ModelConfig, causal: bool) -> layers.RelativeBias:
    # A tower shared by encoder and decoder has one table for each: their bins differ in meaning.
    name = "causal_relative" if causal and config.shared_params == "all" else "relative"
    position = config.position
    return layers.RelativeBias(
        config.num_heads,
        not causal,
        position.relative_attention_num_buckets,
        position.relative_attention_max_distance,
        name=name,
    )


class Tower(nn.Module):
    """A stack of blocks with one relative bias, final norm and dropout; parameters lead with L."""

    config: ModelConfig  # the tower's
    depth: int
    shard_activations: Callable[[Array], Array]

    @nn.compact
    def __call__(
        self, x: Array, context: AttentionContext, causal: bool, deterministic: bool, caches=None
    ):
        """x [B, T, D] -> [B, T, D] and the layers' new caches: a tuple of Layer, or None.

        Decoding uses the caches' unstacked weights: slicing the stack inside the decoding loop
        would copy them at every step.
        """
        config = self.config
        drop = layers.Dropout(config.dropout_rate)
        if config.position.kind == "relative":
            context = context._replace(bias=_relative_bias(config, causal)(context.distance))
        self.sow(layers.INTERMEDIATES, "input", x)
        local = np.array([config.layer_window(layer) is not None for layer in range(self.depth)])
        new_caches = None if caches is None else ()
        if caches is None:
            x = self._scan(drop(x, deterministic), jnp.array(local), context, causal, deterministic)
        else:
            block = Block(config, causal, True, self.shard_activations, parent=None)
            for cache, is_local in zip(caches, local, strict=True):
                variables = {"params": cache.weights}
                x, new_cache = block.apply(variables, x, (cache, is_local), context)
                new_caches += (new_cache,)
        x = self.shard_activations(x)
        if config.norm.placement != "post":
            x = layers.NORMS[config.norm.kind](config.dtype, name="norm")(x)
        self.sow(layers.INTERMEDIATES, "output", x)
        return drop(x, deterministic), new_caches

    def _scan(self, x, local, context, causal, deterministic):
        config, block = self.config, Block
        if config.remat_policy != "none":
            # In unrolled layers XLA would merge the recomputation with the forward pass.
            prevent_cse = not config.scan_layers
            block = nn.remat(Block, policy=REMAT[config.remat_policy], prevent_cse=prevent_cse)
        blocks = nn.scan(
            block,
            variable_axes={"params": 0, layers.INTERMEDIATES: 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=self.depth,
            unroll=1 if config.scan_layers else self.depth,
        )(config, causal, deterministic, self.shard_activations, name="layers")
        return blocks(x, (None, local), context)[0]

    def unstack_layers(self) -> tuple[Layer, ...]:
        """The layers with their weights and empty caches; matrices in the activations' dtype."""
        stack, dtype = self.variables["params"]["layers"], self.config.dtype
        cast = lambda path, x: x.astype(dtype) if path[-1].key == "kernel" else x
        stack = jax.tree_util.tree_map_with_path(cast, stack)
        return tuple(Layer(jax.tree.map(lambda x: x[i], stack)) for i in range(self.depth))  # noqa: B023


class Transformer(nn.Module):
    """Batch to logits: `__call__` for training; `encode`, `start`, `decode_step` for decoding.

    If the collection layers.INTERMEDIATES is mutable, `__call__` stores activations in it: per
    tower "input" and "output" [B, T, D], per layer "hidden" [L, B, T, D], per attention "queries"
    [L, B, T, N, H], "keys" and "values" [L, B, S, K, H] and "scores" [L, B, N, T, S]; each as a
    tuple with one element per call of the tower.

    With model.architecture prefix_lm or language_model there is no encoder: the decoder reads the
    inputs followed by the targets, and only the targets' logits are returned.
    shard_activations: x [B, T, D] -> x, constrains the sharding of activations between blocks.
    """

    config: ModelConfig
    shard_activations: Callable[[Array], Array] = no_constraint

    def setup(self):
        config, encoder_config = self.config, self.config.tower("encoder")
        self.embed = _embedding(config)
        if config.shared_params == "none":
            self.encoder_embed = _embedding(encoder_config)
        if config.architecture == "encoder_decoder":
            self.encoder = Tower(encoder_config, config.num_encoder_layers, self.shard_activations)
        if config.shared_params != "all":
            self.decoder = Tower(config, config.num_decoder_layers, self.shard_activations)
        if config.lm_head == "untied":
            # T5X's variance; less for a small vocabulary, where logits of variance 1 would start
            # more than 5 % above the loss ln V.
            variance = 1.0 if config.vocab_size > math.exp(10) else 0.25
            init = nn.initializers.variance_scaling(variance, "fan_in", "truncated_normal")
            self.head = self.param("head", init, (config.d_model, config.vocab_size))

    def logits(self, x: Array) -> Array:
        """[B, T, D] -> float32 [B, T, V]."""
        config = self.config
        if config.lm_head == "tied":
            x = x * config.d_model**-0.5
        kernel = self.head if config.lm_head == "untied" else self.embed.embedding.T
        kernel = kernel.astype(config.dtype)
        logits = cpu_kernels.dense_general_2d(x, kernel, preferred_element_type=jnp.float32)
        return attention.soft_cap(logits, config.final_logits_soft_cap)

    def tokens(self, ids: Array, positions: Array, side: str = "decoder") -> Array:
        """Ids and positions, int [B, T], -> embeddings [B, T, D] in the activations' dtype."""
        config = self.config.tower(side)
        is_separate = side == "encoder" and config.shared_params == "none"
        x = (self.encoder_embed if is_separate else self.embed)(ids).astype(config.dtype)
        if config.embedding_scale == "sqrt_d_model":
            x *= jnp.asarray(config.d_model**0.5, config.dtype)
        if config.position.kind == "sinusoidal":
            x += attention.sinusoids(positions, config.d_model).astype(config.dtype)
        return x

    def encode(self, inputs: Array, segment_ids: Array, deterministic: bool = True) -> Array:
        """Ids and segment ids, int [B, S], -> encoder states [B, S, D]."""
        positions = attention.positions(segment_ids)
        distance = attention.distance(inputs.shape[1], inputs.shape[1])
        mask = attention.same_segment(segment_ids, segment_ids)
        context = AttentionContext(mask, distance, positions)
        x = self.tokens(inputs, positions, "encoder")
        return self.encoder(x, context, False, deterministic)[0]

    def decode(self, x: Array, context: AttentionContext, deterministic: bool, caches=None):
        """Embeddings [B, T, D] through the decoder -> [B, T, D] and the layers' new caches."""
        causal = self.config.architecture != "prefix_lm"
        return self._decoder_tower()(x, context, causal, deterministic, caches)

    def _decoder_tower(self) -> Tower:
        return self.encoder if self.config.shared_params == "all" else self.decoder

    def __call__(self, examples: batch.Batch, deterministic: bool = True) -> Array:
        """A Batch, packed or not -> float32 logits [B, T, V], teacher-forced."""
        segments = examples.targets_segment_ids
        ids = batch.shift_right(examples.targets, segments, self.config.decoder_start_token_id)
        if self.config.architecture != "encoder_decoder":
            return self._decoder_only(examples, ids, deterministic)
        encoded = self.encode(examples.inputs, examples.inputs_segment_ids, deterministic)
        distance = attention.distance(segments.shape[1], segments.shape[1])
        mask = attention.same_segment(segments, segments) & (distance <= 0)
        cross_mask = attention.same_segment(segments, examples.inputs_segment_ids)
        positions = attention.positions(segments)
        context = AttentionContext(mask, distance, positions, None, cross_mask, encoded)
        return self.logits(self.decode(self.tokens(ids, positions), context, deterministic)[0])

    def _decoder_only(self, examples, ids, deterministic):
        num_inputs = examples.inputs.shape[1]
        segments = examples.inputs_segment_ids, examples.targets_segment_ids
        offset = jnp.sum(attention.same_segment(segments[1], segments[0]), axis=-1)
        positions = attention.positions(segments[0]), attention.positions(segments[1]) + offset
        positions, segments = jnp.concatenate(positions, 1), jnp.concatenate(segments, 1)
        context = self._decoder_only_context(positions, segments, num_inputs)
        x = self.tokens(jnp.concatenate([examples.inputs, ids], axis=1), positions)
        return self.logits(self.decode(x, context, deterministic)[0][:, num_inputs:])

    def _decoder_only_context(self, positions, segments, num_inputs):
        """Causal attention; in a prefix LM the first `num_inputs` keys are visible to all."""
        distance = positions[:, None, :] - positions[:, :, None]
        visible = distance <= 0
        if self.config.architecture == "prefix_lm":
            visible |= jnp.arange(positions.shape[1]) < num_inputs
        mask = attention.same_segment(segments, segments) & visible
        return AttentionContext(mask, distance, positions)

    def start(self, inputs: Array, segment_ids: Array, length: int) -> Cache:
        """Return a cache for `length` tokens that holds the inputs' keys and values.

        inputs, segment_ids: int [B, S].
        """
        config, rows, caches = self.config, len(inputs), self._decoder_tower().unstack_layers()
        if config.architecture == "encoder_decoder":
            encoded = self.encode(inputs, segment_ids)
            empty = jnp.zeros((rows, length, config.num_kv_heads, config.head_dim), config.dtype)
            caches = [_with_cross_cache(config, x.weights, encoded, empty) for x in caches]
        else:
            positions = attention.positions(segment_ids)
            context = self._decoder_only_context(positions, segment_ids, inputs.shape[1])
            caches = self.decode(self.tokens(inputs, positions), context, True, caches)[1]
            pad = lambda x: jnp.pad(x, ((0, 0), (0, length), (0, 0), (0, 0)))
            keys_values = [attention.to_cache(pad(x.key), pad(x.value)) for x in caches]
            caches = [
                cache._replace(key=key, value=value)
                for cache, (key, value) in zip(caches, keys_values, strict=True)
            ]
        ancestry = jnp.zeros((rows, 1, length), jnp.int32)
        return Cache(tuple(caches), ancestry, segment_ids, jnp.zeros([], jnp.int32))

    def decode_step(self, token: Array, cache: Cache) -> tuple[Array, Cache]:
        """Previous tokens int [R] and the cache -> logits [R, V] of the next tokens, and new cache.

        R is B * W: the W beams of an input row are adjacent.
        """
        rows, width, _ = cache.beam_ancestry.shape
        beams = jnp.broadcast_to(jnp.arange(width)[:, None], (rows, width, 1))
        index = (0, 0, cache.index)
        ancestry = jax.lax.dynamic_update_slice(cache.beam_ancestry, beams, index)
        cache = cache._replace(beam_ancestry=ancestry)
        if self.config.architecture == "encoder_decoder":
            context = _encoder_decoder_step(cache)
        else:
            context = _decoder_only_step(cache)
        x = self.tokens(token.reshape(rows, width), context.positions)
        x, new_layers = self.decode(x, context, True, cache.layers)
        logits = self.logits(x).reshape(len(token), -1)
        return logits, cache._replace(layers=new_layers, index=cache.index + 1)


def _encoder_decoder_step(cache: Cache) -> AttentionContext:
    """One step's context: self-attention to decoded tokens, cross-attention to the inputs."""
    rows, width, _ = cache.beam_ancestry.shape
    mask, steps = _decoded_mask(cache)
    position = cache.index[None, None]
    distance = (steps - position)[:, None]
    positions = jnp.broadcast_to(position, (rows, width))
    cross_mask = (cache.inputs_segment_ids > 0)[:, None]
    index = cache.index * cache.num_beam_slots
    return AttentionContext(mask, distance, positions, None, cross_mask, None, index)


def _decoder_only_step(cache: Cache) -> AttentionContext:
    """One step's context: self-attention to the inputs followed by the decoded tokens."""
    (rows, width, _), sources = cache.beam_ancestry.shape, cache.inputs_segment_ids.shape[1]
    decoded_mask, steps = _decoded_mask(cache)
    is_input = cache.inputs_segment_ids > 0
    num_inputs = jnp.sum(is_input, axis=1, keepdims=True)
    input_mask = jnp.broadcast_to(is_input[:, None], (rows, width, sources))
    mask = jnp.concatenate([input_mask, decoded_mask], axis=2)
    input_positions = attention.positions(cache.inputs_segment_ids)
    key_positions = jnp.concatenate([input_positions, steps + num_inputs], axis=1)
    position = cache.index[None, None] + num_inputs
    distance = (key_positions - position)[:, None]
    positions = jnp.broadcast_to(position, (rows, width))
    index = sources + cache.index * cache.num_beam_slots
    return AttentionContext(mask, distance, positions, write_index=index)


def _decoded_mask(cache: Cache) -> tuple[Array, Array]:
    """Which cached tokens each beam descends from: bool [B, W, P], and their steps, int [1, P]."""
    rows, width, length = cache.beam_ancestry.shape
    slots, steps = cache.num_beam_slots, jnp.arange(length)
    mask = cache.beam_ancestry[..., None] == jnp.arange(slots)
    mask &= (steps <= cache.index)[:, None]
    return mask.reshape(rows, width, -1), jnp.repeat(steps, slots)[None]


def _with_cross_cache(config: ModelConfig, weights: dict, encoded: Array, empty: Array) -> Layer:
    """A layer with empty self-attention and the encoder's keys and values.

    The weights that compute the latter are dropped: decoding steps do not use them.
    """
    cross, module = weights["cross_attention"], layers.Attention(config, parent=None)
    keys_values = module.apply({"params": cross}, encoded, method="keys_values")
    unused = ("key", "value", "key_norm")
    rest = {name: kernel for name, kernel in cross.items() if name not in unused}
    weights = {**weights, "cross_attention": rest}
    return Layer(weights, *attention.to_cache(empty, empty), *attention.to_cache(*keys_values))


def _embedding(config: ModelConfig) -> nn.Embed:
    # Embedded tokens start with variance 1, and so do the logits of an unscaled tied head.
    small = config.embedding_scale == "sqrt_d_model" or config.lm_head == "tied_unscaled"
    init = nn.initializers.normal(config.d_model**-0.5 if small else 1.0)
    return nn.Embed(config.vocab_size, config.d_model, embedding_init=init)


def dummy_batch(inputs: int = 1, targets: int = 1, rows: int = 1) -> batch.Batch:
    """Return a batch of this shape for initialization and shape evaluation."""
    ones = lambda length: jnp.ones((rows, length), jnp.int32)
    return batch.Batch(ones(inputs), ones(inputs), ones(targets), ones(targets))
