"""Losses as (total, weight): summed over target tokens, divided once, wherever the sum ends."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from lm import batch

Array = jax.Array
LEAST = -1e6  # the log of nothing, in nats


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
    log_q, log_p = _softened(student, temperature), _softened(teacher, temperature)
    return _summed(temperature**2 * _divergence(log_p, log_q), weights)


def reverse_kl(
    student: Array, teacher: Array, weights: Array, *, temperature: float = 1.0
) -> tuple[Array, Array]:
    """KL(student || teacher) of softened distributions, times T^2, as (total, weight).

    It asks the student for what the teacher finds likely, not for all of it. As forward_kl.
    Source: Gu et al. 2023, arXiv:2306.08543, section 2.
    """
    log_q, log_p = _softened(student, temperature), _softened(teacher, temperature)
    return _summed(temperature**2 * _divergence(log_q, log_p), weights)


def jsd(
    student: Array, teacher: Array, weights: Array, *, beta: float = 0.5, temperature: float = 1.0
) -> tuple[Array, Array]:
    """beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q, times T^2.

    P is the teacher's, Q the student's softened distribution; 0 < beta < 1. Over beta it tends to
    forward_kl as beta goes to 0, over 1 - beta to reverse_kl as beta goes to 1. As forward_kl.
    Source: Agarwal et al. 2023, arXiv:2306.13649, equation 1.
    """
    log_q, log_p = _softened(student, temperature), _softened(teacher, temperature)
    log_m = jnp.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    both = beta * _divergence(log_p, log_m) + (1 - beta) * _divergence(log_q, log_m)
    return _summed(temperature**2 * both, weights)


def logit_mse(student: Array, teacher: Array, weights: Array) -> tuple[Array, Array]:
    """The squared difference of logits, its mean over V, as (total, weight).

    Source: Ba and Caruana 2014, arXiv:1312.6184; the mean as in DistilBERT's code.
    """
    apart = student.astype(jnp.float32) - teacher.astype(jnp.float32)
    return _summed(jnp.mean(jnp.square(apart), axis=-1), weights)


def top_k_and_rest(
    student: Array, teacher: batch.TeacherTopK, temperature: float = 1.0
) -> tuple[Array, Array]:
    """Logits of the k + 1 outcomes that a cached teacher knows: its k ids, and any other id.

    student: logits float [B, T, V] -> (student's, teacher's) float32 [B, T, k + 1], or [B, T, V]
    where k is V. Softened by this temperature, the one that the tail was taken at, "any other id"
    has what the others have together once they are softened. So each divergence of them is at most
    that of all V ids, and nearer the larger k is: what KL(P || Q) lacks is P's tail times the KL
    of the two tails.
    """
    student = student.astype(jnp.float32)
    ours = jnp.take_along_axis(student, teacher.ids, axis=-1)
    theirs = teacher.logits.astype(jnp.float32)
    if teacher.ids.shape[-1] == student.shape[-1]:
        return ours, theirs
    rest = jnp.put_along_axis(student, teacher.ids, -jnp.inf, axis=-1, inplace=False)
    tail = temperature * jax.nn.logsumexp(rest / temperature, axis=-1, keepdims=True)
    # A tail of nothing has a logarithm too, or 0 times it would not be 0.
    left = temperature * jnp.maximum(teacher.tail.astype(jnp.float32), LEAST)[..., None]
    return jnp.concatenate([ours, tail], axis=-1), jnp.concatenate([theirs, left], axis=-1)


def _softened(logits: Array, temperature: float) -> Array:
    return jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)


def _divergence(log_p: Array, log_q: Array) -> Array:
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _summed(each: Array, weights: Array) -> tuple[Array, Array]:
    return jnp.sum(each * weights), jnp.sum(weights)
