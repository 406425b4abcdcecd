"""Tests of records read from TFDS."""

from __future__ import annotations

import json
import pathlib
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from lm import sources

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "tfds"
EXAMPLES = 200


class Tiny(tfds.core.GeneratorBasedBuilder):
    """A dataset with every kind of field that text has."""

    VERSION = tfds.core.Version("1.2.0")
    url_infos = None

    def _info(self):
        text = tfds.features.Text()
        fields = {
            "text": text,
            "count": tfds.features.Scalar(np.int32),
            "turns": tfds.features.Sequence(text),
            "answers": tfds.features.Sequence({"text": text, "start": np.int32}),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(fields))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(EXAMPLES), "test": self._generate_examples(7)}

    def _generate_examples(self, count):
        for i in range(count):
            answers = [{"text": "où", "start": i}] * 2
            record = {"text": f"é {i}", "count": i, "turns": ["ja", "nein"], "answers": answers}
            yield i, record


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    Tiny(data_dir=root, file_format="array_record").download_and_prepare()
    return root


@pytest.fixture
def root(prepared, tmp_path):
    """A copy of the prepared data that a test may damage."""
    shutil.copytree(prepared / "tiny", tmp_path / "tiny")
    return tmp_path


def rewrite(path: pathlib.Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def texts(split: str, root) -> list[str]:
    source = sources.tfds_records("tiny", split, root)
    return [source[i]["text"] for i in range(len(source))]


def test_records_are_plain_python_values_and_bytes_are_text(prepared):
    source = sources.tfds_records("tiny", "train", prepared)
    for index in (0, 57, EXAMPLES - 1):
        record = source[index]
        i = record["count"]
        assert type(i) is int
        assert record["text"] == f"é {i}"
        assert record["turns"] == ["ja", "nein"]
        assert record["answers"] == {"text": ["où", "où"], "start": [i, i]}


def test_splits_have_their_sizes_and_every_record_occurs_once(prepared):
    assert sources.tfds_splits("tiny", prepared) == {"train": EXAMPLES, "test": 7}
    assert sorted(texts("train", prepared)) == sorted(f"é {i}" for i in range(EXAMPLES))
    assert len(texts("train[:10]+test", prepared)) == 17


def test_an_unpickled_source_has_the_same_records(prepared):
    source = sources.tfds_records("tiny", "train[3:90]", prepared)
    unpickled = pickle.loads(pickle.dumps(source))
    assert len(unpickled) == len(source) == 87
    assert [unpickled[i] for i in range(87)] == [source[i] for i in range(87)]


def test_a_slice_and_its_complement_are_the_whole_split(prepared):
    assert texts("train[:99%]", prepared) + texts("train[99%:]", prepared) == texts(
        "train", prepared
    )


def test_the_newest_version_is_read_unless_one_is_named(root):
    for version in ("1.10.0", "1.9.9"):
        shutil.copytree(root / "tiny" / "1.2.0", root / "tiny" / version)
    newest = root / "tiny" / "1.10.0" / "dataset_info.json"
    rewrite(newest, splits=json.loads(newest.read_text())["splits"][:1])
    assert len(sources.tfds_splits("tiny", root)) == 1
    assert len(sources.tfds_splits("tiny:1.2.0", root)) == 2
    assert len(sources.tfds_splits("tiny/1.9.9", root)) == 2
    with pytest.raises(ValueError, match=r"which has 1\.10\.0, 1\.2\.0, 1\.9\.9; .*tiny:3\.0\.0 "):
        sources.tfds_splits("tiny/3.0.0", root)


def test_a_config_is_part_of_the_name(root):
    (root / "family").mkdir()
    shutil.move(root / "tiny", root / "family" / "20230601.en")
    for name in ("family/20230601.en", "family/20230601.en:1.2.0", "family/20230601.en/1.2.0"):
        assert sources.tfds_splits(name, root)["test"] == 7
    with pytest.raises(ValueError, match="did you mean 'family/20230601.en'"):
        sources.tfds_splits("family", root)
    with pytest.raises(ValueError, match="did you mean 'family/20230601.en'"):
        sources.tfds_splits("famly", root)


def test_an_incomplete_version_is_not_read(root):
    shutil.copytree(root / "tiny" / "1.2.0", root / "tiny" / "incomplete.ABC123_2.0.0")
    (root / "tiny" / "3.0.0").mkdir()
    assert sources.tfds_records("tiny", "test", root).stored.dataset_info.version == "1.2.0"
    shutil.rmtree(root / "tiny" / "1.2.0")
    with pytest.raises(ValueError, match="tiny is not in"):
        sources.tfds_splits("tiny", root)


def test_the_error_for_a_missing_dataset_names_the_directory_and_the_command(root, monkeypatch):
    monkeypatch.chdir(root.parent)
    with pytest.raises(ValueError) as error:
        sources.tfds_splits("tinny/1.2.0", root.name)
    command = f"`tfds build tinny:1.2.0 --file_format=array_record --data_dir={root}`"
    assert f"not in {root};" in str(error.value) and command in str(error.value)
    assert "did you mean 'tiny'?" in str(error.value)
    with pytest.raises(ValueError, match="wmt14_translate/de-en is not in .*[^?]$"):
        sources.tfds_splits("wmt14_translate/de-en", root / "nowhere")


def test_the_error_for_a_missing_embedded_dataset_names_the_corpus_command(root):
    for name in sources.EMBEDDED_DATASETS:
        with pytest.raises(ValueError, match="python -m lm corpus --config=configs/pretrain.py`.$"):
            sources.tfds_records(name, "train", root)


@pytest.mark.parametrize("stored", ["tfrecord", "parquet", None])
def test_only_array_record_is_read_and_the_error_says_how_to_convert(root, stored):
    info = root / "tiny" / "1.2.0" / "dataset_info.json"
    rewrite(info, fileFormat=stored or "tfrecord")
    if stored is None:
        info.write_text(info.read_text().replace('"fileFormat": "tfrecord", ', ""))
        assert "fileFormat" not in info.read_text()
    with pytest.raises(ValueError) as error:
        sources.tfds_records("tiny", "train", root)
    assert f"is stored as {stored or 'tfrecord'}" in str(error.value)
    assert f"--dataset_version_dir={info.parent} --out_file_format=array_record" in str(error.value)


def test_a_converted_dataset_is_read_from_its_array_record(root, prepared):
    # `tfds convert_format` leaves the first format's name and adds its own.
    info = root / "tiny" / "1.2.0" / "dataset_info.json"
    rewrite(info, fileFormat="tfrecord", alternativeFileFormats=["array_record"])
    assert texts("train", root) == texts("train", prepared)


@pytest.mark.parametrize(
    "split, message",
    [
        ("trian", "choose one of all, test, train; did you mean 'train'?"),
        ("train+valid", "the split of tiny='valid' is unknown"),
        ("train[:9", "'train[:9' of tiny cannot be read as a slice; write it as train[:99%]"),
        ("train[:x%]", "cannot be read as a slice"),
        ("test[99%:]", "holds no example, out of {'train': 200, 'test': 7}"),
        ("train[9:2]", "holds no example"),
    ],
)
def test_an_invalid_split_is_refused_with_a_message(prepared, split, message):
    with pytest.raises(ValueError) as error:
        sources.tfds_records("tiny", split, prepared)
    assert message in str(error.value)


def test_held_out_examples_are_not_training_examples(prepared):
    assert sources.resolve_tfds_splits("tiny", "train[:50%]", "test[:3]", prepared) == (
        "train[:50%]",
        "test[:3]",
    )
    train, heldout = sources.resolve_tfds_splits("tiny", "train", "validation", prepared)
    assert (train, heldout) == ("train[:99%]", "train[99%:]")
    assert not set(texts(train, prepared)) & set(texts(heldout, prepared))
    for sliced in ("train[:50%]", "trian"):
        with pytest.raises(ValueError, match="to hold 'validation' out of=.*did you mean 'train'"):
            sources.resolve_tfds_splits("tiny", sliced, "validation", prepared)


def test_the_default_directory_is_tfds_s_own(prepared, monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert sources.tfds_splits("tiny")["test"] == 7
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tensorflow_datasets").symlink_to(prepared)
    assert sources.tfds_splits("tiny")["test"] == 7


def test_reading_is_silent_and_touches_neither_tensorflow_nor_jax(prepared, tmp_path):
    (tmp_path / "tensorflow.py").write_text("print('tensorflow was imported')")
    code = (
        "import sys; from lm import sources;"
        f"source = sources.tfds_records('tiny', 'train[:99%]', {str(prepared)!r}); source[3];"
        "assert not {'tensorflow', 'jax'} & set(sys.modules)"
    )
    root = pathlib.Path(__file__).parents[1]
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{root}:{tmp_path}", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the TFDS directory beside the checkout")
def test_real_datasets_read_as_text():
    source = sources.tfds_records("wikipedia/20230601.en", "train", SHARED)
    assert len(source) == sources.tfds_splits("wikipedia/20230601.en", SHARED)["train"]
    assert all(isinstance(source[0][field], str) for field in ("title", "text"))
