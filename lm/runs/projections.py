"""What training holds beside the model: projections of hidden states to the teacher's width."""

from __future__ import annotations

from collections.abc import Callable

import jax

from lm.distill import features
from lm.runs import checks
from lm.runs.schema import Run


def projection_shapes(run: Run) -> dict:
    """Return the projections that a student's hidden states need, as shapes; {} for none.

    Raises ValueError if teacher.loss compares layers that cannot be compared, and for projections
    with LoRA, which would not train them.
    """
    terms = run.teacher.terms
    if run.stage != "distill" or not features.wanted(terms):
        return {}
    teacher = checks.read_run(checks.teacher_source(run)[0]).model
    shapes = features.shapes(terms, run.model, teacher)
    if shapes and run.lora.rank:
        raise ValueError(
            f"lora.rank={run.lora.rank} trains no projections, which teacher.loss.hidden needs "
            f"between other widths than the teacher's; use relations, or lora.rank=0."
        )
    return shapes


def trained_shapes(run: Run) -> dict:
    """Return the parameters that training holds, as shapes: the run's, and projections."""
    shapes = projection_shapes(run)
    return run.shapes | ({features.PROJECTIONS: shapes} if shapes else {})


def with_projections(
    run: Run, params: dict | None, init: Callable[[], dict], key: jax.Array
) -> dict | None:
    """Add fresh projections to the parameters to start from, if the run has any.

    params: the model's; None for random ones, which `init` then makes.
    """
    shapes = projection_shapes(run)
    if not shapes:
        return params
    params = init() if params is None else params
    return params | {features.PROJECTIONS: features.first_projections(shapes, key)}
