"""The one record that passes from data to model, and the legend of axes.

Axis letters, in every comment and docstring of this package:

  B batch     T query or target length   S key or source length   L layers   D d_model
  N heads     K key/value heads          H head_dim               F d_ff     V vocabulary
"""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any  # numpy here and in worker processes, jax on devices: this file imports neither


class TeacherTopK(NamedTuple):
    """What a teacher said of each target, as a cache has it: its k likeliest ids, and the rest."""

    ids: Array  # int32 [B, T, k]
    logits: Array  # float [B, T, k], log-probabilities
    tail: Array  # float32 [B, T], the log of what all other ids have together, each probability
    # to the power 1 / the temperature that the teacher is asked at


class Batch(NamedTuple):
    """A batch of encoder-decoder examples, packed or not; segment 0 is padding.

    Positions are not carried: inside a segment the index difference is the position difference.
    """

    inputs: Array  # int32 [B, S]
    inputs_segment_ids: Array  # int32 [B, S], 1.. along the row
    targets: Array  # int32 [B, T]
    targets_segment_ids: Array  # int32 [B, T]
    teacher_top_k: TeacherTopK | None = None  # by a cached teacher
    from_student: Array | None = (
        None  # bool [B], rows whose targets the student wrote: labels do not count
    )


def shift_right(targets: Array, segment_ids: Array, start: int = 0) -> Array:
    """The decoder's inputs: each segment's targets one later, `start` first; int [B, T]."""
    xp = targets.__array_namespace__()

    def later(x):
        return xp.concat([xp.zeros_like(x[:, :1]), x[:, :-1]], axis=1)

    first = xp.full_like(targets, start) * (segment_ids > 0)
    return xp.where(later(segment_ids) == segment_ids, later(targets), first)


def loss_weights(batch: Batch) -> Array:
    """1 where a target is to be predicted, 0 on padding: float32 [B, T]."""
    xp = batch.targets.__array_namespace__()
    return (batch.targets_segment_ids > 0).astype(xp.float32)


def label_weights(batch: Batch) -> Array:
    """The same but 0 in rows whose targets the student wrote: float32 [B, T]."""
    weights = loss_weights(batch)
    return weights if batch.from_student is None else weights * ~batch.from_student[:, None]
