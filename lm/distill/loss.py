"""The loss of a student: its terms added up."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm import batch, losses, steps
from lm.distill import features, on_policy
from lm.distill.terms import INSIDE, TERMS, Term, shared_temperature

Array = jax.Array


class ModelOutputs(NamedTuple):
    """What student and teacher say of the same targets.

    logits: the student's [B, T, V]. student, teacher: logits of the same outcomes, [B, T, V], or
    [B, T, k + 1] where the teacher is cached. inside: what features.compare takes after the term.
    """

    examples: batch.Batch
    logits: Array
    student: Array
    teacher: Array
    inside: tuple = ()


def make_distillation_loss(
    model, config: steps.LossConfig, text_bytes: Array, teacher_model, terms: tuple[Term, ...]
) -> steps.Loss:
    """The weighted sum of the terms, as (total, sums).

    The teacher runs without dropout or gradient; its parameters are the loss's `teacher` argument.
    Where that is None, what a cache says, the batch's `taught`, stands for it. With neither, as in
    evaluation, the loss is the cross-entropy alone. Beside what steps.token_sums counts, the sums
    have
    of each term x "teacher/x", unweighted, and "teacher/x/weight", what it counts; and "labelled",
    the weight of the targets that the student did not write itself, which alone count as labels.
    Source: Hinton et al. 2015, arXiv:1503.02531.
    """
    language_loss = steps.make_language_loss(model, config, text_bytes)
    wanted = features.wanted(terms)

    def said(params, examples, key, teacher) -> ModelOutputs:
        logits, ours = features.features(model, params, examples, key, wanted)
        if teacher is None:
            pair = losses.top_k_and_rest(logits, examples.teacher_top_k, shared_temperature(terms))
            return ModelOutputs(examples, logits, *pair)
        fixed = jax.lax.stop_gradient(teacher)
        taught, theirs = features.features(teacher_model, fixed, examples, None, wanted)
        inside = (ours, theirs, examples, params.get(features.PROJECTIONS)) if wanted else ()
        return ModelOutputs(examples, logits, logits, taught, inside)

    def loss(params, examples, key=None, teacher=None, progress=None):
        if teacher is None and examples.teacher_top_k is None:
            return language_loss(params, examples, key)
        heard = said(params, examples, key, teacher)
        total, shown = 0.0, {"labelled": jnp.sum(batch.label_weights(examples))}
        for term in terms:
            part, count = _part(term, heard, config)
            total += term.weight_at(progress) * part
            shown |= {f"teacher/{term.name}": part, f"teacher/{term.name}/weight": count}
        return total, {"loss": total} | shown | steps.token_sums(heard.logits, examples, text_bytes)

    return loss


def _part(term: Term, said: ModelOutputs, config: steps.LossConfig) -> tuple[Array, Array]:
    # The (total, weight) of one term.
    if term.name in INSIDE:
        return features.compare(term, *said.inside)
    if term.name == "labels":
        return losses.cross_entropy(
            said.logits,
            said.examples.targets,
            batch.label_weights(said.examples),
            z_loss=config.z_loss,
            smoothing=config.label_smoothing,
        )
    weights = batch.loss_weights(said.examples)
    if term.name == "policy":
        own = weights - batch.label_weights(said.examples)
        return on_policy.policy_gradient(said.student, said.teacher, said.examples.targets, own)
    names, divergence, _ = TERMS[term.name]
    options = {name: getattr(term, name) for name in names}
    return divergence(said.student, said.teacher, weights, **options)
