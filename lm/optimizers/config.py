"""The optimizer's section of a config, and what of it contradicts itself."""

from __future__ import annotations

import dataclasses
import math

from lm import lookup
from lm.optimizers import param_groups, run_length, schedules, transforms


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters follow their gradients; keys and units as in configs/base.py.

    Raises ValueError for a value out of bounds, and for keys that contradict each other.
    """

    name: str = "adafactor"
    learning_rate: float = 1e-2
    schedule: str = "rsqrt"
    warmup: int = 10_000
    warmup_duration: str = ""
    cooldown: int = 0
    cooldown_duration: str = ""
    final_learning_rate_fraction: float = 0.0
    grad_clip_norm: float = 1.0
    weight_decay: float = 0.0
    weight_decay_multipliers: str = "(scale|bias)$=0"
    learning_rate_multipliers: str = ""
    beta1: float = 0.9
    beta2: float = 0.98
    ema_decay: float = 0.0

    def __post_init__(self):
        lookup.lookup(transforms.OPTIMIZERS, self.name, "optimizer.name")
        lookup.lookup(schedules.SCHEDULES, self.schedule, "optimizer.schedule")
        bounds = {
            "learning_rate": (0, 1e3),
            "final_learning_rate_fraction": (0, 1),
            "weight_decay": (0, 1),
            "grad_clip_norm": (0, 1e9),
        }
        # Not 1: Adam divides by 1 - beta^t.
        bounds |= {"beta1": (0, 0.9999), "beta2": (0, 0.99999), "ema_decay": (0, 0.99999)}
        bounds |= {"warmup": (0, run_length.MOST), "cooldown": (0, run_length.MOST)}
        for field, (low, high) in bounds.items():
            value = getattr(self, field)
            if not (math.isfinite(value) and low <= value <= high):
                raise ValueError(
                    f"optimizer.{field}={value} is out of bounds; use {low} to {high:g}."
                )
        for field in ("warmup", "cooldown"):
            text, number = getattr(self, f"{field}_duration"), getattr(self, field)
            if text:
                run_length.parse(text)
            if text and number:
                raise ValueError(
                    f"optimizer.{field}={number} and optimizer.{field}_duration={text!r} both say "
                    f"how long; set {field}=0 or leave {field}_duration empty."
                )
        param_groups.parse(self.learning_rate_multipliers, "learning_rate_multipliers")
        param_groups.parse(self.weight_decay_multipliers, "weight_decay_multipliers")
        self._check_uses()

    def _check_uses(self) -> None:
        """Nothing is asked for that another key leaves without use."""
        cools = self.cooldown or self.cooldown_duration
        if self.schedule == "wsd" and not cools:
            raise ValueError(
                "optimizer.schedule='wsd' has no optimizer.cooldown, so its rate would never fall; "
                "set cooldown or cooldown_duration, or use schedule='constant'."
            )
        schedule, name = f"schedule={self.schedule!r}", f"name={self.name!r}"
        useless = {
            "cooldown": (self.schedule != "wsd", schedule, "schedule='wsd'"),
            "cooldown_duration": (self.schedule != "wsd", schedule, "schedule='wsd'"),
            "final_learning_rate_fraction": (
                self.schedule not in schedules.FALLING,
                schedule,
                "schedule='linear', 'cosine' or 'wsd'",
            ),
            "weight_decay_multipliers": (
                not self.weight_decay,
                "weight_decay=0.0",
                "a weight_decay",
            ),
            "beta1": (self.name == "adafactor", name, "another optimizer"),
            "beta2": (self.name == "adafactor", name, "another optimizer"),
        }
        for field, (no_use, where, cure) in useless.items():
            value, default = getattr(self, field), getattr(OptimizerConfig, field)
            if no_use and value != default:
                raise ValueError(
                    f"optimizer.{field}={value!r} has no use with optimizer.{where}; leave it at "
                    f"{default!r}, or use {cure}."
                )

    def span(self, steps: int, pace: run_length.RunLength) -> schedules.ScheduleConfig:
        """The rate's course over a run of so many updates, its durations in updates.

        Raises ValueError where wsd's warm-up and fall take more updates than there are.
        """
        length = {
            field: run_length.num_updates(text, steps, pace) if text else getattr(self, field)
            for field in ("warmup", "cooldown")
            for text in [getattr(self, f"{field}_duration")]
        }
        if self.schedule == "wsd" and sum(length.values()) > steps:
            raise ValueError(
                f"optimizer.warmup of {length['warmup']} updates and optimizer.cooldown of "
                f"{length['cooldown']} are more than the {steps} of the run; shorten one, or "
                f"raise steps to {sum(length.values())}."
            )
        return schedules.ScheduleConfig(
            self.learning_rate, self.final_learning_rate_fraction, steps=steps, **length
        )
