"""Build a corpus by Apache Beam on any runner, with the same bytes as by local processes.

  file -> record -> cleaned, keyed -+-> by key ------------> all but the first are duplicates
                                    |   by band and bucket -> near an earlier one: duplicates
                                    +-> by file, without duplicates: a text file   (first pipeline)
  text file -> token file                                                         (second pipeline)

Between the two the tokenizer is trained in the process that launched the command. Workers write to
a shared directory: for the DirectRunner that of the corpus; for a cluster --temp, a gs:// address
or a directory that all machines mount. Workers must reach the sources and data_dir too.

Workers need what `make beam` installs; for a cluster that is a container: the image
apache/beam_python3.11_sdk in Beam's version, with `pip install --requirement requirements-beam.txt`
and `pip install --no-deps` of this package. Tests run the DirectRunner, which holds all data in
memory; the flags of other runners are from Beam's documentation:

  --runner=DirectRunner --runner_flags="--direct_num_workers=4
      --direct_running_mode=multi_processing"
  --runner=DataflowRunner --temp=gs://bucket/lm --runner_flags="--project=p --region=r
      --temp_location=gs://bucket/beam --sdk_container_image=IMAGE"   (needs apache-beam[gcp])
  --runner=FlinkRunner --temp=... --runner_flags="--flink_master=host:8081
      --environment_type=DOCKER --environment_config=IMAGE"
  --runner=SparkRunner --temp=... --runner_flags="--spark_master_url=spark://host:7077
      --environment_type=DOCKER --environment_config=IMAGE"
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from lm import sources, storage, tokenizer
from lm.corpus import dedupe, documents, folder, rules, runners
from lm.corpus.documents import Position
from lm.shards import shard_files

BAND_BATCH = 1000  # documents whose band hashes are computed at once


def build(
    config: documents.CorpusConfig,
    out: str | pathlib.Path,
    runner: str,
    runner_flags: str = "",
    temp: str = "",
) -> tuple[dict, bool]:
    """Build the corpus in local directory `out`; returns (manifest, whether it existed already).

    runner: Beam's name of it. runner_flags: Beam's own flags, as in a shell. temp: the shared
    directory; "" for one beside `out`, for the DirectRunner only.
    Raises ValueError as lm.corpus.build and runners.pipeline_options do.
    """
    options = runners.pipeline_options(runner, runner_flags, temp)

    def write(files, staging_dir):
        with _temporary_dir(temp or staging_dir) as shared_dir:
            return _write_corpus(config, files, staging_dir, shared_dir, options)

    return folder.build_corpus(config, out, write)


@contextlib.contextmanager
def _temporary_dir(parent: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Create a directory in `parent` and remove it at the end."""
    directory = storage.as_path(parent) / f"lm-corpus-{uuid.uuid4().hex}"
    directory.mkdir(parents=True)
    try:
        yield directory
    finally:
        storage.remove_dir(directory)


def _write_corpus(
    config: documents.CorpusConfig,
    files: list[sources.SourceFile],
    staging_dir: pathlib.Path,
    shared_dir: pathlib.Path,
    options: Any,
) -> tuple[documents.Counts, dict[str, list[documents.EncodedShard]]]:
    """Run both pipelines; copy the token files to the staging directory."""
    num_shards = config.shard_count(files)
    counts = _read_sources(config, files, shared_dir, staging_dir, options)
    sampled = _tokenizer_texts(shared_dir, num_shards, counts["splits", "train"])
    tokens = folder.make_tokenizer(config, staging_dir, counts, sampled)
    written = _write_shards(config, shared_dir, num_shards, tokens, options)
    for split, shards in written.items():
        (staging_dir / split).mkdir()
        for number in range(len(shards)):
            name = documents.file_name(number, num_shards)
            (staging_dir / split / name).write_bytes((shared_dir / f"{split}-{name}").read_bytes())
    return counts, written


def _read_json_lines(directory: pathlib.Path, pattern: str) -> Iterator[Any]:
    """The JSON of each line of the files that match `pattern`."""
    for path in sorted(directory.glob(pattern)):
        with path.open() as file:
            yield from map(json.loads, file)


# The first pipeline: records to text files. -------------------------------------------------------


def _read_sources(
    config: documents.CorpusConfig,
    files: list[sources.SourceFile],
    shared_dir: pathlib.Path,
    staging_dir: pathlib.Path,
    options: Any,
) -> documents.Counts:
    """Write text files and quarantine."""
    import apache_beam as beam

    limits, num_shards = rules.parse_rules(config.rules), config.shard_count(files)
    shared, names = str(shared_dir), folder.source_names(files)
    shard_of = lambda key: int(documents.shard_of(np.frombuffer(key, dedupe.KEY), num_shards)[0])
    with runners.pipeline(options) as pipeline:
        records = (
            pipeline
            | "files" >> beam.Create(range(len(files)))
            | "spread files" >> beam.Reshuffle()
            | "records" >> beam.FlatMap(documents.raw_records, files)
            | "spread records" >> beam.Reshuffle()
            | "read" >> beam.Map(documents.read_record, files, limits, config.dedupe)
        )
        passed = records | "passed" >> beam.Filter(lambda record: bool(record.key))
        texts = passed | "texts" >> beam.Map(
            lambda record: (shard_of(record.key), (record.position, record.key, record.text))
        )
        duplicates = _duplicates(passed, config.dedupe) | "duplicates" >> beam.Map(
            lambda duplicate: (shard_of(duplicate[1]), (duplicate[0], duplicate[2]))
        )
        split_counts = (
            {"texts": texts, "duplicates": duplicates}
            | "by file" >> beam.CoGroupByKey()
            | "write texts" >> beam.FlatMap(_write_texts, shared, config.heldout_fraction)
        )
        record_counts = records | "count" >> beam.FlatMap(
            lambda record: list(documents.record_counts(record).items())
        )
        (
            (record_counts, split_counts)
            | "all counts" >> beam.Flatten()
            | "add up" >> beam.CombinePerKey(sum)
            | "counts" >> beam.Map(json.dumps)
            | "write counts" >> beam.io.WriteToText(f"{shared}/counts")
        )
        (
            records
            | "unreadable" >> beam.Filter(lambda record: bool(record.reason))
            | "lines" >> beam.Map(lambda r: [r.position, documents.quarantine_line(r, names)])
            | "quarantine" >> beam.Map(json.dumps)
            | "write quarantine" >> beam.io.WriteToText(f"{shared}/bad")
        )
    quarantine = "".join(line for _, line in sorted(_read_json_lines(shared_dir, "bad*")))
    (staging_dir / folder.QUARANTINE).write_text(quarantine)
    return Counter({tuple(key): n for key, n in _read_json_lines(shared_dir, "counts*")})


def _duplicates(passed: Any, dedupe_kind: str) -> Any:
    """The documents that repeat an earlier one: (position, key, kind of duplicate)."""
    import apache_beam as beam

    if dedupe_kind == "none":
        return passed | "none" >> beam.Filter(lambda _: False)
    by_key = (
        passed
        | "keys" >> beam.Map(lambda record: (record.key, (record.position, record.signature)))
        | "by key" >> beam.GroupByKey()
    )
    exact = by_key | "later" >> beam.FlatMap(_all_but_first)
    if dedupe_kind == "exact":
        return exact
    near = (
        by_key
        | "first" >> beam.Map(_first)
        | "batches" >> beam.BatchElements(max_batch_size=BAND_BATCH)
        | "bands" >> beam.FlatMap(_band_buckets)
        | "by bucket" >> beam.GroupByKey()
        | "near" >> beam.FlatMap(_near)
    )
    return (exact, near) | "exact and near" >> beam.Flatten()


def _all_but_first(group: tuple[bytes, Iterable]) -> list[tuple[Position, bytes, str]]:
    key, members = group
    return [(position, key, "exact") for position, _ in sorted(members)[1:]]


def _first(group: tuple[bytes, Iterable]) -> tuple[Position, bytes, bytes]:
    key, members = group
    position, signature = min(members)
    return position, key, signature


def _band_buckets(batch: list) -> Iterator[tuple[bytes, tuple[Position, bytes, bytes]]]:
    """Each document under its bucket of each band."""
    signatures = _signatures(batch)
    for band in range(dedupe.NUM_BANDS):
        entries = signatures[:, band * dedupe.BAND_ROWS : (band + 1) * dedupe.BAND_ROWS]
        for bucket, document in zip(dedupe.band_hashes(entries), batch, strict=True):
            yield bytes([band]) + bucket.tobytes(), document


def _near(group: tuple[bytes, Iterable]) -> Iterator[tuple[Position, bytes, str]]:
    bucket = sorted(group[1])
    order = np.arange(len(bucket))
    is_near = dedupe.near_in_buckets(np.zeros(len(bucket)), _signatures(bucket), order)
    for index in np.flatnonzero(is_near).tolist():
        position, key, _ = bucket[index]
        yield position, key, "near"


def _signatures(batch: list) -> np.ndarray:
    data = b"".join(signature for _, _, signature in batch)
    return np.frombuffer(data, np.uint16).reshape(-1, dedupe.NUM_HASHES)


def _write_texts(
    group: tuple[int, dict], shared_dir: str, heldout_fraction: float
) -> Iterator[tuple[tuple[str, str], int]]:
    """Write a file's documents, in order, as lines of (split, key, text); yields counts."""
    number, members = group
    duplicates = dict(members["duplicates"])
    texts = sorted(text for text in members["texts"] if text[0] not in duplicates)
    keys = np.frombuffer(b"".join(key for _, key, _ in texts), dedupe.KEY)
    splits = [documents.SPLITS[int(flag)] for flag in documents.is_heldout(keys, heldout_fraction)]
    lines = [
        json.dumps([split, key.hex(), text]) + "\n"
        for split, (_, key, text) in zip(splits, texts, strict=True)
    ]
    storage.write_atomic(f"{shared_dir}/texts-{number:05d}.jsonl", "".join(lines).encode())
    for kind in duplicates.values():
        yield ("duplicates", kind), 1
    for split in splits:
        yield ("splits", split), 1


# The second pipeline: text files to token files. --------------------------------------------------


def _texts(shared_dir: pathlib.Path, number: int) -> Iterator[tuple[str, bytes, str]]:
    """(split, key, text) of each document of a text file."""
    for split, key, text in _read_json_lines(shared_dir, f"texts-{number:05d}.jsonl"):
        yield split, bytes.fromhex(key), text


def _tokenizer_texts(shared_dir: pathlib.Path, num_shards: int, total: int) -> Iterator[str]:
    """The texts that a tokenizer is trained on, from `total` documents of the training split."""
    for number in range(num_shards):
        for split, key, text in _texts(shared_dir, number):
            if split == "train" and documents.is_sampled(np.frombuffer(key, dedupe.KEY), total)[0]:
                yield text


def _write_shards(
    config: documents.CorpusConfig,
    shared_dir: pathlib.Path,
    num_shards: int,
    tokens: tokenizer.Tokenizer,
    options: Any,
) -> dict[str, list[documents.EncodedShard]]:
    """Write the token files of all splits to the shared directory."""
    import apache_beam as beam

    model, shared = tokenizer.read(tokens.directory), str(shared_dir)
    items = [(split, number) for split in config.splits for number in range(num_shards)]
    with runners.pipeline(options) as pipeline:
        (
            pipeline
            | "files" >> beam.Create(items)
            | "spread files" >> beam.Reshuffle()
            | "encode" >> beam.Map(_write_shard, shared, num_shards, model)
            | "facts" >> beam.Map(json.dumps)
            | "write facts" >> beam.io.WriteToText(f"{shared}/facts")
        )
    written = {split: [] for split in config.splits}
    for split, _, facts, frequencies, lengths, text_bytes in sorted(
        _read_json_lines(shared_dir, "facts*"), key=lambda row: row[:2]
    ):
        arrays = np.array(frequencies, np.int64), np.array(lengths, np.int32)
        shard = shard_files.WrittenShard(facts, *arrays)
        written[split].append(documents.EncodedShard(shard, text_bytes))
    return written


def _write_shard(
    item: tuple[str, int], shared_dir: str, num_shards: int, model: tuple[bytes, dict]
) -> list:
    """Write the token file of an item (split, number); returns its facts as JSON."""
    split, number = item
    shared = storage.as_path(shared_dir)
    texts = (text for name, _, text in _texts(shared, number) if name == split)
    with tempfile.TemporaryDirectory() as directory:
        tokens = tokenizer.write(pathlib.Path(directory, "tokenizer"), *model)
        path = pathlib.Path(directory, documents.file_name(number, num_shards))
        shard, text_bytes = documents.write_shard(path, texts, tokens)
        storage.write_atomic(shared / f"{split}-{path.name}", path.read_bytes())
    return [*item, shard.facts, shard.frequencies.tolist(), shard.lengths.tolist(), text_bytes]
