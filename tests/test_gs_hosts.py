"""Laws of gs:// with processes of the command line: two hosts share only a bucket."""

from __future__ import annotations

import json
import os
import pathlib
import signal

import pytest

from experiments.kill_drill import children, drill, outcome
from lm import runs, storage
from tests import gcs, host_processes

pytestmark = pytest.mark.slow

STEPS, SAVE = 4, 2
VARIABLES = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")


@pytest.fixture(scope="module")
def config(tiny_config, tiny_tokens, bucket, tmp_path_factory):
    """A file for --config of a tiny run with dropout and prepared shards, copied to the bucket."""
    path = tmp_path_factory.mktemp("hosts") / "config.py"
    changes = {
        "steps": STEPS,
        "checkpoint.every_steps": SAVE,
        "eval_every_steps": STEPS,
        "checkpoint.max_to_keep": 2,
    }
    run_config = tiny_config(**changes, **{"model.dropout_rate": 0.1, "evaluate.max_examples": 8})
    path.write_text(host_processes.CONFIG)
    path.with_suffix(".json").write_text(json.dumps(run_config))
    with pytest.MonkeyPatch.context() as patch:
        cache = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
        for key, value in children.surroundings(cache).items():
            patch.setenv(key, value)
        yield path


def start(config, workdir, name: str) -> list[children.Child]:
    """Two processes of one run, each with its own device and home, as on two machines."""
    port, started = drill.free_port(), []
    for host in range(2):
        flags = ["train", f"--config={config}", f"--workdir={workdir}", "--hosts=2"]
        flags += [f"--coordinator=127.0.0.1:{port}", f"--host={host}"]
        variables = {key: os.environ[key] for key in VARIABLES}
        variables["HOME"] = str(config.parent / f"home{host}")
        log = config.parent / f"{name}.{host}.log"
        started.append(children.Child(flags, log, environment=variables))
    return started


def test_killed_hosts_with_a_bucket_resume_to_the_result_of_a_disk(
    config, bucket, store, tmp_path, monkeypatch
):
    on_disk = start(config, tmp_path / "disk", "disk")
    assert host_processes.ends(on_disk) == [0, 0], on_disk[0].said() + on_disk[1].said()

    workdir, killed = storage.as_path(f"{bucket}/pair"), []

    def kill(write: bool, name: str) -> bool:  # during the last save
        if write and f"/pair/checkpoints/{STEPS}" in name and not killed:
            killed.extend(child.send(signal.SIGKILL) for child in pair)
        return False

    monkeypatch.setattr(store, "refused", kill)
    pair = start(config, workdir, "killed")
    codes = host_processes.ends(pair)
    assert codes == [-signal.SIGKILL] * 2 and all(killed), pair[0].said() + pair[1].said()
    saved = [workdir / "checkpoints" / str(at) / "commit_success.txt" for at in (SAVE, STEPS)]
    assert [mark.exists() for mark in saved] == [True, False]
    assert runs.is_claimed(workdir)

    pair = start(config, workdir, "again")
    assert host_processes.ends(pair) == [0, 0], pair[0].said() + pair[1].said()
    copy = gcs.download(f"{bucket}/pair", tmp_path / "copy")
    assert outcome.differences(outcome.read(copy), outcome.read(tmp_path / "disk")) == []
    assert "resumed" in [row["event"] for row in outcome.rows(copy, "events.jsonl")]
