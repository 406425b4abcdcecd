"""The scores of a run's checkpoints over its updates, as a picture."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import NamedTuple

from lm import storage
from lm.checkpoints import retention

LOWER = (*retention.LOWER_IS_BETTER, "perplexity")  # is better; of all other scores higher is
ACROSS = 3  # panels side by side
WIDTH, HEIGHT = 3.6, 2.6  # of a panel, in inches


class Point(NamedTuple):
    """A score of a checkpoint, and the ends of its interval."""

    step: int
    value: float
    low: float
    high: float


def series(rows: Sequence[dict]) -> dict[str, list[Point]]:
    """The points of each score that has an interval, by its name; of several tasks "task/score".

    rows: as evaluate writes them, by step.
    """
    found: dict[str, list[Point]] = {}
    for row in rows:
        scored = {"": row} | {f"{name}/": part for name, part in row.get("tasks", {}).items()}
        for prefix, part in scored.items():
            for name, ends in part["intervals"].items():
                point = Point(row["step"], part[name], *ends)
                found.setdefault(prefix + name, []).append(point)
    return found


def best(name: str, points: Sequence[Point]) -> Point:
    """The point with the best value of this score, of equal ones the earliest."""
    sign = 1 if name.rpartition("/")[2] in LOWER else -1
    return min(points, key=lambda point: sign * point.value)


def draw(rows: Sequence[dict], path, title: str) -> None:
    """Write a PNG with a panel a score: its values, their intervals as a band, the best marked.

    A lead baseline is the dashed line in the panel of its score. rows: as of series.
    """
    from matplotlib import figure

    found = series(rows)
    panels = [name for name in found if not name.rpartition("/")[2].startswith("lead_")]
    down = math.ceil(len(panels) / ACROSS)
    size = (WIDTH * min(ACROSS, len(panels)), HEIGHT * down)
    canvas = figure.Figure(figsize=size, layout="constrained")
    canvas.suptitle(title)
    for place, name in enumerate(panels, 1):
        axes, points = canvas.add_subplot(down, min(ACROSS, len(panels)), place), found[name]
        steps, values, lows, highs = zip(*points, strict=True)
        axes.fill_between(steps, lows, highs, alpha=0.2, linewidth=0)
        axes.plot(steps, values, "o-", markersize=3, linewidth=1.4)
        top = best(name, points)
        axes.plot(top.step, top.value, "*", markersize=11)
        axes.set_title(f"{name}: best {top.value:.4g} at {top.step}", fontsize=9)
        task, slash, score = name.rpartition("/")
        for point in found.get(f"{task}{slash}lead_{score}", ())[-1:]:
            axes.axhline(point.value, linestyle="--", linewidth=1)
        axes.set_xlabel("updates", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", alpha=0.2)
    drawing = io.BytesIO()
    canvas.savefig(drawing, format="png", dpi=120, metadata={"Software": None})
    storage.write_atomic(path, drawing.getvalue())
