"""Trained parameters beside the model: projections of hidden states to the teacher's width."""

from __future__ import annotations

from collections.abc import Callable

import jax

from lm.distill import features
from lm.runs import checks
from lm.runs.schema import Run


def _projection_shapes(run: Run) -> dict:
    """Return the shapes of the projections that teacher.loss.hidden needs; {} for none."""
    terms = run.teacher.terms
    if run.stage != "distill" or not features.needs_features(terms):
        return {}
    teacher = checks.read_run(checks.teacher_source(run)[0]).model
    shapes = features.projection_shapes(terms, run.model, teacher)
    if shapes and run.lora.rank:
        raise ValueError(
            f"lora.rank={run.lora.rank} trains no projections, which teacher.loss.hidden needs for "
            f"a width that differs from the teacher's; use relations, or lora.rank=0."
        )
    return shapes


def trained_shapes(run: Run) -> dict:
    """Return the shapes of all trained parameters: the run's and the projections.

    Raises ValueError if teacher.loss compares incompatible layers, or needs projections with LoRA.
    """
    shapes = _projection_shapes(run)
    return run.shapes | ({features.PROJECTIONS: shapes} if shapes else {})


def with_projections(
    run: Run, params: dict | None, init: Callable[[], dict], key: jax.Array
) -> dict | None:
    """Add new projections to the initial parameters, if the run needs any.

    params: the model's, or None for random ones, which are then made by `init`.
    """
    shapes = _projection_shapes(run)
    if not shapes:
        return params
    params = init() if params is None else params
    return params | {features.PROJECTIONS: features.init_projections(shapes, key)}
