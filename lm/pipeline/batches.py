"""Which rows make batch number t, and the batches one after the other."""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from lm import batch, extensions
from lm.pipeline import task_examples

LEAST = 16  # columns of the narrowest bucket of inputs


def row_order(examples: task_examples.Examples, seed: int):
    """Row numbers for ever, as a grain.MapDataset: each part shuffled anew each epoch, then mixed.

    Any stretch of sum(rates) numbers holds each part as often as its rate says.
    """
    import grain

    # grain shuffles epoch e by seed + e, so the parts' own seeds must be far from one another.
    seeds = np.random.SeedSequence(seed).generate_state(len(examples.parts)).tolist()
    ranges = itertools.pairwise(examples.starts)
    shuffled = [
        grain.MapDataset.source(range(*bounds)).shuffle(seed=own).repeat()
        for bounds, own in zip(ranges, seeds, strict=True)
    ]
    return grain.MapDataset.mix(shuffled, examples.rates) if len(shuffled) > 1 else shuffled[0]


def data_order_spec(examples: task_examples.Examples, seed: int) -> dict:
    """All that decides which rows batch t of train_batches has, as plain values.

    What is given twice, as by the files and by their task, is not listed.
    """
    data, objective = examples.data, examples.parts[0].objective
    files = json.dumps([*examples.files.values()], sort_keys=True)
    return {
        "seed": seed,
        "batch_size": data.batch_size,
        "columns": list(examples.columns),
        "input_length": data.input_length,
        "packing": data.packing,
        "rates": examples.rates if len(examples.parts) > 1 else [],
        "objective": _stored_objective(objective) if any(p.raw for p in examples.parts) else {},
        "files": hashlib.sha256(files.encode()).hexdigest(),
    }


def _stored_objective(objective) -> dict:
    """An objective's fields by the names that caches on disk have."""
    fields = dataclasses.asdict(objective)
    return {"mean_span" if k == "mean_noise_span_length" else k: v for k, v in fields.items()}


def train_batches(
    examples: task_examples.Examples, seed: int, *, start: int = 0, host: int = 0, hosts: int = 1
) -> Iterator[batch.Batch]:
    """Batches start, start + 1, .. for ever: shuffled anew each epoch, masked anew each time.

    A row's masks are drawn from its place in the run, before the host's slice, so that batch t is
    the same set of rows whatever the number of hosts; each gets batch_size / hosts of them.
    data.num_workers processes make the batches, or threads of this one if 0: their order is the
    same.
    Rows of damaged records are empty, up to data.max_bad_records of them; more raise ValueError.
    Raises what making a batch raises; ChildProcessError where a worker was killed; ValueError where
    the hosts cannot share a batch.
    """
    import grain

    size = examples.data.batch_size
    if not 0 <= host < hosts or size % hosts:
        raise ValueError(
            f"host {host} of {hosts} has no equal share of data.batch_size={size}; number hosts "
            f"from 0, and use a multiple of them."
        )

    def with_places(step: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return numbers, step * size + host + hosts * np.arange(size // hosts)

    own = row_order(examples, seed)[host::hosts]
    own = own.batch(size // hosts, drop_remainder=True, batch_fn=np.array)
    own = own.map_with_index(with_places)[start:]
    if examples.data.num_workers:
        return _counted(examples, _by_workers(examples, seed, own))
    made = own.map(lambda rows: _made(examples, rows, seed))
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
    return _counted(examples, made.to_iter_dataset(options))


def _made(examples: task_examples.Examples, rows, seed: int) -> tuple[batch.Batch, dict[str, str]]:
    """A batch of rows (numbers, addresses), and the damaged records that it does without."""
    damaged = {}
    made = examples.batch(*rows, seed, damaged)
    if examples.teacher_cache:
        made = made._replace(teacher_top_k=examples.teacher_cache.read(made, rows[1]))
    return made, damaged


def _counted(examples: task_examples.Examples, made: Iterable) -> Iterator[batch.Batch]:
    """The batches alone; what they do without is counted here, where they come one by one."""
    for rows, damaged in made:
        examples.leave_out(damaged)
        yield rows


def _work(end, examples: task_examples.Examples, seed: int, files: list[str]) -> None:
    """A worker process: row numbers come in, batches go out, until the other end is closed.

    files: of extensions, which the parent has loaded.
    """
    extensions.load(files)
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent's business
        signal.signal(number, signal.SIG_IGN)
    try:
        while True:
            rows = end.recv()
            try:
                made = _made(examples, rows, seed)
            except (ValueError, OSError) as error:
                made = error
            end.send(made)
    except (EOFError, OSError):  # the parent has ended, however it did
        return


def _by_workers(examples: task_examples.Examples, seed: int, own) -> Iterator[tuple]:
    """What `_made` gives of each of `own`, by worker processes in turns: t by t modulo workers.

    Not by grain's own workers: those import jax, which may hold the devices of this process.
    A worker has one batch in hand: it is asked for the next when that is taken, so that neither
    end ever waits for the other to read.
    """
    context = multiprocessing.get_context("spawn")
    workers = []
    try:
        for first in range(examples.data.num_workers):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(theirs, examples, seed, extensions.files()), daemon=True
            )
            process.start()
            theirs.close()
            workers.append((process, ours))
            atexit.register(ours.close)  # before multiprocessing waits for it to end
            ours.send(own[first])
        for step in itertools.count(len(workers)):
            process, end = workers[step % len(workers)]
            try:
                made = end.recv()
                end.send(own[step])
            except (EOFError, OSError) as error:
                process.join()
                raise ChildProcessError(
                    f"a process of data.num_workers={len(workers)} ended with exit code "
                    f"{process.exitcode} (-9: it was killed, perhaps for want of memory); run the "
                    f"same command again to continue, with fewer workers if it happens again."
                ) from error
            if isinstance(made, Exception):
                raise made
            yield made
    finally:
        for _, end in workers:
            end.close()
            atexit.unregister(end.close)


def heldout_batches(
    examples: task_examples.Examples, seed: int, limit: int = 0
) -> Iterator[batch.Batch]:
    """Each example once, part by part in stored order, masked by (seed, index).

    The last batch of a part is padded with empty rows. limit: only so many examples of each part,
    from the first; 0 is all.
    """
    for first, end in itertools.pairwise(examples.starts):
        end = min(end, first + limit) if limit else end
        for start in range(first, end, examples.data.batch_size):
            numbers = np.arange(start, min(end, start + examples.data.batch_size))
            rows, damaged = _made(examples, (numbers, numbers - first), seed)
            examples.leave_out(damaged)
            yield pad_rows(rows, examples.data.batch_size)


def pad_rows(rows: batch.Batch, size: int) -> batch.Batch:
    """Empty rows (segment 0) up to `size`; they weigh nothing."""
    missing = size - len(rows.inputs)
    return batch.Batch(*(np.pad(array, ((0, missing), (0, 0))) for array in rows[:4]))


def num_heldout_batches(examples: task_examples.Examples, limit: int = 0) -> int:
    """How many batches heldout_batches yields."""
    sizes = [min(limit, len(part)) if limit else len(part) for part in examples.parts]
    return sum(-(-size // examples.data.batch_size) for size in sizes)


def bucket_length(length: int, most: int) -> int:
    """The columns of a batch whose longest input has `length` tokens: 16, 32, 64, .. and `most`."""
    columns = LEAST
    while columns < length:
        columns *= 2
    return min(columns, most)


def input_batches(
    asked: Sequence[np.ndarray], batch_size: int, most: int
) -> Iterator[tuple[np.ndarray, batch.Batch]]:
    """(which inputs, their batch to decode), the longest first, without targets.

    asked: the ids of each input, at most `most`. A batch is as wide as the bucket of its longest,
    so that there are few shapes; the last is padded with empty rows.
    """
    order = np.argsort([-len(ids) for ids in asked], kind="stable")
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        columns = bucket_length(len(asked[numbers[0]]), most)
        shapes = [(len(numbers), columns)] * 2 + [(len(numbers), 1)] * 2
        rows = batch.Batch(*(np.zeros(shape, np.int32) for shape in shapes))
        for place, ids in enumerate(asked[number] for number in numbers):
            rows.inputs[place, : len(ids)] = ids
            rows.inputs_segment_ids[place, : len(ids)] = 1
        yield numbers, pad_rows(rows, batch_size)
