"""Build a corpus by Apache Beam on any runner, with the same bytes as by local processes.

  file -> record -> cleaned, keyed -+-> by key ------------> all but the first are duplicates
                                    |   by band and bucket -> near an earlier one: duplicates
                                    +-> by file, without duplicates: a text file   (first pipeline)
  text file -> token file                                                         (second pipeline)

Between the two the tokenizer is trained in the process that launched the command. Workers write to
a shared directory: for the DirectRunner that of the corpus; for a cluster --temp, as
gs://bucket/folder. Workers must reach the sources and data_dir too.

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

import json
import pathlib
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from lm import sources, tokenizer
from lm.corpus import beam_files, dedupe, documents, folder, rules, runners
from lm.shards import shard_files

BAND_BATCH = 1000  # documents whose band hashes are computed at once

Position = tuple[int, int]  # (number of a file, position of the record in it): the global order


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
        with beam_files.temporary_folder(temp or str(staging_dir)) as shared_dir:
            return _write_corpus(config, files, staging_dir, shared_dir, options)

    return folder.build_corpus(config, out, write)


def _write_corpus(
    config: documents.CorpusConfig,
    files: list[sources.SourceFile],
    staging_dir: pathlib.Path,
    shared_dir: str,
    options: Any,
) -> tuple[documents.Tally, list[documents.SplitFiles]]:
    """Run both pipelines; copy the token files to the staging directory."""
    count = config.shard_count(files)
    tally, split_counts = _read_sources(config, files, shared_dir, staging_dir, options)
    folder.check_splits(config, split_counts, tally)
    sampled = _tokenizer_texts(shared_dir, count, split_counts["train"])
    tokens = folder.make_tokenizer(config, staging_dir / "tokenizer", sampled)
    written = _write_shards(config, shared_dir, count, tokens, options)
    _check_complete(written, count, split_counts)
    for split in config.splits:
        (staging_dir / split).mkdir()
        for number in range(count):
            name = documents.file_name(number, count)
            address = beam_files.join(shared_dir, f"{split}-{name}")
            beam_files.download(address, staging_dir / split / name)
    return tally, written


def _check_complete(
    written: list[documents.SplitFiles], count: int, split_counts: dict[str, int]
) -> None:
    """Raise ValueError unless the files have every document. split_counts: split -> documents."""
    actual = {
        split: sum(files.written[split].facts["documents"] for files in written)
        for split in split_counts
    }
    if len(written) != count or actual != split_counts:
        raise ValueError(
            f"the workers left {len(written)} of {count} files, with {actual} of {split_counts} "
            f"documents; set --temp to storage that all of them share."
        )


# The first pipeline: records to text files. -------------------------------------------------------


def _read_sources(
    config: documents.CorpusConfig,
    files: list[sources.SourceFile],
    shared_dir: str,
    staging_dir: pathlib.Path,
    options: Any,
) -> tuple[documents.Tally, dict[str, int]]:
    """Write text files and quarantine; returns the tally and the documents of each split."""
    import apache_beam as beam

    limits, count = rules.parse_rules(config.rules), config.shard_count(files)
    with runners.pipeline(options) as pipeline:
        records = (
            pipeline
            | "files" >> beam.Create(range(len(files)))
            | "spread files" >> beam.Reshuffle()
            | "records" >> beam.FlatMap(_records, files)
            | "spread records" >> beam.Reshuffle()
            | "read" >> beam.Map(_read, files, limits, config.dedupe)
        )
        passed = records | "passed" >> beam.Filter(lambda record: bool(record[1].key))
        by_file = {
            "texts": passed | "texts" >> beam.Map(_text, count),
            "repeated": _duplicates(passed, config.dedupe)
            | "repeated" >> beam.Map(_duplicate_by_file, count),
        }
        split_counts = (
            by_file
            | "by file" >> beam.CoGroupByKey()
            | "write texts" >> beam.FlatMap(_write_texts, shared_dir, config.heldout_fraction)
        )
        record_counts = records | "count" >> beam.FlatMap(_counts)
        (
            (record_counts, split_counts)
            | "all counts" >> beam.Flatten()
            | "add up" >> beam.CombinePerKey(sum)
            | "counts" >> beam.Map(json.dumps)
            | "write counts" >> beam.io.WriteToText(beam_files.join(shared_dir, "counts"))
        )
        (
            records
            | "quarantine" >> beam.FlatMap(_quarantine, folder.source_names(files))
            | "write quarantine" >> beam.io.WriteToText(beam_files.join(shared_dir, "bad"))
        )
    quarantine = sorted(beam_files.read_json_lines(beam_files.join(shared_dir, "bad*")))
    lines = [line for _, line in quarantine]
    (staging_dir / folder.QUARANTINE).write_text("".join(lines))
    counts = list(beam_files.read_json_lines(beam_files.join(shared_dir, "counts*")))
    return _totals(config, counts, lines)


def _records(number: int, files: list[sources.SourceFile]) -> Iterator[tuple[Position, Any]]:
    for index, raw in enumerate(files[number].raw_records()):
        yield (number, index), raw


def _read(
    record: tuple[Position, Any],
    files: list[sources.SourceFile],
    limits: rules.RuleLimits,
    dedupe_kind: str,
) -> tuple[Position, documents.RecordResult]:
    position, raw = record
    return position, documents.read_record(files[position[0]], raw, limits, dedupe_kind)


def _file_number(key: bytes, count: int) -> int:
    return int(documents.shard_of(np.frombuffer(key, dedupe.KEY), count)[0])


def _text(
    record: tuple[Position, documents.RecordResult], count: int
) -> tuple[int, tuple[Position, bytes, str]]:
    position, result = record
    return _file_number(result.key, count), (position, result.key, result.text)


def _duplicates(passed: Any, dedupe_kind: str) -> Any:
    """The documents that repeat an earlier one: (position, key, kind of duplicate)."""
    import apache_beam as beam

    if dedupe_kind == "none":
        return passed | "none" >> beam.Filter(lambda _: False)
    by_key = passed | "keys" >> beam.Map(_by_key) | "by key" >> beam.GroupByKey()
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
    return (exact, near) | "both" >> beam.Flatten()


def _by_key(
    record: tuple[Position, documents.RecordResult],
) -> tuple[bytes, tuple[Position, bytes]]:
    position, result = record
    return result.key, (position, result.signature)


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


def _duplicate_by_file(
    duplicate: tuple[Position, bytes, str], count: int
) -> tuple[int, tuple[Position, str]]:
    position, key, kind = duplicate
    return _file_number(key, count), (position, kind)


def _write_texts(
    group: tuple[int, dict], shared_dir: str, heldout: float
) -> Iterator[tuple[tuple[str, str], int]]:
    """Write a file's documents, in order, as lines of (split, key, text); yields counts."""
    number, members = group
    duplicates = dict(members["repeated"])
    texts = sorted(text for text in members["texts"] if text[0] not in duplicates)
    keys = np.frombuffer(b"".join(key for _, key, _ in texts), dedupe.KEY)
    splits = [documents.SPLITS[int(flag)] for flag in documents.is_heldout(keys, heldout)]
    with beam_files.atomic_file(beam_files.join(shared_dir, f"texts-{number:05d}.jsonl")) as file:
        for split, (_, key, text) in zip(splits, texts, strict=True):
            file.write(json.dumps([split, key.hex(), text]).encode() + b"\n")
    for kind in duplicates.values():
        yield ("duplicates", kind), 1
    for split in splits:
        yield ("splits", split), 1


def _counts(
    record: tuple[Position, documents.RecordResult],
) -> Iterator[tuple[tuple[str, str], int]]:
    """What a record adds to a Tally: ((field of the tally, name of a counter), number)."""
    tally = documents.Tally()
    tally.count(record[1])
    for field, value in vars(tally).items():
        if isinstance(value, dict):
            yield from (((field, name), count) for name, count in value.items())
        elif isinstance(value, int):
            yield (field, ""), value


def _totals(
    config: documents.CorpusConfig, counts: list, quarantine: list[str]
) -> tuple[documents.Tally, dict[str, int]]:
    """The tally of all records, and the documents of each split."""
    tally, split_counts = documents.Tally(config), dict.fromkeys(config.splits, 0)
    tally.first = json.loads(quarantine[0])["reason"] if quarantine else ""
    for (field, name), count in counts:
        if field == "splits":
            split_counts[name] = count
        elif name:
            getattr(tally, field)[name] = count
        else:
            setattr(tally, field, count)
    return tally, split_counts


def _quarantine(record: tuple[Position, documents.RecordResult], names: list[str]) -> Iterator[str]:
    (number, index), result = record
    if result.reason:
        line = documents.quarantine_line(names[number], index, result)
        yield json.dumps([[number, index], line])


# The second pipeline: text files to token files. --------------------------------------------------


def _texts(shared_dir: str, number: int) -> Iterator[tuple[str, bytes, str]]:
    """(split, key, text) of each document of a text file."""
    path = beam_files.join(shared_dir, f"texts-{number:05d}.jsonl")
    for split, key, text in beam_files.read_json_lines(path):
        yield split, bytes.fromhex(key), text


def _tokenizer_texts(shared_dir: str, count: int, total: int) -> Iterator[str]:
    """The texts that a tokenizer is trained on, of `total` documents in `count` files."""
    for number in range(count):
        for split, key, text in _texts(shared_dir, number):
            if split == "train" and documents.is_sampled(np.frombuffer(key, dedupe.KEY), total)[0]:
                yield text


def _write_shards(
    config: documents.CorpusConfig,
    shared_dir: str,
    count: int,
    tokens: tokenizer.Tokenizer,
    options: Any,
) -> list[documents.SplitFiles]:
    """Write the token files of all splits to the shared directory, in order."""
    import apache_beam as beam

    model = tokenizer.read(tokens.directory)
    with runners.pipeline(options) as pipeline:
        (
            pipeline
            | "files" >> beam.Create(range(count))
            | "spread files" >> beam.Reshuffle()
            | "encode" >> beam.Map(_write_shard, shared_dir, count, config.splits, model)
            | "facts" >> beam.Map(json.dumps)
            | "write facts" >> beam.io.WriteToText(beam_files.join(shared_dir, "facts"))
        )
    facts = sorted(beam_files.read_json_lines(beam_files.join(shared_dir, "facts*")))
    return [_split_files(written, text_bytes) for _, written, text_bytes in facts]


def _write_shard(
    number: int, shared_dir: str, count: int, splits: tuple[str, ...], model: tuple[bytes, dict]
) -> list:
    """Write a token file of each split; returns [number, *fields of SplitFiles] as JSON."""
    name = documents.file_name(number, count)
    texts_of = lambda split: (text for own, _, text in _texts(shared_dir, number) if own == split)
    with tempfile.TemporaryDirectory() as directory:
        tokens = tokenizer.write(pathlib.Path(directory) / "tokenizer", *model)
        for split in splits:
            (pathlib.Path(directory) / split).mkdir()
        texts = {split: texts_of(split) for split in splits}
        files = documents.write_split_files(directory, name, texts, tokens)
        for split in splits:
            address = beam_files.join(shared_dir, f"{split}-{name}")
            beam_files.upload(f"{directory}/{split}/{name}", address)
    written = {
        split: (shard.facts, shard.frequencies.tolist(), shard.lengths.tolist())
        for split, shard in files.written.items()
    }
    return [number, written, files.text_bytes]


def _split_files(written: dict, text_bytes: dict[str, int]) -> documents.SplitFiles:
    """Read the JSON of `_write_shard`."""
    shards = {
        split: shard_files.WrittenShard(
            facts, np.array(frequencies, np.int64), np.array(lengths, np.int32)
        )
        for split, (facts, frequencies, lengths) in written.items()
    }
    return documents.SplitFiles(shards, text_bytes)
