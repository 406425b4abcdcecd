"""Implementations that are faster on a CPU than the plain text of the same function.

Other devices run them too, except where a function says otherwise: attention row by row,
products of matrices, top-k and top-p without sorting the vocabulary.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from lm import attention

Array = jax.Array

MIN_ROW_SCORES = 2**16  # rows with fewer scores are computed at once: a loop would cost more
BLOCK = 128  # logits per block in fast_top_k


def attend(
    query: Array,
    key: Array,
    value: Array,
    mask: Array,
    bias: Array | None = None,
    keep: Array | None = None,
    config: attention.ScoreConfig = attention.ScoreConfig(),  # noqa: B008  (immutable)
) -> Array:
    """Run `attention.attend`; on a CPU with long rows, one row after the other.

    The scores of a row stay in the CPU's cache; the backward pass recomputes them.
    """
    length, heads, groups = *query.shape[1:3], key.shape[2]
    query = query.reshape(*query.shape[:2], groups, heads // groups, -1)
    if bias is not None:
        bias = bias.reshape(*bias.shape[:-3], groups, heads // groups, *bias.shape[-2:])
    attend_row = functools.partial(_attend_row, config=config)
    is_shared = bias is None or bias.ndim == 4  # one bias for all rows
    at_once = jax.vmap(attend_row, (0, 0, 0, 0, 0, None if is_shared else 0))

    def row_by_row(*arrays):
        attend_again = jax.checkpoint(attend_row)
        if not is_shared:
            return jax.lax.map(lambda row: attend_again(*row), arrays)
        return jax.lax.map(lambda row: attend_again(*row, arrays[-1]), arrays[:-1])

    arrays = query, key, value, mask, keep, bias
    if heads * length * key.shape[1] < MIN_ROW_SCORES:
        outputs = at_once(*arrays)
    else:
        outputs = jax.lax.platform_dependent(*arrays, cpu=row_by_row, default=at_once)
    return outputs.reshape(*query.shape[:2], heads, -1)


def _attend_row(query, key, value, mask, keep, bias, *, config):
    """Attention of one row: query [T, K, G, H], key and value [S, K, H] -> [T, K, G, H]."""
    # The products have one batch axis, K, in front: with any other order XLA copies the scores to
    # transpose them.
    length, groups, shared, width = query.shape
    query = jnp.transpose(query, (1, 2, 0, 3)).reshape(groups, shared * length, width)
    key, value = jnp.swapaxes(key, 0, 1), jnp.swapaxes(value, 0, 1)
    scores = jnp.einsum("kth,ksh->kts", query, key, preferred_element_type=jnp.float32)
    scores = scores.reshape(groups, shared, length, -1)
    weights = jax.nn.softmax(attention.masked_scores(scores, mask, bias, config), axis=-1)
    if keep is not None:
        weights *= keep
    weights = weights.astype(value.dtype).reshape(groups, shared * length, -1)
    outputs = jnp.einsum("kts,ksh->kth", weights, value)
    return jnp.transpose(outputs.reshape(groups, shared, length, -1), (2, 0, 1, 3))


def dense_general_2d(
    x: Array, kernel: Array, dimensions: tuple = (((-1,), (0,)), ((), ())), **kwargs: Any
) -> Array:
    """Contract the last axes of x with the first of a kernel as one product of two matrices.

    The gradient of a product over more axes is computed transposed, which costs a CPU copies.

    Args:
      x: [.., I]; I stands for one or more axes.
      kernel: [I, O ..].
      dimensions: as for lax.dot_general; only the number of contracted axes is read.
      **kwargs: passed to jnp.dot.

    Returns: [.., O ..].
    """
    count = len(dimensions[0][0])
    rows, size = x.shape[: x.ndim - count], math.prod(kernel.shape[:count])
    product = jnp.dot(x.reshape(-1, size), kernel.reshape(size, -1), **kwargs)
    return product.reshape(*rows, *kernel.shape[count:])


def argmax(logits: Array) -> Array:
    """Compute jnp.argmax at a tenth of its cost on a CPU: float [B, V] -> int32 [B]."""
    return fast_top_k(logits, 1)[1][:, 0]


def fast_top_k(x: Array, count: int) -> tuple[Array, Array]:
    """Compute jax.lax.top_k at a twentieth of its cost on a CPU.

    The `count` largest values lie in the `count` blocks with the largest maxima.

    Args: x: [B, N]. Returns (values, indices) [B, count]; of equal values the first come first.
    """
    size = x.shape[-1]
    if size <= count * BLOCK:
        return jax.lax.top_k(x, count)
    blocks = jnp.pad(x, ((0, 0), (0, -size % BLOCK)), constant_values=-jnp.inf)
    blocks = blocks.reshape(len(x), -1, BLOCK)
    # Sorted, so that of equal values the first wins.
    top_blocks = jnp.sort(jax.lax.top_k(jnp.max(blocks, -1), count)[1])
    blocks = jnp.take_along_axis(blocks, top_blocks[..., None], axis=1)
    values, indices = jax.lax.top_k(blocks.reshape(len(x), -1), count)
    block, offset = jnp.divmod(indices, BLOCK)
    return values, jnp.take_along_axis(top_blocks, block, axis=1) * BLOCK + offset


def top_p(logits: Array, mass: float) -> Array:
    """Set all logits to -inf except the fewest largest whose probabilities sum to `mass`.

    Tokens of equal probability are treated alike. Other implementations sort the vocabulary; this
    one bisects the threshold over the bits of the probabilities, which are ordered as floats are.
    Source: Holtzman et al. 2020, section 3.1, arXiv:1904.09751.
    """
    probs = jax.nn.softmax(logits)
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)

    def bisect(_, bounds):  # tokens of `low` or more have the mass, those of `high` or more do not
        low, high = bounds
        middle = low + (high - low) // 2
        is_enough = jnp.sum(jnp.where(bits >= middle, probs, 0.0), -1, keepdims=True) >= mass
        return jnp.where(is_enough, middle, low), jnp.where(is_enough, high, middle)

    bounds = (jnp.zeros_like(bits[:, :1]), jnp.max(bits, -1, keepdims=True) + 1)
    low, _ = jax.lax.fori_loop(0, 31, bisect, bounds)
    return jnp.where(bits < low, -jnp.inf, logits)
