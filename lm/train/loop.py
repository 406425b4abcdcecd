"""One update of the state, and what follows some of them: logs, evaluations, checkpoints."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import shlex
from collections.abc import Callable
from typing import Any, NoReturn

import jax

from lm import batch, checkpoints, evaluate, logs, parallel, pipeline, runs, steps, tokenizer
from lm.train import early_stopping, guard, live_teacher, profiling, signals, watchdog

MAX_IN_FLIGHT = 2  # updates that devices may be behind the host
DIVERGED = "diverged.json"


@dataclasses.dataclass(frozen=True)
class TrainSetup:
    """The fixed parts of a run, from which its updates are computed."""

    run: runs.Run
    strategy: parallel.Strategy
    tokens: tokenizer.Tokenizer
    init_state: Callable  # parameters, or None for random ones -> a fresh state
    train_step: Callable  # (state, placed batch, teacher) -> (state, sums), compiled
    learning_rates: Callable  # updates done -> {"learning_rate": .., "learning_rate/<pattern>": ..}
    model_params: Callable  # placed trained parameters -> the model's own, LoRA merged
    heldout: evaluate.HeldOut
    task_scorer: evaluate.TaskScorer | None  # if best_metric is a task's score
    examples: pipeline.Examples
    state_shapes: steps.State
    total_steps: int
    flops_per_step: int  # model FLOPs of one update on all devices
    facts: dict  # stored in every checkpoint: the config, and fingerprints of tokenizer and data
    student_answers: live_teacher.StudentAnswers | None = None  # with teacher.on_policy
    teacher_cost: dict = dataclasses.field(default_factory=dict)  # of live_teacher.measure_cost


class Loop:
    """Runs updates to the last one, with logs, held-out losses and checkpoints on the way.

    At most MAX_IN_FLIGHT updates are in flight; otherwise the host waits for devices only to log.
    profile: the first and last update to trace, or None; written however the run ends.
    """

    def __init__(
        self,
        setup: TrainSetup,
        saved: checkpoints.Checkpoints,
        log: logs.RunLog | logs.NullLog,
        ledger: logs.TimeLedger | logs.NullLog,
        stop: signals.Signals,
        profile: tuple[int, int] | None,
    ):
        self.run, self.strategy, self.setup, self.saved = setup.run, setup.strategy, setup, saved
        self.log, self.ledger, self.stop = log, ledger, stop
        self.profiler = profiling.Profiler(self.run.workdir, profile)
        self.metrics, self.in_flight = {}, collections.deque()
        self.every = {
            "log": self.run.log_every_steps,
            "evaluate": self.run.eval_every_steps,
            "checkpoint": self.run.checkpoint.every_steps,
        }
        self.host, self.num_hosts = parallel.host_index_and_count()

    def train_from(self, state: Any, facts: dict, teacher: Any = None) -> dict[str, float]:
        """Resume from a placed state; returns the last held-out metrics. The last state is saved.

        state: placed; it is used up. facts: of its checkpoint; of a fresh state, step and position
        only. teacher: the placed parameters of a live teacher. Raises signals.Unfinished after a
        signal, or if copies of the state differ; guard.Diverged if rollbacks did not help;
        ValueError if the devices refuse the program.
        """
        self.state, self.teacher = state, teacher
        self.saved_step = facts["step"] if "guard" in facts else None
        memory = facts.get("guard")
        stored_config = runs.without_operational(facts.get("config", {}))
        if memory and runs.differences(self.setup.facts["config"], stored_config):
            memory = memory | {"rollbacks": 0}  # the change of the config may be the cure
        self.guard = guard.Guard(self.run.guard, memory)
        self._resume_from(facts)
        devices, flops = self.strategy.devices, self.setup.flops_per_step
        peak = 1.0 if self.host else logs.peak_flops(devices)
        self.meter = logs.ThroughputMeter(
            flops_per_step=flops, peak_flops=peak, devices=len(devices)
        )
        report = lambda sentence: self._event("hang", said=sentence)
        timeout = self.run.guard.hang_timeout_seconds
        self.watch = watchdog.Watchdog(timeout, self.run.workdir, report)
        with self.watch, watchdog.detect_lost_host(self._exit_lost_host):
            try:
                self._run_updates()
            finally:
                self._stop_trace()
        return self.metrics

    def _resume_from(self, facts: dict) -> None:
        # step: updates done; next_batch: its number; unlogged: sums that are in no row yet.
        self.step, self.next_batch = facts["step"], facts["position"]["next_index"]
        self.unlogged = list(facts.get("unread", []))
        self.early_stopping = early_stopping.EarlyStopping.from_facts(self.run, facts)
        options = {"start": self.next_batch, "host": self.host, "hosts": self.num_hosts}
        self.batches = pipeline.train_batches(self.setup.examples, self.run.seed, **options)

    def _run_updates(self) -> None:
        self.ledger.write_row(self.step)
        self.is_first_update, self.is_first_decoding = True, True
        if self.saved_step is None:
            self._save()
        else:
            devices = [str(device.device_kind) for device in self.strategy.devices]
            facts = {"commit": logs.commit(), "versions": logs.versions(), "devices": devices}
            self._event("resumed", batch=self.next_batch, command=logs.command(), **facts)
        first, last = self.profiler.first, self.profiler.last
        if first and (first > self.setup.total_steps or last <= self.step):
            self._event("no trace", said=f"--profile={first}:{last} is no update still to come")
        while not self._is_done():
            if self.stop.should_stop():
                self._stop_after_signal()
            self._update()
            due = self._due()
            if "log" not in due:
                if self.step % 10 == 0:
                    self.log.advance(self.step)
            elif self._check_updates():
                self._log_evaluate_save(due)
            else:
                self._roll_back()
        self.ledger.switch("save")
        self.saved.wait()

    def _is_done(self) -> bool:
        return self.step >= self.setup.total_steps or self.early_stopping.is_over

    def _update(self) -> None:
        """Dispatch one update; it may still be in flight when this returns."""
        step = self.step + 1
        if self.profiler.first <= step <= self.profiler.last:
            self.profiler.start()
        self.ledger.switch("input")
        self._beat_update(step)
        placed = self.strategy.place_batch(batch.Batch(*next(self.batches)))
        if self.setup.student_answers:
            placed = self._with_student_answers(placed)
        self.ledger.switch("compile" if self.is_first_update else "step")
        self.state, sums = self.setup.train_step(self.state, placed, self.teacher)
        self.ledger.switch("step")
        self.unlogged.append({"step": step, "batch": self.next_batch, "sums": sums})
        self.step, self.next_batch = step, self.next_batch + 1
        self.in_flight.append(sums["loss"])
        if len(self.in_flight) > MAX_IN_FLIGHT:
            jax.block_until_ready(self.in_flight.popleft())
        if self.is_first_update:
            jax.block_until_ready(self.state)
            self.ledger.switch("save")
            self.saved.wait()  # fail early if the first checkpoint cannot be written
            self.ledger.switch("step")
            self.is_first_update = False
        if self.profiler.is_tracing and step == self.profiler.last:
            jax.block_until_ready(self.state)
            self._stop_trace()

    def _beat_update(self, step: int) -> None:
        self.watch.beat(f"update {step}", watchdog.SLOW_FACTOR if self.is_first_update else 1)

    def _with_student_answers(self, placed: batch.Batch) -> batch.Batch:
        """The batch with the student's own answers as targets, if it is an on-policy one.

        Waits for devices before and after, so that the ledger knows the time of decoding.
        """
        answers, step = self.setup.student_answers, self.step + 1
        if not answers.policy.is_on_policy(self.next_batch):
            return answers.mark_as_given(placed)
        self.ledger.switch("step")
        jax.block_until_ready(self.state)
        self.watch.beat(f"answers to learn from in update {step}", watchdog.SLOW_FACTOR)
        self.ledger.switch("compile" if self.is_first_decoding else "decode")
        params = self.setup.model_params(self.state.params)
        placed = jax.block_until_ready(answers.generate(params, placed, self.next_batch))
        self._beat_update(step)
        self.is_first_decoding = False
        return placed

    def _stop_trace(self) -> None:
        if self.profiler.is_tracing:
            self.watch.beat("the trace", watchdog.SLOW_FACTOR)
            if problem := self.profiler.stop():
                self._event("no trace", said=problem)

    def _due(self) -> set[str]:
        """The actions due after this update: at their multiples and after the last update.

        A log is also due after update 1. A resumed run so writes the rows of the unbroken one.
        """
        is_last = self.step == self.setup.total_steps
        due = {action for action, n in self.every.items() if is_last or self.step % n == 0}
        return due | {"log"} if due or self.step == 1 else due

    def _log_evaluate_save(self, due: set[str]) -> None:
        self._write_row()
        metrics = self._evaluate() if "evaluate" in due else None
        if self.early_stopping.is_over and self.step < self.setup.total_steps:
            self._event("ended early", said=self.early_stopping.reason)
            due.add("checkpoint")
        # Within a streak of bad updates nothing is saved: the checkpoint before it is needed.
        if "checkpoint" in due and (self._is_done() or not self.guard.bad_streak):
            self._save(metrics)
        if due - {"log"}:
            self.meter.start(self.step)
            self.ledger.write_row(self.step)  # evaluations are lost only with their update
        self.ledger.switch("other")

    # Reading results from devices. ------------------------------------------------------------

    def _fetch_sums(self) -> None:
        """Turn the unlogged sums into numbers; waits for the devices."""
        rows = [row for row in self.unlogged if isinstance(row["sums"]["loss"], jax.Array)]
        arrays = [row["sums"] for row in rows]
        self.watch.beat(f"update {self.step}")
        jax.block_until_ready(arrays[-1:])
        self.ledger.switch("log")
        self.in_flight.clear()
        for row, sums in zip(rows, self.strategy.fetch_numbers(arrays), strict=True):
            row["sums"] = {name: float(value) for name, value in sums.items()}

    def _check_updates(self) -> bool:
        """Check every update since the last row; returns whether to go on."""
        self._fetch_sums()
        answers = self.setup.student_answers
        for row in self.unlogged:
            sums = row["sums"]
            loss, is_finite = sums["loss"] / max(sums["weight"], 1.0), bool(sums["finite"])
            is_comparable = not answers or answers.policy.is_usual(row["batch"])
            bad = self.guard.check(row["step"], row["batch"], loss, is_finite, is_comparable)
            if bad:
                facts = {name: bad[name] for name in bad if name not in ("kind", "step")}
                self.log.event(bad["kind"], bad["step"], **facts, see=self._show_command(bad))
            if self.guard.should_roll_back:
                return False
        return True

    def _show_command(self, bad: dict) -> str:
        """The command that prints the batch of a bad update."""
        workdir = shlex.quote(str(self.run.workdir))
        return f"python -m lm show --workdir={workdir} --step={bad['batch'] + 1}"

    def _write_row(self) -> None:
        """Write the row of the updates since the last one; skipped updates do not count in it."""
        self.ledger.switch("log")
        finite = [row["sums"] for row in self.unlogged if row["sums"]["finite"]]
        num_skipped = int(self.unlogged[-1]["sums"]["skipped"])
        self.unlogged, metrics, tokens = [], {"loss": math.nan}, 0.0
        if finite:
            last = finite[-1]
            total = {name: float(sum(sums[name] for sums in finite)) for name in last}
            metrics, tokens = steps.metrics_from_sums(total), total["inputs"] + total["weight"]
            metrics |= {name: last[name] for name in last if "norm" in name or "ratio" in name}
        metrics["skipped"] = num_skipped
        metrics |= self.setup.learning_rates(max(0, self.step - 1 - num_skipped))
        throughput = self.meter.measure(self.step, tokens)
        memory, cost = logs.memory_peak(self.strategy.devices), self.setup.teacher_cost
        metrics |= throughput | live_teacher.cost_shares(cost, throughput, memory, self.ledger)
        metrics |= memory
        if self.run.data.max_bad_records:
            metrics["bad_records"] = len(self.setup.examples.damaged)
        metrics["goodput"] = self.ledger.write_row(self.step)
        self.log.write(self.step, "train", metrics)
        self.log.advance(self.step, metrics)

    def _evaluate(self) -> dict[str, float]:
        self.ledger.switch("evaluate")
        beat = lambda: self.watch.beat(f"evaluation {self.step}", watchdog.SLOW_FACTOR)
        average = self.state.average
        params = self.setup.model_params(self.state.params if average is None else average)
        self.metrics = steps.metrics_from_sums(self.setup.heldout.sums(params, beat=beat))
        if self.setup.task_scorer:
            self.metrics |= self.setup.task_scorer(params, beat=beat)
        self.early_stopping.update(self.step, self.metrics)
        self.log.write(self.step, "heldout", self.metrics)
        return self.metrics

    # Saving, rolling back, stopping. ----------------------------------------------------------

    def _save(self, metrics: dict[str, float] | None = None) -> None:
        """Start to save the state, unless its copies on different devices differ."""
        self.watch.beat(f"checkpoint {self.step}", watchdog.SLOW_FACTOR)
        self.ledger.switch("save")
        if leaf := self.strategy.find_disagreement(self.state):
            problem = f"copies of {leaf} on different devices differ in their bits"
            self._event("disagreement", said=problem)
            raise signals.Unfinished(
                f"{problem} after update {self.step}, as after a hardware error; run the same "
                f"command again to continue from update {self.saved_step}, without that device if "
                f"it happens again."
            )
        position = {"position": {"next_index": self.next_batch}, "unread": self.unlogged}
        memory = {"guard": self.guard.memory, "patience": self.early_stopping.memory}
        self.log.flush()  # a run that resumes here needs its earlier rows
        self.ledger.flush()
        state, facts = self.strategy.fetch(self.state), position | self.setup.facts | memory
        self.saved.save(state, facts, metrics)
        self.saved_step = self.step

    def _stop_after_signal(self) -> NoReturn:
        if self.saved_step != self.step:
            self._fetch_sums()
            self._save()
        self.saved.wait()
        self._event("stopped", signal=self.stop.name)
        self.ledger.write_row(self.step)
        raise signals.Unfinished(
            f"{self.stop.name} stopped the run after update {self.step} of "
            f"{self.setup.total_steps}, which is saved; run the same command again to continue."
        )

    def _roll_back(self) -> None:
        """Restore the state before the streak of bad updates, and skip all batches up to its end.

        Nothing is saved here: a run killed before its next checkpoint decides the same again.
        """
        bad, next_batch = self.guard.bad_streak, self.guard.bad_streak[-1]["batch"] + 1
        allowed = self.run.guard.max_rollbacks
        if self.guard.num_rollbacks >= allowed:
            self._give_up(bad, f"guard.max_rollbacks={allowed} did not help")
        self.watch.beat(f"the return from update {self.step}", watchdog.SLOW_FACTOR)
        self.ledger.switch("restore")
        self.saved.wait()
        self.state, self.unlogged, self.in_flight = None, [], collections.deque()
        checkpoint = self._restore_before(bad[0]["step"])
        if checkpoint is None:
            self._give_up(bad, "no checkpoint from before them is left")
        self.state, facts = self.strategy.place_state(checkpoint[0]), checkpoint[1]
        times = self.guard.roll_back(facts["guard"])
        skipped = (facts["position"]["next_index"], next_batch - 1)
        self._resume_from(facts | {"position": {"next_index": next_batch}})
        self.saved_step = self.step
        self.log.rewind(self.step)
        self.ledger.write_row(self.step)
        bad_steps = [row["step"] for row in bad]
        self._event("rollback", times=times, bad=bad_steps, passed_over=skipped)
        self.meter.start(self.step)

    def _restore_before(self, step: int) -> tuple[Any, dict] | None:
        """(state, facts) of the newest checkpoint from before an update, or None.

        Prefers a regular checkpoint to one saved after a signal: the unbroken run has no such.
        """
        is_before = lambda facts: facts["step"] < step and not facts["guard"]["row"]
        every = self.every["checkpoint"]
        is_regular = lambda facts: is_before(facts) and facts["step"] % every == 0
        for accept in (is_regular, is_before):
            try:
                shapes = self.strategy.abstract_state(self.setup.state_shapes)
                return self.saved.restore(shapes, accept)
            except checkpoints.Mismatch:
                continue
        return None

    def _give_up(self, bad: list[dict], why: str) -> NoReturn:
        learning_rate = self.run.optimizer.learning_rate
        sentence = (
            f"update {bad[-1]['step']} was the last of {len(bad)} in a row that were not finite or "
            f"spikes, and {why}; inspect their batches, listed in {self.run.workdir / DIVERGED}, "
            f"and lower optimizer.learning_rate={learning_rate} with "
            f"--allow_change=optimizer.learning_rate."
        )
        if not self.host:
            rows = [row | {"see": self._show_command(row)} for row in bad]
            report = {"what": sentence, "rollbacks": self.guard.num_rollbacks, "updates": rows}
            text = json.dumps(report, indent=2) + "\n"
            logs.write_atomically(self.run.workdir / DIVERGED, text)
        self._event("gave up", rollbacks=self.guard.num_rollbacks, report=DIVERGED)
        raise guard.Diverged(sentence)

    def _exit_lost_host(self, message: str) -> None:
        """Exit: steps in which the lost host takes part would never end."""
        try:
            self._event("lost host", said=message)
        finally:  # the log may be closed
            watchdog.exit_now(
                f"another host was lost at update {self.step}{message and f' ({message})'}; start "
                f"them all again to continue from update {self.saved_step}."
            )

    def _event(self, kind: str, **facts: Any) -> None:
        self.log.event(kind, self.step, **facts)
