"""Losses as (total, weight): sums over target tokens, divided once after the last addition."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from lm import batch

Array = jax.Array
MIN_LOG_TAIL = -1e6  # nats; stands for the log of an empty tail


def token_nats(logits: Array, targets: Array) -> Array:
    """-log p of each target: float [B, T, V], int [B, T] -> float32 [B, T]."""
    logits = logits.astype(jnp.float32)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - target_logits


def cross_entropy(
    logits: Array, targets: Array, weights: Array, *, z_loss: float = 0.0, smoothing: float = 0.0
) -> tuple[Array, Array]:
    """Token losses in nats: float [B, T, V], int [B, T], float [B, T] -> (total [], weight []).

    z_loss adds z_loss * log(Z)^2, which keeps the softmax's normaliser Z near 1; smoothing moves
    this fraction of the target's probability to all V ids evenly.
    Source: Shazeer et al. 2018, arXiv:1811.02084 (z-loss); Szegedy et al. 2016, arXiv:1512.00567.
    """
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = log_z - (1 - smoothing) * target_logits + z_loss * log_z**2
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
    log_q, log_p = _log_softmax(student, temperature), _log_softmax(teacher, temperature)
    return _weighted_sum(temperature**2 * _divergence(log_p, log_q), weights)


def reverse_kl(
    student: Array, teacher: Array, weights: Array, *, temperature: float = 1.0
) -> tuple[Array, Array]:
    """KL(student || teacher) of softened distributions, times T^2, as (total, weight).

    Mode-seeking: it penalizes what the teacher finds unlikely. Arguments as forward_kl.
    Source: Gu et al. 2023, arXiv:2306.08543, section 2.
    """
    log_q, log_p = _log_softmax(student, temperature), _log_softmax(teacher, temperature)
    return _weighted_sum(temperature**2 * _divergence(log_q, log_p), weights)


def jsd(
    student: Array, teacher: Array, weights: Array, *, beta: float = 0.5, temperature: float = 1.0
) -> tuple[Array, Array]:
    """beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q, times T^2.

    P is the teacher's, Q the student's softened distribution; 0 < beta < 1. Divided by beta it
    tends to forward_kl as beta goes to 0, by 1 - beta to reverse_kl as beta goes to 1.
    Source: Agarwal et al. 2023, arXiv:2306.13649, equation 1.
    """
    log_q, log_p = _log_softmax(student, temperature), _log_softmax(teacher, temperature)
    log_m = jnp.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    mixed = beta * _divergence(log_p, log_m) + (1 - beta) * _divergence(log_q, log_m)
    return _weighted_sum(temperature**2 * mixed, weights)


def logit_mse(student: Array, teacher: Array, weights: Array) -> tuple[Array, Array]:
    """The squared difference of logits, averaged over V, as (total, weight).

    Source: Ba and Caruana 2014, arXiv:1312.6184; the mean as in DistilBERT's code.
    """
    difference = student.astype(jnp.float32) - teacher.astype(jnp.float32)
    return _weighted_sum(jnp.mean(jnp.square(difference), axis=-1), weights)


def top_k_and_rest(
    student: Array, teacher: batch.TeacherTopK, temperature: float = 1.0
) -> tuple[Array, Array]:
    """Logits of the k + 1 outcomes of a cached teacher: its top k ids, and the rest.

    student: logits float [B, T, V]. temperature: of the cache's tail. Returns (student's,
    teacher's) float32 [B, T, k + 1], or [B, T, V] if k is V. Softened by this temperature, the rest
    has the sum of the softened probabilities of all other ids. So a divergence of these outcomes is
    at most that of all V ids: KL(P || Q) is less by P's tail times the KL of the two tails.
    """
    student = student.astype(jnp.float32)
    student_top = jnp.take_along_axis(student, teacher.ids, axis=-1)
    teacher_top = teacher.logits.astype(jnp.float32)
    if teacher.ids.shape[-1] == student.shape[-1]:
        return student_top, teacher_top
    rest = jnp.put_along_axis(student, teacher.ids, -jnp.inf, axis=-1, inplace=False)
    student_tail = temperature * jax.nn.logsumexp(rest / temperature, axis=-1, keepdims=True)
    # Finite, because 0 * -inf is not 0.
    log_tail = jnp.maximum(teacher.tail.astype(jnp.float32), MIN_LOG_TAIL)[..., None]
    student_outcomes = jnp.concatenate([student_top, student_tail], axis=-1)
    return student_outcomes, jnp.concatenate([teacher_top, temperature * log_tail], axis=-1)


def _log_softmax(logits: Array, temperature: float) -> Array:
    return jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)


def _divergence(log_p: Array, log_q: Array) -> Array:
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _weighted_sum(values: Array, weights: Array) -> tuple[Array, Array]:
    return jnp.sum(values * weights), jnp.sum(weights)
