"""Law of the time ledger: in a real run, a stall anywhere counts for its own kind."""

from __future__ import annotations

import itertools
import time

import jax
import pytest

from lm import checkpoints, evaluate, logs, pipeline, runs, steps, train


class Stalls:
    """A clock that jumps ahead at each stall, so that the test does not wait."""

    def __init__(self):
        self.ahead, self.counts = 0.0, {}

    def __call__(self) -> float:
        return time.time() + self.ahead

    def delay(self, kind: str, seconds: float, function):
        """Return the function with a stall before it, counting its calls."""

        def stalled(*arguments, **options):
            self.ahead += seconds
            self.counts[kind] = self.counts.get(kind, 0) + 1
            return function(*arguments, **options)

        return stalled


SECONDS = {"compile": 5e4, "input": 1e4, "save": 2e4, "evaluate": 4e4, "restore": 3e4}


@pytest.mark.slow
def test_each_stall_of_a_resumed_run_is_in_its_own_kind(tiny_config, tmp_path, monkeypatch):
    clock, time_ledger = Stalls(), logs.TimeLedger
    started = clock()
    monkeypatch.setattr(logs, "peak_flops", lambda devices: 1e12)
    monkeypatch.setattr(
        logs, "TimeLedger", lambda workdir: time_ledger(workdir, clock=clock, started=clock())
    )

    def stall(owner, name: str, kind: str):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, clock.delay(kind, SECONDS[kind], function))

    stall(steps, "train_step", "compile")  # called once per compilation
    stall(evaluate.HeldOut, "sums", "evaluate")
    stall(checkpoints.Checkpoints, "save", "save")
    stall(checkpoints.Checkpoints, "restore", "restore")
    train_batches = pipeline.train_batches

    def batches(*arguments, **options):
        fetch = clock.delay("input", SECONDS["input"], lambda rows: rows)
        return map(fetch, train_batches(*arguments, **options))

    def interrupted(*arguments, **options):
        yield from itertools.islice(batches(*arguments, **options), 5)
        raise KeyboardInterrupt

    run = runs.make_run(tiny_config(**{"checkpoint.every_steps": 2}), tmp_path / "run")
    monkeypatch.setattr(pipeline, "train_batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train(run, jax.devices()[:1])
    monkeypatch.setattr(pipeline, "train_batches", batches)
    train.train(run, jax.devices()[:1])  # updates 5 and 6; update 5 is repeated

    summary = logs.goodput(run.workdir)
    assert summary["wall"] == pytest.approx(clock() - started, rel=0.02)
    assert sum(summary["shares"].values()) == pytest.approx(1.0)
    spent = {kind: share * summary["wall"] for kind, share in summary["shares"].items()}
    lost = SECONDS["input"]  # of update 5, the first time
    expected = {kind: SECONDS[kind] * clock.counts[kind] for kind in SECONDS}
    expected["input"] -= lost
    assert clock.counts["input"] == 7 and clock.counts["compile"] >= 2
    assert {kind: spent[kind] for kind in SECONDS} == pytest.approx(expected, rel=0.1)
    assert spent["lost"] == pytest.approx(lost, rel=0.1)
    others = ("start", "step", "log", "other", "down")
    assert sum(spent[kind] for kind in others) < 0.01 * summary["wall"]
