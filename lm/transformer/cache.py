"""The KV cache, and beam reordering without moving keys or values."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Layer(NamedTuple):
    """The cache of one decoder layer; `key` is None until tokens are read.

    P slots per row: in a decoder-only model S for the inputs, then those of the decoded tokens.
    """

    weights: Any  # the layer's parameters, sliced from the stack
    key: Array | None = None  # [B * K, H, P]
    value: Array | None = None  # [B * K, P, H]
    cross_key: Array | None = None  # [B * K, H, S]: computed once per sequence;
    cross_value: Array | None = None  # [B * K, S, H]; None without an encoder


class Cache(NamedTuple):
    """The decoding state, made by `Transformer.start`.

    Each of the B rows of inputs has W beams: a step has B * W rows. Every beam's token has a slot
    per step and stays there; `beam_ancestry` says which slots a beam descends from, so reordering
    beams moves a table of numbers and no keys or values.
    """

    layers: tuple[Layer, ...]
    beam_ancestry: Array  # int [B, W, length]: the slot of each step that a beam descends from
    inputs_segment_ids: Array  # [B, S]
    index: Array  # [], the number of decoded tokens

    @property
    def num_beam_slots(self) -> int:
        """Slots per step."""
        layer, num_inputs = self.layers[0], self.inputs_segment_ids.shape[1]
        slots = layer.value.shape[1] - (num_inputs if layer.cross_key is None else 0)
        return slots // self.beam_ancestry.shape[2]


def gather_beams(cache: Cache, rows: Array) -> Cache:
    """Return the cache of these rows, int [B * any], in this order; rows may repeat.

    The rows are grouped by their input row (rows // W), equally many for each, in order.
    """
    num_inputs, width, length = cache.beam_ancestry.shape
    parents = rows.reshape(num_inputs, -1) % width
    ancestry = jnp.take_along_axis(cache.beam_ancestry, parents[..., None], axis=1)
    num_slots, num_beams = cache.num_beam_slots, parents.shape[1]
    if num_beams <= num_slots:
        return cache._replace(beam_ancestry=ancestry)

    def add_slots(x):
        inputs, decoded = x[:, : -length * num_slots], x[:, -length * num_slots :]
        decoded = decoded.reshape(len(x), length, num_slots, -1)
        decoded = jnp.pad(decoded, ((0, 0), (0, 0), (0, num_beams - num_slots), (0, 0)))
        return jnp.concatenate([inputs, decoded.reshape(len(x), length * num_beams, -1)], axis=1)

    add_key_slots = lambda x: jnp.swapaxes(add_slots(jnp.swapaxes(x, 1, 2)), 1, 2)
    layers = (x._replace(key=add_key_slots(x.key), value=add_slots(x.value)) for x in cache.layers)
    return cache._replace(layers=tuple(layers), beam_ancestry=ancestry)
