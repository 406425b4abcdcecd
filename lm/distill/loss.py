"""The loss of a student: its terms added up."""

from __future__ import annotations

import jax

from lm import batch, losses, steps
from lm.distill.terms import Term

Array = jax.Array


def make_distillation_loss(
    model, config: steps.LossConfig, text_bytes: Array, teacher_model, terms: tuple[Term, ...]
) -> steps.Loss:
    """The weighted sum of the terms, as (total, sums).

    The teacher runs without dropout or gradient; its parameters are the loss's `teacher` argument.
    Evaluated without a teacher (None), the loss is the cross-entropy alone.
    Source: Hinton et al. 2015, arXiv:1503.02531.
    """
    language_loss = steps.make_language_loss(model, config, text_bytes)

    def loss(params, examples, key=None, teacher=None, progress=None):
        if teacher is None:
            return language_loss(params, examples, key)
        logits = steps.predict(model, params, examples, key)
        taught = jax.lax.stop_gradient(steps.predict(teacher_model, teacher, examples, None))
        weights, total, shown = batch.loss_weights(examples), 0.0, {}
        for term in terms:
            if term.name == "labels":
                part, _ = losses.cross_entropy(
                    logits,
                    examples.targets,
                    weights,
                    z_loss=config.z_loss,
                    smoothing=config.smoothing,
                )
            else:
                part, _ = losses.forward_kl(logits, taught, weights, temperature=term.temperature)
            shown[f"teacher/{term.name}"] = part
            total += term.weight_at(progress) * part
        return total, {"loss": total} | shown | steps.measure(logits, examples, text_bytes)

    return loss
