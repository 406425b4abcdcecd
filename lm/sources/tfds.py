"""Records from TFDS, stored as ArrayRecord and read without TensorFlow.

A data directory holds root/name[/config]/version; the newest version is read unless one is named.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from typing import Any

from lm import lookup, storage

EMBEDDED_DATASETS = {"pydocs"}  # datasets that this package builds itself

MIN_EXAMPLES_FOR_PERCENT = 51  # examples of which 1 %, rounded, is one
DEFAULT_HELDOUT = "validation"  # TFDS's word, which not every dataset has

FORMAT = "array_record"
VERSION = re.compile(r"\d+\.\d+\.\d+")


@dataclasses.dataclass(frozen=True)
class TfdsRecords:
    """A split of a TFDS dataset as a random-access sequence: len() and [i] -> dict of str, int.

    Pickles by its address, so that worker processes open the files themselves.
    """

    name: str
    split: str
    source: Sequence = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _to_python(self.source[index])

    def __iter__(self):
        return (self[index] for index in range(len(self)))


def data_root(data_dir: str = ""):
    """The TFDS directory: data_dir, or where it is "", $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    from etils import epath

    root = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    if storage.is_remote(root):
        raise ValueError(
            f"the TFDS directory {root} is in a bucket, and is read from a disk alone; copy it to "
            f"one, or make a corpus of it with `python -m lm corpus`, which may lie in a bucket."
        )
    return epath.Path(root).expanduser().resolve()


def tfds_splits(name: str, data_dir: str = "") -> dict[str, int]:
    """Split name -> number of examples.

    name: dataset, dataset/config, either with :version or /version or neither.
    data_dir: "" is the user's TFDS directory, $TFDS_DATA_DIR or else ~/tensorflow_datasets.
    Raises ValueError, with the cure, where the dataset is absent or not stored as ArrayRecord.
    """
    info = json.loads((_dataset_dir(name, data_dir) / "dataset_info.json").read_text())
    return {s["name"]: sum(map(int, s.get("shardLengths", ()))) for s in info.get("splits", ())}


def tfds_records(name: str, split: str, data_dir: str = "") -> TfdsRecords:
    """The records of a split: bytes become str, sequences lists, numpy scalars int or float.

    name, data_dir: as in tfds_splits. split: in TFDS's words, as train, train[:99%], train+test.
    Raises ValueError for what tfds_splits raises, and for a split that is absent or empty.
    """
    import tensorflow_datasets as tfds

    splits = tfds_splits(name, data_dir)
    for part in split.split("+"):
        lookup.lookup(splits | {"all": 0}, part.split("[")[0].strip(), f"the split of {name}")
    builder = tfds.builder_from_directory(_dataset_dir(name, data_dir))
    try:
        examples = builder.info.splits[split].num_examples
    except ValueError:
        raise ValueError(
            f"the split {split!r} of {name} cannot be read as a slice; "
            f"write it as train[:99%], train[1000:] or train+test."
        ) from None
    if examples < 1:
        raise ValueError(
            f"the split {split!r} of {name} holds no example, out of {splits}; take a wider slice."
        )
    return TfdsRecords(name, split, builder.as_data_source(split, file_format=FORMAT))


def split_address(address: str) -> tuple[str, str]:
    """tfds:name@split to (name, split), train where none is named."""
    name, _, split = address.removeprefix("tfds:").partition("@")
    return name, split or "train"


def tfds_bytes(name: str, split: str, data_dir: str = "") -> int:
    """Bytes of a split's data, or of a slice's share of its splits.

    name, split, data_dir, errors: as in tfds_records.
    """
    info = json.loads((_dataset_dir(name, data_dir) / "dataset_info.json").read_text())
    stored = {s["name"]: int(s.get("numBytes", 0)) for s in info.get("splits", ())}
    sizes, ranges = tfds_splits(name, data_dir), _ranges(name, split, data_dir)
    return sum(stored[part] * (last - first) // sizes[part] for part, first, last in ranges)


def tfds_fingerprint(name: str, data_dir: str = "") -> str:
    """A hash of what a dataset says of itself: version, splits, sizes; not of where it lies."""
    info = (_dataset_dir(name, data_dir) / "dataset_info.json").read_bytes()
    return hashlib.sha256(info).hexdigest()


def hold_out_end(source: str, split: str, count: int) -> tuple[str, str]:
    """(all but the end of a split, its end): the last 1 %, of fewer than ENOUGH the last example.

    Raises ValueError where it has fewer than 2.
    """
    if count < 2:
        raise ValueError(
            f"{source} has {count} of the 2 examples or more that {split} needs for one to be held "
            f"out; add some, or name another split in data.heldout."
        )
    cut = "99%" if count >= MIN_EXAMPLES_FOR_PERCENT else "-1"
    return f"{split}[:{cut}]", f"{split}[{cut}:]"


def resolve_tfds_splits(name: str, train: str, heldout: str, data_dir: str = "") -> tuple[str, str]:
    """(train split, held-out split): as given, or as `end_of` train if there is no validation.

    Raises ValueError for what tfds_splits and end_of raise, for a split that is not there, and
    where the two splits share examples.
    """
    splits = tfds_splits(name, data_dir)
    if heldout == DEFAULT_HELDOUT and heldout not in splits:
        lookup.lookup(splits, train, f"the split of {name} to hold {heldout!r} out of")
        return hold_out_end(name, train, splits[train])
    for a in _ranges(name, train, data_dir):
        for b in _ranges(name, heldout, data_dir):
            if a[0] == b[0] and max(a[1], b[1]) < min(a[2], b[2]):
                raise ValueError(
                    f"data.train={train!r} and data.heldout={heldout!r} of {name} share examples; "
                    f"use disjoint slices, as {a[0]}[:95%] and {a[0]}[95%:]."
                )
    return train, heldout


def _ranges(name: str, split: str, data_dir: str) -> list[tuple[str, int, int]]:
    """(split, first, after last) of each part of a split in TFDS's words."""
    import tensorflow_datasets as tfds

    splits = tfds_splits(name, data_dir)
    if split == "all":
        return [(part, 0, size) for part, size in splits.items()]
    infos = tfds.builder_from_directory(_dataset_dir(name, data_dir)).info.splits
    for part in split.split("+"):
        lookup.lookup(splits, part.split("[")[0].strip(), f"the split of {name}")
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"the split {split!r} of {name} cannot be read as a slice ({error}); "
            f"write it as train[:99%], train[1000:] or train+test."
        ) from None
    return [
        (p.splitname, p.from_ or 0, splits[p.splitname] if p.to is None else p.to) for p in parts
    ]


def _to_python(value: Any) -> Any:
    """numpy and bytes to Python and str, at any depth."""
    if isinstance(value, dict):
        return {key: _to_python(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if hasattr(value, "tolist"):  # numpy arrays and scalars
        return _to_python(value.tolist())
    if isinstance(value, list | tuple):
        return [_to_python(item) for item in value]
    return value


def _split_version(name: str) -> tuple[str, str]:
    """("dataset" or "dataset/config", version or "")."""
    path, _, version = name.partition(":")
    head, _, last = path.rpartition("/")
    return (head, last) if not version and VERSION.fullmatch(last) else (path, version)


def _dataset_dir(name: str, data_dir: str):
    """The directory that holds the dataset's files, as an epath.Path."""
    root = data_root(data_dir)
    path, wanted = _split_version(name)
    versions = _finished_versions(root / path)
    if wanted and wanted in versions:
        versions = [wanted]
    elif not versions or wanted:
        raise ValueError(_absent_message(name, root, versions))
    directory = root / path / max(versions, key=lambda v: [int(n) for n in v.split(".")])
    info = json.loads((directory / "dataset_info.json").read_text())
    # A dataset without a word on its format is from before TFDS had two.
    stored = info.get("fileFormat", "tfrecord")
    if FORMAT not in {stored, *info.get("alternativeFileFormats", ())}:
        raise ValueError(
            f"{name} at {directory} is stored as {stored}, which is not read here; "
            f"where tensorflow is installed, convert it with `tfds convert_format "
            f"--dataset_version_dir={directory} --out_file_format={FORMAT}`, "
            f"or build it anew elsewhere with {_build_command(name, '<another directory>')}."
        )
    return directory


def _finished_versions(directory) -> list[str]:
    """The finished versions in root/name[/config]; what a killed build left is not one."""
    if not directory.is_dir():
        return []
    return sorted(
        child.name
        for child in directory.iterdir()
        if VERSION.fullmatch(child.name)
        and (child / "dataset_info.json").exists()
        and (child / "features.json").exists()
    )


def _build_command(name: str, root: Any) -> str:
    """The shell command that prepares a dataset for this package."""
    path, version = _split_version(name)
    if path in EMBEDDED_DATASETS:
        return "`python -m lm corpus --config=configs/pretrain.py`"
    exact = f"{path}:{version}" if version else path
    return f"`tfds build {exact} --file_format={FORMAT} --data_dir={root}`"


def _absent_message(name: str, root, versions: list[str]) -> str:
    """The sentence for a dataset that is not there: where, what lies near, and the cure."""
    path, _ = _split_version(name)
    cure = f"prepare it with {_build_command(name, root)}"
    if path not in EMBEDDED_DATASETS:
        cure += " where tensorflow is installed"
    if versions:
        return f"{name} is not in {root / path}, which has {', '.join(versions)}; {cure}."
    there = _list_datasets(root)
    # A misspelt dataset is still near to its own name when a config makes the whole path far.
    heads = {full.split("/")[0]: full for full in there}
    near = difflib.get_close_matches(path, there, 1) or [
        heads[head] for head in difflib.get_close_matches(path.split("/")[0], heads, 1)
    ]
    return f"{name} is not in {root}; {cure}" + (f"; did you mean {near[0]!r}?" if near else ".")


def _list_datasets(root) -> list[str]:
    """Every dataset, with its config where it has one, that has a finished version in root."""
    if not root.is_dir():
        return []
    children = [child for child in root.iterdir() if child.is_dir()]
    grandchildren = [g for child in children for g in child.iterdir() if g.is_dir()]
    found = [path for path in (*children, *grandchildren) if _finished_versions(path)]
    return sorted(str(path.relative_to(root)) for path in found)
