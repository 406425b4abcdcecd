"""What training holds beside what the run keeps: projections to the teacher's width."""

from __future__ import annotations

import jax

from lm import distill
from lm.distill import features
from lm.runs import checks
from lm.runs.schema import Run


def projections(run: Run) -> dict:
    """The projections that a student's hidden states need, as shapes; {} where none are.

    Raises ValueError where teacher.loss compares layers that cannot be, and for projections beside
    LoRA, which would leave them as they are.
    """
    terms = distill.parse(run.config["teacher"]["loss"])
    if run.config["stage"] != "distill" or not features.wanted(terms):
        return {}
    theirs = checks.read_run(checks.teacher_source(run)[0]).model
    wanted = features.shapes(terms, run.model, theirs)
    if wanted and run.lora.rank:
        raise ValueError(
            f"lora.rank={run.lora.rank} trains no projections, which teacher.loss hidden needs "
            f"between other widths than the teacher's; use relations, or lora.rank=0."
        )
    return wanted


def trained_shapes(run: Run) -> dict:
    """The parameters that training holds, as shapes: those that the run keeps, and projections."""
    beside = projections(run)
    return run.shapes | ({features.PROJECTIONS: beside} if beside else {})


def with_projections(run: Run, params: dict | None, random, key: jax.Array) -> dict | None:
    """Parameters to start from with fresh projections beside them; unchanged where none are needed.

    params: the model's, or None for random ones, which `random`, () -> parameters, then makes.
    """
    wanted = projections(run)
    if not wanted:
        return params
    params = random() if params is None else params
    return params | {features.PROJECTIONS: features.first_projections(wanted, key)}
