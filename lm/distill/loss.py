"""The loss of a student: the weighted sum of the terms of teacher.loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lm import batch, losses, steps, transformer
from lm.distill import features, on_policy
from lm.distill.terms import INSIDE, TERMS, Term, shared_temperature

Array = jax.Array


def make_distillation_loss(
    model: transformer.Transformer,
    config: steps.LossConfig,
    text_bytes: Array,
    teacher_model: transformer.Transformer,
    terms: tuple[Term, ...],
) -> steps.Loss:
    """The weighted sum of the terms, as (total, sums).

    The teacher runs without dropout or gradient; its parameters are the loss's `teacher` argument.
    If that is None, the batch's teacher_top_k of a cache takes its place; without either, as in
    evaluation, the loss is the cross-entropy. In addition to steps.token_sums, the sums have
    "teacher/x" of each term x, unweighted, its weight "teacher/x/weight", and "labelled": the
    number of targets that the student did not write itself, which alone count as labels.
    Source: Hinton et al. 2015, arXiv:1503.02531.
    """
    language_loss = steps.make_language_loss(model, config, text_bytes)
    with_features = features.needs_features(terms)

    def loss(params, examples, key=None, teacher=None, progress=None):
        if teacher is None and examples.teacher_top_k is None:
            return language_loss(params, examples, key)
        logits, student = features.forward(model, params, examples, key, with_features)
        if teacher is None:
            temperature = shared_temperature(terms)
            pair = losses.top_k_and_rest(logits, examples.teacher_top_k, temperature)
        else:
            fixed = jax.lax.stop_gradient(teacher)
            teacher_logits, teacher_features = features.forward(
                teacher_model, fixed, examples, None, with_features
            )
            pair = logits, teacher_logits
        total, sums = 0.0, {"labelled": jnp.sum(batch.label_weights(examples))}
        for term in terms:
            if term.name in INSIDE:
                projections = params.get(features.PROJECTIONS)
                value, weight = features.compare(
                    term, student, teacher_features, examples, projections
                )
            else:
                value, weight = _logit_term(term, examples, logits, *pair, config)
            total += term.weight_at(progress) * value
            sums |= {f"teacher/{term.name}": value, f"teacher/{term.name}/weight": weight}
        return total, {"loss": total} | sums | steps.token_sums(logits, examples, text_bytes)

    return loss


def _logit_term(
    term: Term,
    examples: batch.Batch,
    logits: Array,
    student: Array,
    teacher: Array,
    config: steps.LossConfig,
) -> tuple[Array, Array]:
    """A term of logits as (total, weight).

    logits: the student's [B, T, V]. student, teacher: logits of the same outcomes, [B, T, V], or
    [B, T, k + 1] with a cached teacher.
    """
    labels, weights = batch.label_weights(examples), batch.loss_weights(examples)
    if term.name == "labels":
        options = {"z_loss": config.z_loss, "smoothing": config.label_smoothing}
        return losses.cross_entropy(logits, examples.targets, labels, **options)
    if term.name == "policy":  # for the student's own answers
        return on_policy.policy_gradient(student, teacher, examples.targets, weights - labels)
    names, divergence, _ = TERMS[term.name]
    if divergence is None:
        raise ValueError(f"teacher.loss.{term.name} has no divergence; give its TermKind one.")
    options = {name: getattr(term, name) for name in names}
    return divergence(student, teacher, weights, **options)
