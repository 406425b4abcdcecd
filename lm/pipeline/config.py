"""The data section of a config: tasks, mixing rates and the shape of a batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from lm import lookup, objectives, shards, tasks

PACKINGS = {"none": "one pair per row", "first_fit": "as many pairs per row as fit"}
MAX_RATE_RATIO = 1_000_000  # of the most to the least frequent task


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data section; configs/base.py documents keys and units.

    Raises ValueError for values that are impossible or have no effect.
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
        rates = self.task_rates
        lookup.lookup(PACKINGS, self.packing, "data.packing")
        least = dict(input_length=8, target_length=2, batch_size=1, num_workers=0)
        least |= dict(max_examples_per_task=0, max_bad_records=0)
        lookup.check_bounds(self, "data", {field: (low, None) for field, low in least.items()})
        if None not in rates.values():
            mixing_rates((), list(rates.values()))
        if not 0 < self.mixing_temperature < math.inf:
            raise ValueError(
                f"data.mixing_temperature={self.mixing_temperature} is not a finite number above "
                f"0; use 1.0 for rates proportional to sizes, 2.0 to favour small tasks."
            )
        if self.packing != "none" and not any(self.get_task(name).has_inputs for name in rates):
            raise ValueError(
                f"data.packing={self.packing!r} has no effect on {', '.join(rates)}: running text "
                f"fills its rows without padding; use none."
            )
        for key, value, default in (
            ("max_examples_per_task", self.max_examples_per_task, 0),
            ("mixing_temperature", self.mixing_temperature, 1.0),
        ):
            if value != default and (len(rates) == 1 or None not in rates.values()):
                cause = "one task alone" if len(rates) == 1 else "fixed rates"
                raise ValueError(
                    f"data.{key}={value} has no effect with {cause} ({', '.join(rates)}); use "
                    f"{default}, or a data.mixture of several tasks with the rate None."
                )

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks of the mixture, in order."""
        return tuple(self.task_rates)

    @property
    def task_rates(self) -> dict[str, float | None]:
        """Task -> fixed rate or None: the mixture, or else the one task."""
        if not self.mixture:
            self.get_task(self.task)
        return dict(self.mixture or ((self.task, None),))

    def get_task(self, name: str) -> tasks.Task:
        """The task of a name: custom, built in, or a finished corpus."""
        return tasks.get_task(name, self.custom_tasks)

    def task_and_split(self, name: str, split: str) -> tuple[tasks.Task, str]:
        """The task and split whose records to read; a file of answers replaces the task's data."""
        return tasks.with_teacher_answers(name, self.get_task(name), split)

    def pair_lengths(self, name: str) -> shards.PairLengths | None:
        """The lengths that a task's pairs are truncated to; None for running text."""
        if self.get_task(name).has_inputs:
            return shards.PairLengths(self.input_length, self.target_length)
        return None

    def lengths(self, objective: objectives.ObjectiveConfig) -> tuple[int, int]:
        """Columns of a batch's inputs and targets, in tokens: the maximum over the tasks."""
        text = lambda: objectives.lengths(objective, self.input_length)
        lengths = [self.pair_lengths(name) or text() for name in self.names]
        return max(x.inputs for x in lengths), max(x.targets for x in lengths)


def mixing_rates(
    sizes: Sequence[int],
    fixed: Sequence[float | None] = (None,),
    *,
    limit: int = 0,
    temperature: float = 1.0,
) -> list[int]:
    """How often each task of a mixture occurs, in hundredths of the rarest.

    sizes: rows of each task. fixed: a rate for each; None for rates proportional to
    min(size, limit) ** (1 / temperature), where a limit of 0 means none.
    Raises ValueError if two rates differ by more than MAX_RATE_RATIO.
    Source: Raffel et al. 2020, section 3.5.2, arXiv:1910.10683.
    """
    shares, power = list(fixed), 1.0
    if None in shares:
        shares, power = [min(size, limit or size) for size in sizes], 1 / temperature
    if (math.log(max(shares)) - math.log(min(shares))) * power > math.log(MAX_RATE_RATIO):
        raise ValueError(
            f"data.mixture draws a task more than {MAX_RATE_RATIO:,} times as often as another; "
            f"use closer rates, a data.max_examples_per_task or a higher data.mixing_temperature."
        )
    return [round(100 * (share / min(shares)) ** power) for share in shares]
