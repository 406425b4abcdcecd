"""The batch, the record that passes from data to model, and the legend of axes.

Axis letters, in every comment and docstring of this package:

  B batch     T query or target length   S key or source length   L layers   D d_model
  N heads     K key/value heads          H head_dim               F d_ff     V vocabulary
"""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any  # numpy here and in worker processes, jax on devices: this file imports neither


class TeacherTopK(NamedTuple):
    """The cached output of a teacher for each target: its k most likely ids, and the rest."""

    ids: Array  # int32 [B, T, k]
    logits: Array  # float [B, T, k], log-probabilities
    tail: Array  # float32 [B, T], the log of the sum of p ** (1 / temperature) over all other ids


class Batch(NamedTuple):
    """A batch of encoder-decoder examples, packed or not; segment 0 is padding.

    It has no positions: within a segment, differences of indices are differences of positions.
    """

    inputs: Array  # int32 [B, S]
    inputs_segment_ids: Array  # int32 [B, S], 1.. along the row
    targets: Array  # int32 [B, T]
    targets_segment_ids: Array  # int32 [B, T]
    teacher_top_k: TeacherTopK | None = None  # from a teacher cache
    from_student: Array | None = None  # bool [B], rows with targets that the student generated


def shift_right(targets: Array, segment_ids: Array, start: int = 0) -> Array:
    """Shift targets right within their segments, after `start`: decoder inputs, int [B, T]."""
    xp = targets.__array_namespace__()

    def shift(x):
        return xp.concat([xp.zeros_like(x[:, :1]), x[:, :-1]], axis=1)

    first = xp.full_like(targets, start) * (segment_ids > 0)
    return xp.where(shift(segment_ids) == segment_ids, shift(targets), first)


def loss_weights(batch: Batch) -> Array:
    """Return 1 for targets and 0 for padding, float32 [B, T]."""
    xp = batch.targets.__array_namespace__()
    return (batch.targets_segment_ids > 0).astype(xp.float32)


def label_weights(batch: Batch) -> Array:
    """Return loss_weights, but 0 in rows with targets that the student generated."""
    weights = loss_weights(batch)
    return weights if batch.from_student is None else weights * ~batch.from_student[:, None]
