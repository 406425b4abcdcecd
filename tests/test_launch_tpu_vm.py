"""Laws of a queued resource: one run, through preemptions, and nothing left standing behind it."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from experiments.launch import __main__ as launch
from experiments.launch import tpu_vm
from lm import exits
from tests.cloud import cloud  # noqa: F401  (a fixture)

WORDS = ["--on=tpu-vm", "--slice=v5e-8", "--zone=us-central1-a", "--no-preflight", "--name=mine"]
WORDS += ["--", "train", "--config=configs/pretrain.py:tiny", "--workdir=gs://bucket/run"]
WAITED = ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
ONCE = ["create", "scp", "ssh", "ssh"]


def test_a_run_waits_for_its_resource_and_gives_it_back(cloud, capfd):  # noqa: F811
    cloud.plot(states=WAITED)
    assert launch.main(WORDS) == 0
    assert cloud.verbs() == [*ONCE, "delete"] and not (cloud.home / "state").exists()
    said = capfd.readouterr()
    assert "mine is WAITING_FOR_RESOURCES" in said.err
    train = "-m lm train --config=configs/pretrain.py:tiny --workdir=gs://bucket/run"
    assert said.out == f"host 0 is at step 0: {train}\n", "what the hosts say, and no more"


def test_a_preempted_run_goes_on_with_a_new_resource(cloud, capfd):  # noqa: F811
    cloud.plot(states=[*WAITED, *["ACTIVE"] * 9], lives=[["preempted", "preempted", "0"]])
    assert launch.main(WORDS) == 0
    assert cloud.verbs() == [*ONCE, "delete"] * 3
    said = capfd.readouterr()
    assert said.err.count("was preempted") == 2
    assert "at step 2" in said.out, "the same command went on from its checkpoint"
    runs = [call["words"] for call in cloud.calls() if call["words"][4:5] == ["ssh"]]
    assert len({tuple(words) for words in runs[1::2]}) == 1
    assert (cloud.home / "bucket").read_text() == "3\n"


def test_a_resource_that_is_gone_before_the_start_is_asked_for_anew(cloud):  # noqa: F811
    (cloud.home / "state").write_text("SUSPENDED")
    assert launch.main(WORDS) == 0
    assert cloud.verbs() == ["delete", *ONCE, "delete"]


def test_one_that_stands_is_taken_and_may_be_kept(cloud):  # noqa: F811
    (cloud.home / "state").write_text("ACTIVE")
    assert launch.main(["--keep", *WORDS]) == 0
    assert cloud.verbs() == ["scp", "ssh", "ssh"] and (cloud.home / "state").exists()


@pytest.mark.parametrize("code", [2, 3])
def test_a_mistake_or_a_divergence_is_not_run_again(cloud, code):  # noqa: F811
    cloud.plot(lives=[[str(code), "0"]])
    assert launch.main(WORDS) == code
    assert cloud.verbs() == [*ONCE, "delete"]


def test_75_is_run_again_on_the_same_resource(cloud):  # noqa: F811
    cloud.plot(lives=[["75", "1", "0"]])
    assert launch.main(WORDS) == 0
    assert cloud.verbs() == [*ONCE, *["scp", "ssh", "ssh"] * 2, "delete"]


def test_a_run_that_keeps_failing_at_once_is_given_up_and_given_back(cloud, monkeypatch):  # noqa: F811
    monkeypatch.setattr(tpu_vm, "TRIES", 2)
    cloud.plot(lives=[["1"] * 9])
    with pytest.raises(ValueError, match="failed 2 times in a row .* with 1"):
        launch.main(WORDS)
    assert cloud.verbs() == [*ONCE, "scp", "ssh", "ssh", "delete"]


def test_a_run_that_lasts_may_stop_any_number_of_times(cloud, monkeypatch):  # noqa: F811
    monkeypatch.setattr(tpu_vm, "TRIES", 2)
    monkeypatch.setattr(tpu_vm, "QUICK", 0.0)
    cloud.plot(lives=[["75", "75", "75", "0"]])
    assert launch.main(WORDS) == 0


def test_all_hosts_of_all_slices_must_end_well(cloud, monkeypatch):  # noqa: F811
    """v5e-16 has four hosts: four chips each. Of two slices: eight."""
    words = ["--slices=2", *WORDS[:1], "--slice=v5e-16", *WORDS[2:]]
    lost = [["0", "0"]] * 7 + [["75", "0"]]
    cloud.plot(hosts=8, lives=lost)
    assert launch.main(words) == 0
    assert cloud.verbs() == [*ONCE, "scp", "ssh", "ssh", "delete"]
    creation = next(call["words"] for call in cloud.calls() if "create" in call["words"][4:5])
    assert {"--node-count=2", "--node-prefix=mine"} <= set(creation)
    assert "--accelerator-type=v5litepod-16" in creation
    cloud.forget()
    cloud.plot(hosts=7, lives=[["0"]] * 7)
    monkeypatch.setattr(tpu_vm, "TRIES", 1)
    with pytest.raises(ValueError, match="1 times"):  # one host says nothing
        launch.main(words)


def test_a_mistake_of_one_host_is_not_taken_for_the_others_loss(cloud):  # noqa: F811
    words = [*WORDS[:1], "--slice=v5e-16", *WORDS[2:]]
    cloud.plot(hosts=4, lives=[["2", "0"], ["75", "0"], ["75", "0"], ["75", "0"]])
    assert launch.main(words) == 0, "it may be that it only missed the others: tried again"
    cloud.forget()
    cloud.plot(hosts=4, lives=[["2"]] * 4)
    assert launch.main(words) == 2


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["create", "describe", "delete"])
def test_an_answerless_call_is_repeated_and_then_a_sentence(cloud, verb):  # noqa: F811
    passing = {f"errors_{verb}": ["UNAVAILABLE: try later"] * 3}
    cloud.plot(**passing)
    assert launch.main(WORDS) == 0
    cloud.forget()
    cloud.plot(**{f"errors_{verb}": ["UNAVAILABLE: try later"] * 4})
    with pytest.raises(ValueError, match=rf"queued-resources {verb} mine` failed: .*try later"):
        launch.main(WORDS)


def test_an_end_behind_half_a_line_is_an_end(cloud, capfd):  # noqa: F811
    (cloud.home / "trainer").write_text("#!/bin/bash\nprintf 'half a line'; exit 0\n")
    assert launch.main(WORDS) == 0
    assert cloud.verbs() == [*ONCE, "delete"] and capfd.readouterr().out == "half a line"


def test_what_will_not_change_is_not_repeated(cloud):  # noqa: F811
    cloud.plot(errors_create=["PERMISSION_DENIED: no quota"] * 9)
    with pytest.raises(ValueError, match="no quota"):
        launch.main(WORDS)
    assert cloud.verbs() == ["create"]


def test_a_request_that_keeps_failing_is_given_up(cloud):  # noqa: F811
    cloud.plot(states=["FAILED"] * 99)
    with pytest.raises(ValueError, match="FAILED 5 times .* --zone=us-central1-a"):
        launch.main(WORDS)


def test_looking_on_ends_without_the_run_and_begins_again(interruptible, cloud, capfd):  # noqa: F811
    """The run is another session's: it outlives the connection, and is found again.

    `interruptible` comes first: `cloud` takes signal.signal away from all that follow.
    """
    trainer = cloud.home / "trainer"
    trainer.write_text(
        f"#!/bin/bash\necho started | tee -a {cloud.home}/starts\n"
        f"until [ -e {cloud.home}/go ]; do sleep 0.05; done; exit 0\n"
    )
    pid = cloud.home / "hosts/0/lm-run/pid"

    def interrupt():
        while not (pid.exists() and pid.read_text().strip()):
            time.sleep(0.02)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert launch.main(WORDS) == exits.UNFINISHED
    first, said = pid.read_text(), capfd.readouterr()
    os.kill(int(first), 0)
    assert "cost go on" in said.err and "queued-resources delete mine --force" in said.err
    assert cloud.verbs() == ONCE
    threading.Timer(0.5, (cloud.home / "go").touch).start()
    assert launch.main(WORDS) == 0
    assert capfd.readouterr().out == "started\n", "its log from the beginning"
    assert (cloud.home / "starts").read_text() == "started\n", "it was started once"


def test_what_is_asked_for_is_what_was_meant():
    plain = launch.parse(WORDS)[1]
    assert not {"--spot"} & set(tpu_vm.creation(plain).words)
    words = ["--spot", "--project=p", "--service-account=a@b", "--extra=--network=n", *WORDS]
    asked = tpu_vm.creation(launch.parse(words)[1]).words
    assert {"--spot", "--project=p", "--service-account=a@b", "--network=n"} <= set(asked)
    assert "--node-id=mine" in asked and "--runtime-version=v2-alpha-tpuv5-lite" in asked


# With the real git. ------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with a committed configs/x.py, which is the working directory."""
    place = tmp_path / "checkout"
    (place / "configs").mkdir(parents=True)
    (place / "configs/x.py").write_text("1")
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@x"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *words], cwd=place, check=True)
    monkeypatch.chdir(place)
    return place


def test_hosts_get_the_commit_and_what_differs_is_named(checkout):
    tpu_vm.check_committed()
    (checkout / "notes.md").write_text("not of a run")
    tpu_vm.check_committed()
    (checkout / "configs/x.py").write_text("2")
    (checkout / "configs/y.py").write_text("3")
    with pytest.raises(ValueError, match="configs/x.py, configs/y.py differ from the commit"):
        tpu_vm.check_committed()


def test_outside_a_checkout_it_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(ValueError, match="no git checkout"):
        tpu_vm.check_committed()


def test_the_bundle_is_what_a_host_clones(checkout, tmp_path, monkeypatch):
    monkeypatch.setattr(tpu_vm.tempfile, "gettempdir", lambda: str(tmp_path))
    job = launch.parse(WORDS)[1]
    pack = tpu_vm.attempt(job)[0]
    assert subprocess.run(pack.words, check=False).returncode == 0
    host = tmp_path / "host"
    host.mkdir()
    (tmp_path / "mine.bundle").rename(host / "lm.bundle")
    (host / "python3").write_text("#!/bin/bash\n")
    (host / "python3").chmod(0o755)
    around = {"PATH": f"{host}:/usr/bin:/bin", "HOME": str(host)}
    command = ["bash", "-c", tpu_vm.INSTALL]
    done = subprocess.run(command, cwd=host, env=around, capture_output=True, check=False)
    assert done.returncode == 0 and done.stdout + done.stderr == b""
    assert pathlib.Path(host / "lm-run/configs/x.py").read_text() == "1"
    head = ["git", "rev-parse", "HEAD"]
    ours, theirs = (
        subprocess.run(head, cwd=place, capture_output=True, check=True).stdout
        for place in (checkout, host / "lm-run")
    )
    assert ours == theirs, "run.json says of which commit it is"


def test_the_interpreter_is_one_that_the_package_allows():
    assert "--python 3.11" in tpu_vm.INSTALL and sys.version_info >= (3, 11)
