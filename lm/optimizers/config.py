"""OptimizerConfig: the section optimizer of a config."""

from __future__ import annotations

import dataclasses

from lm import lookup
from lm.optimizers import param_groups, run_length, schedules, transforms
from lm.optimizers.run_length import LengthConfig


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, its schedule and parameter groups; keys and units as in configs/base.py.

    Raises ValueError for a value out of bounds, and for keys that contradict each other.
    """

    name: str = "adafactor"
    learning_rate: float = 1e-2
    schedule: str = "rsqrt"
    warmup: LengthConfig = LengthConfig(steps=10_000)
    cooldown: LengthConfig = LengthConfig()
    final_learning_rate_fraction: float = 0.0
    grad_clip_norm: float = 1.0
    weight_decay: float = 0.0
    weight_decay_multipliers: param_groups.Rules = (("(scale|bias)$", 0.0),)
    learning_rate_multipliers: param_groups.Rules = ()
    beta1: float = 0.9
    beta2: float = 0.98
    ema_decay: float = 0.0

    def __post_init__(self):
        lookup.lookup(transforms.OPTIMIZERS, self.name, "optimizer.name")
        lookup.lookup(schedules.SCHEDULES, self.schedule, "optimizer.schedule")
        bounds = {"learning_rate": (0, 1e3), "final_learning_rate_fraction": (0, 1)}
        bounds |= {"weight_decay": (0, 1), "grad_clip_norm": (0, 1e9)}
        # Not 1: Adam divides by 1 - beta^t.
        bounds |= {"beta1": (0, 0.9999), "beta2": (0, 0.99999), "ema_decay": (0, 0.99999)}
        lookup.check_bounds(self, "optimizer", bounds)
        for field in ("warmup", "cooldown"):
            path = f"optimizer.{field}"
            try:
                length = lookup.as_section(LengthConfig, getattr(self, field), path)
            except ValueError as error:
                prefix = "" if path in str(error) else f"{path}."
                raise ValueError(f"{prefix}{error}") from None
            object.__setattr__(self, field, length)
        for field in param_groups.FIELDS:
            rules = param_groups.check_rules(getattr(self, field), field)
            object.__setattr__(self, field, rules)
        self._check_unused()

    def _check_unused(self) -> None:
        """Raise ValueError for a key that another key leaves without effect."""
        if self.schedule == "wsd" and not self.cooldown.units:
            raise ValueError(
                "optimizer.schedule='wsd' has no optimizer.cooldown, so its rate would never fall; "
                "set one of its keys, or use schedule='constant'."
            )
        unused = {}  # field: (the key that leaves it without effect, the fix)
        if self.schedule != "wsd":
            unused["cooldown"] = ("schedule", "schedule='wsd'")
        if self.schedule not in schedules.DECAYING:
            unused["final_learning_rate_fraction"] = ("schedule", "another schedule")
        if not self.weight_decay:
            unused["weight_decay_multipliers"] = ("weight_decay", "a weight_decay above 0")
        if self.name == "adafactor":
            unused |= dict.fromkeys(("beta1", "beta2"), ("name", "another optimizer"))
        for field, (key, fix) in unused.items():
            if (value := getattr(self, field)) != getattr(OptimizerConfig, field):
                raise ValueError(
                    f"optimizer.{field}={value} has no effect with optimizer.{key}="
                    f"{getattr(self, key)!r}; remove it, or use {fix}."
                )

    def schedule_config(self, steps: int, length: run_length.RunLength) -> schedules.ScheduleConfig:
        """Return the schedule of a run of `steps` updates, with its lengths in updates.

        Raises ValueError if wsd's warm-up and cooldown exceed the run.
        """
        warmup = self.warmup.num_updates(length, steps)
        cooldown = self.cooldown.num_updates(length, steps)
        if self.schedule == "wsd" and warmup + cooldown > steps:
            raise ValueError(
                f"optimizer.warmup of {warmup} updates and optimizer.cooldown of {cooldown} are "
                f"more than the {steps} of the run; shorten one, or raise steps to "
                f"{warmup + cooldown}."
            )
        peak, final = self.learning_rate, self.final_learning_rate_fraction
        return schedules.ScheduleConfig(peak, final, warmup, cooldown, steps)
