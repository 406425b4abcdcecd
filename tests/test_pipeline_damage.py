"""Damaged shards: no row is ever wrong, omitted records are counted, and too many are an error."""

from __future__ import annotations

import itertools
import json
import pathlib
import shutil

import numpy as np
import pytest

from lm import objectives, pipeline, shards

TRIALS, SIZE, FILES = 3, 400, 3
VOCABULARY = objectives.Vocabulary(np.arange(390, 400), 1, np.arange(3, 300), np.zeros(400, bool))
TASKS = {"text": "pydocs", "pairs": "docstring_summary"}


@pytest.fixture(scope="module", params=TASKS)
def stored(request, tmp_path_factory) -> pathlib.Path:
    """Shards of text or of pairs, in files of equal sizes."""
    directory, rng = tmp_path_factory.mktemp(request.param), np.random.default_rng(0)
    write, files = getattr(shards, f"write_{request.param}"), {}
    for number in range(FILES):
        path = directory / f"shard-{number}.array_record"
        ids = [rng.integers(3, SIZE - 10, rng.integers(20, 60)) for _ in range(300)]
        if request.param == "text":
            files[path.name] = write(path, ids, np.array([9]), SIZE)
        else:
            files[path.name] = write(path, [(row[:16], row[:8]) for row in ids[:100]], SIZE)
    shards.write_manifest(directory, {"kind": request.param}, files, {})
    assert len({path.stat().st_size for path in directory.glob("shard-*")}) == 1
    return directory


def examples_of(directory: pathlib.Path, most: int, **options) -> pipeline.Examples:
    manifest = shards.read_manifest(directory)
    task = TASKS[manifest["identity"]["kind"]]
    options |= {"task": task, "input_length": 64, "target_length": 16, "batch_size": 20}
    data = pipeline.DataConfig(max_bad_records=most, **options)
    objective = objectives.ObjectiveConfig()
    split = pipeline.TaskSplit(task, str(directory), manifest, data, objective, VOCABULARY)
    return pipeline.Examples((split,))


def epoch(examples: pipeline.Examples) -> list[np.ndarray]:
    """The batches of a little more than an epoch, their four arrays side by side."""
    batches = pipeline.train_batches(examples, seed=1)
    count = len(examples) // 20 + 2
    return [np.concatenate(rows[:4], axis=1) for rows in itertools.islice(batches, count)]


@pytest.fixture(scope="module")
def expected(stored) -> list[np.ndarray]:
    """The batches of undamaged shards."""
    return epoch(examples_of(stored, 0))


def flip(files, rng):
    data = bytearray(files[0].read_bytes())
    for _ in range(8):
        data[rng.integers(16_000)] ^= 1 << rng.integers(8)
    files[0].write_bytes(data)


def garble(files, rng):
    data = bytearray(files[0].read_bytes())
    start = rng.integers(len(data) - 5000)
    data[start : start + 5000] = rng.bytes(5000)
    files[0].write_bytes(data)


def truncate(files, rng):
    data = files[0].read_bytes()
    files[0].write_bytes(data[: rng.integers(len(data))])


def swap(files, rng):
    first, second = (files[0].read_bytes(), files[1].read_bytes())
    files[0].write_bytes(second)
    files[1].write_bytes(first)


KINDS = {
    "whole": lambda files, rng: None,  # the control
    "flipped": flip,
    "garbled": garble,
    "truncated": truncate,
    "missing": lambda files, rng: files[0].unlink(),
    "appended": lambda files, rng: files[0].write_bytes(files[0].read_bytes() * 2),
    "doubled": lambda files, rng: shutil.copy(files[1], files[0]),
    "swapped": swap,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trial", range(TRIALS))
def test_a_row_is_correct_or_empty_or_an_error_names_the_file_and_the_fix(
    kind, trial, stored, expected, tmp_path, capsys
):
    copy = pathlib.Path(shutil.copytree(stored, tmp_path / "copy"))
    files = sorted(copy.glob("shard-*"))
    np.random.default_rng(trial).shuffle(files)
    KINDS[kind](files, np.random.default_rng(trial))
    examples = examples_of(copy, 10**9)
    try:
        batches = epoch(examples)
    except ValueError as error:  # at the opening of the files
        assert kind not in ("flipped", "garbled") or "is not the file that was" in str(error)
        assert any(str(path) in str(error) for path in files)
        assert f"remove {copy}" in str(error)
        return
    assert kind in ("whole", "flipped", "garbled")
    empty = 0
    for rows, right in zip(batches, expected, strict=True):
        whole = (rows == right).all(axis=1)
        assert (rows[~whole] == 0).all(), "a row is wrong"
        empty += (~whole).sum()
    count = len(examples.damaged)
    assert bool(empty) == bool(count) and not (count and kind == "whole")
    assert capsys.readouterr().err.count("left out (") == count
    if count:  # a limit below the count is an error
        with pytest.raises(ValueError, match=f"record .* a data.max_bad_records above {count - 1}"):
            epoch(examples_of(copy, count - 1))


def damage(directory: pathlib.Path, tmp_path, *records: int) -> pathlib.Path:
    """A copy whose first file has these records damaged."""
    copy = pathlib.Path(shutil.copytree(directory, tmp_path / "damaged"))
    path = copy / "shard-0.array_record"
    data, numbers = bytearray(path.read_bytes()), []
    manifest = shards.read_manifest(copy)
    kind = shards.Pairs if manifest["kind"] == "pairs" else shards.Stream
    for record in records:
        raw = kind(str(directory), manifest).record(record)
        offset = bytes(data).index(raw)
        data[offset + len(raw) // 2] ^= 1
        numbers.append(offset)
    path.write_bytes(data)
    assert len(set(numbers)) == len(records)
    return copy


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_an_error_with_the_record_and_both_fixes(stored, workers, tmp_path):
    copy = damage(stored, tmp_path, 1)
    path = copy / "shard-0.array_record"
    with pytest.raises(ValueError) as caught:
        epoch(examples_of(copy, 0, num_workers=workers))
    message = str(caught.value)
    assert message.startswith(f"record 1 of {path} cannot be read (")
    fixes = f"; remove {copy}, and it is built again, or set a data.max_bad_records above 0."
    assert message.endswith(fixes)
    assert message.count(". ") == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_allowed_damage_is_omitted_and_counted_once_and_more_is_an_error(
    stored, expected, workers, tmp_path, capsys
):
    copy = damage(stored, tmp_path, 0, 2)
    examples = examples_of(copy, 2, num_workers=workers)
    for _ in range(1 if workers else 2):  # a record is counted once
        batches = epoch(examples)
        assert {name.split(" of ")[0] for name in examples.damaged} == {"0", "2"}
    assert capsys.readouterr().err.count("left out (") == 2
    empty = 0
    for rows, right in zip(batches, expected, strict=True):
        same = (rows == right).all(axis=1)
        assert (rows[~same] == 0).all()
        empty += (~same).sum()
    assert 0 < empty < sum(map(len, expected)) / 2
    with pytest.raises(ValueError, match="a data.max_bad_records above 1"):
        epoch(examples_of(copy, 1, num_workers=workers))


def test_held_out_damage_is_omitted_and_counted(stored, tmp_path):
    copy = damage(stored, tmp_path, 1)
    examples = examples_of(copy, 1)
    rows = [np.concatenate(b[:4], axis=1) for b in pipeline.heldout_batches(examples, 0)]
    undamaged = pipeline.heldout_batches(examples_of(stored, 0), 0)
    right = [np.concatenate(b[:4], axis=1) for b in undamaged]
    differ = [(a != b).any(axis=1) for a, b in zip(rows, right, strict=True)]
    assert sum(d.sum() for d in differ) > 0
    assert all((a[d] == 0).all() for a, d in zip(rows, differ, strict=True))
    assert len(examples.damaged) == 1
    with pytest.raises(ValueError, match="record 1 of .* data.max_bad_records above 0"):
        list(pipeline.heldout_batches(examples_of(copy, 0), 0))


@pytest.mark.parametrize("stored", ["pairs"], indirect=True)
def test_a_row_of_several_pairs_with_a_damaged_one_is_empty_as_a_whole(stored, tmp_path):
    copy = damage(stored, tmp_path, 1)
    whole, broken = (examples_of(path, 1, packing="first_fit") for path in (stored, copy))
    differing = [
        (row, reference)
        for batch, right in zip(epoch(broken), epoch(whole), strict=True)
        for row, reference in zip(batch, right, strict=True)
        if (row != reference).any()
    ]
    assert 1 <= len(differing) <= 2  # one row, which a second epoch may hold again
    assert all((row == 0).all() for row, _ in differing)


def test_shards_without_hashes_of_heads_are_an_earlier_versions(stored, tmp_path):
    copy = pathlib.Path(shutil.copytree(stored, tmp_path / "copy"))
    manifest = json.loads((copy / shards.MANIFEST).read_text())
    for facts in manifest["files"].values():
        del facts["head"]
    (copy / shards.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="was written by an earlier version; remove"):
        shards.read_manifest(copy)


def test_a_negative_limit_is_an_error():
    with pytest.raises(ValueError, match="data.max_bad_records=-1 is too small; use 0 or more"):
        pipeline.DataConfig(max_bad_records=-1)
