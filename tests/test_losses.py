"""Laws of losses: equal to optax and scipy, padding never counts, sums are additive."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from lm import losses

ROWS, LENGTH, VOCAB = 3, 5, 11


def case(seed=0, scale=2.0):
    """Random logits [B, T, V], targets [B, T] and ragged weights [B, T]."""
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(scale * rng.normal(size=(ROWS, LENGTH, VOCAB)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, VOCAB, (ROWS, LENGTH)))
    weights = jnp.asarray(np.arange(LENGTH) < np.array([[5], [2], [3]]), jnp.float32)
    return logits, targets, weights


def parts_and_whole(loss, *arrays):
    """(the loss summed over single rows, the loss of the batch)."""
    parts = [loss(*(x[b : b + 1] for x in arrays)) for b in range(ROWS)]
    return np.sum(parts, axis=0), np.array(loss(*arrays))


# Cross-entropy. ------------------------------------------------------------------------------


def test_token_nats_are_optax_cross_entropy():
    logits, targets, _ = case()
    theirs = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    np.testing.assert_allclose(losses.token_nats(logits, targets), theirs, rtol=1e-6)


def test_cross_entropy_equals_optax_summed_over_weighted_targets():
    logits, targets, weights = case()
    theirs = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    total, weight = losses.cross_entropy(logits, targets, weights)
    np.testing.assert_allclose(total, np.sum(theirs * weights), rtol=1e-6)
    assert weight == 10


@pytest.mark.parametrize("smoothing", [0.1, 0.7])
def test_smoothing_is_optax_smooth_labels(smoothing):
    logits, targets, weights = case()
    labels = optax.smooth_labels(jax.nn.one_hot(targets, VOCAB), smoothing)
    theirs = np.sum(optax.softmax_cross_entropy(logits, labels) * weights)
    total, _ = losses.cross_entropy(logits, targets, weights, smoothing=smoothing)
    np.testing.assert_allclose(total, theirs, rtol=1e-5)


def test_z_loss_is_the_squared_log_of_the_normaliser():
    logits, targets, weights = case()
    plain, _ = losses.cross_entropy(logits, targets, weights)
    total, _ = losses.cross_entropy(logits, targets, weights, z_loss=0.3)
    log_z = scipy.special.logsumexp(np.asarray(logits, np.float64), axis=-1)
    np.testing.assert_allclose(total - plain, 0.3 * np.sum(log_z**2 * weights), rtol=1e-5)


@pytest.mark.parametrize("z_loss, smoothing", [(0.0, 0.0), (0.5, 0.0), (0.5, 0.2)])
def test_the_gradient_is_that_of_finite_differences(z_loss, smoothing):
    logits, targets, weights = case()

    def exact(x):
        log_p = scipy.special.log_softmax(x, axis=-1)
        log_z = scipy.special.logsumexp(x, axis=-1)
        right = np.take_along_axis(log_p, np.asarray(targets)[..., None], -1)[..., 0]
        token = -(1 - smoothing) * right - smoothing * log_p.mean(-1) + z_loss * log_z**2
        return np.sum(token * np.asarray(weights))

    ours = jax.grad(
        lambda x: losses.cross_entropy(x, targets, weights, z_loss=z_loss, smoothing=smoothing)[0]
    )(logits)
    wide = np.asarray(logits, np.float64)
    for place in [(0, 0, 0), (0, 4, 7), (1, 1, int(targets[1, 1])), (2, 4, 3)]:
        nudge = np.zeros(wide.shape)
        nudge[place] = 1e-5
        slope = (exact(wide + nudge) - exact(wide - nudge)) / 2e-5
        np.testing.assert_allclose(ours[place], slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shift", [-50.0, 1000.0])
def test_a_shift_of_all_logits_changes_no_nats(shift):
    logits, targets, _ = case()
    shifted = losses.token_nats(logits + shift, targets)
    np.testing.assert_allclose(shifted, losses.token_nats(logits, targets), atol=2e-4)


def test_equal_logits_cost_ln_v_each():
    _, targets, weights = case()
    total, weight = losses.cross_entropy(jnp.zeros((ROWS, LENGTH, VOCAB)), targets, weights)
    np.testing.assert_allclose(total / weight, np.log(VOCAB), rtol=1e-6)


def test_bfloat16_logits_are_summed_in_float32():
    logits, targets, weights = case()
    rounded = logits.astype(jnp.bfloat16)
    total, _ = losses.cross_entropy(rounded, targets, weights, z_loss=0.1, smoothing=0.1)
    wide = rounded.astype(jnp.float32)
    assert total == losses.cross_entropy(wide, targets, weights, z_loss=0.1, smoothing=0.1)[0]
    np.testing.assert_array_equal(
        losses.token_nats(rounded, targets), losses.token_nats(wide, targets)
    )


# Padding and parts. --------------------------------------------------------------------------

LOSSES = {
    "cross_entropy": lambda a, b, t, w: losses.cross_entropy(a, t, w, z_loss=0.1, smoothing=0.1),
    "forward_kl": lambda a, b, t, w: losses.forward_kl(a, b, w, temperature=2.0),
    "reverse_kl": lambda a, b, t, w: losses.reverse_kl(a, b, w, temperature=2.0),
    "jsd": lambda a, b, t, w: losses.jsd(a, b, w, beta=0.3, temperature=2.0),
    "logit_mse": lambda a, b, t, w: losses.logit_mse(a, b, w),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


@every_loss
def test_padding_never_counts(name):
    (student, targets, weights), (teacher, _, _) = case(0), case(1)
    real = np.asarray(weights) > 0
    spoil = lambda x: jnp.where(real[..., None], x, 77.0 * jnp.arange(VOCAB))
    spoilt = LOSSES[name](spoil(student), spoil(teacher), jnp.where(real, targets, 3), weights)
    np.testing.assert_array_equal(spoilt, LOSSES[name](student, teacher, targets, weights))
    grad = jax.grad(lambda x: LOSSES[name](x, teacher, targets, weights)[0])(student)
    assert not np.asarray(grad)[~real].any() and np.asarray(grad)[real].any(-1).all()


@every_loss
def test_the_sum_over_parts_is_the_whole(name):
    (student, targets, weights), (teacher, _, _) = case(0), case(1)
    parts, whole = parts_and_whole(LOSSES[name], student, teacher, targets, weights)
    np.testing.assert_allclose(parts, whole, rtol=1e-6)


@every_loss
def test_a_batch_of_padding_is_a_zero_and_not_a_nan(name):
    (student, targets, weights), (teacher, _, _) = case(0), case(1)
    assert LOSSES[name](student, teacher, targets, 0 * weights) == (0, 0)
