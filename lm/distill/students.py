"""Where a student starts from."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lm import choose, origin, transformer


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


def even(teacher, teacher_config, config):
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


STUDENTS = {"even": even, "random": random_student}


def init_student(name: str, teacher, teacher_config, config: transformer.ModelConfig):
    """The student's first parameters by the word `name`, or None for random ones.

    Raises ValueError as check_student does.
    """
    check_student(name, teacher_config, config)
    return STUDENTS[name](teacher, teacher_config, config)
