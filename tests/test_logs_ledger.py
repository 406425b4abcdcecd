"""Laws of the time ledger: each second has one kind, through stalls, kills and repeated updates."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import time

import pytest

from lm import logs


class Clock:
    """A clock that the test advances."""

    def __init__(self, now: float = 1000.0):
        self.now = now

    def __call__(self) -> float:
        return self.now


def session(workdir, clock, first: int, stop: int, *, every=10, killed=False, **stalls):
    """Run updates first + 1 to stop, 0.1 s each, in a new process; a kind stalls once.

    Returns the goodput of the last row.
    """
    ledger = logs.TimeLedger(workdir, clock=clock, started=clock.now)
    spend(ledger, clock, "start", stalls.get("start", 5.0))
    spend(ledger, clock, "restore", stalls.get("restore", 0.0))
    share = ledger.write_row(first)
    spend(ledger, clock, "compile", stalls.get("compile", 20.0))
    for step in range(first + 1, stop + 1):
        spend(ledger, clock, "input", 0.01)
        spend(ledger, clock, "step", 0.1)
        if step % every == 0:
            share = ledger.write_row(step)
    for kind in ("input", "step", "decode", "save", "evaluate", "log", "other"):
        spend(ledger, clock, kind, stalls.get(kind, 0.0))
    if killed:
        clock.now += killed
    else:
        ledger.__exit__(None, None, None)
    return share


def spend(ledger, clock, kind: str, seconds: float) -> None:
    ledger.switch(kind)
    clock.now += seconds


def seconds_of(workdir) -> dict[str, float]:
    summary = logs.goodput(workdir)
    assert sum(summary["shares"].values()) == pytest.approx(1.0, abs=1e-12)
    assert summary["goodput"] == summary["shares"]["step"] + summary["shares"]["decode"]
    return {kind: share * summary["wall"] for kind, share in summary["shares"].items()}


def test_kinds_sum_to_the_wall_time(tmp_path):
    clock = Clock()
    session(tmp_path, clock, 0, 100, save=3.0, evaluate=7.0, log=0.5, other=0.25, decode=2.0)
    summary = logs.goodput(tmp_path)
    assert summary["wall"] == pytest.approx(clock.now - 1000)
    expected = {"start": 5, "compile": 20, "input": 1, "step": 10, "save": 3, "evaluate": 7}
    expected |= {"decode": 2, "log": 0.5, "other": 0.25, "restore": 0, "lost": 0, "down": 0}
    assert seconds_of(tmp_path) == pytest.approx(expected)
    assert summary["sessions"] == 1


def test_seconds_since_row_start_at_the_last_row(tmp_path):
    clock = Clock()
    ledger = logs.TimeLedger(tmp_path, clock=clock, started=clock.now)
    for seconds in (1.0, 4.0):
        spend(ledger, clock, "decode", seconds)
        spend(ledger, clock, "step", 2.0)
        ledger.switch("log")
        assert ledger.seconds_since_row("decode") == pytest.approx(seconds)
        assert ledger.seconds_since_row("step") == pytest.approx(2.0)
        ledger.write_row(1)
        assert ledger.seconds_since_row("decode") == 0


@pytest.mark.parametrize("kind", ["start", "compile", "input", "step", "save", "evaluate", "other"])
def test_a_stall_counts_for_its_kind_only(kind, tmp_path):
    clock = Clock()
    session(tmp_path / "smooth", clock, 0, 20)
    session(tmp_path / "stalled", clock, 0, 20, **{kind: 60.0})
    smooth, stalled = seconds_of(tmp_path / "smooth"), seconds_of(tmp_path / "stalled")
    usual = {"start": 5.0, "compile": 20.0}.get(kind, 0.0)
    differing = {k: stalled[k] - smooth[k] for k in smooth if stalled[k] - smooth[k] > 1e-9}
    assert differing == pytest.approx({kind: 60.0 - usual})


def test_real_stalls_are_within_a_tenth_and_the_sum_within_a_fiftieth(tmp_path):
    stalls, started = {"compile": 0.2, "input": 0.1, "save": 0.15, "evaluate": 0.12}, time.time()
    with logs.TimeLedger(tmp_path, started=started) as ledger:
        ledger.write_row(0)
        for kind, seconds in stalls.items():
            start = time.perf_counter()
            ledger.switch(kind)
            time.sleep(seconds)
            stalls[kind] = time.perf_counter() - start  # sleeps are late on a busy machine
        ledger.switch("step")
    wall, spent = time.time() - started, seconds_of(tmp_path)
    assert sum(spent.values()) == pytest.approx(wall, rel=0.02)
    assert {kind: spent[kind] for kind in stalls} == pytest.approx(stalls, rel=0.1)


def test_an_unknown_kind_names_the_nearest(tmp_path):
    with logs.TimeLedger(tmp_path) as ledger, pytest.raises(ValueError, match="'evaluate'"):
        ledger.switch("evalute")


def test_repeated_updates_are_lost_and_the_gap_is_down(tmp_path):
    clock = Clock()
    session(tmp_path, clock, 0, 50, killed=4.0)  # the last checkpoint was of update 30
    clock.now += 6.0
    session(tmp_path, clock, 30, 60, restore=2.0)
    spent = seconds_of(tmp_path)
    assert spent["lost"] == pytest.approx(20 * 0.11)
    assert spent["step"] == pytest.approx(60 * 0.1)
    assert spent["input"] == pytest.approx(60 * 0.01)
    assert spent["down"] == pytest.approx(10.0)  # 4 s until the kill are in no row
    assert (spent["start"], spent["compile"]) == pytest.approx((10.0, 40.0))
    assert sum(spent.values()) == pytest.approx(clock.now - 1000)
    assert logs.goodput(tmp_path)["sessions"] == 2


def test_a_restart_between_rows_loses_its_share_of_them(tmp_path):
    clock = Clock()
    session(tmp_path, clock, 0, 40, every=20, killed=1.0)
    session(tmp_path, clock, 25, 40, every=20)
    spent = seconds_of(tmp_path)
    assert spent["lost"] == pytest.approx(15 * 0.11)
    assert spent["step"] == pytest.approx(40 * 0.1)


def test_a_run_killed_before_its_first_checkpoint_loses_all_updates(tmp_path):
    clock = Clock()
    session(tmp_path, clock, 0, 30, killed=1.0)
    session(tmp_path, clock, 0, 30, killed=1.0)
    session(tmp_path, clock, 0, 30)
    spent = seconds_of(tmp_path)
    assert spent["step"] == pytest.approx(3.0)
    assert spent["lost"] == pytest.approx(2 * 30 * 0.11)


def test_updates_done_three_times_are_lost_twice_and_counted_once(tmp_path):
    clock = Clock()
    session(tmp_path, clock, 0, 50, killed=1.0)
    session(tmp_path, clock, 40, 70, killed=1.0)
    session(tmp_path, clock, 20, 70)
    spent = seconds_of(tmp_path)
    assert spent["step"] == pytest.approx(70 * 0.1)
    assert spent["lost"] == pytest.approx((30 + 30) * 0.11)
    assert sum(spent.values()) == pytest.approx(clock.now - 1000)


def test_a_roll_back_loses_the_updates_and_the_time_after_them(tmp_path):
    clock = Clock()
    with logs.TimeLedger(tmp_path, clock=clock, started=clock.now) as ledger:
        ledger.write_row(0)
        for step in range(1, 11):
            spend(ledger, clock, "step", 1.0)
            ledger.write_row(step)
        spend(ledger, clock, "step", 0.5)  # the update that is rolled back
        spend(ledger, clock, "restore", 3.0)
        assert ledger.write_row(6) == pytest.approx(logs.goodput(tmp_path)["goodput"])
        spend(ledger, clock, "step", 1.0)
        assert ledger.write_row(7) == pytest.approx(7 / 14.5)
    assert seconds_of(tmp_path) == pytest.approx(
        dict.fromkeys([*logs.KINDS, "down"], 0.0) | {"step": 7.0, "lost": 4.5, "restore": 3.0}
    )


def test_an_evaluation_of_lost_updates_is_lost(tmp_path):
    clock = Clock()
    session(tmp_path, clock, 0, 40, evaluate=9.0)
    session(tmp_path, clock, 30, 40)
    assert seconds_of(tmp_path)["lost"] == pytest.approx(10 * 0.11 + 9.0)


def test_the_goodput_of_a_row_is_that_of_the_file(tmp_path):
    clock = Clock()
    for start, stop in ((0, 50), (30, 60), (30, 90), (0, 20)):
        share = session(tmp_path, clock, start, stop, killed=0.0, restore=1.0)
        assert share == pytest.approx(logs.goodput(tmp_path)["goodput"], abs=1e-9)
        clock.now += 3.0


def test_a_run_without_rows_has_no_wall_time(tmp_path):
    summary = logs.goodput(tmp_path)
    assert (summary["wall"], summary["goodput"], summary["sessions"]) == (0.0, 0.0, 0)
    with (
        pytest.raises(ValueError, match="another config"),
        logs.TimeLedger(tmp_path / "new") as ledger,
    ):
        ledger.switch("restore")
        raise ValueError("another config")  # a rejected run writes no file
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [1, 7, 60])
def test_a_torn_last_row_is_dropped_and_the_next_session_goes_on(cut, tmp_path):
    clock = Clock()
    session(tmp_path, clock, 0, 30, killed=1.0)
    path = tmp_path / logs.GOODPUT
    path.write_bytes(path.read_bytes()[:-cut])
    session(tmp_path, clock, 20, 40)
    rows = logs.read(path)
    assert [row["session"] for row in rows] == sorted(row["session"] for row in rows)
    assert sum(seconds_of(tmp_path).values()) == pytest.approx(clock.now - 1000)


def test_two_runs_of_one_process_count_its_start_once(tmp_path):
    clock = Clock()
    session(tmp_path, clock, 0, 10)
    with logs.TimeLedger(tmp_path, clock=clock, started=900.0) as ledger:  # long before the first
        clock.now += 1.0
        ledger.write_row(10)
    spent = seconds_of(tmp_path)
    assert spent["start"] == pytest.approx(6.0)
    assert spent["down"] == 0.0


SCRIPT = """
import sys, time
time.sleep(0.4)
from lm import logs
with logs.TimeLedger(sys.argv[1]) as ledger:
    ledger.write_row(0)
"""


def test_time_before_the_ledger_exists_is_start(tmp_path):
    started = time.time()
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    subprocess.run(command, cwd=pathlib.Path(__file__).parents[1], check=True)
    row = logs.read(tmp_path / logs.GOODPUT)[0]
    assert started - 0.05 < row["start"] < row["time"] - 0.4 < time.time() - 0.4
    assert row["seconds"] == pytest.approx({"start": row["time"] - row["start"]})


def test_without_proc_the_cpu_time_gives_the_start(monkeypatch):
    from lm.logs import time_ledger

    monkeypatch.setattr(time_ledger.pathlib.Path, "read_text", lambda self: "no such thing")
    monkeypatch.setattr(time_ledger.time, "process_time", lambda: 2.5)
    assert time_ledger.process_start_time(100.0) == 97.5


def test_a_null_log_accepts_every_call_and_writes_nothing(tmp_path):
    with logs.NullLog() as silent:
        silent.write(1, "train", {"loss": 1.0})
        silent.event("spike", 1, loss=9.0)
        silent.rewind(0)
        silent.advance(1)
        silent.switch("step")
        assert silent.write_row(1) == 0.0
    assert list(tmp_path.iterdir()) == []


def test_rows_are_cumulative_flushed_and_small(tmp_path):
    clock = Clock()
    session(tmp_path, clock, 0, 30, killed=1.0)  # rows are on disk without a close
    rows = [json.loads(text) for text in (tmp_path / logs.GOODPUT).read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 10, 20, 30]
    for row in rows:
        assert sum(row["seconds"].values()) == pytest.approx(row["time"] - row["start"])
        assert len(json.dumps(row)) < 300
    steps = [row["seconds"].get("step", 0.0) for row in rows]
    assert steps == sorted(steps)
