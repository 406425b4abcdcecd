"""Laws of divergences between student and teacher: equal to references, limits, identities, and
bounds with a top-k cache.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import torch

from lm import batch, losses

ROWS, LENGTH, VOCAB = 3, 5, 11
WEIGHTS = jnp.asarray(np.arange(LENGTH) < np.array([[5], [2], [3]]), jnp.float32)
TEMPERATURES = [0.5, 1.0, 2.0, 7.0]

DIVERGENCES = {
    "forward_kl": losses.forward_kl,
    "reverse_kl": losses.reverse_kl,
    "jsd 0.1": functools.partial(losses.jsd, beta=0.1),
    "jsd 0.5": functools.partial(losses.jsd, beta=0.5),
    "jsd 0.9": functools.partial(losses.jsd, beta=0.9),
}
every_divergence = pytest.mark.parametrize("name", DIVERGENCES)
every_temperature = pytest.mark.parametrize("temperature", TEMPERATURES)


def draw(seed, scale=2.0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(scale * rng.normal(size=(ROWS, LENGTH, VOCAB)), jnp.float32)


STUDENT, TEACHER = draw(0), draw(1)


# References. ---------------------------------------------------------------------------------


def by_torch(name, temperature):
    """(total, its gradient for the student) by torch, as TRL writes the generalized JSD."""
    student = torch.tensor(np.asarray(STUDENT), dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor(np.asarray(TEACHER), dtype=torch.float64)
    log_q = torch.log_softmax(student / temperature, -1)
    log_p = torch.log_softmax(teacher / temperature, -1)
    kl = lambda target, given: torch.nn.functional.kl_div(
        given, target, reduction="none", log_target=True
    )
    if name == "forward_kl":
        each = kl(log_p, log_q)
    elif name == "reverse_kl":
        each = kl(log_q, log_p)
    else:
        beta = torch.tensor(float(name.split()[1]), dtype=torch.float64)
        both = torch.stack([log_q + torch.log1p(-beta), log_p + torch.log(beta)])
        mixture = torch.logsumexp(both, dim=0)
        each = beta * kl(log_p, mixture) + (1 - beta) * kl(log_q, mixture)
    weights = torch.tensor(np.asarray(WEIGHTS, np.float64))
    total = temperature**2 * (each.sum(-1) * weights).sum()
    total.backward()
    return total.item(), student.grad.numpy()


@every_divergence
@every_temperature
def test_a_divergence_and_its_gradient_equal_torch(name, temperature):
    loss = lambda x: DIVERGENCES[name](x, TEACHER, WEIGHTS, temperature=temperature)
    (total, weight), grad = loss(STUDENT), jax.grad(lambda x: loss(x)[0])(STUDENT)
    theirs, slope = by_torch(name, temperature)
    np.testing.assert_allclose(total, theirs, rtol=1e-5)
    np.testing.assert_allclose(grad, slope, atol=2e-6)
    assert weight == 10


@every_temperature
def test_forward_kl_is_scipys_relative_entropy_of_softened_distributions(temperature):
    soften = lambda x: scipy.special.softmax(np.asarray(x, np.float64) / temperature, axis=-1)
    each = scipy.special.rel_entr(soften(TEACHER), soften(STUDENT)).sum(-1)
    total, _ = losses.forward_kl(STUDENT, TEACHER, WEIGHTS, temperature=temperature)
    np.testing.assert_allclose(total, temperature**2 * np.sum(each * WEIGHTS), rtol=1e-5)


def test_logit_mse_equals_torch_over_weighted_targets():
    real = np.asarray(WEIGHTS) > 0
    chosen = [torch.tensor(np.asarray(x)[real]) for x in (STUDENT, TEACHER)]
    total, weight = losses.logit_mse(STUDENT, TEACHER, WEIGHTS)
    np.testing.assert_allclose(total / weight, torch.nn.functional.mse_loss(*chosen), rtol=1e-5)


# Identities and limits. ----------------------------------------------------------------------


@every_divergence
@every_temperature
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(name, temperature):
    loss = lambda x: DIVERGENCES[name](x, TEACHER, WEIGHTS, temperature=temperature)[0]
    total, grad = jax.value_and_grad(loss)(TEACHER)
    np.testing.assert_allclose(total, 0, atol=2e-5)
    np.testing.assert_allclose(grad, 0, atol=2e-6)
    assert loss(STUDENT) > 0.1


@every_divergence
def test_a_divergence_is_invariant_to_a_shift_of_all_logits(name):
    loss = DIVERGENCES[name]
    shifted = loss(STUDENT + 3, TEACHER - 20, WEIGHTS)[0]
    np.testing.assert_allclose(shifted, loss(STUDENT, TEACHER, WEIGHTS)[0], rtol=1e-5)


@every_divergence
def test_logits_of_thousands_have_a_finite_divergence_and_gradient(name):
    loss = lambda x: DIVERGENCES[name](x, 1e4 * TEACHER, WEIGHTS)[0]
    total, grad = jax.value_and_grad(loss)(1e4 * STUDENT)
    assert np.isfinite(total) and np.isfinite(grad).all()


def test_a_one_hot_teacher_gives_the_cross_entropy():
    targets = jnp.asarray(np.random.default_rng(2).integers(0, VOCAB, (ROWS, LENGTH)))
    taught, _ = losses.forward_kl(STUDENT, 1e4 * jax.nn.one_hot(targets, VOCAB), WEIGHTS)
    label, _ = losses.cross_entropy(STUDENT, targets, WEIGHTS)
    np.testing.assert_allclose(taught, label, rtol=1e-6)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_jsd_tends_to_each_kl_as_beta_goes_to_its_end(name):
    """Halving the distance of beta to its end halves the difference, so the limit is 0."""
    student, teacher = STUDENT / 4, TEACHER / 4
    whole = DIVERGENCES[name](student, teacher, WEIGHTS)[0]

    def far(part):
        beta = part if name == "forward_kl" else 1 - part
        return abs(losses.jsd(student, teacher, WEIGHTS, beta=beta)[0] / part - whole)

    assert far(0.01) < 0.05 * whole
    np.testing.assert_allclose(far(0.01) / far(0.02), 0.5, atol=0.05)


def test_jsd_is_symmetric_at_a_half_and_mirrored_elsewhere():
    for beta in (0.5, 0.2):
        there = losses.jsd(STUDENT, TEACHER, WEIGHTS, beta=beta)[0]
        back = losses.jsd(TEACHER, STUDENT, WEIGHTS, beta=1 - beta)[0]
        np.testing.assert_allclose(there, back, rtol=1e-5)
    assert abs(there / losses.jsd(TEACHER, STUDENT, WEIGHTS, beta=0.2)[0] - 1) > 0.01


def test_jsd_is_at_most_the_entropy_of_beta():
    far = 1e4 * jax.nn.one_hot(jnp.zeros((ROWS, LENGTH), int), VOCAB)
    other = 1e4 * jax.nn.one_hot(jnp.ones((ROWS, LENGTH), int), VOCAB)
    for beta in (0.1, 0.5):
        total, weight = losses.jsd(far, other, WEIGHTS, beta=beta)
        np.testing.assert_allclose(total / weight, scipy.special.entr([beta, 1 - beta]).sum(), 1e-5)


@pytest.mark.parametrize(
    "name, share", [("forward_kl", 1.0), ("reverse_kl", 1.0), ("jsd 0.1", 0.09)]
)
def test_the_gradient_keeps_its_scale_as_the_temperature_grows(name, share):
    """Times T^2 each tends to half the squared error of centred logits (Hinton, eq. 4), jsd to
    beta (1 - beta) of that, so the gradient tends to half of that of logit_mse.
    """
    loss = lambda x: DIVERGENCES[name](x, TEACHER, WEIGHTS, temperature=300.0)[0]
    centred = lambda x: x - x.mean(-1, keepdims=True)
    error = lambda x: losses.logit_mse(centred(x), centred(TEACHER), WEIGHTS)[0]
    limit = share * jax.grad(error)(STUDENT) / 2
    np.testing.assert_allclose(jax.grad(loss)(STUDENT), limit, atol=0.03 * np.abs(limit).max())


@every_divergence
def test_bfloat16_logits_are_summed_in_float32(name):
    rounded = [x.astype(jnp.bfloat16) for x in (STUDENT, TEACHER)]
    wide = [x.astype(jnp.float32) for x in rounded]
    found = DIVERGENCES[name](*rounded, WEIGHTS)
    assert found == DIVERGENCES[name](*wide, WEIGHTS) and found[0].dtype == jnp.float32


# A cached teacher. ---------------------------------------------------------------------------


def taught(teacher, k, temperature=1.0):
    """The top k of these logits at this temperature, computed in float64."""
    known = scipy.special.log_softmax(np.asarray(teacher, np.float64), axis=-1)
    ids = np.argsort(-known, axis=-1)
    ordered = np.take_along_axis(known, ids, -1)
    with np.errstate(divide="ignore"):
        rest = ordered[..., k:] / temperature
        tail = scipy.special.logsumexp(rest, axis=-1) if k < VOCAB else -np.inf
    tail = np.broadcast_to(tail, ordered.shape[:2])
    return batch.TeacherTopK(
        ids[..., :k].astype(np.int32), np.float32(ordered[..., :k]), np.float32(tail)
    )


def cached(name, k, temperature=1.0, student=STUDENT, teacher=TEACHER):
    pair = losses.top_k_and_rest(student, taught(teacher, k, temperature), temperature)
    return DIVERGENCES[name](*pair, WEIGHTS, temperature=temperature)[0]


@every_divergence
@every_temperature
def test_the_divergence_of_a_cache_grows_with_k_up_to_the_exact_one(name, temperature):
    whole = DIVERGENCES[name](STUDENT, TEACHER, WEIGHTS, temperature=temperature)[0]
    found = [cached(name, k, temperature) for k in (1, 2, 4, 8, 10, 11)]
    assert (np.diff(found) >= -1e-4 * whole).all() and 0 < found[0] < 0.95 * whole
    np.testing.assert_allclose(found[-1], whole, rtol=1e-5)


@every_temperature
@pytest.mark.parametrize("seed", range(20))
def test_the_divergence_of_a_cache_never_exceeds_the_exact_one(seed, temperature):
    """At every position, by the data-processing inequality."""
    pair = draw(2 * seed + 10, 1 + seed / 4), draw(2 * seed + 11, 1 + seed / 4)
    here = jnp.zeros((ROWS, LENGTH)).at[seed % ROWS, 0].set(1.0)
    told = losses.top_k_and_rest(pair[0], taught(pair[1], 2, temperature), temperature)
    for loss in DIVERGENCES.values():
        found, whole = (loss(*two, here, temperature=temperature)[0] for two in (told, pair))
        assert -1e-5 <= found <= whole + 1e-4 * whole


@every_temperature
@pytest.mark.parametrize("k", [1, 4, 8])
def test_the_error_of_a_cache_is_the_tail_mass_times_the_tails_divergence(k, temperature):
    """The chain rule of the Kullback-Leibler divergence."""
    soft = lambda x: scipy.special.softmax(np.asarray(x, np.float64) / temperature, -1)
    p, q = soft(TEACHER), soft(STUDENT)
    rest = np.argsort(-p, axis=-1)[..., k:]
    p, q = (np.take_along_axis(x, rest, -1) for x in (p, q))
    for name, one, other in (("forward_kl", p, q), ("reverse_kl", q, p)):
        mass = one.sum(-1, keepdims=True), other.sum(-1, keepdims=True)
        inside = scipy.special.rel_entr(one / mass[0], other / mass[1]).sum(-1)
        lacking = temperature**2 * np.sum(mass[0][..., 0] * inside * WEIGHTS)
        whole = DIVERGENCES[name](STUDENT, TEACHER, WEIGHTS, temperature=temperature)[0]
        found = whole - cached(name, k, temperature)
        np.testing.assert_allclose(found, lacking, rtol=1e-4, atol=1e-6 * float(whole))


@every_divergence
@every_temperature
@pytest.mark.parametrize("k", [VOCAB - 1, VOCAB])
def test_a_cache_of_all_ids_is_exact_at_any_temperature(name, temperature, k):
    """With k = V - 1 too: the tail is one id."""
    loss = lambda x: DIVERGENCES[name](x, TEACHER, WEIGHTS, temperature=temperature)[0]
    ours = lambda x: cached(name, k, temperature, x)
    np.testing.assert_allclose(ours(STUDENT), loss(STUDENT), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(ours)(STUDENT), jax.grad(loss)(STUDENT), atol=1e-5)


@every_divergence
@every_temperature
@pytest.mark.parametrize("k", [1, 4])
def test_a_student_equal_to_a_cached_teacher_has_no_loss_and_no_gradient(name, temperature, k):
    ours = lambda x: cached(name, k, temperature, x)
    total, grad = jax.value_and_grad(ours)(TEACHER)
    np.testing.assert_allclose(total, 0, atol=2e-5)
    np.testing.assert_allclose(grad, 0, atol=2e-6)


def test_an_empty_tail_and_padding_give_no_nan():
    some = taught(TEACHER, 4)
    empty = some._replace(tail=jnp.full((ROWS, LENGTH), -jnp.inf))
    nothing = batch.TeacherTopK(*(jnp.zeros_like(x) for x in some))
    for told in (empty, nothing):
        for loss in DIVERGENCES.values():
            ours = lambda x, told=told, loss=loss: loss(*losses.top_k_and_rest(x, told), WEIGHTS)[0]
            total, grad = jax.value_and_grad(ours)(STUDENT)
            assert np.isfinite(total) and np.isfinite(grad).all()


def test_the_gradient_outside_the_top_k_depends_on_the_tail_mass_only():
    """Permuting the student's tail changes nothing."""
    student = np.asarray(STUDENT).copy()
    rest = np.argsort(-np.asarray(TEACHER), axis=-1)[..., 4:]
    np.put_along_axis(student, rest, np.take_along_axis(student, rest[..., ::-1], -1), -1)
    for name in DIVERGENCES:
        np.testing.assert_allclose(cached(name, 4, 2.0, student), cached(name, 4, 2.0), rtol=1e-5)
