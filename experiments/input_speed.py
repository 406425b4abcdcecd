"""How many tokens per second does one core turn into rows of a batch? Answer: input_speed.md.

python -m experiments.input_speed [section ..] [--repeats=15]

The process is pinned to one core and timed by its processor time. The table has medians;
input_speed.jsonl has every repeat. Other sections keep their recorded rows.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np

from experiments import records
from lm import lookup, objectives, pipeline, shards

NAME = "input_speed"
REPEATS = 15
ROUNDS = 10  # batches a repeat
BATCH = 128  # examples
INPUT_LENGTH = 512  # tokens
PIECES, SENTINELS, EOS = 32_000, 256, 1
VOCABULARY = objectives.Vocabulary(
    sentinels=np.arange(PIECES + SENTINELS - 1, PIECES - 1, -1, dtype=np.int32),
    eos=EOS,
    words=np.arange(3, PIECES, dtype=np.int32),
    ends=np.arange(PIECES + SENTINELS) % 20 == 0,  # a sentence is 20 tokens on average
)


def timed(make: Callable[[], object], tokens: int, repeats: int = REPEATS) -> dict:
    """Tokens per second of processor time of `make`, which handles `tokens` tokens a call."""
    make()
    rates = []
    for _ in range(repeats):
        start = time.process_time()
        for _ in range(ROUNDS):
            make()
        rates.append(ROUNDS * tokens / (time.process_time() - start))
    rates.sort()
    return dict(median=statistics.median(rates), lowest=rates[0], highest=rates[-1], repeats=rates)


# Masking: tokens in memory to padded rows. ------------------------------------------------------


def rows_of(config: objectives.ObjectiveConfig, texts: np.ndarray, rng) -> list[np.ndarray]:
    """The padded rows of a batch of texts: ids and segments of inputs and of targets."""
    _, inputs, targets, _ = objectives.lengths(config, INPUT_LENGTH)
    rows = [np.zeros((len(texts), length), np.int32) for length in (inputs, inputs)]
    rows += [np.zeros((len(texts), length), np.int32) for length in (targets, targets)]
    for row, text in enumerate(texts):
        input_ids, target_ids = objectives.corrupt(config, text, rng, VOCABULARY)
        rows[0][row, : len(input_ids)] = input_ids
        rows[1][row, : len(input_ids)] = 1
        rows[2][row, : len(target_ids)] = target_ids
        rows[3][row, : len(target_ids)] = 1
    return rows


def naive_mask(length: int, noise: int, spans: int, rng) -> np.ndarray:
    """T5's mask as the usual numpy collators compute it: shuffle, count segments, alternate."""

    def sizes(total: int) -> np.ndarray:
        first = (np.arange(total - 1) < spans - 1).astype(np.int64)
        rng.shuffle(first)
        return np.unique(np.cumsum(np.pad(first, [[1, 0]])), return_counts=True)[1]

    both = np.reshape(np.stack([sizes(length - noise), sizes(noise)], axis=1), [spans * 2])
    starts = np.zeros(length, np.int8)
    starts[np.cumsum(both)[:-1]] = True
    return np.equal(np.cumsum(starts) % 2, 1)


def naive_rows(texts: np.ndarray, noise: int, spans: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of T5's span corruption by batch, as those collators compute them."""
    mask = np.stack([naive_mask(texts.shape[1], noise, spans, rng) for _ in texts])

    def blanked(hidden: np.ndarray) -> np.ndarray:
        hidden = hidden.astype(np.int8)
        first = hidden - hidden * np.roll(hidden, 1, axis=-1)
        first[:, 0] = hidden[:, 0]
        names = np.where(first != 0, np.cumsum(first, axis=-1), first)
        names = np.where(names != 0, PIECES + SENTINELS - names, 0)
        names -= hidden - first  # -1: what follows the first token of a span
        full = np.where(names != 0, names, texts)
        kept = full[full >= 0].reshape(len(texts), -1)
        return np.concatenate([kept, np.full((len(texts), 1), EOS, np.int32)], axis=-1)

    return blanked(mask), blanked(~mask)


def configs():
    """Yields every objective with every combination of its options."""
    for name, objective in objectives.OBJECTIVES.items():
        for words in itertools.product(*objective.choices.values()):
            keys = dict(zip(objective.choices, words, strict=True))
            yield objectives.ObjectiveConfig(name=name, **keys)


def masking(repeats: int = REPEATS, batch: int = BATCH) -> list[dict]:
    """A row for each objective and its options, and for the usual span corruption."""
    rng = np.random.Generator(np.random.Philox(0))  # what grain hands to a random map
    texts_of = lambda raw: rng.integers(3, PIECES, (batch, raw), dtype=np.int32)
    measurements = []
    for config in configs():
        lengths = objectives.lengths(config, INPUT_LENGTH)
        texts = texts_of(lengths.raw)
        make = lambda config=config, texts=texts: rows_of(config, texts, rng)
        words = objectives.OBJECTIVES[config.name].choices
        several = [getattr(config, field) for field, options in words.items() if len(options) > 1]
        row = dict(what=", ".join([config.name, *several]))
        row |= dict(raw=lengths.raw, inputs=lengths.inputs, targets=lengths.targets)
        measurements.append(row | timed(make, texts.size, repeats))
    lengths = objectives.lengths(objectives.ObjectiveConfig(placement="t5"), INPUT_LENGTH)
    texts, spans = texts_of(lengths.raw), lengths.sentinels
    usual = timed(
        lambda: naive_rows(texts, lengths.targets - spans - 1, spans, rng), texts.size, repeats
    )
    description = "reference: span corruption as the usual numpy collators do it"
    row = dict(what=description, raw=lengths.raw, inputs=lengths.inputs, targets=lengths.targets)
    return [*measurements, row | usual]


# Pipeline: token shards to batches. ---------------------------------------------------------------

STORED = 16_000_000  # made-up tokens on disk


def stored_texts(directory: pathlib.Path, rng) -> dict:
    """Writes random documents as a split of a corpus; returns the manifest."""
    documents = (rng.integers(3, PIECES, 2000, dtype=np.int32) for _ in range(STORED // 2000))
    gap, size = np.array([4, 5]), PIECES + SENTINELS
    written = {"shard": shards.write_text(directory / "shard", documents, gap, size)}
    return shards.write_manifest(directory, {}, written, {})


def naive_batches(directory: pathlib.Path, raw: int, noise: int, spans: int):
    """The usual pipeline with grain: one text per record, masked and padded one by one."""
    import grain
    from array_record.python import array_record_module

    manifest = shards.read_manifest(directory)
    stream, path = shards.Stream(str(directory), manifest), str(directory / "records")
    writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
    for start in range(0, len(stream) - raw, raw):
        writer.write(stream.read(start, start + raw).astype(np.int32).tobytes())
    writer.close()

    def row(record: bytes, rng) -> dict:
        text = np.frombuffer(record, np.int32)[None]
        input_ids, target_ids = (
            half[0].astype(np.int32) for half in naive_rows(text, noise, spans, rng)
        )
        example = {}
        for name, ids in (("inputs", input_ids), ("targets", target_ids)):
            example[name] = np.pad(ids, (0, 512 - len(ids)))
            example[name + "_segment_ids"] = np.pad(np.ones_like(ids), (0, 512 - len(ids)))
        return example

    source = grain.MapDataset.source(grain.sources.ArrayRecordDataSource([path]))
    batches = source.seed(0).shuffle().repeat().random_map(row).batch(BATCH)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)))


def timed_batches(batches, raw: int, repeats: int) -> dict:
    """Times an iterator as `timed` does, over more batches than its threads prefetch."""
    many = 8
    some = lambda: [next(batches) for _ in range(many)]
    return timed(some, many * BATCH * raw, repeats)


def pipeline_speed(repeats: int = REPEATS) -> list[dict]:
    """A row for each pre-training objective, and for the usual span corruption."""
    measurements = []
    with tempfile.TemporaryDirectory() as folder:
        directory = pathlib.Path(folder)
        manifest = stored_texts(directory, np.random.default_rng(0))
        data = pipeline.DataConfig(input_length=INPUT_LENGTH, batch_size=BATCH)
        make = objectives.ObjectiveConfig
        t5 = make(placement="t5")
        for config in (make(), t5, make(name="token_masking"), make(name="ul2")):
            lengths = objectives.lengths(config, INPUT_LENGTH)
            split = pipeline.TaskSplit("text", str(directory), manifest, data, config, VOCABULARY)
            batches = pipeline.train_batches(pipeline.Examples((split,)), seed=0)
            speed = timed_batches(batches, lengths.raw, repeats)
            words = [config.placement]
            row = dict(what=", ".join([config.name, *words]))
            measurements.append(
                row | dict(raw=lengths.raw, inputs=lengths.inputs, targets=lengths.targets) | speed
            )
        lengths = objectives.lengths(t5, INPUT_LENGTH)
        spans = lengths.sentinels
        batches = naive_batches(directory, lengths.raw, lengths.targets - spans - 1, spans)
        usual = timed_batches(batches, lengths.raw, repeats)
    row = dict(what="reference: span corruption, a text a record, mapped one by one")
    row |= dict(raw=lengths.raw, inputs=lengths.inputs, targets=lengths.targets)
    return [*measurements, row | usual]


# Storage: how long records of the stream are, and whether they are compressed. ------------------


def storage(repeats: int = REPEATS) -> list[dict]:
    """A row for each way to store tokens: reading windows at random positions."""
    from array_record.python import array_record_data_source, array_record_module

    rng, raw, found = np.random.default_rng(0), 568, []
    stream = np.minimum(3 + rng.zipf(1.2, STORED), PIECES - 1).astype("<u2")  # frequent, like words
    places = rng.integers(0, STORED - raw, BATCH).tolist()
    for length, packed in itertools.product((1024, 4096, 16384), ("uncompressed", "zstd")):
        with tempfile.NamedTemporaryFile() as file:
            writer = array_record_module.ArrayRecordWriter(file.name, f"group_size:1,{packed}")
            for start in range(0, STORED, length):
                writer.write(stream[start : start + length].tobytes())
            writer.close()
            source = array_record_data_source.ArrayRecordDataSource([file.name])

            def windows(source=source, length=length):
                for place in places:
                    last = (place + raw - 1) // length
                    records = [source[i] for i in range(place // length, last + 1)]
                    np.frombuffer(b"".join(records), "<u2")[place % length :][:raw].astype(np.int32)

            size = pathlib.Path(file.name).stat().st_size / STORED
            row = dict(what=f"records of {length}, {packed}: {size:.2f} bytes a token")
            row |= dict(raw=raw, inputs="", targets="")
            found.append(row | timed(windows, BATCH * raw, repeats))
    return found


# The program. ----------------------------------------------------------------------------------

SECTIONS = {
    "masking": masking,
    "storage": storage,
    "pipeline": pipeline_speed,
}  # name -> the rows of its table


def table(rows: list[dict]) -> str:
    """The rows of a section as a Markdown table."""
    lines = []
    for row in rows:
        low, middle, high = (f"{row[key] / 1e6:.1f}" for key in ("lowest", "median", "highest"))
        lengths = [row[key] for key in ("raw", "inputs", "targets")]
        lines.append([row["what"], *lengths, middle, f"{low} .. {high}"])
    header = ("what", "raw", "inputs", "targets", "million tokens/s", "lowest .. highest")
    return records.markdown(header, lines)


def main(arguments: list[str] | None = None) -> None:
    """Measures the sections, and saves and prints their tables."""
    parser = records.parser(NAME, __doc__)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; none: all")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    flags = parser.parse_args(arguments)
    names = flags.sections or list(SECTIONS)
    chosen = {name: lookup.lookup(SECTIONS, name, "the section") for name in names}
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    stamp = records.stamp()
    for name, measure in chosen.items():
        rows = [dict(section=name) | row | stamp for row in measure(flags.repeats)]
        order = lambda row: list(SECTIONS).index(row["section"])
        records.save(flags.out, NAME, rows, order)
        records.put_table(flags.out, NAME, table(rows), name)
        print(table(rows))


if __name__ == "__main__":
    main()
