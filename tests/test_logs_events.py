"""Laws of events: they only grow, a rewound log equals that of a run that stopped earlier,
a full disk is one sentence, and a pipe gets plain lines.
"""

from __future__ import annotations

import math
import os
import pathlib
import pty
import subprocess
import sys
import termios

import numpy as np
import pytest

from lm import logs
from tests.log_files import Clock, records

ROOT = pathlib.Path(__file__).parents[1]


def write_steps(workdir, steps, **options) -> None:
    with logs.RunLog(workdir, 100, name="pretrain", **options) as log:
        for step in steps:
            log.write(step, "train", {"loss": float(step)})


def test_events_are_rows_and_printed_lines_in_order_of_time(tmp_path, capsys):
    with logs.RunLog(tmp_path, 50, name="x", clock=Clock(7.0)) as log:
        log.event("skipped", 3, batch=3, why="the loss is nan", replay="lm show --step=3")
        log.event(
            "spike", 4, loss=np.float32(9.0), batches=[np.int64(4), 5], nested={"a": math.inf}
        )
        log.event("restart", 0)
        rows = logs.read(tmp_path / logs.EVENTS)  # before the close: each row is flushed
    assert [row["event"] for row in rows] == ["skipped", "spike", "restart"]
    assert rows[0]["why"] == "the loss is nan" and rows[0]["step"] == 3
    assert type(rows[1]["batches"][0]) is int
    spike = {"loss": 9.0, "batches": [4, 5], "nested": {"a": "Infinity"}, "time": 7.0}
    assert rows[1] == {"step": 4, "event": "spike"} | spike
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 3/50  skipped: batch 3, why the loss is nan, replay lm show --step=3"
    assert len(lines) == 3 and lines[2] == "step 0/50  restart"


def test_events_are_never_removed(tmp_path):
    for resume in (0, 20, 0):
        with logs.RunLog(tmp_path, 50, name="x", resume_step=resume) as log:
            log.event("start", resume)
            log.event("far", 45)
            log.rewind(resume)
    assert [r["step"] for r in logs.read(tmp_path / logs.EVENTS)] == [0, 45, 20, 45, 0, 45]


@pytest.mark.parametrize("torn", ['{"st', '{"step": 30, "event": ', "\0\0"])
def test_a_torn_last_event_is_dropped(tmp_path, torn):
    with logs.RunLog(tmp_path, 50, name="x") as log:
        log.event("one", 1)
    path = tmp_path / logs.EVENTS
    path.write_text(path.read_text() + torn)
    with logs.RunLog(tmp_path, 50, name="x", resume_step=1) as log:
        log.event("two", 2)
    assert [row["event"] for row in logs.read(path)] == ["one", "two"]


def test_a_rewound_log_equals_that_of_a_run_that_stopped_earlier(tmp_path):
    with logs.RunLog(tmp_path, 100, name="x", clock=Clock()) as log:
        for step in (10, 20, 30, 40):
            log.write(step, "train", {"loss": 1.0})
        log.rewind(20)
        log.write(30, "train", {"loss": 3.0})
    rows = [(row["step"], row["loss"]) for row in logs.read(tmp_path / logs.METRICS)]
    assert rows == [(10, 1.0), (20, 1.0), (30, 3.0)]
    (path,) = (tmp_path / logs.TENSORBOARD).iterdir()
    from tensorboardX.proto import event_pb2

    events = [event_pb2.Event.FromString(record) for record in records(path)]
    assert events[0].file_version == "brain.Event:2"
    restarts = [(i, e.step) for i, e in enumerate(events) if e.HasField("session_log")]
    assert restarts == [(5, 21)]  # readers drop earlier events of updates from 21


def test_tensorboard_records_have_the_checksums_that_readers_verify(tmp_path):
    """Masked CRC-32C of TFRecord files; the CRC of "123456789" is e3069283."""
    write_steps(tmp_path, [1])
    (path,) = (tmp_path / logs.TENSORBOARD).iterdir()
    data, offset, count = path.read_bytes(), 0, 0
    while offset < len(data):
        length = int.from_bytes(data[offset : offset + 8], "little")
        end = offset + 12 + length
        for start, stop in ((offset, offset + 8), (offset + 12, end)):
            checksum = int.from_bytes(data[stop : stop + 4], "little")
            assert checksum == masked_crc(data[start:stop])
        offset, count = end + 4, count + 1
    assert (offset, count) == (len(data), 2)
    assert crc32c(b"123456789") == 0xE3069283


def crc32c(data: bytes) -> int:
    """Compute CRC-32C (Castagnoli) bit by bit."""
    rest = 0xFFFFFFFF
    for byte in data:
        rest ^= byte
        for _ in range(8):
            rest = rest >> 1 ^ (0x82F63B78 if rest & 1 else 0)
    return rest ^ 0xFFFFFFFF


def masked_crc(data: bytes) -> int:
    total = crc32c(data)
    return ((total >> 15 | total << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_the_eta_excludes_compilation_and_restarts_after_a_rewind(tmp_path, capsys):
    clock = Clock()
    with logs.RunLog(tmp_path, 1000, name="x", clock=clock) as log:
        for step, seconds in ((1, 60.0), (11, 1.0), (21, 1.0), (11, 50.0), (21, 2.0), (31, 1.0)):
            clock.now += seconds
            if step == 11 and seconds == 50.0:
                log.rewind(11)
            else:
                log.write(step, "train", {"loss": 1.0})
    etas = [line.rpartition("eta ")[2] for line in capsys.readouterr().err.splitlines()]
    # At 0.1 s an update, the remaining 989 take 99 s; only the first row includes compilation.
    assert etas == ["16:39:00", "0:01:39", "0:01:38", "0:03:16", "0:01:37"]


def test_the_eta_of_a_resumed_run_counts_its_own_updates_only(tmp_path, capsys):
    clock = Clock()
    with logs.RunLog(tmp_path, 1000, name="x", resume_step=900, clock=clock) as log:
        for step in (910, 920):
            clock.now += 5.0
            log.write(step, "train", {"loss": 1.0})
        log.write(920, "heldout", {"nats": 1.0})
    etas = [line.partition("eta ")[2] for line in capsys.readouterr().err.splitlines()]
    assert etas == ["0:00:45", "0:00:40", ""]


SCRIPT = """
import sys
from lm import logs
with logs.RunLog(sys.argv[1], 30, name="x") as log:
    for step in (10, 20, 30):
        log.write(step, "train", {"loss": 1.0, "tokens_per_second": 5.0})
        log.advance(step, {"loss": 1.0})
        log.event("spike", step, text="two\\nlines")
    log.rewind(10)
    log.write(20, "heldout", {"nats": 2.0})
"""


def test_a_pipe_gets_one_plain_line_per_row_and_event(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    assert done.stdout == b""
    lines = done.stderr.decode().split("\n")
    assert len(lines) == 3 + 3 + 1 + 1 and lines[-1] == ""
    assert all(line.startswith("step ") and line.isprintable() for line in lines[:-1])


def test_a_terminal_shows_events_above_the_bar(tmp_path):
    parent, child = pty.openpty()
    termios.tcsetwinsize(parent, (24, 80))
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    subprocess.run(command, cwd=ROOT, stderr=child, check=True)
    os.close(child)
    output = os.read(parent, 65536).decode()
    os.close(parent)
    assert output.count("spike: text two lines\r\n") == 3
    assert "x:" in output and "30/30" in output


FULL = """
import resource, sys
from lm import logs
log, ledger = logs.RunLog(sys.argv[1], 1000, name="x"), logs.TimeLedger(sys.argv[1])
ledger.write_row(0)
most = resource.RLIM_INFINITY
for act in (
    lambda n: log.write(n, "train", {"loss": 1.0 / 3}),
    lambda n: log.event("spike", n),
    lambda n: ledger.write_row(n),
):
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, most))
    try:
        for number in range(1000):
            act(number)
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        print(error, number)
log.close()  # no write is repeated
"""


def test_a_full_disk_is_one_error_and_earlier_rows_stay(tmp_path):
    """The next scalar does not block, as it would after the death of a writer thread."""
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [
        line.partition(" cannot be written (File too large); check the")[0]
        for line in output.splitlines()
    ]
    assert [pathlib.Path(file).parent for file in files[1:]] == [tmp_path] * 2
    assert [pathlib.Path(file).name for file in files[1:]] == [logs.EVENTS, logs.GOODPUT]
    assert tmp_path in pathlib.Path(files[0]).parents
    for name in (logs.METRICS, logs.EVENTS, logs.GOODPUT):
        steps = [row["step"] for row in logs.read(tmp_path / name)]
        assert len(steps) > 5 and steps == sorted(steps)  # a torn row is dropped
    count = int(output.splitlines()[1].split()[-1])  # events before the refused one
    assert len(logs.read(tmp_path / logs.EVENTS)) == count
    write_steps(tmp_path, [999], resume_step=998)
    assert logs.read(tmp_path / logs.METRICS)[-1]["step"] == 999


def test_an_unwritable_folder_is_one_sentence(tmp_path):
    with pytest.raises(OSError, match="gone/a.txt cannot be written .No such file or directory"):
        logs.write_atomically(tmp_path / "gone" / "a.txt", "text")


def test_memory_peak_is_named_after_device_or_process():
    class Device:
        def __init__(self, stats, process_index=0):
            self.memory_stats, self.process_index = lambda: stats, process_index

    devices = [Device({"peak_bytes_in_use": n << 30}, i) for n, i in ((3, 0), (5, 0), (9, 1))]
    assert logs.memory_peak(devices) == {"device_memory_peak_gib": 5.0}
    for devices in ([Device(None)], [Device({})]):
        ((name, used),) = logs.memory_peak(devices).items()
        assert name == "process_memory_peak_gib"
        assert 0.02 < used < 64
    array = np.ones(1 << 26)  # 0.5 GiB
    assert logs.memory_peak([Device(None)])["process_memory_peak_gib"] > used - 0.1 and array.any()
