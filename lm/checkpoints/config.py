"""The section checkpoint of a config."""

from __future__ import annotations

import dataclasses

from lm import lookup


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save checkpoints, and which to keep; keys as in configs/base.py."""

    every_steps: int = 1000
    max_to_keep: int = 2
    keep_period: int = 0
    best_metric: str = ""

    def __post_init__(self):
        bounds = {"every_steps": (1, None), "max_to_keep": (2, None), "keep_period": (0, None)}
        lookup.check_bounds(self, "checkpoint", bounds)
