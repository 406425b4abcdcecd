"""A tiny model and examples, for tests of features."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lm import batch, distill, transformer

SIZES = dict(vocab_size=48, d_model=16, d_ff=24, num_heads=4, num_kv_heads=4, head_dim=4)

MODEL = transformer.ModelConfig(
    **SIZES, num_encoder_layers=2, num_decoder_layers=3, scan_layers=True
)


def drawn(model, seed: int, scale=0.3):
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * scale, leaf.dtype)
    return jax.tree.map(draw, transformer.param_shapes(model.config))


def row(lengths, columns: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """Packed examples of these lengths, then padding: (ids, segments), int32 [1, columns]."""
    segments = np.repeat(np.arange(len(lengths)) + 1, lengths)
    segments = np.pad(segments, (0, columns - len(segments)))[None].astype(np.int32)
    return rng.integers(3, 48, segments.shape).astype(np.int32) * (segments > 0), segments


def ragged() -> batch.Batch:
    """Rows of one example with different lengths; the last is empty."""
    rng = np.random.default_rng(3)
    inputs, targets = ([row(n, 9, rng) for n in lengths] for lengths in (
        ([5], [9], [2], []), ([4], [1], [7], [])
    ))  # fmt: skip
    sides = [np.concatenate(part) for side in (inputs, targets) for part in zip(*side, strict=True)]
    return batch.Batch(*sides)


EXAMPLES = ragged()


def term(section: dict) -> distill.Term:
    (only,) = distill.loss_terms(section)
    return only
