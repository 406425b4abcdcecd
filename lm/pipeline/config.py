"""Which tasks make a batch, at which rates and of which shape."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from lm import lookup, objectives, shards, tasks

PACKINGS = {"none": "a row is one pair", "first_fit": "a row is as many pairs as fit"}
MOST = 1_000_000  # times that a task may be drawn as often as another


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which records make a batch of which shape; keys and units as in configs/base.py.

    Raises ValueError for what is impossible or has no use.
    """

    task: str = "pydocs"
    mixture: tuple = ()
    tfds_dir: str = ""
    shards_dir: str = ""
    train_split: str = "train"
    heldout_split: str = "validation"
    input_length: int = 512
    target_length: int = 128
    batch_size: int = 128
    max_examples_per_task: int = 0
    mixing_temperature: float = 1.0
    packing: str = "none"
    max_bad_records: int = 0
    num_workers: int = 0
    custom_tasks: Mapping = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self):
        for name, spec in self.custom_tasks.items():
            tasks.task_from_config(name, spec)
        pairs = tasks.check_mixture(self.mixture, self.custom_tasks)
        object.__setattr__(self, "mixture", pairs)
        mixed = self.task_rates
        lookup.lookup(PACKINGS, self.packing, "data.packing")
        least = dict(input_length=8, target_length=2, batch_size=1, num_workers=0)
        least |= dict(max_examples_per_task=0, max_bad_records=0)
        lookup.check_bounds(self, "data", {field: (low, None) for field, low in least.items()})
        if None not in mixed.values():
            mixing_rates((), list(mixed.values()))
        if not 0 < self.mixing_temperature < math.inf:
            raise ValueError(
                f"data.mixing_temperature={self.mixing_temperature} is not a finite number "
                f"above 0; "
                f"use 1.0 for rates proportional to the numbers of examples, 2.0 to favour small "
                f"tasks."
            )
        if self.packing != "none" and not any(self.get_task(name).has_inputs for name in mixed):
            raise ValueError(
                f"data.packing={self.packing!r} has no effect on {', '.join(mixed)}: running text "
                f"fills its rows without padding; use none."
            )
        for key, value, default in (
            ("max_examples_per_task", self.max_examples_per_task, 0),
            ("mixing_temperature", self.mixing_temperature, 1.0),
        ):
            if value != default and (len(mixed) == 1 or None not in mixed.values()):
                cause = "one task alone" if len(mixed) == 1 else "fixed rates"
                raise ValueError(
                    f"data.{key}={value} has no effect with {cause} ({', '.join(mixed)}); use "
                    f"{default}, or a data.mixture of several tasks with the rate None."
                )

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks of the mixture, in order."""
        return tuple(self.task_rates)

    @property
    def task_rates(self) -> dict[str, float | None]:
        """The tasks, each with its fixed rate or None: those of the mixture, or else the task."""
        if not self.mixture:
            self.get_task(self.task)
        return dict(self.mixture or ((self.task, None),))

    def get_task(self, name: str) -> tasks.Task:
        """The task of this name: the user's own, built in, or a finished corpus."""
        return tasks.get_task(name, self.custom_tasks)

    def reading(self, name: str, split: str) -> tuple[tasks.Task, str]:
        """The task and split to read a task's records by; of a file of answers, its rows."""
        return tasks.with_teacher_answers(name, self.get_task(name), split)

    def form(self, name: str) -> shards.PairLengths | None:
        """What a task's pairs are cut to; None for running text, which is stored uncut."""
        if self.get_task(name).has_inputs:
            return shards.PairLengths(self.input_length, self.target_length)
        return None

    def lengths(self, objective: objectives.ObjectiveConfig) -> tuple[int, int]:
        """Columns of a batch's inputs and targets, in tokens: what the longest of the tasks needs.

        Pairs are cut to input_length and target_length; running text takes what the objective says.
        """
        forms = [self.form(name) for name in self.names]
        needed = [(form.inputs, form.targets) for form in forms if form]
        if None in forms:
            text = objectives.lengths(objective, self.input_length)
            needed.append((text.inputs, text.targets))
        inputs, targets = zip(*needed, strict=True)
        return max(inputs), max(targets)


def mixing_rates(
    sizes: Sequence[int],
    fixed: Sequence[float | None] = (None,),
    *,
    limit: int = 0,
    temperature: float = 1.0,
) -> list[int]:
    """How often each task of a mixture is drawn, in hundredths of the rarest: a list of int.

    sizes: rows of each task. fixed: rates that are given, or None each. Without: proportional to
    min(size, limit) ** (1 / temperature); limit 0 is none.
    Raises ValueError where the most frequent is drawn more than MOST times as often as the rarest.
    Source: Raffel et al. 2020, section 3.5.2, arXiv:1910.10683.
    """
    shares, power = list(fixed), 1.0
    if None in shares:
        shares, power = [min(size, limit or size) for size in sizes], 1 / temperature
    if (math.log(max(shares)) - math.log(min(shares))) * power > math.log(MOST):
        raise ValueError(
            f"data.mixture draws one task more than {MOST:,} times as often as another; use rates "
            f"nearer to one another, a data.max_examples_per_task or a higher "
            f"data.mixing_temperature."
        )
    return [round(100 * (share / min(shares)) ** power) for share in shares]
