"""Laws of damage: it is detected, and the previous step is used; without one, an error."""

from __future__ import annotations

import json
import logging
import pathlib
import shutil

import numpy as np
import pytest

from experiments import damage
from lm import checkpoints
from tests.states import abstract, bits, check_fallback, files, make_state, names, restore, save

# Orbax does not close readers of damaged files; Python warns when it collects them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A directory with good checkpoints of steps 1 and 2."""
    directory = tmp_path_factory.mktemp("pair") / "checkpoints"
    save(directory, make_state(1), make_state(2))
    return directory


@pytest.fixture
def copied(pair, tmp_path):
    """A copy of the two checkpoints that a test may damage."""
    return pathlib.Path(shutil.copytree(pair, tmp_path / "checkpoints"))


@pytest.mark.parametrize("trial", range(16))
def test_a_flipped_bit_in_array_data_falls_back_to_the_previous_step(trial, copied):
    rng = np.random.default_rng(trial)
    item = ("params", "opt_state")[trial % 2]
    data = files(copied / "2" / item)[0]
    assert data.parent.name == "d" and data.stat().st_size > 3000
    damage.flip(data, rng)
    assert check_fallback(copied)


HARMLESS = {"step metadata", "sharding", "facts mark", "item mark", "writer's manifest"}


@pytest.mark.parametrize(("kind", "fault"), damage.ALL)
def test_damage_to_any_kind_of_file_is_detected(kind, fault, copied):
    done = damage.damage(copied / "2", np.random.default_rng(len(kind)), kind, fault)
    assert (done.kind, done.fault, done.path.exists()) == (kind, fault, fault != "delete")
    if (kind, fault) == ("step mark", "delete"):  # no longer a step, so not set aside
        assert int(restore(copied)[0].step) == 1
        save(copied, make_state(2))
        assert names(copied) == ["1", "2"]
    elif kind in HARMLESS | {"step mark"}:
        assert not check_fallback(copied)
    elif kind in ("facts", "manifest"):
        assert check_fallback(copied)
    else:
        check_fallback(copied)


def test_every_file_of_a_checkpoint_is_damaged_by_a_case(copied):
    kinds = {damage.kind_of(path, copied / "2") for path in files(copied / "2")}
    assert kinds == set(damage.KINDS)
    assert not check_fallback(copied)


@pytest.mark.parametrize("item", ["params", "opt_state", "facts"])
def test_a_missing_item_falls_back(item, copied):
    shutil.rmtree(copied / "2" / item)
    assert check_fallback(copied)


def test_after_a_fallback_the_damaged_step_can_be_saved_again(copied):
    for _ in range(3):
        damage.flip(files(copied / "2")[0], np.random.default_rng(0))
        assert int(restore(copied)[0].step) == 1
        save(copied, make_state(2))
        assert bits(restore(copied)[0]) == bits(make_state(2))
    assert sum(name.startswith("2.corrupt-") for name in names(copied)) == 3


def facts_file(step: pathlib.Path) -> pathlib.Path:
    (path,) = (p for p in (step / "facts").iterdir() if b"tokenizer" in p.read_bytes())
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts["position"].update(next_index=3),
        lambda facts: facts["config"].update(peak=0.2),
        lambda facts: facts.update(extra=1),
        lambda facts: facts.pop("tokenizer"),
        lambda facts: facts.pop("seal"),
        lambda facts: facts["leaves"]["params"]["tower.scale"].update(sum=1),
    ],
)
def test_altered_facts_are_detected(change, copied):
    path = facts_file(copied / "2")
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))
    assert check_fallback(copied)


def test_if_all_steps_are_damaged_restore_is_an_error(copied):
    for step in ("1", "2"):
        damage.flip(files(copied / step)[0], np.random.default_rng(0))
    for _ in range(2):  # a second try must not find an empty directory
        with pytest.raises(ValueError, match=r"none of the checkpoints \[2, 1\] in .* can be read"):
            restore(copied)


def test_read_only_falls_back_with_a_warning_but_renames_nothing(copied, caplog):
    damage.flip(files(copied / "2")[0], np.random.default_rng(0))
    before = {path: path.read_bytes() for path in files(copied)}
    with caplog.at_level(logging.WARNING, "lm.checkpoints"):
        actual, _ = restore(copied, read_only=True)
    assert "checkpoint 2 in" in caplog.text and "is damaged: checksum of" in caplog.text
    assert bits(actual) == bits(make_state(1))
    assert names(copied) == ["1", "2"]
    assert {path: path.read_bytes() for path in files(copied)} == before


def uncommit(folder, *steps) -> None:
    for step in steps:
        (folder / step / "commit_success.txt").unlink()


def link_elsewhere(folder) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere" / "mine").write_text("kept")
    (folder / "9").symlink_to(folder.parent / "elsewhere")


def copy(folder, name: str, *lacking: str) -> None:
    shutil.copytree(folder / "2", folder / name, ignore=shutil.ignore_patterns(*lacking))


STRAY = {  # an extra file or folder: (how to create it, the step that is restored or the error)
    "an empty folder": (lambda d: (d / "9").mkdir(), 2),
    "the newest without its mark": (lambda d: uncommit(d, "2"), 1),
    "none with its mark": (lambda d: uncommit(d, "1", "2"), r"unfinished checkpoints \(1, 2\)"),
    "a copied temporary": (lambda d: copy(d, "9.orbax-checkpoint-tmp-7", "commit_*"), 2),
    "a copied temporary, marked": (lambda d: copy(d, "9.orbax-checkpoint-tmp-7"), 2),
    "a stray file": (lambda d: (d / "notes.txt").write_text("7"), 2),
    "a folder of the user's": (lambda d: (d / "thesis").mkdir(), 2),
    "half a copy, unmarked": (lambda d: copy(d, "9", "commit_*", "opt_state"), 2),
    "half a copy, marked": (lambda d: copy(d, "9", "opt_state"), 2),
    "a copy under another number": (lambda d: copy(d, "9"), 2),
    "a link": (link_elsewhere, 2),
    "steps that were set aside, alone": (
        lambda d: [shutil.move(d / n, d / f"{n}.corrupt-1") for n in "12"],
        None,
    ),
}


@pytest.mark.parametrize("stray", STRAY)
def test_stray_files_are_ignored(stray, copied):
    prepare, expected = STRAY[stray]
    prepare(copied)
    if isinstance(expected, str):
        for _ in range(2):  # a second try starts no new run either
            with pytest.raises(ValueError, match=expected):
                restore(copied)
        return
    with checkpoints.Checkpoints(copied, read_only=True) as saved:
        actual = saved.restore(abstract(make_state(0)))
    before = names(copied)
    assert actual is None if expected is None else bits(actual[0]) == bits(make_state(expected))
    actual = restore(copied)
    assert actual is None if expected is None else bits(actual[0]) == bits(make_state(expected))
    save(copied, make_state(8), make_state(9))
    assert bits(restore(copied)[0]) == bits(make_state(9))
    whole, numbers = {"8", "9"}, {"1", "2", "9", "9.orbax-checkpoint-tmp-7"}
    remaining = {name for name in names(copied) if not name.startswith("9.corrupt-")}
    marked = {"9.orbax-checkpoint-tmp-7"} if stray == "a copied temporary, marked" else set()
    assert remaining == whole | marked | (set(before) - numbers)
    elsewhere = copied.parent / "elsewhere"
    assert not elsewhere.exists() or names(elsewhere) == ["mine"]


def test_restore_removes_a_partly_deleted_step(copied):
    (copied / "1" / "commit_success.txt").unlink()
    shutil.rmtree(copied / "1" / "params")
    assert int(restore(copied, read_only=True)[0].step) == 2
    assert names(copied) == ["1", "2"]
    assert int(restore(copied)[0].step) == 2
    assert names(copied) == ["2"]
