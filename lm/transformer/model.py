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
    """What is the same for every layer of a tower: who sees whom, how far apart, and what else."""

    mask: Array  # bool [B, T, S]
    distance: Array  # int [T, S] or [B, T, S]
    positions: Array  # int [B, T], of the queries
    bias: Array | None = None  # [N, T, S] or [B, N, T, S]
    cross_mask: Array | None = None  # None: no cross-attention
    encoded: Array | None = None  # None once the cache holds the cross-attention's keys and values
    place: Array | None = None  # the cache's first place to fill, when there is one


class Block(nn.Module):
    """Residual block: self-attention, cross-attention where there is an encoder to see, and FF."""

    config: ModelConfig  # the tower's
    causal: bool
    deterministic: bool
    place: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Array, own, sight: AttentionContext):
        """x [B, T, D] and this layer's own (a Layer or None, is it local) -> x, the new Layer.

        A Layer without keys gets those of x, [B, T, K, H]; one with keys sees them, too.
        """
        config, deterministic, (memory, local) = self.config, self.deterministic, own
        self_attention = layers.Attention(config, name="self_attention")
        places = sight.positions if config.position.kind == "rotary" else None

        def see_own(x):
            seen = self_attention.keys_values(x, places)
            mask, bias = sight.mask, sight.bias
            if config.attention.pattern != "global":
                mask &= (jnp.abs(sight.distance) < config.attention.window_size) | ~local
            if config.position.kind == "relative_per_layer":
                bias = _relative_bias(config, self.causal)(sight.distance)
            if memory is None or memory.key is None:
                return self_attention(x, seen, mask, bias, deterministic, places), seen
            put, new = jax.lax.dynamic_update_slice, _by_heads(seen)
            key = put(memory.key, new[0], (0, 0, sight.place))
            seen = key, put(memory.value, new[1], (0, sight.place, 0))
            return self_attention.by_heads(x, seen, mask, bias, places), seen

        def see_encoder(x):
            cross_attention = layers.Attention(config, name="cross_attention")
            if sight.encoded is None:
                seen = memory.cross_key, memory.cross_value
                return cross_attention.by_heads(x, seen, sight.cross_mask, None), None
            seen = cross_attention.keys_values(sight.encoded)
            return cross_attention(x, seen, sight.cross_mask, None, deterministic), None

        def feed(x):
            return layers.FeedForward(config, name="feed_forward")(x, deterministic), None

        x, (key, value) = self.add(self.place(x), "self", see_own)
        if sight.cross_mask is not None:
            x, _ = self.add(x, "cross", see_encoder)
        x, _ = self.add(x, "ff", feed)
        self.sow(layers.INTERMEDIATES, "hidden", x)
        return x, None if memory is None else memory._replace(key=key, value=value)

    def add(self, x: Array, name: str, change) -> tuple:
        """x plus what a sub-layer makes of it, normed before, after, or on both sides.

        change: x -> (what it makes, what it saw). Returns the sum and what was seen.
        """
        config = self.config
        norm = lambda end: layers.NORMS[config.norm.kind](config.dtype, name=f"{name}_{end}")
        drop = lambda x: layers.Dropout(config.dropout_rate)(x, self.deterministic)
        if config.norm.placement == "post":
            changed, seen = change(x)
            return norm("post_norm")(x + drop(changed)), seen
        changed, seen = change(norm("norm")(x))
        if config.norm.placement == "both":
            changed = norm("post_norm")(changed)
        return x + drop(changed), seen


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
    place: Callable[[Array], Array]

    @nn.compact
    def __call__(
        self, x: Array, sight: AttentionContext, causal: bool, deterministic: bool, memory=None
    ):
        """x [B, T, D] -> [B, T, D] and the layers' new memory: a tuple of Layer, or None.

        With a memory its weights are used, layer by layer: cut out of the stack in every step of a
        loop they would be copied in every step.
        """
        config = self.config
        drop = layers.Dropout(config.dropout_rate)
        if config.position.kind == "relative":
            sight = sight._replace(bias=_relative_bias(config, causal)(sight.distance))
        self.sow(layers.INTERMEDIATES, "input", x)
        local = np.array([config.layer_window(layer) is not None for layer in range(self.depth)])
        if memory is None:
            x = self._through(
                drop(x, deterministic), jnp.array(local), sight, causal, deterministic
            )
        else:
            block, old, memory = Block(config, causal, True, self.place, parent=None), memory, ()
            for layer, is_local in zip(old, local, strict=True):
                own = {"params": layer.weights}
                x, new = block.apply(own, x, (layer, is_local), sight)
                memory += (new,)
        x = self.place(x)
        if config.norm.placement != "post":
            x = layers.NORMS[config.norm.kind](config.dtype, name="norm")(x)
        self.sow(layers.INTERMEDIATES, "output", x)
        return drop(x, deterministic), memory

    def _through(self, x, local, sight, causal, deterministic):
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
        )(config, causal, deterministic, self.place, name="layers")
        return blocks(x, (None, local), sight)[0]

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
    inputs and then the targets, and only the latter's logits are returned. place: x [B, T, D] -> x,
    says of activations between blocks where their rows lie; a mesh's compiler is to be told.
    """

    config: ModelConfig
    place: Callable[[Array], Array] = no_constraint

    def setup(self):
        config, ours = self.config, self.config.tower("encoder")
        self.embed = _embedding(config)
        if config.shared_params == "none":
            self.encoder_embed = _embedding(ours)
        if config.architecture == "encoder_decoder":
            self.encoder = Tower(ours, config.num_encoder_layers, self.place)
        if config.shared_params != "all":
            self.decoder = Tower(config, config.num_decoder_layers, self.place)
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
        sight = AttentionContext(
            attention.same_segment(segment_ids, segment_ids), distance, positions
        )
        x = self.tokens(inputs, positions, "encoder")
        return self.encoder(x, sight, False, deterministic)[0]

    def decode(self, x: Array, sight: AttentionContext, deterministic: bool, memory=None):
        """Embeddings [B, T, D] through the decoder -> [B, T, D] and the layers' new memory."""
        causal = self.config.architecture != "prefix_lm"
        return self._writer()(x, sight, causal, deterministic, memory)

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
        sight = AttentionContext(mask, distance, positions, None, cross_mask, encoded)
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
            sight = self._sight(positions, positions, segment_ids, segment_ids, sources)
            memory = self.decode(self.tokens(inputs, positions), sight, True, memory)[1]
            room = lambda x: jnp.pad(x, ((0, 0), (0, length), (0, 0), (0, 0)))
            seen = [_by_heads((room(layer.key), room(layer.value))) for layer in memory]
            memory = [x._replace(key=k, value=v) for x, (k, v) in zip(memory, seen, strict=True)]
        taken = jnp.zeros((rows, 1, length), jnp.int32)
        return Cache(tuple(memory), taken, segment_ids, jnp.zeros([], jnp.int32))

    def decode_step(self, token: Array, cache: Cache) -> tuple[Array, Cache]:
        """The previous token int [R] and the cache -> logits [R, V] of the next, and new cache.

        R is B * W: the W beams of a row of inputs stand together.
        """
        rows, width, length = cache.beam_ancestry.shape
        beside, steps, index = cache.num_beam_slots, jnp.arange(length), cache.index
        here = jnp.broadcast_to(jnp.arange(width)[:, None], (rows, width, 1))
        taken = jax.lax.dynamic_update_slice(cache.beam_ancestry, here, (0, 0, index))
        own = (taken[..., None] == jnp.arange(beside)) & (steps <= index)[:, None]
        mask, places = own.reshape(rows, width, -1), jnp.repeat(steps, beside)[None]
        read, position, first = cache.inputs_segment_ids > 0, index[None, None], 0
        cross_mask = read[:, None]
        if self.config.architecture != "encoder_decoder":
            first, before = read.shape[1], jnp.sum(read, axis=1, keepdims=True)
            inputs = attention.positions(cache.inputs_segment_ids)
            places = jnp.concatenate([inputs, places + before], axis=1)
            seen = jnp.broadcast_to(cross_mask, (rows, width, first))
            mask, position = jnp.concatenate([seen, mask], axis=2), position + before
            cross_mask = None
        distance = (places - position)[:, None]
        position = jnp.broadcast_to(position, (rows, width))
        place = first + index * beside
        sight = AttentionContext(mask, distance, position, None, cross_mask, None, place)
        x = self.tokens(token.reshape(rows, width), position)
        x, memory = self.decode(x, sight, True, cache.layers)
        logits = self.logits(x).reshape(len(token), -1)
        return logits, Cache(memory, taken, cache.inputs_segment_ids, index + 1)


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
