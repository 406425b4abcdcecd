"""The story of an update, and of what follows some of them."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import pathlib
import shlex
import tempfile
from collections.abc import Callable

import jax

from lm import batch, checkpoints, evaluate, exits, logs, parallel, pipeline, runs, steps, storage
from lm.train import early_stopping, guard, live_teacher, signals, watchdog

IN_FLIGHT = 2  # updates that the devices may be behind, so that the end of each is known
DIVERGED = "diverged.json"


@dataclasses.dataclass(frozen=True)
class TrainSetup:
    """What the updates of a run are made of; nothing of it changes on the way."""

    make: Callable  # parameters, or None for random ones -> a fresh state
    update: Callable  # (state, placed batch, teacher) -> (state, sums), compiled
    rates: Callable  # updates before -> {"learning_rate": .., "learning_rate/<pattern>": ..}
    plain: Callable  # placed parameters of the state -> the model's own, LoRA's merged into them
    heldout: evaluate.HeldOut
    judge: evaluate.TaskScorer | None  # of the tasks' scores, where keep_best is one
    examples: pipeline.Examples
    shapes: steps.State  # of the state, to restore it again
    total: int  # updates
    flops: int  # of one update, on all devices
    facts: dict  # that every checkpoint has: the config, and what its numbers come from
    answers: live_teacher.Answers | None = None  # of the student, where it learns from its own
    cost: dict = dataclasses.field(default_factory=dict)  # of the teacher, as of teaching.cost


class Loop:
    """Updates from one step to the last, with logs, held-out losses and checkpoints on the way.

    The devices are waited for at log points alone; between them only the end of an update
    IN_FLIGHT before is awaited. profile: the first and last update to trace, or None; the trace of
    what was taken of them is kept, however the run ends.
    """

    def __init__(
        self, run: runs.Run, strategy, work: TrainSetup, saved, log, ledger, stop, profile
    ):
        self.run, self.strategy, self.work, self.saved = run, strategy, work, saved
        self.log, self.ledger, self.stop, self.profile = log, ledger, stop, profile
        self.tracing = False
        self.every = {"log": run.log_every_steps}
        self.every |= {"evaluate": run.eval_every_steps}
        self.every |= {"checkpoint": run.checkpoint.every_steps}
        self.figures, self.flying = {}, collections.deque()
        self.host, self.hosts = parallel.host_index_and_count()

    def train_from(self, state, facts: dict, teacher=None) -> dict[str, float]:
        """Go on from a placed state with its facts; returns the last held-out figures.

        facts: of the state's checkpoint; of a fresh one step and position alone. teacher: its
        parameters as placed. The last state is on disk when this returns. Raises Unfinished after
        a signal, or where copies of the state differ; Diverged where going back did not help;
        ValueError for what the devices refuse.
        """
        self.state, self.teacher = state, teacher
        self.saved_at = facts["step"] if "guard" in facts else None
        memory = facts.get("guard")
        if memory and runs.differences(
            self.work.facts["config"], runs.without_operational(facts["config"])
        ):
            memory = memory | {"rollbacks": 0}  # what was changed may have been the cure
        self.guard = guard.Guard(self.run.guard, memory)
        self._go_on_from(facts)
        peak = 1.0 if self.host else logs.peak_flops(self.strategy.devices)
        devices = len(self.strategy.devices)
        self.meter = logs.ThroughputMeter(
            flops_per_step=self.work.flops, peak_flops=peak, devices=devices
        )
        hang, tell = (
            self.run.guard.hang_timeout_seconds,
            lambda said: self._event("hang", said=said),
        )
        dog = watchdog.Watchdog(hang, self.run.workdir, tell)
        with dog as self.watch, watchdog.detect_lost_host(self._lost):
            try:
                self._updates()
            finally:
                self._trace(False)
        return self.figures

    def _go_on_from(self, facts: dict) -> None:
        # number: updates taken; index: of the next batch; unread: sums that no row has yet.
        self.number, self.index = facts["step"], facts["position"]["next_index"]
        self.unread = list(facts.get("unread", []))
        self.patience = early_stopping.EarlyStopping.of(self.run, facts)
        self._read_batches()

    def _read_batches(self) -> None:
        dealt = {"start": self.index, "host": self.host, "hosts": self.hosts}
        seed = self.run.seed
        self.batches = pipeline.train_batches(self.work.examples, seed, **dealt)

    def _updates(self) -> None:
        """To the last update, from wherever one is."""
        self.ledger.write_row(self.number)
        self.fresh, self.answered = True, False
        if self.saved_at is None:
            self._save()
        else:
            devices = [str(device.device_kind) for device in self.strategy.devices]
            made_by = {"commit": logs.commit(), "versions": logs.versions(), "devices": devices}
            self._event("resumed", batch=self.index, command=logs.command(), **made_by)
        first, last = self.profile or (1, self.work.total)
        if first > self.work.total or last <= self.number:
            self._event("no trace", said=f"--profile={first}:{last} is no update still to come")
        while not self._done():
            if self.stop.should_stop():
                self._leave()
            self._update()
            due = self._due()
            if "log" not in due:
                if self.number % 10 == 0:
                    self.log.advance(self.number)
            elif self._judge():
                self._follow(due)
            else:
                self._go_back()
        self.ledger.switch("save")
        self.saved.wait()

    def _done(self) -> bool:
        return self.number >= self.work.total or self.patience.over

    def _update(self) -> None:
        """One update; it may still be under way when this returns."""
        number = self.number + 1
        if self.profile and self.profile[0] <= number <= self.profile[1]:
            self._trace(True)
        self.ledger.switch("input")
        self.watch.beat(f"update {number}", watchdog.SLOW_FACTOR if self.fresh else 1)
        placed = self.strategy.place_batch(batch.Batch(*next(self.batches)))
        placed = self._answered(placed) if self.work.answers else placed
        self.ledger.switch("compile" if self.fresh else "step")
        self.state, sums = self.work.update(self.state, placed, self.teacher)
        self.ledger.switch("step")
        self.unread.append({"step": number, "batch": self.index, "sums": sums})
        self.number, self.index = number, self.index + 1
        self.flying.append(sums["loss"])
        if len(self.flying) > IN_FLIGHT:
            jax.block_until_ready(self.flying.popleft())
        if self.fresh:
            jax.block_until_ready(self.state)
            self.ledger.switch("save")
            self.saved.wait()  # the first save has shown by now that there is room and permission
            self.ledger.switch("step")
            self.fresh = False
        if self.tracing and number == self.profile[1]:
            jax.block_until_ready(self.state)
            self._trace(False)

    def _answered(self, placed):
        """The batch with the student's own answers, where it is its turn to give them.

        Waited for, before and behind, so that the ledger tells what they cost.
        """
        answers, number = self.work.answers, self.number + 1
        if not answers.policy.is_on_policy(self.index):
            return answers.given(placed)
        self.ledger.switch("step")
        jax.block_until_ready(self.state)
        self.watch.beat(f"answers to learn from in update {number}", watchdog.SLOW_FACTOR)
        self.ledger.switch("decode" if self.answered else "compile")
        params = self.work.plain(self.state.params)
        placed = jax.block_until_ready(answers.written(params, placed, self.index))
        self.watch.beat(f"update {number}", watchdog.SLOW_FACTOR if self.fresh else 1)
        self.answered = True
        return placed

    def _trace(self, on: bool) -> None:
        """Begin the trace, or end it and write it, where that is not so yet."""
        if on == self.tracing:
            return
        self.tracing = on
        if on:
            self.traced = self.run.workdir / "profile"
            if storage.is_remote(self.traced):  # which the profiler cannot write to
                self.traced = pathlib.Path(tempfile.mkdtemp())
            jax.profiler.start_trace(str(self.traced))
            return
        self.watch.beat("the trace", watchdog.SLOW_FACTOR)
        try:
            jax.profiler.stop_trace()
            if storage.is_remote(self.run.workdir):
                storage.copy_dir(self.traced, self.run.workdir / "profile")
                storage.remove_dir(self.traced)
        except (jax.errors.JaxRuntimeError, OSError) as error:  # a full disk, no end of a run
            self._event("no trace", said=exits.one_line(error))

    def _due(self) -> set[str]:
        """What follows this update: at its multiples, after the last, and a log after the first.

        The same whether the run was resumed or not, so that its rows are the unbroken run's.
        """
        due = {what for what, every in self.every.items() if self.number % every == 0}
        if self.number == self.work.total:
            due = set(self.every)
        if self.number == 1 or due:
            due.add("log")
        return due

    def _follow(self, due: set[str]) -> None:
        """What is due after good updates: a row, held-out figures, a checkpoint."""
        self._write_row()
        figures = None
        if "evaluate" in due:
            figures = self._evaluate()
        if self.patience.over and self.number < self.work.total:
            self._event("ended early", said=self.patience.account)
            due.add("checkpoint")
        # With bad updates pending none is saved, so that one to go back to stays.
        if "checkpoint" in due and (self._done() or not self.guard.row):
            self._save(figures)
        if due - {"log"}:
            self.meter.start(self.number)
            self.ledger.write_row(self.number)  # what is due after an update is lost only with it
        self.ledger.switch("other")

    # What the devices have to say. ------------------------------------------------------------

    def _fetch(self) -> None:
        """Numbers in place of arrays in the unread sums; the only wait for the devices."""
        arrays = [row["sums"] for row in self.unread if isinstance(row["sums"]["loss"], jax.Array)]
        self.watch.beat(f"update {self.number}")
        jax.block_until_ready(arrays[-1:])
        self.ledger.switch("log")
        fetched = self.strategy.fetch_numbers(arrays)
        self.flying.clear()
        first = len(self.unread) - len(fetched)
        for row, sums in zip(self.unread[first:], fetched, strict=True):
            row["sums"] = {name: float(value) for name, value in sums.items()}

    def _judge(self) -> bool:
        """Whether to go on: the guard's word on every update since the last row."""
        self._fetch()
        for row in self.unread:
            sums = row["sums"]
            loss, finite = sums["loss"] / max(sums["weight"], 1.0), bool(sums["finite"])
            usual = not self.work.answers or self.work.answers.policy.is_usual(row["batch"])
            bad = self.guard.judge(row["step"], row["batch"], loss, finite, usual)
            if bad:
                self.log.event(bad["kind"], bad["step"], **_beside(bad), see=self._see(bad))
            if self.guard.exhausted:
                return False
        return True

    def _see(self, bad: dict) -> str:
        """The command that prints the batch of a bad update."""
        workdir = shlex.quote(str(self.run.workdir))
        return f"python -m lm show --workdir={workdir} --step={bad['batch'] + 1}"

    def _write_row(self) -> None:
        """The row of the updates since the last one; those left out count for nothing in it."""
        self.ledger.switch("log")
        kept = [row["sums"] for row in self.unread if row["sums"]["finite"]]
        skipped = int(self.unread[-1]["sums"]["skipped"])
        self.unread, figures, tokens = [], {"loss": math.nan}, 0.0
        if kept:
            last = kept[-1]
            added = {name: float(sum(sums[name] for sums in kept)) for name in last}
            figures, tokens = steps.metrics_from_sums(added), added["inputs"] + added["weight"]
            figures |= {name: last[name] for name in last if "norm" in name or "ratio" in name}
        figures |= {"skipped": skipped} | self.work.rates(max(0, self.number - 1 - skipped))
        rates = self.meter.measure(self.number, tokens)
        memory = logs.memory_peak(self.strategy.devices)
        figures |= rates | live_teacher.shares(self.work.cost, rates, memory, self.ledger) | memory
        if self.run.data.max_bad_records:
            figures["bad_records"] = len(self.work.examples.damaged)
        figures["goodput"] = self.ledger.write_row(self.number)
        self.log.write(self.number, "train", figures)
        self.log.advance(self.number, figures)

    def _evaluate(self) -> dict[str, float]:
        self.ledger.switch("evaluate")
        waiting = lambda: self.watch.beat(f"evaluation {self.number}", watchdog.SLOW_FACTOR)
        params = self.work.plain(eval_params(self.state))
        self.figures = steps.metrics_from_sums(self.work.heldout.sums(params, beat=waiting))
        if self.work.judge:
            self.figures |= self.work.judge(params, beat=waiting)
        self.patience.judge(self.number, self.figures)
        self.log.write(self.number, "heldout", self.figures)
        return self.figures

    # What is kept, and the ways out. ----------------------------------------------------------

    def _save(self, figures: dict[str, float] | None = None) -> None:
        """Start to save; copies of the state that differ are never saved."""
        self.watch.beat(f"checkpoint {self.number}", watchdog.SLOW_FACTOR)
        self.ledger.switch("save")
        odd = self.strategy.find_disagreement(self.state)
        if odd:
            said = f"copies of {odd} on different devices differ in their bits"
            self._event("disagreement", said=said)
            raise signals.Unfinished(
                f"{said} after update {self.number}, as after an error of a device; run the same "
                f"command again to continue from update {self.saved_at}, without that device if "
                f"it happens again."
            )
        facts = {"position": {"next_index": self.index}, "unread": self.unread}
        facts |= self.work.facts
        facts |= {"guard": self.guard.memory, "patience": self.patience.memory}
        for rows in (self.log, self.ledger):  # a run that goes on from here keeps its rows so far
            rows.flush()
        self.saved.save(self.strategy.fetch(self.state), facts, figures)
        self.saved_at = self.number

    def _leave(self) -> None:
        """Save what there is and stop, as a signal asked for."""
        if self.saved_at != self.number:
            self._fetch()
            self._save()
        self.saved.wait()
        self._event("stopped", signal=self.stop.name)
        self.ledger.write_row(self.number)
        raise signals.Unfinished(
            f"{self.stop.name} stopped the run after update {self.number} of {self.work.total}, "
            f"which is saved; run the same command again to continue."
        )

    def _go_back(self) -> None:
        """Restore what was before the bad updates in a row, and pass over all batches up to them.

        Nothing is saved here: killed before the next checkpoint, the run decides the same again.
        """
        bad, index = self.guard.row, self.guard.row[-1]["batch"] + 1
        if self.guard.rollbacks >= self.guard.allowed:
            self._give_up(bad, f"guard.max_rollbacks={self.guard.allowed} did not help")
        self.watch.beat(f"the return from update {self.number}", watchdog.SLOW_FACTOR)
        self.ledger.switch("restore")
        self.saved.wait()
        self.state, self.unread, self.flying = None, [], collections.deque()
        found = self._restore(bad[0]["step"])
        if found is None:
            self._give_up(bad, "no checkpoint from before them is left")
        self.state, facts = self.strategy.place_state(found[0]), found[1]
        times = self.guard.go_back(facts["guard"])
        passed = (facts["position"]["next_index"], index - 1)
        self._go_on_from(facts | {"position": {"next_index": index}})
        self.saved_at = self.number
        self.log.rewind(self.number)
        self.ledger.write_row(self.number)
        self._event("rollback", times=times, bad=[row["step"] for row in bad], passed_over=passed)
        self.meter.start(self.number)

    def _restore(self, bad: int):
        """(state, facts) of the newest checkpoint from before an update, if there is one.

        Preferably not one that a signal asked for: the unbroken run has none there.
        """
        before = lambda facts: facts["step"] < bad and not facts["guard"]["row"]
        planned = lambda facts: before(facts) and facts["step"] % self.every["checkpoint"] == 0
        for accept in (planned, before):
            try:
                return self.saved.restore(self.strategy.abstract_state(self.work.shapes), accept)
            except checkpoints.Mismatch:
                continue
        return None

    def _give_up(self, bad: list[dict], why: str) -> None:
        peak = self.run.optimizer.learning_rate
        sentence = (
            f"update {bad[-1]['step']} was the last of {len(bad)} in a row that were not finite or "
            f"spikes, and {why}; look at their batches, named in {self.run.workdir / DIVERGED}, "
            f"and lower optimizer.learning_rate={peak} with --allow_change=optimizer.learning_rate."
        )
        if not self.host:
            rows = [row | {"see": self._see(row)} for row in bad]
            report = {"what": sentence, "rollbacks": self.guard.rollbacks, "updates": rows}
            text = json.dumps(report, indent=2) + "\n"
            logs.write_atomically(self.run.workdir / DIVERGED, text)
        self._event("gave up", rollbacks=self.guard.rollbacks, report=DIVERGED)
        raise guard.Diverged(sentence)

    def _lost(self, said: str) -> None:
        """Another host is gone: what it would take part in cannot be waited for."""
        try:
            self._event("lost host", said=said)
        finally:  # the log may be closed
            watchdog.exit_now(
                f"another host was lost at update {self.number}{said and f' ({said})'}; start them "
                f"all again to continue from update {self.saved_at}."
            )

    def _event(self, kind: str, **facts) -> None:
        self.log.event(kind, self.number, **facts)


def _beside(bad: dict) -> dict:
    return {name: value for name, value in bad.items() if name not in ("kind", "step")}


def eval_params(state):
    """What is evaluated, decoded and started from: the average of weights, where there is one."""
    return state.params if state.average is None else state.average
