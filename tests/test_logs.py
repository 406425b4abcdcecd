"""Laws of the logs: each step once, legal rows, exact throughput, peak FLOP/s of all devices."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import types

import numpy as np
import pytest

from lm import logs
from lm.logs import throughput
from tests.log_files import Clock, records  # noqa: F401


def write_steps(workdir, steps, **options):
    with logs.RunLog(workdir, 100, name="pretrain", **options) as log:
        for step in steps:
            log.write(step, "train", {"loss": 1.0 / (1 + step)})
            log.advance(step, {"loss": 1.0 / (1 + step)})


def steps_of(workdir):
    return [row["step"] for row in logs.read(workdir / "metrics.jsonl")]


def test_written_rows_are_read_back(tmp_path):
    with logs.RunLog(tmp_path, 10, name="x", clock=Clock(5.5)) as log:
        log.write(1, "train", {"loss": np.float32(0.5), "tokens": 7})
        log.write(1, "heldout", {"nats": 2.0})
        rows = logs.read(tmp_path / "metrics.jsonl")  # before the close: each row is flushed
    assert rows == [
        {"step": 1, "split": "train", "loss": 0.5, "tokens": 7, "time": 5.5},
        {"step": 1, "split": "heldout", "nats": 2.0, "time": 5.5},
    ]


def test_every_row_is_legal_json_and_round_trips(tmp_path):
    non_finite = {"a": math.nan, "b": math.inf, "c": np.float32("-inf"), "d": 1e-300}
    with logs.RunLog(tmp_path, 10, name="x") as log:
        log.write(1, "train", non_finite)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    (row,) = logs.read(tmp_path / "metrics.jsonl")
    assert math.isnan(row["a"])
    assert (row["b"], row["c"], row["d"]) == (math.inf, -math.inf, 1e-300)


def test_an_unknown_split_is_one_sentence(tmp_path):
    with (
        logs.RunLog(tmp_path, 10, name="x") as log,
        pytest.raises(ValueError, match="heldout, train"),
    ):
        log.write(1, "held_out", {})


def test_a_resumed_log_has_each_step_once(tmp_path):
    write_steps(tmp_path, [10, 20, 30, 40])
    write_steps(tmp_path, [30, 40, 50], resume_step=20)
    assert steps_of(tmp_path) == [10, 20, 30, 40, 50]


def test_a_fresh_run_empties_the_log(tmp_path):
    write_steps(tmp_path, [0, 10, 20])
    write_steps(tmp_path, [0, 10])
    assert steps_of(tmp_path) == [0, 10]


@pytest.mark.parametrize("torn", ['{"st', '{"step": 30, "loss": ', '"', "{", "\0\0\0"])
def test_a_torn_last_line_is_dropped_and_the_run_goes_on(tmp_path, torn):
    write_steps(tmp_path, [10, 20])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + torn)
    assert steps_of(tmp_path) == [10, 20]
    write_steps(tmp_path, [30], resume_step=20)
    assert steps_of(tmp_path) == [10, 20, 30]


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_log_cut_anywhere_keeps_its_whole_lines(tmp_path, cut):
    write_steps(tmp_path, [10, 20])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    # A last row that lacks only its newline (cut 1) is complete.
    assert steps_of(tmp_path) == ([10, 20] if cut == 1 else [10])


@pytest.mark.parametrize("bad", ["{torn", "3", "[1, 2]", "null"])
def test_a_bad_line_in_the_middle_is_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + bad + '\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not a JSON object"):
        logs.read(path)


def test_only_newlines_end_a_line(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"inputs": "a\u2028b\x85c"}\n\n', encoding="utf-8")
    assert logs.read(path) == [{"inputs": "a\u2028b\x85c"}]
    assert logs.read(tmp_path / "absent.jsonl") == []


def test_tensorboard_tags_have_the_split_and_repeated_steps_are_purged(tmp_path):
    from tensorboardX.proto import event_pb2

    write_steps(tmp_path, [10, 20, 30])
    write_steps(tmp_path, [30], resume_step=20)
    files = sorted((tmp_path / "tensorboard").iterdir(), key=lambda p: p.name.rsplit(".", 1)[-1])
    events = [[event_pb2.Event.FromString(r) for r in records(path)] for path in files]
    scalars = [(e.step, v.tag) for file in events for e in file for v in e.summary.value]
    assert scalars == [(step, "train/loss") for step in (10, 20, 30, 30)]
    restarts = [e.step for e in events[1] if e.HasField("session_log")]
    assert restarts == [21]  # readers drop the first file's later steps


def test_without_a_terminal_each_row_is_one_line_with_an_eta(tmp_path, monkeypatch):
    stream, clock = io.StringIO(), Clock()
    monkeypatch.setattr(sys, "stderr", stream)
    with logs.RunLog(tmp_path, 2000, name="x", resume_step=100, clock=clock) as log:
        clock.now += 10
        log.write(200, "train", {"loss": 5.3125, "tokens_per_second": 12345.6, "mfu": 0.5})
        log.advance(200, {"loss": 5.3125})
        log.write(200, "heldout", {"nats": 5.5, "token_accuracy": 0.5, "bleu": 12.345, "a/f1": 7})
    # 100 updates in 10 s, 1800 to go: the resumed 100 are not part of the rate.
    assert stream.getvalue().splitlines() == [
        "step 200/2000  loss 5.312  12,346 tok/s  eta 0:03:00",
        "step 200/2000  held-out nats 5.5  bleu 12.35  a/f1 7",
    ]


def test_a_terminal_shows_a_bar_that_starts_at_the_resumed_step(tmp_path, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    with logs.RunLog(tmp_path, 40, name="finetune", resume_step=10) as log:
        log.write(20, "train", {"loss": 1.25})
        log.write(20, "heldout", {"nats": 1.5})
        log.advance(20, {"loss": 1.25})
    output = stream.getvalue()
    assert "finetune" in output
    assert "10/40" in output
    assert "20/40" in output
    assert "loss=1.25" in output
    assert "held-out=1.5" in output
    assert "step 20" not in output


def make_meter(clock):
    return logs.ThroughputMeter(flops_per_step=6e9, peak_flops=48e9, devices=4, clock=clock)


def test_throughput_is_of_the_interval_and_the_first_is_skipped():
    clock = Clock()
    meter = make_meter(clock)
    clock.now += 60  # compilation
    assert meter.measure(10, 5120) == {}
    clock.now += 5
    expected = {"step_seconds": 0.25, "tokens_per_second": 2048.0, "mfu": 0.5}
    assert meter.measure(30, 10240) == expected | {"tokens_per_second_per_device": 512.0}
    clock.now += 1
    assert meter.measure(31, 512)["step_seconds"] == 1.0
    assert meter.measure(31, 512) == {}


def test_an_evaluation_between_log_points_is_not_measured():
    clock = Clock()
    meter = make_meter(clock)
    meter.start(1)
    clock.now += 2
    assert meter.measure(3, 512)["step_seconds"] == 1.0
    clock.now += 100
    meter.start(3)
    clock.now += 1
    assert meter.measure(7, 512)["step_seconds"] == 0.25


def device(kind, platform="tpu", process_index=0):
    return types.SimpleNamespace(device_kind=kind, platform=platform, process_index=process_index)


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
    ],
)
def test_listed_devices_have_their_published_peak_and_add_up(kind, tera):
    assert logs.peak_flops([device(kind)]) == tera * 1e12
    assert logs.peak_flops([device(kind)] * 4) == 4 * tera * 1e12


def test_fake_cpu_devices_share_the_machine_and_processes_add_up(monkeypatch):
    monkeypatch.setattr(throughput, "measured_flops", lambda device: 1e9)
    assert logs.peak_flops([device("cpu", "cpu")] * 8) == 1e9
    devices = [device("cpu", "cpu", process_index=i) for i in (0, 0, 1, 1)]
    assert logs.peak_flops(devices) == 2e9
    assert logs.peak_flops([device("unlisted", "gpu")] * 8) == 8e9


def test_a_measured_peak_is_plausible():
    import jax

    assert 1e8 < logs.measured_flops(jax.devices("cpu")[0]) < 1e14


def test_the_manifest_has_facts_command_and_versions(tmp_path):
    logs.write_manifest(tmp_path / "new", {"params": 12, "stage": "pretrain"})
    manifest = json.loads((tmp_path / "new" / "run.json").read_text())
    assert (manifest["params"], manifest["stage"]) == (12, "pretrain")
    assert manifest["versions"]["numpy"] == np.__version__
    assert manifest["python"].split(".")[0] == "3"
    assert {"command", "commit", "platform"} <= set(manifest)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run.json"]  # no temporary file


def test_the_recorded_command_can_be_run_again():
    command = logs.command(
        ["/x y/lm/__main__.py", "train", "--config=a.py:tiny", "--name=devices words"]
    )
    assert command == "python -m lm train --config=a.py:tiny '--name=devices words'"
    assert logs.command(["bench.py", "x"]) == "python bench.py x"


def test_the_commit_is_none_outside_git_and_for_untracked_code(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert logs.commit(tmp_path) is None
    try:
        subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    assert logs.commit(tmp_path) is None
    (tmp_path / "a").write_text("1")
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", "-C", str(tmp_path), "add", "a"], check=True)
    subprocess.run(["git", "-C", str(tmp_path), *author, "commit", "-qm", "a"], check=True)
    clean = logs.commit(tmp_path)
    assert len(clean) == 40
    (tmp_path / "a").write_text("2")
    assert logs.commit(tmp_path) == clean + "-dirty"
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "logs.py").touch()
    assert logs.commit(tmp_path / ".venv") is None  # not the commit of the enclosing repository
    monkeypatch.setenv("PATH", "")
    assert logs.commit(tmp_path) is None


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    logs.write_atomically(path, "old")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        logs.write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    logs.write_atomically(path, "lone \ud800 surrogate")
    assert path.read_text() == "lone \\ud800 surrogate"
