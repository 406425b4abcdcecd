"""Shard files: any window of the stream is readable, and damage is never silent."""

from __future__ import annotations

import json
import pathlib
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest

from lm import shards
from lm.shards import shard_files

GAP, SIZE = np.array([9, 9]), 400


def write(directory, documents, files: int, size: int = SIZE) -> tuple[shards.Stream, np.ndarray]:
    """Write documents to some files; returns the stream and its expected tokens."""
    written = {}
    for number, piece in enumerate(np.array_split(np.arange(len(documents)), files)):
        some = [documents[index] for index in piece]
        written[f"file{number}"] = shards.write_text(directory / f"file{number}", some, GAP, size)
    manifest = shards.write_manifest(directory, {"a": 1}, written, {})
    parts = [piece for ids in documents for piece in (ids, GAP)]
    return shards.Stream(str(directory), manifest), np.concatenate(parts)


def random_documents(seed: int, count: int, longest: int, size: int = SIZE) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, size, rng.integers(0, longest)) for _ in range(count)]


@pytest.mark.parametrize("record", [1, 7, 64, 4096])
@pytest.mark.parametrize("files", [1, 3, 10])
def test_any_window_is_readable_for_any_records_and_files(record, files, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_files, "RECORD_TOKENS", record)
    monkeypatch.setattr(shard_files, "BUFFER_TOKENS", 5 * record)
    stream, expected = write(tmp_path, random_documents(record, 20, 30), files)
    assert len(stream) == len(expected)
    for raw in (1, 2, 13, 100, len(expected)):
        for start in range(0, len(expected) - raw + 1, raw):
            np.testing.assert_array_equal(
                stream.read(start, start + raw), expected[start : start + raw]
            )
    assert len(stream.read(5, 5)) == 0


def test_only_the_last_record_of_a_file_is_short(tmp_path):
    from array_record.python import array_record_module

    stream, _ = write(tmp_path, random_documents(0, 30, 2000), 3)
    for name, facts in stream.manifest["files"].items():
        reader = array_record_module.ArrayRecordReader(str(tmp_path / name))
        sizes = [len(data) // 2 for data in reader.read_all()]
        assert (
            sizes[:-1] == [shard_files.RECORD_TOKENS] * (len(sizes) - 1)
            and 0 < sizes[-1] <= shard_files.RECORD_TOKENS
        )
        assert sum(sizes) == facts["tokens"]


def test_a_window_reads_only_its_records(tmp_path, monkeypatch):
    stream, _ = write(tmp_path, random_documents(0, 30, 2000), 1)
    touched = []
    record = shards.Stream.record
    monkeypatch.setattr(
        shards.Stream, "record", lambda self, i: touched.append(i) or record(self, i)
    )
    size = shard_files.RECORD_TOKENS
    for start, stop, expected in (
        (0, 10, [0]),
        (size - 1, size + 1, [0, 1]),
        (2 * size, 3 * size, [2]),
        (size + 5, 3 * size + 5, [1, 2, 3]),
    ):
        touched.clear()
        stream.read(start, stop)
        assert touched == expected


@pytest.mark.parametrize(
    ("size", "dtype"), [(400, "<u2"), (1 << 16, "<u2"), ((1 << 16) + 1, "<i4")]
)
def test_ids_are_stored_in_two_bytes_if_they_fit(size, dtype, tmp_path):
    documents = [np.array([size - 1, 3]), np.array([0, size - 2])]
    stream, expected = write(tmp_path, documents, 1, size)
    assert stream.manifest["dtype"] == dtype
    np.testing.assert_array_equal(stream.read(0, len(stream)), expected)
    with pytest.raises(ValueError, match=f"id {size} is not one of the tokenizer's {size} ids"):
        shards.write_text(tmp_path / "other", [np.array([size])], GAP, size)


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (5, 4), (0, 10**6)])
def test_reading_outside_the_stream_is_an_error(start, stop, tmp_path):
    stream, _ = write(tmp_path, random_documents(0, 5, 30), 1)
    with pytest.raises(IndexError, match="is outside"):
        stream.read(start, stop)


def test_an_empty_file_is_skipped(tmp_path):
    documents = random_documents(1, 2, 30)
    stream, expected = write(tmp_path, documents, 5)  # of which three are empty
    np.testing.assert_array_equal(stream.read(0, len(stream)), expected)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """(stream, its tokens) of some records in two files."""
    return write(tmp_path_factory.mktemp("stored"), random_documents(5, 60, 1000), 2)


def damaged(stored, tmp_path, change) -> shards.Stream:
    """A copy of the stream whose first file is changed."""
    stream, _ = stored
    copy = pathlib.Path(shutil.copytree(stream.directory, tmp_path / "copy"))
    data = bytearray((copy / "file0").read_bytes())
    change(data)
    (copy / "file0").write_bytes(data)
    return shards.Stream(str(copy), stream.manifest)


def test_a_truncated_file_is_an_error_that_names_it(stored, tmp_path):
    from array_record.python import array_record_module

    stream = damaged(stored, tmp_path, lambda data: data.__delitem__(slice(-1000, None)))
    raw = array_record_module.ArrayRecordReader(str(tmp_path / "copy" / "file0"))
    assert raw.num_records() == 0  # ArrayRecord itself reports no error
    with pytest.raises(ValueError, match="file0 has .* bytes instead of .*; remove .*copy"):
        stream.read(0, 10)


def test_flipped_bits_make_records_unreadable_and_never_wrong(stored, tmp_path):
    """After a flip of one bit, a record is unchanged or reading it is an error."""
    _, expected = stored
    rng, refused = np.random.default_rng(0), 0
    for trial in range(40):

        def flip(data):
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)

        stream = damaged(stored, tmp_path / str(trial), flip)
        for start in range(0, len(stream) - 4096, 4096):
            try:
                actual = stream.read(start, start + 4096)
            except ValueError as error:
                assert f"remove {stream.directory}, and it is built again" in str(error)
                refused += 1
            else:
                np.testing.assert_array_equal(actual, expected[start : start + 4096])
        shutil.rmtree(tmp_path / str(trial))
    assert refused > 5


def test_a_record_of_unexpected_length_is_an_error(stored):
    stream, _ = stored
    files = {
        name: facts | {"tokens": facts["tokens"] - 1}
        for name, facts in stream.manifest["files"].items()
    }
    changed = shards.Stream(stream.directory, stream.manifest | {"files": files})
    with pytest.raises(ValueError, match=r"record \d+ of .* has \d+ tokens instead of \d+; remove"):
        changed.read(0, len(changed))


def test_lengths_are_those_of_documents_with_separators_for_any_files(tmp_path):
    documents = random_documents(2, 23, 900)
    for files in (1, 4, 30):  # of 30, some are empty
        (tmp_path / str(files)).mkdir()
        stream, _ = write(tmp_path / str(files), documents, files)
        assert stream.lengths.tolist() == [len(ids) + len(GAP) for ids in documents]


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: np.save(path, np.load(path)[:-1]),
        lambda path: np.save(path, np.load(path)[::-1]),
    ],
)
def test_missing_or_damaged_lengths_are_an_error(change, stored, tmp_path):
    stream = damaged(stored, tmp_path, lambda data: None)
    change(tmp_path / "copy" / shard_files.LENGTHS)
    with pytest.raises(ValueError, match=r"lengths.npy is missing or damaged; remove .*cop"):
        _ = stream.lengths
    np.testing.assert_array_equal(stream.read(0, 10), stored[1][:10])


@pytest.mark.parametrize("content", ["{", "\x00", ""])
def test_a_damaged_manifest_is_an_error_with_the_fix(content, tmp_path):
    (tmp_path / "made" / "train").mkdir(parents=True)
    for directory in ("made/train", "made"):
        (tmp_path / directory / shards.MANIFEST).write_text(content)
        whole = f"manifest.json is damaged .*, remove {tmp_path}/{directory}, and it is built again"
        with pytest.raises(ValueError, match=whole):
            shards.read_manifest(tmp_path / directory)
    (tmp_path / "made" / shards.MANIFEST).write_text('{"identity": {}, "splits": {}}')
    with pytest.raises(ValueError, match=f", remove {tmp_path}/made, and build that corpus again"):
        shards.read_manifest(tmp_path / "made/train")


@pytest.mark.parametrize("content", ["[1]", "{}", '{"name": "web"}', '{"identity": 3}'])
def test_a_foreign_manifest_reads_as_none(content, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / shards.MANIFEST).write_text(content)
    assert shards.read_manifest(tmp_path) is None
    assert (
        shard_files.rebuild_hint(tmp_path / "train")
        == f"remove {tmp_path}/train, and it is built again"
    )


def test_shards_of_an_earlier_version_are_an_error(stored, tmp_path):
    manifest = dict(stored[0].manifest)
    del manifest["beside"]
    (tmp_path / shards.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="was written by an earlier version; remove"):
        shards.read_manifest(tmp_path)


def test_a_stream_pickles_without_open_files(stored):
    import cloudpickle

    stream, expected = stored
    stream.read(0, 10)
    copy = cloudpickle.loads(cloudpickle.dumps(stream))
    assert "_source" not in vars(copy)
    np.testing.assert_array_equal(copy.read(0, len(copy)), expected)


def test_the_same_documents_give_the_same_bytes(tmp_path):
    written = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, random_documents(3, 30, 500), 2)
        written.append({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()})
    assert written[0] == written[1]


def test_the_manifest_is_written_last(tmp_path, monkeypatch):
    file = shards.write_text(tmp_path / "file0", random_documents(0, 3, 9), GAP, SIZE)
    monkeypatch.setattr(shard_files.np, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        shards.write_manifest(tmp_path, {}, {"file0": file}, {})
    assert shards.read_manifest(tmp_path) is None


def test_pairs_are_read_as_written(tmp_path):
    rng = np.random.default_rng(0)
    pairs = [tuple(rng.integers(3, SIZE, rng.integers(1, 40)) for _ in "12") for _ in range(30)]
    written = {}
    for number, some in enumerate((pairs[:20], pairs[20:])):
        written[str(number)] = shards.write_pairs(tmp_path / str(number), some, SIZE)
    stored = shards.Pairs(
        str(tmp_path), shards.write_manifest(tmp_path, {}, written, {"truncated": 2})
    )
    assert len(stored) == 30 and stored.manifest["counts"]["truncated"] == 2
    for index, pair in enumerate(pairs):
        for ids, expected in zip(stored[index], pair, strict=True):
            np.testing.assert_array_equal(ids, expected)
    assert stored.lengths.tolist() == [[len(a), len(b)] for a, b in pairs]


FULL = """
import numpy as np, pathlib, resource, signal, sys
from lm import shards
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
documents = (np.full(1000, 5) for _ in range(1000))
try:
    shards.write_text(pathlib.Path(sys.argv[1]), documents, np.array([9]), 400)
except OSError as error:
    print(error)
"""


def test_a_full_disk_is_one_error_line(tmp_path):
    assert resource.RLIMIT_FSIZE is not None
    command = [sys.executable, "-c", FULL, str(tmp_path / "file0")]
    root = pathlib.Path(__file__).parents[1]
    output = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout
    assert "file0 cannot be written" in output and "free some space" in output


# Finished corpora. ----------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path, tiny_tokens):
    """A finished corpus of one training split, with the tiny tokenizer."""
    corpus_dir = tmp_path / "corpus"
    (corpus_dir / "train").mkdir(parents=True)
    shutil.copytree(tiny_tokens.directory, corpus_dir / "tokenizer")
    text = {
        "file0": shards.write_text(
            corpus_dir / "train/file0", random_documents(0, 9, 30), GAP, SIZE
        )
    }
    shards.write_manifest(corpus_dir / "train", {"tokenizer": tiny_tokens.fingerprint}, text, {})
    (corpus_dir / shards.MANIFEST).write_text(json.dumps({"identity": {}}))
    return corpus_dir


def test_a_finished_corpus_has_splits_and_a_tokenizer(finished, tiny_tokens):
    assert shards.read_split_manifest(finished, "train") == shards.read_manifest(finished / "train")
    assert shards.corpus_tokenizer_dir(finished) == finished / "tokenizer"
    shards.check_tokenizer(finished, tiny_tokens)


def test_a_corpus_with_a_replaced_tokenizer_is_an_error(finished, tmp_path):
    from lm import tokenizer

    shutil.copytree(finished, tmp_path / "c")
    exchanged = tokenizer.write_byte_tokenizer(tmp_path / "c" / "tokenizer", 10)
    with pytest.raises(ValueError, match="was replaced, build the corpus again"):
        shards.check_tokenizer(tmp_path / "c", exchanged)


def test_damaged_frequencies_are_an_error(finished):
    directory = finished / "train"
    manifest = shards.read_manifest(directory)
    counts = shards.load_array(directory, manifest, shards.COUNTS)
    np.save(directory / shards.COUNTS, counts[::-1])
    with pytest.raises(ValueError, match="counts.npy is missing or damaged; remove"):
        shards.load_array(directory, manifest, shards.COUNTS)


def test_a_missing_corpus_split_or_tokenizer_is_an_error(finished, tmp_path):
    from lm import tokenizer

    with pytest.raises(ValueError, match=r"has no split 'train\[:9\]'; use train or"):
        shards.read_split_manifest(finished, "train[:9]")
    with pytest.raises(
        ValueError,
        match="has no validation; remove it and build it again with a --heldout",
    ):
        shards.read_split_manifest(finished, "validation")
    with pytest.raises(ValueError, match="other holds no finished corpus .* --out=.*other"):
        shards.read_split_manifest(tmp_path / "other", "train")
    with pytest.raises(ValueError, match="other holds no finished corpus"):
        shards.corpus_tokenizer_dir(tmp_path / "other")
    other_tokens = tokenizer.write_byte_tokenizer(tmp_path / "bytes", 10)
    with pytest.raises(ValueError, match="was encoded with another tokenizer than .*; leave"):
        shards.check_tokenizer(finished, other_tokens)
