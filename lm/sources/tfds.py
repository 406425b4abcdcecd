"""TFDS datasets stored as ArrayRecord, read without TensorFlow.

A dataset lies in data_dir/name[/config]/version; the newest version is read unless one is named.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from typing import Any

from lm import lookup, storage
from lm.sources import documents

EMBEDDED_DATASETS = {"pydocs"}  # built by this package

MIN_EXAMPLES_FOR_PERCENT = 51  # 1 % of fewer rounds to none
DEFAULT_HELDOUT = "validation"  # TFDS's usual name; not every dataset has this split

FORMAT = "array_record"
VERSION = re.compile(r"\d+\.\d+\.\d+")


def data_root(data_dir: str = "") -> Any:
    """The TFDS directory as an epath.Path: data_dir, $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    from etils import epath

    root = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    if storage.is_remote(root):
        raise ValueError(
            f"the TFDS directory {root} is in a bucket, but TFDS is read from a local disk only; "
            f"copy it to one, or make a corpus of it with `python -m lm corpus`, which may be in a "
            f"bucket."
        )
    return epath.Path(root).expanduser().resolve()


def tfds_splits(name: str, data_dir: str = "") -> dict[str, int]:
    """Split name -> number of examples.

    name: dataset or dataset/config, optionally with :version or /version.
    data_dir: as in data_root.
    Raises ValueError, with the fix, if the dataset is missing or not stored as ArrayRecord.
    """
    splits = _dataset_info(name, data_dir).get("splits", ())
    return {split["name"]: sum(map(int, split.get("shardLengths", ()))) for split in splits}


def _dataset_info(name: str, data_dir: str) -> dict:
    return json.loads((_dataset_dir(name, data_dir) / "dataset_info.json").read_text())


def tfds_records(name: str, split: str, data_dir: str = "") -> documents.Records:
    """The records of a split: bytes become str, arrays lists, numpy scalars int or float.

    They pickle by address, so that worker processes open the files themselves.

    name, data_dir: as in tfds_splits. split: in TFDS's syntax, as train, train[:99%], train+test.
    Raises ValueError like tfds_splits, and if the split does not exist or is empty.
    """
    import tensorflow_datasets as tfds

    splits = tfds_splits(name, data_dir)
    _check_split_names(name, split, splits | {"all": 0})
    builder = tfds.builder_from_directory(_dataset_dir(name, data_dir))
    try:
        examples = builder.info.splits[split].num_examples
    except ValueError:
        raise _slice_error(name, split) from None
    if examples < 1:
        raise ValueError(
            f"the split {split!r} of {name} holds no example, out of {splits}; take a wider slice."
        )
    stored = builder.as_data_source(split, file_format=FORMAT)
    return documents.Records(name, split, stored, _to_python)


def _check_split_names(name: str, split: str, splits: dict[str, int]) -> None:
    for term in split.split("+"):
        lookup.lookup(splits, term.split("[")[0].strip(), f"the split of {name}")


def _slice_error(name: str, split: str, reason: str = "") -> ValueError:
    return ValueError(
        f"the split {split!r} of {name} cannot be read as a slice{reason}; "
        f"write it as train[:99%], train[1000:] or train+test."
    )


def split_address(address: str) -> tuple[str, str]:
    """(name, split) of tfds:name@split; the default split is train."""
    name, _, split = address.removeprefix("tfds:").partition("@")
    return name, split or "train"


def tfds_bytes(name: str, split: str, data_dir: str = "") -> int:
    """The bytes of a split's data; for a slice, its share of them.

    Arguments and errors as in tfds_records.
    """
    splits = _dataset_info(name, data_dir).get("splits", ())
    num_bytes = {split["name"]: int(split.get("numBytes", 0)) for split in splits}
    sizes, ranges = tfds_splits(name, data_dir), _ranges(name, split, data_dir)
    return sum(num_bytes[key] * (stop - start) // sizes[key] for key, start, stop in ranges)


def tfds_fingerprint(name: str, data_dir: str = "") -> str:
    """A hash of a dataset's metadata (version, splits, sizes), independent of its location."""
    info = (_dataset_dir(name, data_dir) / "dataset_info.json").read_bytes()
    return hashlib.sha256(info).hexdigest()


def hold_out_end(source: str, split: str, count: int) -> tuple[str, str]:
    """(all but the end of a split, its end): the last 1 %, or the last example of few.

    Raises ValueError if it has fewer than 2.
    """
    if count < 2:
        raise ValueError(
            f"{source} has {count} of the 2 examples or more that {split} needs for one to be held "
            f"out; add some, or name another split in data.heldout_split."
        )
    cut = "99%" if count >= MIN_EXAMPLES_FOR_PERCENT else "-1"
    return f"{split}[:{cut}]", f"{split}[{cut}:]"


def resolve_tfds_splits(name: str, train: str, heldout: str, data_dir: str = "") -> tuple[str, str]:
    """(train split, held-out split): as given, or if there is no validation, slices of train.

    Raises ValueError like tfds_splits and hold_out_end, if a split does not exist, and if the two
    share examples.
    """
    splits = tfds_splits(name, data_dir)
    if heldout == DEFAULT_HELDOUT and heldout not in splits:
        lookup.lookup(splits, train, f"the split of {name} to hold {heldout!r} out of")
        return hold_out_end(name, train, splits[train])
    for split, start, stop in _ranges(name, train, data_dir):
        for heldout_split, heldout_start, heldout_stop in _ranges(name, heldout, data_dir):
            if split == heldout_split and max(start, heldout_start) < min(stop, heldout_stop):
                raise ValueError(shared_examples_error(name, train, heldout, split))
    return train, heldout


def shared_examples_error(source: str, train: str, heldout: str, split: str) -> str:
    """The error message for a train and a held-out split that overlap in `split`."""
    return (
        f"data.train_split={train!r} and data.heldout_split={heldout!r} of {source} share "
        f"examples; use disjoint slices, as {split}[:95%] and {split}[95%:]."
    )


def _ranges(name: str, split: str, data_dir: str) -> list[tuple[str, int, int]]:
    """(split name, start, stop) of each term of a split in TFDS's syntax."""
    import tensorflow_datasets as tfds

    splits = tfds_splits(name, data_dir)
    if split == "all":
        return [(key, 0, size) for key, size in splits.items()]
    infos = tfds.builder_from_directory(_dataset_dir(name, data_dir)).info.splits
    _check_split_names(name, split, splits)
    try:
        ranges = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (ValueError, AssertionError) as error:
        raise _slice_error(name, split, f" ({error})") from None
    return [
        (r.splitname, r.from_ or 0, splits[r.splitname] if r.to is None else r.to) for r in ranges
    ]


def _to_python(value: Any) -> Any:
    """Convert numpy values and bytes to Python values and str, at any depth."""
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
    """The directory of a dataset's version, as an epath.Path."""
    root = data_root(data_dir)
    path, version = _split_version(name)
    versions = _finished_versions(root / path)
    if version and version in versions:
        versions = [version]
    elif not versions or version:
        raise ValueError(_absent_message(name, root, versions))
    directory = root / path / max(versions, key=lambda v: [int(n) for n in v.split(".")])
    info = json.loads((directory / "dataset_info.json").read_text())
    # Datasets without the field were written before TFDS had a second format.
    stored = info.get("fileFormat", "tfrecord")
    if FORMAT not in {stored, *info.get("alternativeFileFormats", ())}:
        raise ValueError(
            f"{name} at {directory} is stored as {stored}, which is unsupported; "
            f"where tensorflow is installed, convert it with `tfds convert_format "
            f"--dataset_version_dir={directory} --out_file_format={FORMAT}`, "
            f"or build it anew elsewhere with {_build_command(name, '<another directory>')}."
        )
    return directory


def _finished_versions(directory) -> list[str]:
    """The complete versions in root/name[/config]; a killed build leaves an incomplete one."""
    if not directory.is_dir():
        return []
    files = ("dataset_info.json", "features.json")
    return sorted(
        child.name
        for child in directory.iterdir()
        if VERSION.fullmatch(child.name) and all((child / file).exists() for file in files)
    )


def _build_command(name: str, root: Any) -> str:
    """The shell command that prepares a dataset for this package."""
    path, version = _split_version(name)
    if path in EMBEDDED_DATASETS:
        return "`python -m lm corpus --config=configs/pretrain.py`"
    exact = f"{path}:{version}" if version else path
    return f"`tfds build {exact} --file_format={FORMAT} --data_dir={root}`"


def _absent_message(name: str, root, versions: list[str]) -> str:
    """The error message for a missing dataset: where it was sought, similar names, and the fix."""
    path, _ = _split_version(name)
    fix = f"prepare it with {_build_command(name, root)}"
    if path not in EMBEDDED_DATASETS:
        fix += " where tensorflow is installed"
    if versions:
        return f"{name} is not in {root / path}, which has {', '.join(versions)}; {fix}."
    datasets = _list_datasets(root)
    # Compare the dataset name alone too: a config can make the whole path of a typo look unlike.
    heads = {full.split("/")[0]: full for full in datasets}
    close = difflib.get_close_matches(path, datasets, 1) or [
        heads[head] for head in difflib.get_close_matches(path.split("/")[0], heads, 1)
    ]
    return f"{name} is not in {root}; {fix}" + (f"; did you mean {close[0]!r}?" if close else ".")


def _list_datasets(root) -> list[str]:
    """Every dataset[/config] in root that has a complete version."""
    if not root.is_dir():
        return []
    children = [child for child in root.iterdir() if child.is_dir()]
    grandchildren = [g for child in children for g in child.iterdir() if g.is_dir()]
    datasets = [path for path in (*children, *grandchildren) if _finished_versions(path)]
    return sorted(str(path.relative_to(root)) for path in datasets)
