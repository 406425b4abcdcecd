"""Distillation: the teacher's loss, and where a student starts from."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lm import batch, choose, losses, origin, steps, transformer

Array = jax.Array


def make_distillation_loss(
    model, config: steps.LossConfig, text_bytes: Array, teacher_model
) -> steps.Loss:
    """(1 - a) * cross-entropy + a * T^2 * KL(teacher || student), as (total, sums).

    The teacher runs without dropout or gradient; its parameters are the loss's `teacher` argument.
    Evaluated without a teacher (None), the loss is the cross-entropy alone.
    Source: Hinton et al. 2015, arXiv:1503.02531.
    """
    language_loss = steps.make_language_loss(model, config, text_bytes)

    def loss(params, examples, key=None, teacher=None):
        if teacher is None:
            return language_loss(params, examples, key)
        logits = steps.predict(model, params, examples, key)
        taught = jax.lax.stop_gradient(steps.predict(teacher_model, teacher, examples, None))
        weights = batch.loss_weights(examples)
        hard, _ = losses.cross_entropy(
            logits, examples.targets, weights, z_loss=config.z_loss, smoothing=config.smoothing
        )
        soft, _ = losses.forward_kl(logits, taught, weights, temperature=config.temperature)
        total = (1 - config.teacher_weight) * hard + config.teacher_weight * soft
        return total, {"loss": total, "kl": soft} | steps.measure(logits, examples, text_bytes)

    return loss


def evenly(teacher_layers: int, student_layers: int) -> list[int]:
    """Which teacher layers a shallower student copies: first and last, the rest evenly between."""
    if student_layers == 1:
        return [0]
    last = teacher_layers - 1
    return [round(i * last / (student_layers - 1)) for i in range(student_layers)]


def check_student(init: str, teacher_config, config) -> None:
    """Raise ValueError where this student cannot learn from this teacher, or not start so."""
    choose.choose(STUDENTS, init, "teacher.init")
    origin.check_same(config, teacher_config, ("vocab_size",), "the teacher's")
    if init == "random":
        return
    origin.check_same(
        config, teacher_config, transformer.SHARED, "the teacher's", ", or teacher.init='random'"
    )
    for field in ("num_encoder_layers", "num_decoder_layers"):
        ours, theirs = getattr(config, field), getattr(teacher_config, field)
        if ours > theirs:
            raise ValueError(
                f"model.{field}={ours} is more than the teacher's {theirs}; use at most {theirs}, "
                f"or teacher.init='random'."
            )


def alternate_layers(teacher, teacher_config, config):
    """The student's first parameters: the teacher's, of its layers those chosen by `evenly`."""
    student = dict(teacher)
    for tower in teacher.keys() & {"encoder", "decoder"}:
        ours, theirs = (getattr(c, f"num_{tower}_layers") for c in (config, teacher_config))
        chosen = jnp.array(evenly(theirs, ours))
        picked = jax.tree.map(lambda leaf, chosen=chosen: leaf[chosen], teacher[tower]["layers"])
        student[tower] = dict(teacher[tower]) | {"layers": picked}
    return student


def random_student(teacher, teacher_config, config):
    """No parameters: the student starts at random."""
    return


STUDENTS = {"alternate_layers": alternate_layers, "random": random_student}


def init_student(name: str, teacher, teacher_config, config: transformer.ModelConfig):
    """The student's first parameters by the word `name`, or None for random ones.

    Raises ValueError as check_student does.
    """
    check_student(name, teacher_config, config)
    return STUDENTS[name](teacher, teacher_config, config)
