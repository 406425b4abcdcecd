"""Sources to a finished corpus by Apache Beam: the bytes that local processes make, on any runner.

  part -> record -> cleaned, keyed -+-> by key ------------> all but the first are repeated
                                    |   by band and bucket -> those near an earlier one
                                    +-> by file, without those: a file of texts   (first pipeline)
  file of texts -> token file                                                    (second pipeline)

Between the two the tokenizer is trained here, where the command was given. What workers write goes
to a folder that they and this process reach: of the DirectRunner, the corpus's own; of a cluster,
--temp on storage that all share, as gs://bucket/folder. Sources and data_dir must be there too.

Workers need what `make beam` installs. On a cluster that is a container: of the image
apache/beam_python3.11_sdk in Beam's version, with `pip install --requirement requirements-beam.txt`
and `pip install --no-deps` of this package. Beam's own flags are passed on as they are. Tests run
the DirectRunner, which holds all in memory; the others are as Beam's documentation has them:

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
from lm.corpus import build as local
from lm.shards import shard_files
from lm.storage import staging

BANDED = 1000  # documents whose bands are computed at once

Place = tuple[int, int]  # the number of a part, the number of a record in it: the order of all


def build(
    recipe: documents.CorpusConfig, out, runner: str, runner_flags: str = "", temp: str = ""
) -> tuple[dict, bool]:
    """Make the corpus of a recipe in folder `out`, or find it: (its manifest, whether found).

    runner: as Beam names it. runner_flags: Beam's own, as in a shell. temp: the folder for what
    workers write; "" is one beside `out`, for the DirectRunner alone. `out` is a local folder. The
    bytes in it, and the errors, are those of lm.corpus.build; the flags' errors, runners.options'.
    """
    out = folder.resolve_out_dir(out, recipe)
    options = runners.pipeline_options(runner, runner_flags, temp)
    parts = local.parts_of(recipe)
    identity = folder.corpus_identity(recipe, parts)
    if manifest := folder.read_finished_corpus(out, identity):
        return manifest, True
    sources.check_first_records(parts)
    count = recipe.shard_count(parts)
    with staging.staging_dir(out) as room:
        if manifest := folder.read_finished_corpus(out, identity):  # by a process that was quicker
            return manifest, True
        with beam_files.temporary_folder(temp or str(room)) as place:
            tally, held = _gather(recipe, parts, place, room, options)
            folder.check_splits(recipe, held, tally)
            sampled = _sampled(place, count, held["train"])
            tokens = folder.make_tokenizer(recipe, room / "tokenizer", sampled)
            written = _write(recipe, place, count, tokens, options)
            _check_whole(written, count, held)
            for split in recipe.splits:
                (room / split).mkdir()
                for number in range(count):
                    name = documents.file_name(number, count)
                    beam_files.download(
                        beam_files.join(place, f"{split}-{name}"), room / split / name
                    )
        return folder.finish_corpus(room, out, identity, tally, written), False


def _check_whole(written: list[documents.SplitFiles], count: int, held: dict[str, int]) -> None:
    """Raise ValueError unless the files have every document. held: split -> documents."""
    documents_of = lambda split: sum(one.written[split].facts["documents"] for one in written)
    found = {split: documents_of(split) for split in held}
    if len(written) != count or found != held:
        raise ValueError(
            f"of {count} files with {held} documents, the workers left {len(written)} with "
            f"{found}; set --temp to storage that all of them share."
        )


# The first pipeline: records to files of texts. ---------------------------------------------------


def _gather(
    recipe: documents.CorpusConfig,
    parts: list[sources.SourceFile],
    place: str,
    room: pathlib.Path,
    options,
) -> tuple[documents.Tally, dict[str, int]]:
    """Files of texts in `place`, the quarantine in `room`; returns counts, and those of splits."""
    import apache_beam as beam

    with runners.pipeline(options) as pipeline:
        found = (
            pipeline
            | "parts" >> beam.Create(range(len(parts)))
            | "spread parts" >> beam.Reshuffle()
            | "records" >> beam.FlatMap(_records, parts)
            | "spread records" >> beam.Reshuffle()
            | "read" >> beam.Map(_read, parts, rules.parse_rules(recipe.rules), recipe.dedupe)
        )
        kept = found | "kept" >> beam.Filter(_is_kept)
        count = recipe.shard_count(parts)
        by_file = {
            "texts": kept | "texts" >> beam.Map(_text, count),
            "repeated": _repeated(kept, recipe.dedupe) | "repeated" >> beam.Map(_repeat, count),
        }
        made = (
            by_file
            | "by file" >> beam.CoGroupByKey()
            | "write texts" >> beam.FlatMap(_write_texts, place, recipe.heldout)
        )
        counts = found | "count" >> beam.FlatMap(_counts)
        (
            (counts, made)
            | "all counts" >> beam.Flatten()
            | "add up" >> beam.CombinePerKey(sum)
            | "counts" >> beam.Map(json.dumps)
            | "write counts" >> beam.io.WriteToText(beam_files.join(place, "counts"))
        )
        (
            found
            | "bad" >> beam.FlatMap(_bad, folder.source_names(parts))
            | "write bad" >> beam.io.WriteToText(beam_files.join(place, "bad"))
        )
    bad = [line for _, line in sorted(beam_files.read_json_lines(beam_files.join(place, "bad*")))]
    (room / folder.QUARANTINE).write_text("".join(bad))
    return _totals(recipe, list(beam_files.read_json_lines(beam_files.join(place, "counts*"))), bad)


def _records(number: int, parts: list[sources.SourceFile]) -> Iterator[tuple[Place, Any]]:
    for position, raw in enumerate(parts[number].raw_records()):
        yield (number, position), raw


def _read(record, parts, chosen, kind) -> tuple[Place, documents.RecordResult]:
    place, raw = record
    return place, documents.read_record(parts[place[0]], raw, chosen, kind)


def _is_kept(record: tuple[Place, documents.RecordResult]) -> bool:
    return bool(record[1].key)


def _number(key: bytes, count: int) -> int:
    return int(documents.shard_of(np.frombuffer(key, dedupe.KEY), count)[0])


def _text(record, count: int) -> tuple[int, tuple[Place, bytes, str]]:
    place, found = record
    return _number(found.key, count), (place, found.key, found.text)


def _repeated(kept, kind: str):
    """The documents that repeat an earlier one: (place, key, kind of repetition)."""
    import apache_beam as beam

    if kind == "none":
        return kept | "none" >> beam.Filter(lambda _: False)
    alike = kept | "keys" >> beam.Map(_by_key) | "by key" >> beam.GroupByKey()
    exact = alike | "later" >> beam.FlatMap(_later)
    if kind == "exact":
        return exact
    near = (
        alike
        | "first" >> beam.Map(_first)
        | "together" >> beam.BatchElements(max_batch_size=BANDED)
        | "bands" >> beam.FlatMap(_bands)
        | "by bucket" >> beam.GroupByKey()
        | "near" >> beam.FlatMap(_near)
    )
    return (exact, near) | "both" >> beam.Flatten()


def _by_key(record) -> tuple[bytes, tuple[Place, bytes]]:
    place, found = record
    return found.key, (place, found.signature)


def _later(group: tuple[bytes, Iterable]) -> list[tuple[Place, bytes, str]]:
    key, members = group
    return [(place, key, "exact") for place, _ in sorted(members)[1:]]


def _first(group: tuple[bytes, Iterable]) -> tuple[Place, bytes, bytes]:
    key, members = group
    place, signature = min(members)
    return place, key, signature


def _bands(batch: list) -> Iterator[tuple[bytes, tuple[Place, bytes, bytes]]]:
    """Each document in the bucket of each band."""
    signatures = _signatures(batch)
    for band in range(dedupe.BANDS):
        entries = signatures[:, band * dedupe.ROWS : (band + 1) * dedupe.ROWS]
        for bucket, document in zip(dedupe.band_hashes(entries), batch, strict=True):
            yield bytes([band]) + bucket.tobytes(), document


def _near(group: tuple[bytes, Iterable]) -> Iterator[tuple[Place, bytes, str]]:
    bucket = sorted(group[1])
    order = np.arange(len(bucket))
    near = dedupe.near_in_buckets(np.zeros(len(bucket)), _signatures(bucket), order)
    for (place, key, _), is_near in zip(bucket, near, strict=True):
        if is_near:
            yield place, key, "near"


def _signatures(batch: list) -> np.ndarray:
    data = b"".join(signature for _, _, signature in batch)
    return np.frombuffer(data, np.uint16).reshape(-1, dedupe.ENTRIES)


def _repeat(repeated, count: int) -> tuple[int, tuple[Place, str]]:
    place, key, kind = repeated
    return _number(key, count), (place, kind)


def _write_texts(group, place: str, heldout: float) -> Iterator[tuple[tuple[str, str], int]]:
    """Write a file's documents, in order: lines of (split, key, text). Yields counts."""
    number, members = group
    repeated = dict(members["repeated"])
    texts = sorted(text for text in members["texts"] if text[0] not in repeated)
    keys = np.frombuffer(b"".join(key for _, key, _ in texts), dedupe.KEY)
    splits = [documents.SPLITS[one] for one in documents.is_heldout(keys, heldout).astype(int)]
    with beam_files.atomic_file(beam_files.join(place, f"texts-{number:05d}.jsonl")) as file:
        for split, (_, key, text) in zip(splits, texts, strict=True):
            file.write(json.dumps([split, key.hex(), text]).encode() + b"\n")
    for kind in repeated.values():
        yield ("duplicates", kind), 1
    for split in splits:
        yield ("splits", split), 1


def _counts(record) -> Iterator[tuple[tuple[str, str], int]]:
    """What a record adds to a Tally: (the tally's field, a name of its counter), how much."""
    tally = documents.Tally()
    tally.count(record[1])
    for field, value in vars(tally).items():
        if isinstance(value, dict):
            yield from (((field, name), count) for name, count in value.items())
        elif isinstance(value, int):
            yield (field, ""), value


def _totals(
    recipe: documents.CorpusConfig, counts: list, bad: list[str]
) -> tuple[documents.Tally, dict[str, int]]:
    """The tally of all records, and the documents of each split."""
    tally, held = documents.Tally(recipe), dict.fromkeys(documents.SPLITS, 0)
    tally.first = json.loads(bad[0])["reason"] if bad else ""
    for (field, name), count in counts:
        if field == "splits":
            held[name] = count
        elif name:
            getattr(tally, field)[name] = count
        else:
            setattr(tally, field, count)
    return tally, {split: held[split] for split in recipe.splits}


def _bad(record, names: list[str]) -> Iterator[str]:
    (number, position), found = record
    if found.reason:
        line = documents.quarantine_line(names[number], position, found)
        yield json.dumps([[number, position], line])


# The second pipeline: files of texts to token files. ----------------------------------------------


def _texts(place: str, number: int) -> Iterator[tuple[str, bytes, str]]:
    """(split, key, text) of each document of a file."""
    for split, key, text in beam_files.read_json_lines(
        beam_files.join(place, f"texts-{number:05d}.jsonl")
    ):
        yield split, bytes.fromhex(key), text


def _sampled(place: str, count: int, total: int) -> Iterator[str]:
    """What a tokenizer learns from, of `total` training documents in `count` files."""
    for number in range(count):
        for split, key, text in _texts(place, number):
            wanted = documents.is_sampled(np.frombuffer(key, dedupe.KEY), total)
            if split == "train" and wanted[0]:
                yield text


def _write(
    recipe: documents.CorpusConfig, place: str, count: int, tokens: tokenizer.Tokenizer, options
) -> list[documents.SplitFiles]:
    """The token files of all splits in `place`: what was written, by number."""
    import apache_beam as beam

    with runners.pipeline(options) as pipeline:
        (
            pipeline
            | "files" >> beam.Create(range(count))
            | "spread files" >> beam.Reshuffle()
            | "encode"
            >> beam.Map(_encode, place, count, recipe.splits, tokenizer.read(tokens.directory))
            | "facts" >> beam.Map(json.dumps)
            | "write facts" >> beam.io.WriteToText(beam_files.join(place, "facts"))
        )
    return [
        _shard(*facts)
        for _, *facts in sorted(beam_files.read_json_lines(beam_files.join(place, "facts*")))
    ]


def _encode(number: int, place: str, count: int, splits, model: tuple[bytes, dict]) -> list:
    """Write a token file of each split; returns what documents.Shard says, as JSON."""
    name = documents.file_name(number, count)
    own = lambda split: (text for run, _, text in _texts(place, number) if run == split)
    with tempfile.TemporaryDirectory() as room:
        tokens = tokenizer.write(pathlib.Path(room) / "tokenizer", *model)
        for split in splits:
            (pathlib.Path(room) / split).mkdir()
        made = documents.write_shard(room, name, {split: own(split) for split in splits}, tokens)
        for split in splits:
            beam_files.upload(f"{room}/{split}/{name}", beam_files.join(place, f"{split}-{name}"))
    plain = lambda one: (one.facts, one.frequencies.tolist(), one.lengths.tolist())
    return [number, {split: plain(one) for split, one in made.written.items()}, made.text_bytes]


def _shard(written: dict, text_bytes: dict[str, int]) -> documents.SplitFiles:
    """What _encode returned, as documents.Shard."""

    def read(facts: dict, frequencies: list, lengths: list) -> shard_files.WrittenShard:
        return shard_files.WrittenShard(
            facts, np.array(frequencies, np.int64), np.array(lengths, np.int32)
        )

    return documents.SplitFiles({split: read(*one) for split, one in written.items()}, text_bytes)
