"""Layouts of a run on a slice: the nearest that fit, and the fastest, found by compiling them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator

import tqdm

from lm import runs, train
from lm.preflight import compiler, layouts, program, roofline, slices

TRIES = 8  # programs that a search compiles
ADVICE_TRIES = 6  # and that advice does
PER_KIND = 2  # of those, programs of one kind of change
PER_SLICE = 3  # and of a larger slice, for the next one to be proven as well
FIRST_SCALE = 1.6  # of the guess of activations: what T5 1.1 small takes on v5e, over it
LEAST_SCALE = 0.1
SLACK = 0.5  # share of the guess at which the largest step of a kind is still worth a try
QUICK_DEPTH = 8  # layers of both towers that compile in little time one by one


@dataclasses.dataclass(frozen=True)
class Trial:
    """A layout on a slice, and what the compiler says of it.

    flags: what to add to the command line. fits: False also where the compiler refuses; error says
    why. proven: False where it was not compiled, and peak is a guess from shapes. peak: bytes of a
    chip. step_s: seconds of an update at best, and mfu at that; 0 where it does not fit. seconds:
    of compiling.
    """

    layout: layouts.Layout
    flags: tuple[str, ...]
    slice: str
    fits: bool
    peak: int
    proven: bool = True
    step_s: float = 0.0
    mfu: float = 0.0
    seconds: float = 0.0
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Advice:
    """The nearest changes that fit, the smallest first; compiled: programs that it took.

    here: True where they are on the slice itself. Else no change of layout is enough there, and
    trials has the smallest slice of the same chip that is, if there is one.
    """

    trials: tuple[Trial, ...]
    here: bool
    compiled: int


class Trials:
    """Programs compiled for one slice, and what they teach of those that were not.

    this: the run. compile: (config, slice) -> compiler.Compiled. tries: the most it compiles, those
    of the trials it comes after included.
    """

    def __init__(self, run: runs.Run, target: slices.Slice, compile, tries: int, after=None):
        self.run, self.target, self.tries = run, target, tries
        state = after.shapes.state if after else program.state(run)
        self.shapes = layouts.Shapes(run, state, target)
        self.done: list[Trial] = after.done if after else []
        self._before = len(self.done)
        self._compile, self._flops = compile, train.step_flops(run)
        self._scale = after._scale if after else FIRST_SCALE
        self.guessing = tries == 0  # whether what is not compiled is an answer too

    @property
    def left(self) -> int:
        """Programs that may still be compiled."""
        return self.tries - len(self.done)

    @property
    def here(self) -> int:
        """Programs that were compiled for this slice."""
        return len(self.done) - self._before

    def possible(self, layout: layouts.Layout) -> bool:
        """Whether no rule speaks against it, and the chip holds at least what it must."""
        refused = self.shapes.refusal(layout)
        return not refused and self.shapes.least(layout) <= self.target.chip.memory

    def guess(self, layout: layouts.Layout, share: float = 1.0) -> int:
        """About how many bytes of a chip it takes, going by what others took.

        share: of what comes to state and gradients, which is the uncertain part.
        """
        kept = share * self._scale * self.shapes.activations(layout)
        return self.shapes.least(layout) + int(kept)

    def fits(self, layout: layouts.Layout, share: float = 1.0) -> bool:
        """Whether it should fit, by that guess."""
        return self.guess(layout, share) <= self.target.chip.memory

    def learn(self, layout: layouts.Layout, found: compiler.Compiled) -> None:
        """Guess better from now on: this layout takes so many bytes of a chip.

        What was refused for another reason than memory comes with its sizes alone: no lesson.
        """
        if found.needed > sum(found.sizes.values()):
            kept = found.needed - self.shapes.least(layout)
            self._scale = max(kept / self.shapes.activations(layout), LEAST_SCALE)

    def order(self, layout: layouts.Layout) -> tuple:
        """A key that sorts by what should fit, then by what should be fast, then simple ones."""
        memory, links = self.shapes.traffic(layout)
        share = layouts.forward_passes(layout) / 3 / self.target.chips
        guess = roofline.predict(
            self.target.chip, flops=self._flops * share, memory_bytes=memory, network=links
        )
        parts = guess.compute_s + guess.memory_s + guess.network_s
        simple = (layout.tensor, layout.fsdp, layout.num_microbatches, layout.remat != "none")
        return not self.fits(layout), guess.step_s, parts, simple

    def take(self, layout: layouts.Layout, label: str = "") -> Trial:
        """Compile one; a layout that is refused takes no memory. label: as of compile_for."""
        config, place = layouts.changed(self.run.config, layout), str(self.run.workdir)
        try:
            found = self._compile(config, self.target, place, label=label)
            made = self._trial(layout, found)
            self.learn(layout, found)
        except ValueError as error:
            made = dataclasses.replace(self.guessed(layout), fits=False, peak=0, error=str(error))
        self.done.append(made)
        return made

    def guessed(self, layout: layouts.Layout) -> Trial:
        """One that is not compiled."""
        flags = tuple(layouts.flags(self.run.config, layout))
        return Trial(layout, flags, self.target.name, True, self.guess(layout), proven=False)

    def _trial(self, layout: layouts.Layout, found: compiler.Compiled) -> Trial:
        made = dataclasses.replace(
            self.guessed(layout),
            **dict(proven=True, fits=bool(found.fits), peak=found.needed),
            **dict(seconds=found.seconds, error=found.error),
        )
        if not found.fits:
            return made
        step_s = found.prediction.step_s
        whole = self.target.chip.flops * found.chips * step_s
        return dataclasses.replace(made, step_s=step_s, mfu=found.model_flops / whole)


# Advice. -----------------------------------------------------------------------------------------


def advice(
    run: runs.Run,
    target: slices.Slice,
    first: compiler.Compiled | None = None,
    *,
    tries: int = ADVICE_TRIES,
    compile: Callable = compiler.compile_for,
) -> Advice:
    """The nearest changes with which a run fits a slice, each compiled to prove it.

    first: what the compiler said of the run as it is. One change is tried before two: micro-batches
    by doubling, remat, fsdp; of each kind the smallest that fits. With none on this slice, the
    smallest larger one of the same chip. Many layers are scanned, so that each takes little time.
    tries: programs to compile at most, and as many for larger slices; 0: from shapes alone.
    """
    trials, own = Trials(run, target, compile, tries), _own(run)
    if first is not None and trials.possible(own):
        trials.learn(own, first)
    for count in (1, 2, 3):
        found = list(_fitting(trials, own, count))
        if found:
            return Advice(tuple(found), True, len(trials.done))
    larger = [one for one in slices.sizes(target.chip.name) if one.chips > target.chips]
    tries += len(trials.done)
    found = smallest(run, larger, tries=tries, compile=compile, after=trials)
    return Advice((found,) if found else (), False, len(trials.done))


def smallest(
    run: runs.Run,
    offered: Iterable[slices.Slice],
    *,
    tries: int = TRIES,
    compile: Callable = compiler.compile_for,
    after: Trials | None = None,
) -> Trial | None:
    """The run on the first of these slices that it fits, with as few changes as it takes there.

    after: trials that went before, whose programs count among `tries` and teach. When these are
    used up, the answer is from shapes; of a slice, PER_SLICE at most. None where it fits none.
    """
    own = _own(run)
    for target in offered:
        after = Trials(run, target, compile, tries, after)
        after.guessing = True
        for count in range(4):
            found = next(_fitting(after, own, count), None)
            if found:
                return found
    return None


def _own(run: runs.Run) -> layouts.Layout:
    # The run's layout, over all chips; many layers scanned.
    layers = "scanned" if slow(run) else run.model.layers
    return dataclasses.replace(layouts.layout_of(run.config), data=-1, layers=layers)


def slow(run: runs.Run) -> bool:
    """Whether a run has so many layers, compiled one by one, that this takes minutes."""
    depth = run.model.num_encoder_layers + run.model.num_decoder_layers
    return run.model.layers == "unrolled" and depth > QUICK_DEPTH


def ladders(run: runs.Run, own: layouts.Layout, target: slices.Slice) -> list[list[dict]]:
    """Changes of a layout that save memory, by kind, each from the smallest step up."""
    micro = [n for n in layouts.doublings(run.data.batch_size) if n > own.num_microbatches]
    stronger = layouts.REMATS[layouts.REMATS.index(own.remat) + 1 :]
    wider = [n for n in layouts.divisors(target.chips) if n > own.fsdp]
    return [
        [{"num_microbatches": n} for n in micro],
        [{"remat": word} for word in stronger],
        [{"strategy": "mesh", "fsdp": n} for n in wider],
    ]


def changes(own: layouts.Layout, group: Iterable[list[dict]]) -> list[layouts.Layout]:
    """The layouts with one step up each of these ladders, those of few steps first."""
    steps = sorted(itertools.product(*map(enumerate, group)), key=lambda at: sum(n for n, _ in at))
    made = [{key: value for _, change in at for key, value in change.items()} for at in steps]
    return [dataclasses.replace(own, **one) for one in made]


def _fitting(trials: Trials, own: layouts.Layout, count: int) -> Iterator[Trial]:
    # For every choice of `count` kinds of change, the nearest layout that fits, if one does.
    for group in itertools.combinations(ladders(trials.run, own, trials.target), count):
        found = _nearest(trials, changes(own, group))
        if found:
            yield found


def _nearest(trials: Trials, options: list[layouts.Layout]) -> Trial | None:
    # The first that fits: of those that should, PER_KIND are compiled; or else the last, which
    # saves the most, where the guess may be wrong.
    options, taken = list(filter(trials.possible, options)), 0
    for layout in options:
        last = layout == options[-1] and not taken and not trials.guessing
        if not trials.fits(layout, SLACK if last else 1.0):
            continue
        if trials.left <= 0:
            return trials.guessed(layout) if trials.guessing else None
        if taken == PER_KIND or (trials.guessing and trials.here == PER_SLICE):
            return None
        words = " ".join(layouts.flags(trials.run.config, layout))
        made, taken = trials.take(layout, f"trying {trials.target.name} {words}".strip()), taken + 1
        if made.fits:
            return made
    return None


# Search. -----------------------------------------------------------------------------------------


def search(
    run: runs.Run,
    target: slices.Slice,
    *,
    tries: int = TRIES,
    compile: Callable = compiler.compile_for,
) -> list[Trial]:
    """The most promising layouts compiled: those that fit first, by the predicted step.

    Every layout that the rules allow is put in order by a guess from shapes; `tries` are compiled,
    the run's own among them. One that cannot be better than a compiled one is left out: more
    micro-batches or remat where fewer fit, fewer where more do not.
    """
    trials, own = Trials(run, target, compile, tries), _own(run)
    every = dict.fromkeys([own, *trials.shapes.allowed(own.layers)])
    waiting = [one for one in every if trials.possible(one)]
    if not waiting:
        raise ValueError(
            f"{target.name} has no layout for this run: its state and gradients alone, cut into "
            f"all chips, are larger than their {target.chip.memory / 2**30:.2f} GiB each, or "
            f"data.batch_size={run.data.batch_size} does not divide over {target.chips} chips; "
            f"use a larger slice, or another batch."
        )
    with tqdm.tqdm(total=min(tries, len(waiting)), desc="search", unit="program") as bar:
        while waiting and trials.left > 0:
            best = own if own in waiting and not trials.done else min(waiting, key=trials.order)
            bar.set_postfix_str(name_of(best, target.chips))
            made = trials.take(best)
            waiting = [one for one in waiting if one != best and not _settled(one, made)]
            bar.update()
    if not any(one.peak for one in trials.done):
        raise ValueError(trials.done[0].error)
    return sorted(trials.done, key=lambda made: (not made.fits, made.step_s, made.peak))


def _settled(other: layouts.Layout, made: Trial) -> bool:
    # Whether the trial already says that the other layout does not fit, or is no faster.
    axes = lambda one: (one.strategy, one.fsdp, one.tensor)
    if axes(other) != axes(made.layout):
        return False
    saves = lambda one: (one.num_microbatches, layouts.REMATS.index(one.remat))
    pairs = list(zip(saves(other), saves(made.layout), strict=True))
    if made.fits:
        return all(theirs >= ours for theirs, ours in pairs)
    return all(theirs <= ours for theirs, ours in pairs)


# Text. -------------------------------------------------------------------------------------------


def table(trials: list[Trial], target: slices.Slice) -> str:
    """The trials as lines of text, the best first, and why some are refused."""
    head = ("layout", "micro-batches", "remat", "peak GiB", "step ms", "MFU", "fits")
    rows = [head, *(_cells(one, target) for one in trials)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    line = lambda cells: "  ".join(cell.ljust(n) for cell, n in zip(cells, widths, strict=True))
    why = dict.fromkeys(one.error for one in trials if _fitness(one, target) == "refused")
    lines = [*(line(cells).rstrip() for cells in rows), *(f"refused: {error}" for error in why)]
    return "\n".join(lines)


def name_of(layout: layouts.Layout, chips: int) -> str:
    """A layout in few words, as "mesh 2x4x1": data x fsdp x tensor."""
    sizes = "x".join(map(str, layout.sizes(chips).values()))
    return f"{layout.strategy} {sizes}"


def _cells(one: Trial, target: slices.Slice) -> list[str]:
    layout, known = one.layout, one.step_s > 0
    cells = [name_of(layout, target.chips), str(layout.num_microbatches), layout.remat]
    cells += [f"{one.peak / 2**30:.2f}" if one.peak else "?"]
    cells += [f"{one.step_s * 1e3:.1f}" if known else "?", f"{one.mfu:.1%}" if known else "?"]
    return [*cells, _fitness(one, target)]


def _fitness(one: Trial, target: slices.Slice) -> str:
    return "yes" if one.fits else "no" if one.peak > target.chip.memory else "refused"
