"""Batches in order: the rows of batch t, made in this process or in worker processes."""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from lm import batch, extensions, objectives
from lm.pipeline import task_examples

MIN_BUCKET = 16  # columns of the narrowest bucket of inputs


def row_order(examples: task_examples.Examples, seed: int) -> Any:
    """Endless row numbers, as a grain.MapDataset: tasks mixed, each shuffled anew in every epoch.

    Any sum(rates) consecutive numbers contain each task exactly as often as its rate.
    """
    import grain

    # grain shuffles epoch e by seed + e, so the tasks' seeds must be far from one another.
    seeds = np.random.SeedSequence(seed).generate_state(len(examples.splits)).tolist()
    ranges = itertools.pairwise(examples.starts)
    shuffled = [
        grain.MapDataset.source(range(*bounds)).shuffle(seed=task_seed).repeat()
        for bounds, task_seed in zip(ranges, seeds, strict=True)
    ]
    return grain.MapDataset.mix(shuffled, examples.rates) if len(shuffled) > 1 else shuffled[0]


def data_order_spec(examples: task_examples.Examples, seed: int) -> dict:
    """Everything that decides the rows of each batch of train_batches, as plain values."""
    data, objective = examples.data, examples.splits[0].objective
    files = json.dumps([*examples.files.values()], sort_keys=True)
    has_text = any(split.is_text for split in examples.splits)
    return {
        "seed": seed,
        "batch_size": data.batch_size,
        "columns": list(examples.columns),
        "input_length": data.input_length,
        "packing": data.packing,
        "rates": examples.rates if len(examples.splits) > 1 else [],
        "objective": _stored_objective(objective) if has_text else {},
        "files": hashlib.sha256(files.encode()).hexdigest(),
    }


def _stored_objective(objective: objectives.ObjectiveConfig) -> dict:
    """An objective's fields by the names that caches on disk have."""
    fields = dataclasses.asdict(objective)
    return {"mean_span" if k == "mean_noise_span_length" else k: v for k, v in fields.items()}


def train_batches(
    examples: task_examples.Examples, seed: int, *, start: int = 0, host: int = 0, hosts: int = 1
) -> Iterator[batch.Batch]:
    """Endless batches from number `start`: shuffled anew in each epoch, masked anew each time.

    Each of `hosts` gets batch_size / hosts rows of a batch. Masks depend on a row's number in the
    run, not on the host, so batch t has the same rows for any number of hosts. Batches are made by
    data.num_workers processes, or by threads if 0, in the same order.
    Rows of damaged records are empty, up to data.max_bad_records records.
    Raises ValueError for more damaged records or if batch_size is no multiple of `hosts`;
    ChildProcessError if a worker was killed.
    """
    import grain

    size = examples.data.batch_size
    if not 0 <= host < hosts or size % hosts:
        raise ValueError(
            f"host {host} of {hosts} has no equal share of data.batch_size={size}; number hosts "
            f"from 0, and use a multiple of them."
        )

    def with_addresses(step: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return numbers, step * size + host + hosts * np.arange(size // hosts)

    rows = row_order(examples, seed)[host::hosts]
    rows = rows.batch(size // hosts, drop_remainder=True, batch_fn=np.array)
    rows = rows.map_with_index(with_addresses)[start:]
    if examples.data.num_workers:
        return _count_damage(examples, _by_workers(examples, seed, rows))
    batches = rows.map(lambda row: _make_batch(examples, row, seed))
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
    return _count_damage(examples, batches.to_iter_dataset(options))


def _make_batch(
    examples: task_examples.Examples, rows: tuple[np.ndarray, np.ndarray], seed: int
) -> tuple[batch.Batch, dict[str, str]]:
    """The batch of rows (numbers, addresses), and the damaged records that it omits."""
    damaged = {}
    output = examples.batch(*rows, seed, damaged)
    if examples.teacher_cache:
        output = output._replace(teacher_top_k=examples.teacher_cache.read(output, rows[1]))
    return output, damaged


def _count_damage(examples: task_examples.Examples, batches: Iterable) -> Iterator[batch.Batch]:
    """The batches alone; damage is counted in this process, where they arrive in order."""
    for rows, damaged in batches:
        examples.count_damaged(damaged)
        yield rows


def _work(connection: Any, examples: task_examples.Examples, seed: int, files: list[str]) -> None:
    """Run a worker process: receive rows and send batches until the connection is closed.

    files: of the extensions that the parent has loaded.
    """
    extensions.load(files)
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent handles them
        signal.signal(number, signal.SIG_IGN)
    try:
        while True:
            rows = connection.recv()
            try:
                answer = _make_batch(examples, rows, seed)
            except (ValueError, OSError) as error:
                answer = error
            connection.send(answer)
    except (EOFError, OSError):  # the parent has ended
        return


def _by_workers(examples: task_examples.Examples, seed: int, rows: Any) -> Iterator[tuple]:
    """`_make_batch` of each of `rows`, by worker processes in turn.

    grain's own workers import jax, which may hold the devices of this process. Each worker has one
    batch in flight, and gets the next rows when it is received, so neither end blocks on a write.
    """
    context = multiprocessing.get_context("spawn")
    workers = []
    try:
        for first in range(examples.data.num_workers):
            connection, worker_end = context.Pipe()
            arguments = worker_end, examples, seed, extensions.files()
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            worker_end.close()
            workers.append((process, connection))
            atexit.register(connection.close)  # before multiprocessing waits for the worker's end
            connection.send(rows[first])
        for step in itertools.count(len(workers)):
            process, connection = workers[step % len(workers)]
            try:
                answer = connection.recv()
                connection.send(rows[step])
            except (EOFError, OSError) as error:
                process.join()
                raise ChildProcessError(
                    f"a process of data.num_workers={len(workers)} ended with exit code "
                    f"{process.exitcode} (-9: it was killed, perhaps for lack of memory); run the "
                    f"same command again to continue, with fewer workers if it happens again."
                ) from error
            if isinstance(answer, Exception):
                raise answer
            yield answer
    finally:
        for _, connection in workers:
            connection.close()
            atexit.unregister(connection.close)


def heldout_batches(
    examples: task_examples.Examples, seed: int, limit: int = 0
) -> Iterator[batch.Batch]:
    """Each example once, task by task in stored order, masked by (seed, index).

    The last batch of a task is padded with empty rows. limit: examples of each task; 0 for all.
    """
    size = examples.data.batch_size
    for first, end in itertools.pairwise(examples.starts):
        end = min(end, first + limit) if limit else end
        for start in range(first, end, size):
            numbers = np.arange(start, min(end, start + size))
            rows, damaged = _make_batch(examples, (numbers, numbers - first), seed)
            examples.count_damaged(damaged)
            yield _pad_rows(rows, size)


def _pad_rows(rows: batch.Batch, size: int) -> batch.Batch:
    """Append empty rows (segment 0, no weight) up to `size` rows."""
    missing = size - len(rows.inputs)
    return batch.Batch(*(np.pad(array, ((0, missing), (0, 0))) for array in rows[:4]))


def num_heldout_batches(examples: task_examples.Examples, limit: int = 0) -> int:
    """The number of batches that heldout_batches yields."""
    sizes = [min(limit, len(split)) if limit else len(split) for split in examples.splits]
    return sum(-(-size // examples.data.batch_size) for size in sizes)


def bucket_length(length: int, max_length: int) -> int:
    """The columns of a batch whose longest input has `length` tokens: 16, 32, .. `max_length`."""
    columns = MIN_BUCKET
    while columns < length:
        columns *= 2
    return min(columns, max_length)


def input_batches(
    inputs: Sequence[np.ndarray], batch_size: int, max_length: int
) -> Iterator[tuple[np.ndarray, batch.Batch]]:
    """Yield (indices of inputs, their batch to decode, without targets), the longest first.

    inputs: the ids of each, at most `max_length`. A batch is as wide as the bucket of its longest
    input, so that few shapes are compiled; the last is padded with empty rows.
    """
    order = np.argsort([-len(ids) for ids in inputs], kind="stable")
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        columns = bucket_length(len(inputs[numbers[0]]), max_length)
        shapes = [(len(numbers), columns)] * 2 + [(len(numbers), 1)] * 2
        rows = batch.Batch(*(np.zeros(shape, np.int32) for shape in shapes))
        for row, number in enumerate(numbers):
            rows.inputs[row, : len(inputs[number])] = inputs[number]
            rows.inputs_segment_ids[row, : len(inputs[number])] = 1
        yield numbers, _pad_rows(rows, batch_size)
