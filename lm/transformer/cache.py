"""What decoding remembers, and whose memory a beam goes on from."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Layer(NamedTuple):
    """What one layer of the decoder remembers; `key` is None before anything was read.

    A token's P places: without an encoder the S inputs first; then those of the decoded tokens.
    """

    weights: Any  # the layer's parameters, out of their stack, once and for all
    key: Array | None = None  # [B * K, H, P]
    value: Array | None = None  # [B * K, P, H]
    cross_key: Array | None = None  # [B * K, H, S]: computed once a sequence, never moved;
    cross_value: Array | None = None  # [B * K, S, H]; None without an encoder


class Cache(NamedTuple):
    """What decoding remembers: a pytree of printable shapes, made by `Transformer.start`.

    W beams go on from each of the B rows of inputs: a step has B * W rows. The tokens of a step lie
    side by side, and stay there: what a beam sees is told by `taken`. So re-ordering beams moves a
    table of numbers, and no keys or values.
    """

    layers: tuple[Layer, ...]
    beam_ancestry: Array  # int [B, W, length]: whose token of each step, of those side by side
    inputs_segment_ids: Array  # [B, S]
    index: Array  # [], the number of tokens decoded so far

    @property
    def num_beam_slots(self) -> int:
        """How many tokens of a step have a place."""
        layer, sources = self.layers[0], self.inputs_segment_ids.shape[1]
        places = layer.value.shape[1] - (sources if layer.cross_key is None else 0)
        return places // self.beam_ancestry.shape[2]


def gather_beams(cache: Cache, rows: Array) -> Cache:
    """The cache of these rows, int [B * any], in this order; a row may be taken repeatedly.

    Each row stays with its inputs: those that follow on row b of the inputs, rows // W == b, stand
    together, as many for each b, in the order of b.
    """
    inputs, width, length = cache.beam_ancestry.shape
    parents = rows.reshape(inputs, -1) % width
    taken = jnp.take_along_axis(cache.beam_ancestry, parents[..., None], axis=1)
    beside, wide = cache.num_beam_slots, parents.shape[1]
    if wide <= beside:
        return cache._replace(beam_ancestry=taken)

    def widened(x):
        first, decoded = x[:, : -length * beside], x[:, -length * beside :]
        decoded = decoded.reshape(len(x), length, beside, -1)
        decoded = jnp.pad(decoded, ((0, 0), (0, 0), (0, wide - beside), (0, 0)))
        return jnp.concatenate([first, decoded.reshape(len(x), length * wide, -1)], axis=1)

    turned = lambda x: jnp.swapaxes(widened(jnp.swapaxes(x, 1, 2)), 1, 2)
    wider = (x._replace(key=turned(x.key), value=widened(x.value)) for x in cache.layers)
    return cache._replace(layers=tuple(wider), beam_ancestry=taken)
