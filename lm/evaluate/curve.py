"""Plot the scores of a run's checkpoints over the updates."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from typing import NamedTuple

from lm import storage
from lm.checkpoints import retention

LOWER_IS_BETTER = (*retention.LOWER_IS_BETTER, "perplexity")
COLUMNS = 3  # of panels
WIDTH, HEIGHT = 3.6, 2.6  # of a panel, in inches


class Point(NamedTuple):
    """A score of a checkpoint, with its interval."""

    step: int
    value: float
    low: float
    high: float


def series(rows: Sequence[dict]) -> dict[str, list[Point]]:
    """Return the points of each score that has an interval, by "score" or "task/score".

    rows: of evaluate.jsonl, sorted by step.
    """
    points: dict[str, list[Point]] = {}
    for row in rows:
        tables = {"": row} | {f"{name}/": scores for name, scores in row.get("tasks", {}).items()}
        for prefix, scores in tables.items():
            for name, interval in scores["intervals"].items():
                point = Point(row["step"], scores[name], *interval)
                points.setdefault(prefix + name, []).append(point)
    return points


def best(name: str, points: Sequence[Point]) -> Point:
    """Return the point with the best value, the earliest if several are equal."""
    sign = 1 if name.rpartition("/")[2] in LOWER_IS_BETTER else -1
    return min(points, key=lambda point: sign * point.value)


def draw(rows: Sequence[dict], path: str | os.PathLike, title: str) -> None:
    """Write a PNG with a panel for each score: values, intervals (a band), the best value (a star).

    A dashed line shows the lead baseline of a score. rows: as in series.
    """
    from matplotlib import figure

    points_by_score = series(rows)
    panels = [name for name in points_by_score if not name.rpartition("/")[2].startswith("lead_")]
    num_rows, num_columns = math.ceil(len(panels) / COLUMNS), min(COLUMNS, len(panels))
    size = (WIDTH * num_columns, HEIGHT * num_rows)
    canvas = figure.Figure(figsize=size, layout="constrained")
    canvas.suptitle(title)
    for number, name in enumerate(panels, 1):
        axes, points = canvas.add_subplot(num_rows, num_columns, number), points_by_score[name]
        steps, values, lows, highs = zip(*points, strict=True)
        axes.fill_between(steps, lows, highs, alpha=0.2, linewidth=0)
        axes.plot(steps, values, "o-", markersize=3, linewidth=1.4)
        peak = best(name, points)
        axes.plot(peak.step, peak.value, "*", markersize=11)
        axes.set_title(f"{name}: best {peak.value:.4g} at {peak.step}", fontsize=9)
        task, slash, score = name.rpartition("/")
        for point in points_by_score.get(f"{task}{slash}lead_{score}", ())[-1:]:
            axes.axhline(point.value, linestyle="--", linewidth=1)
        axes.set_xlabel("updates", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", alpha=0.2)
    file = io.BytesIO()
    canvas.savefig(file, format="png", dpi=120, metadata={"Software": None})
    storage.write_atomic(path, file.getvalue())
