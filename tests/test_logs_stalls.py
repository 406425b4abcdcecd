"""Law of the account: whatever holds up a real run, the seconds are in the kind they belong to."""

from __future__ import annotations

import itertools
import time

import jax
import pytest

from lm import checkpoints, evaluate, logs, pipeline, runs, steps, train


class Stalls:
    """The machine's clock, which jumps ahead where something is held up: no one waits for it."""

    def __init__(self):
        self.ahead, self.counts = 0.0, {}

    def __call__(self) -> float:
        return time.time() + self.ahead

    def before(self, kind: str, seconds: float, function):
        """The function, behind a stall; how often it was called is counted."""

        def stalled(*arguments, **options):
            self.ahead += seconds
            self.counts[kind] = self.counts.get(kind, 0) + 1
            return function(*arguments, **options)

        return stalled


SECONDS = {"compile": 5e4, "input": 1e4, "save": 2e4, "evaluate": 4e4, "restore": 3e4}


def test_each_stall_of_a_run_and_of_its_continuation_is_in_its_own_kind(
    tiny_config, tmp_path, monkeypatch
):
    clock, made = Stalls(), logs.TimeLedger
    began = clock()
    monkeypatch.setattr(logs, "peak_flops", lambda devices: 1e12)
    monkeypatch.setattr(logs, "Ledger", lambda workdir: made(workdir, clock=clock, started=clock()))

    def stall(owner, name: str, kind: str):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, clock.before(kind, SECONDS[kind], function))

    stall(steps, "train_step", "compile")  # python runs it when XLA's program is made of it
    stall(evaluate.HeldOut, "sums", "evaluate")
    stall(checkpoints.Checkpoints, "save", "save")
    stall(checkpoints.Checkpoints, "restore", "restore")
    whole = pipeline.train_batches

    def batches(*arguments, **options):
        fetch = clock.before("input", SECONDS["input"], lambda rows: rows)
        return map(fetch, whole(*arguments, **options))

    def stopped(*arguments, **options):
        yield from itertools.islice(batches(*arguments, **options), 5)
        raise KeyboardInterrupt

    run = runs.make_run(tiny_config(**{"checkpoint.every_steps": 2}), tmp_path / "run")
    monkeypatch.setattr(pipeline, "train_batches", stopped)
    with pytest.raises(KeyboardInterrupt):
        train.train(run, jax.devices()[:1])
    monkeypatch.setattr(pipeline, "train_batches", batches)
    train.train(run, jax.devices()[:1])  # updates 5 and 6; the first of them is taken again

    found = logs.goodput(run.workdir)
    assert found["wall"] == pytest.approx(clock() - began, rel=0.02)
    assert sum(found["shares"].values()) == pytest.approx(1.0)
    spent = {kind: share * found["wall"] for kind, share in found["shares"].items()}
    lost = SECONDS["input"]  # of update 5, the first time
    expected = {kind: SECONDS[kind] * clock.counts[kind] for kind in SECONDS}
    expected["input"] -= lost
    assert clock.counts["input"] == 7 and clock.counts["compile"] >= 2
    assert {kind: spent[kind] for kind in SECONDS} == pytest.approx(expected, rel=0.1)
    assert spent["lost"] == pytest.approx(lost, rel=0.1)
    others = ("start", "step", "log", "other", "down")
    assert sum(spent[kind] for kind in others) < 0.01 * found["wall"]
