"""Block, Tower and Transformer: batch to logits, and one token at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lm import attention, batch, layers
from lm.transformer.cache import Cache, Layer
from lm.transformer.config import ModelConfig

Array = jax.Array

REMAT = {  # what the backward pass finds instead of computing it again
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def no_constraint(x: Array) -> Array:
    """Activations as they are: on one device, or where each has rows of its own."""
    return x


class AttentionContext(NamedTuple):
    """What the layers of a tower share: masks, distances, positions, encoder states."""

    mask: Array  # bool [B, T, S]
    distance: Array  # int [T, S] or [B, T, S]
    positions: Array  # int [B, T], of the queries
    bias: Array | None = None  # [N, T, S] or [B, N, T, S]
    cross_mask: Array | None = None  # None: no cross-attention
    encoded: Array | None = None  # None if the cache holds the cross-attention's keys and values
    write_index: Array | None = None  # where the cache takes the new keys and values


class Block(nn.Module):
    """Residual block: self-attention, cross-attention if there is an encoder, feed-forward."""

    config: ModelConfig  # the tower's
    causal: bool
    deterministic: bool
    shard_activations: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Array, layer_inputs: tuple, context: AttentionContext):
        """x [B, T, D] and (the layer's cache or None, whether it is local) -> x, the new cache.

        A cache without keys receives those of x, [B, T, K, H]; one with keys is attended to.
        """
        cache, is_local = layer_inputs
        x = self.shard_activations(x)

        attended, cache = self._self_attention(self._pre_norm(x, "self"), cache, is_local, context)
        x = self._add(x, attended, "self")

        if context.cross_mask is not None:
            x = self._add(
                x, self._cross_attention(self._pre_norm(x, "cross"), cache, context), "cross"
            )

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
            key, value = _by_heads((key, value))
            index, update = context.write_index, jax.lax.dynamic_update_slice
            key = update(cache.key, key, (0, 0, index))
            value = update(cache.value, value, (0, index, 0))
            out = module.by_heads(x, (key, value), mask, bias, positions)
        return out, None if cache is None else cache._replace(key=key, value=value)

    def _cross_attention(self, x: Array, cache: Layer | None, context: AttentionContext) -> Array:
        module = layers.Attention(self.config, name="cross_attention")
        if context.encoded is None:
            keys_values = cache.cross_key, cache.cross_value
            return module.by_heads(x, keys_values, context.cross_mask, None)
        keys_values = module.keys_values(context.encoded)
        return module(x, keys_values, context.cross_mask, None, self.deterministic)


def _relative_bias(config: ModelConfig, causal: bool) -> layers.RelativeBias:
    # A tower that plays both parts has a table for each: their bins mean other things.
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
        self, x: Array, context: AttentionContext, causal: bool, deterministic: bool, memory=None
    ):
        """x [B, T, D] -> [B, T, D] and the layers' new memory: a tuple of Layer, or None.

        With a memory its weights are used, layer by layer: cut out of the stack in every step of a
        loop they would be copied in every step.
        """
        config = self.config
        drop = layers.Dropout(config.dropout_rate)
        if config.position.kind == "relative":
            context = context._replace(bias=_relative_bias(config, causal)(context.distance))
        self.sow(layers.INTERMEDIATES, "input", x)
        local = np.array([config.layer_window(layer) is not None for layer in range(self.depth)])
        if memory is None:
            x = self._through(
                drop(x, deterministic), jnp.array(local), context, causal, deterministic
            )
        else:
            block, old, memory = (
                Block(config, causal, True, self.shard_activations, parent=None),
                memory,
                (),
            )
            for layer, is_local in zip(old, local, strict=True):
                own = {"params": layer.weights}
                x, new = block.apply(own, x, (layer, is_local), context)
                memory += (new,)
        x = self.shard_activations(x)
        if config.norm.placement != "post":
            x = layers.NORMS[config.norm.kind](config.dtype, name="norm")(x)
        self.sow(layers.INTERMEDIATES, "output", x)
        return drop(x, deterministic), memory

    def _through(self, x, local, context, causal, deterministic):
        config, block = self.config, Block
        if config.remat_policy != "none":
            # Inside a loop nothing can be merged; unrolled, XLA would undo what is computed again.
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
        """The layers with their weights and no memory; matrices in the activations' dtype."""
        stack, dtype = self.variables["params"]["layers"], self.config.dtype
        cast = lambda path, x: x.astype(dtype) if path[-1].key == "kernel" else x
        stack = jax.tree_util.tree_map_with_path(cast, stack)
        return tuple(Layer(jax.tree.map(lambda x: x[i], stack)) for i in range(self.depth))  # noqa: B023


class Transformer(nn.Module):
    """Batch to logits: `__call__` for training; `encode`, `start`, `decode_step` to decode.

    Where apply has the collection layers.INTERMEDIATES mutable, `__call__` leaves there of each
    tower its
    "input" and "output" [B, T, D] and of its layers "hidden" [L, B, T, D], and of each attention
    "queries" [L, B, T, N, H], "keys", "values" [L, B, S, K, H] and "scores" [L, B, N, T, S], each
    in a tuple of one for each time that the tower was run. Elsewhere none of it is computed.

    With model.architecture prefix_lm or language_model there is no encoder: the decoder reads the
    inputs and then the targets, and only the latter's logits are returned.
    shard_activations: x [B, T, D] -> x, constrains the sharding of activations between blocks.
    """

    config: ModelConfig
    shard_activations: Callable[[Array], Array] = no_constraint

    def setup(self):
        config, ours = self.config, self.config.tower("encoder")
        self.embed = _embedding(config)
        if config.shared_params == "none":
            self.encoder_embed = _embedding(ours)
        if config.architecture == "encoder_decoder":
            self.encoder = Tower(ours, config.num_encoder_layers, self.shard_activations)
        if config.shared_params != "all":
            self.decoder = Tower(config, config.num_decoder_layers, self.shard_activations)
        if config.lm_head == "untied":
            variance = layers.head_variance(config.vocab_size)
            init = nn.initializers.variance_scaling(variance, "fan_in", "truncated_normal")
            self.head = self.param("head", init, (config.d_model, config.vocab_size))

    def logits(self, x: Array) -> Array:
        """[B, T, D] -> float32 [B, T, V]."""
        config = self.config
        if config.lm_head == "tied":
            x = x * config.d_model**-0.5
        kernel = self.head if config.lm_head == "untied" else self.embed.embedding.T
        kernel = kernel.astype(config.dtype)
        logits = layers.dense_general_2d(x, kernel, preferred_element_type=jnp.float32)
        return attention.soft_cap(logits, config.final_logits_soft_cap)

    def tokens(self, ids: Array, positions: Array, side: str = "decoder") -> Array:
        """int [B, T], int [B, T] -> embeddings [B, T, D] in the activations' dtype."""
        config = self.config.tower(side)
        own = side == "encoder" and config.shared_params == "none"
        x = (self.encoder_embed if own else self.embed)(ids).astype(config.dtype)
        if config.embedding_scale == "sqrt_d_model":
            x *= jnp.asarray(config.d_model**0.5, config.dtype)
        if config.position.kind == "sinusoidal":
            x += attention.sinusoids(positions, config.d_model).astype(config.dtype)
        return x

    def encode(self, inputs: Array, segment_ids: Array, deterministic: bool = True) -> Array:
        """int [B, S], int [B, S] -> [B, S, D]."""
        positions = attention.positions(segment_ids)
        distance = attention.distance(inputs.shape[1], inputs.shape[1])
        context = AttentionContext(
            attention.same_segment(segment_ids, segment_ids), distance, positions
        )
        x = self.tokens(inputs, positions, "encoder")
        return self.encoder(x, context, False, deterministic)[0]

    def decode(self, x: Array, context: AttentionContext, deterministic: bool, memory=None):
        """Embeddings [B, T, D] through the decoder -> [B, T, D] and the layers' new memory."""
        causal = self.config.architecture != "prefix_lm"
        return self._writer()(x, context, causal, deterministic, memory)

    def _writer(self) -> Tower:
        return self.encoder if self.config.shared_params == "all" else self.decoder

    def __call__(self, examples: batch.Batch, deterministic: bool = True) -> Array:
        """A Batch, packed or not -> float32 logits [B, T, V], teacher-forced."""
        segments = examples.targets_segment_ids
        ids = batch.shift_right(examples.targets, segments, self.config.decoder_start_token_id)
        if self.config.architecture != "encoder_decoder":
            return self._one_tower(examples, ids, deterministic)
        encoded = self.encode(examples.inputs, examples.inputs_segment_ids, deterministic)
        distance = attention.distance(segments.shape[1], segments.shape[1])
        mask = attention.same_segment(segments, segments) & (distance <= 0)
        cross_mask = attention.same_segment(segments, examples.inputs_segment_ids)
        positions = attention.positions(segments)
        context = AttentionContext(mask, distance, positions, None, cross_mask, encoded)
        return self.logits(self.decode(self.tokens(ids, positions), context, deterministic)[0])

    def _one_tower(self, examples, ids, deterministic):
        sources, ours, theirs = examples.inputs.shape[1], examples[3], examples[1]
        before = jnp.sum(attention.same_segment(ours, theirs), axis=-1)
        positions = (attention.positions(theirs), attention.positions(ours) + before)
        positions, segments = (jnp.concatenate(p, 1) for p in (positions, (theirs, ours)))
        context = self._one_tower_context(positions, positions, segments, segments, sources)
        x = self.tokens(jnp.concatenate([examples.inputs, ids], axis=1), positions)
        return self.logits(self.decode(x, context, deterministic)[0][:, sources:])

    def _one_tower_context(self, positions, key_positions, segments, key_segments, sources):
        # The key is no later than the query, or, for a prefix LM, among the first `sources`.
        distance = key_positions[:, None, :] - positions[:, :, None]
        visible = distance <= 0
        if self.config.architecture == "prefix_lm":
            visible |= jnp.arange(key_positions.shape[1]) < sources
        return AttentionContext(
            attention.same_segment(segments, key_segments) & visible, distance, positions
        )

    def start(self, inputs: Array, segment_ids: Array, length: int) -> Cache:
        """A cache for `length` tokens, with the inputs' keys and values in place."""
        config, rows, memory = self.config, len(inputs), self._writer().unstack_layers()
        if config.architecture == "encoder_decoder":
            encoded = self.encode(inputs, segment_ids)
            own = jnp.zeros((rows, length, config.num_kv_heads, config.head_dim), config.dtype)
            memory = [_read(config, layer.weights, encoded, own) for layer in memory]
        else:
            positions = attention.positions(segment_ids)
            sources = inputs.shape[1]
            context = self._one_tower_context(
                positions, positions, segment_ids, segment_ids, sources
            )
            memory = self.decode(self.tokens(inputs, positions), context, True, memory)[1]
            room = lambda x: jnp.pad(x, ((0, 0), (0, length), (0, 0), (0, 0)))
            seen = [_by_heads((room(layer.key), room(layer.value))) for layer in memory]
            memory = [x._replace(key=k, value=v) for x, (k, v) in zip(memory, seen, strict=True)]
        taken = jnp.zeros((rows, 1, length), jnp.int32)
        return Cache(tuple(memory), taken, segment_ids, jnp.zeros([], jnp.int32))

    def decode_step(self, token: Array, cache: Cache) -> tuple[Array, Cache]:
        """The previous token int [R] and the cache -> logits [R, V] of the next, and new cache.

        R is B * W: the W beams of an input row are adjacent.
        """
        rows, width, _ = cache.beam_ancestry.shape
        beams = jnp.broadcast_to(jnp.arange(width)[:, None], (rows, width, 1))
        put = jax.lax.dynamic_update_slice
        cache = cache._replace(beam_ancestry=put(cache.beam_ancestry, beams, (0, 0, cache.index)))
        if self.config.architecture == "encoder_decoder":
            context = _encoder_decoder_step(cache)
        else:
            context = _decoder_only_step(cache)
        x = self.tokens(token.reshape(rows, width), context.positions)
        x, new_layers = self.decode(x, context, True, cache.layers)
        logits = self.logits(x).reshape(len(token), -1)
        return logits, cache._replace(layers=new_layers, index=cache.index + 1)


def _encoder_decoder_step(cache: Cache) -> AttentionContext:
    """One step's context: decoded tokens by self-attention, inputs by cross-attention."""
    rows, width, _ = cache.beam_ancestry.shape
    mask, steps = _decoded_mask(cache)
    position = cache.index[None, None]
    distance = (steps - position)[:, None]
    positions = jnp.broadcast_to(position, (rows, width))
    cross_mask = (cache.inputs_segment_ids > 0)[:, None]
    index = cache.index * cache.num_beam_slots
    return AttentionContext(mask, distance, positions, None, cross_mask, None, index)


def _decoder_only_step(cache: Cache) -> AttentionContext:
    """One step's context: self-attention to the inputs and then the decoded tokens."""
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


def _read(config: ModelConfig, weights: dict, encoded: Array, own: Array) -> Layer:
    # A layer that has read what is encoded, and needs no more of what makes keys and values of it.
    cross, look = weights["cross_attention"], layers.Attention(config, parent=None)
    seen = look.apply({"params": cross}, encoded, method="keys_values")
    rest = {
        name: kernel for name, kernel in cross.items() if name not in ("key", "value", "key_norm")
    }
    weights = {**weights, "cross_attention": rest}
    return Layer(weights, *_by_heads((own, own)), *_by_heads(seen))


def _by_heads(keys_values: tuple[Array, Array]) -> tuple[Array, Array]:
    # Keys and values, each [B, S, K, H], as a cache has them.
    return attention.by_units(keys_values[0]), attention.by_heads(keys_values[1])


def _embedding(config: ModelConfig) -> nn.Embed:
    # What leaves the embedding has variance 1; so have the logits where it is an unscaled head too.
    small = config.embedding_scale == "sqrt_d_model" or config.lm_head == "tied_unscaled"
    init = nn.initializers.normal(config.d_model**-0.5 if small else 1.0)
    return nn.Embed(config.vocab_size, config.d_model, embedding_init=init)


def dummy_batch(inputs: int = 1, targets: int = 1, rows: int = 1) -> batch.Batch:
    """A batch of pad tokens of this shape: enough to initialise or to evaluate shapes."""
    ones = lambda length: jnp.ones((rows, length), jnp.int32)
    return batch.Batch(ones(inputs), ones(inputs), ones(targets), ones(targets))
