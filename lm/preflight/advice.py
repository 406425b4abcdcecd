"""Search for the nearest changes of layout with which a run fits a slice, by compiling them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence

from lm import parallel, runs
from lm.preflight import compiler, roofline, slices

MAX_PROGRAMS = 8  # programs compiled for a slice, and again for the larger slices
REMAT_POLICIES = ("none", "dots", "full")  # from the fastest to the smallest
QUICK_DEPTH = 8  # layers of encoder and decoder that compile quickly without a scan

Changes = dict[str, object]  # "section.key" of the config -> value


@dataclasses.dataclass(frozen=True)
class Trial:
    """Changes of a run's config on a slice, and the compiled result."""

    slice: slices.Slice
    changes: Changes
    compiled: compiler.Compiled

    @property
    def flags(self) -> list[str]:
        """The changes as command-line flags."""
        return [f"--config.{key}={value}" for key, value in self.changes.items()]

    @property
    def step_seconds(self) -> float:
        """Lower bound of the seconds of an update."""
        return roofline.estimate(self.compiled).seconds


def advise(
    run: runs.Run,
    target: slices.Slice,
    *,
    max_programs: int = MAX_PROGRAMS,
    compile: Callable = compiler.compile_for,
) -> list[Trial]:
    """Returns the nearest changes with which a run fits a slice, fewest first.

    Kinds of changes: more micro-batches, stronger rematerialization, wider fsdp. Returns the
    smallest step that fits of each kind; if no kind is enough, of pairs, then of all three. If
    nothing fits the slice, returns one trial on the smallest larger slice of the same chip. Deep
    models are compiled with scanned layers. Empty: nothing fits within max_programs.
    """
    if trials := _Search(run, compile, max_programs).nearest(target):
        return trials
    larger = [item for item in slices.sizes(target.chip.name) if item.chips > target.chips]
    trial = smallest(run, larger, max_programs=max_programs, compile=compile)
    return [trial] if trial else []


def smallest(
    run: runs.Run,
    candidates: Iterable[slices.Slice],
    *,
    max_programs: int = MAX_PROGRAMS,
    compile: Callable = compiler.compile_for,
) -> Trial | None:
    """Returns a trial on the first of the slices that the run fits, with the fewest changes."""
    search = _Search(run, compile, max_programs)
    for target in candidates:
        if trial := search.bisect(target, [{}]) or next(iter(search.nearest(target)), None):
            return trial
    return None


def is_slow(run: runs.Run) -> bool:
    """Whether the run's layers take long to compile, because they are many and not scanned."""
    depth = run.model.num_encoder_layers + run.model.num_decoder_layers
    return not run.model.scan_layers and depth > QUICK_DEPTH


def changed(config: dict, changes: Changes) -> dict:
    """Returns a copy of the config with the changes."""
    config = copy.deepcopy(config)
    for key, value in changes.items():
        section, name = key.split(".")
        config[section][name] = value
    return config


def ladders(run: runs.Run, target: slices.Slice) -> list[list[Changes]]:
    """Lists the steps of each kind of change that the config allows, smallest first."""
    batch, layout = run.data.batch_size, run.parallel
    doublings = [1 << power for power in range(batch.bit_length())]
    divisors = [n for n in range(1, target.chips + 1) if target.chips % n == 0]
    stronger = REMAT_POLICIES[REMAT_POLICIES.index(run.model.remat_policy) + 1 :]
    kinds = [
        [{"parallel.num_microbatches": n} for n in doublings if n > layout.num_microbatches],
        [{"model.remat_policy": policy} for policy in stronger],
        [{"parallel.strategy": "mesh", "parallel.fsdp": n} for n in divisors if n > layout.fsdp],
    ]
    allowed = [[step for step in kind if _is_allowed(run, target, step)] for kind in kinds]
    return [kind for kind in allowed if kind]


def _is_allowed(run: runs.Run, target: slices.Slice, changes: Changes) -> bool:
    """Whether the config and the division of the batch allow the changes."""
    try:
        run = runs.make_run(changed(run.config_dict, changes), str(run.workdir))
        layout = run.parallel
        shards = max(target.chips // layout.tensor, layout.fixed_shards)
        parallel.check_batch_size(run.data.batch_size, shards, layout.num_microbatches)
    except ValueError:
        return False
    return target.chips % (layout.fsdp * layout.tensor) == 0


class _Search:
    """Compiles changes of one run: each once, and at most max_programs in all."""

    def __init__(self, run: runs.Run, compile: Callable, max_programs: int):
        self.run, self.compile, self.programs_left = run, compile, max_programs
        self.base: Changes = {"model.scan_layers": True} if is_slow(run) else {}
        if run.parallel.data != -1:
            self.base["parallel.data"] = -1  # all chips
        self.trials: dict[tuple, Trial | None] = {}

    def nearest(self, target: slices.Slice) -> list[Trial]:
        """Finds the smallest step that fits of each kind; else of pairs, then of all kinds."""
        kinds = ladders(self.run, target)
        for count in range(1, len(kinds) + 1):
            groups = itertools.combinations(kinds, count)
            trials = [self.bisect(target, _diagonal(group)) for group in groups]
            if any(trials):
                return [trial for trial in trials if trial]
        return []

    def bisect(self, target: slices.Slice, steps: list[Changes]) -> Trial | None:
        """Finds the first step that fits; each step needs no more memory than the one before."""
        low, high, best = 0, len(steps) - 1, None
        while low <= high:
            middle = (low + high) // 2 if best else high  # the last step first
            trial = self._try(target, steps[middle])
            if trial and trial.compiled.fits:
                best, high = trial, middle - 1
            elif best:
                low = middle + 1
            elif trial:
                return None
            else:
                high -= 1
        return best

    def _try(self, target: slices.Slice, changes: Changes) -> Trial | None:
        """Compiles changes; None if the config is invalid or no program may be compiled."""
        changes = self.base | changes
        key = target.name, *changes.items()
        if key not in self.trials and self.programs_left > 0:
            words = [f"{name}={value}" for name, value in changes.items()]
            label = " ".join(["trying", target.name, *words])
            config = changed(self.run.config_dict, changes)
            try:
                compiled = self.compile(config, target, str(self.run.workdir), label=label)
            except ValueError:
                self.trials[key] = None
            else:
                self.programs_left -= compiled.seconds > 0  # 0: rejected by its shapes
                self.trials[key] = Trial(target, changes, compiled)
        return self.trials.get(key)


def _diagonal(kinds: Sequence[list[Changes]]) -> list[Changes]:
    """Combines steps of several kinds: the i-th step of each, or its last."""
    length = max(map(len, kinds))
    steps = [[kind[min(i, len(kind) - 1)] for kind in kinds] for i in range(length)]
    return [functools.reduce(operator.or_, changes) for changes in steps]
