"""Losses as (total, weight): summed over target tokens, divided once, wherever the sum ends."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def token_nats(logits: Array, targets: Array) -> Array:
    """Nats of each target's surprise: float [B, T, V], int [B, T] -> float32 [B, T]."""
    logits = logits.astype(jnp.float32)
    right = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - right


def cross_entropy(
    logits: Array, targets: Array, weights: Array, *, z_loss: float = 0.0, smoothing: float = 0.0
) -> tuple[Array, Array]:
    """Token losses in nats: float [B, T, V], int [B, T], float [B, T] -> (total [], weight []).

    z_loss adds z_loss * log(Z)^2, which keeps the softmax's normaliser near 1; smoothing spreads
    that share of the target's probability evenly over V.
    Source: Shazeer et al. 2018, arXiv:1811.02084 (z-loss); Szegedy et al. 2016, arXiv:1512.00567.
    """
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    right = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = log_z - (1 - smoothing) * right + z_loss * log_z**2
    if smoothing:
        loss -= smoothing * logits.mean(axis=-1)
    return jnp.sum(loss * weights), jnp.sum(weights)


def forward_kl(
    student: Array, teacher: Array, weights: Array, *, temperature: float = 1.0
) -> tuple[Array, Array]:
    """KL(teacher || student) of softened distributions, times T^2, as (total, weight).

    student, teacher: logits float [B, T, V]; weights float [B, T]. In nats at temperature 1. The
    factor T^2 keeps the gradient's scale as the temperature changes.
    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    p = jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature, axis=-1)
    q = jax.nn.log_softmax(student.astype(jnp.float32) / temperature, axis=-1)
    divergence = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    return temperature**2 * jnp.sum(divergence * weights), jnp.sum(weights)
