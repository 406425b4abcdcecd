"""Writing a teacher cache: a teacher's top-k logits of every batch of its students' runs."""

from __future__ import annotations

import functools
import itertools
import math
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from lm import batch, inference, lookup, parallel, pipeline, runs, steps, storage, transformer
from lm.pipeline import teacher_cache
from lm.train import data, live_teacher, setup

SAMPLED_BATCHES = 8  # whose targets are counted to estimate the size


def top_k_logits(logits: jax.Array, k: int, dtype: str, temperature: float) -> batch.TeacherTopK:
    """The k most likely ids of logits [B, T, V], their log-probabilities in dtype, and the tail."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    top, ids = jax.lax.top_k(log_p, k)
    rest = jnp.put_along_axis(log_p, ids, -jnp.inf, axis=-1, inplace=False)
    top = jnp.maximum(top, jnp.finfo(dtype).min.astype(jnp.float32)).astype(dtype)
    return batch.TeacherTopK(ids, top, jax.nn.logsumexp(rest / temperature, axis=-1))


def _top_k_step(params, rows: batch.Batch, *, model, num_microbatches: int, axis=None, **options):
    """The TeacherTopK of a batch, computed in micro-batches. options: of top_k_logits."""
    split = lambda x: x.reshape(-1, num_microbatches, *x.shape[1:]).swapaxes(0, 1)
    join = lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
    forward = lambda rows: top_k_logits(steps.apply_model(model, params, rows, None), **options)
    return jax.tree.map(join, jax.lax.map(forward, jax.tree.map(split, rows)))


class CacheWriter:
    """Writes the cache of a run's teacher to the run's workdir, on all hosts together.

    k: stored ids per target. dtype: of their log-probabilities. updates: 0 for those of the run.
    Raises ValueError for options out of bounds, and if the directory has another cache or a run.
    """

    def __init__(self, run: runs.Run, k: int = 16, dtype: str = "float16", updates: int = 0):
        _check(run, k, dtype, updates)
        self.run, self.strategy = run, setup.make_strategy(run)
        self.tokens, self.examples, _ = data.prepare_data(run)
        self.identity = data.cache_identity(run, self.tokens, self.examples, k, dtype)
        self.manifest = teacher_cache.open_manifest(run.workdir, self.identity)
        self.num_written = teacher_cache.num_updates(self.manifest)
        self.is_first_host = jax.process_index() == 0
        self.total = updates or runs.total_updates(run, len(self.examples))

    def _batches(self, start: int) -> Iterator[batch.Batch]:
        host, hosts = parallel.host_index_and_count()
        options = {"start": start, "host": host, "hosts": hosts}
        return pipeline.train_batches(self.examples, self.run.seed, **options)

    @functools.cached_property
    def update_bytes(self) -> int:
        """Estimated bytes of an update, from the number of targets of the first batches."""
        batches = itertools.islice(self._batches(0), min(self.total, SAMPLED_BATCHES))
        is_target = [rows.targets_segment_ids > 0 for rows in batches]
        targets = np.mean([mask.sum() for mask in is_target])
        size = len(is_target[0]) * teacher_cache.ROW_OVERHEAD
        size += targets * teacher_cache.target_dtype(self.identity).itemsize
        return round(size * parallel.host_index_and_count()[1])

    @property
    def _updates_per_file(self) -> int:
        return max(1, teacher_cache.FILE_BYTES // self.update_bytes)

    def disk_bytes(self, updates: int) -> int:
        """Estimated bytes of so many updates on disk, in files of whole blocks with an index."""
        block, starts = teacher_cache.BLOCK_BYTES, range(0, updates, self._updates_per_file)
        files = [min(self._updates_per_file, updates - start) for start in starts]
        return block * sum(1 + math.ceil(count * self.update_bytes / block) for count in files)

    def describe(self) -> str:
        """What will be written: its estimated size, and the free space.

        Raises ValueError if the space does not suffice.
        """
        workdir, identity = self.run.workdir, self.identity
        text = (
            f"{workdir}: {self.total:,} updates of {self.run.data.batch_size} rows, the "
            f"{identity['k']} likeliest of {identity['vocabulary']:,} ids in {identity['dtype']}: "
            f"about {self.update_bytes:,} bytes an update, {self.disk_bytes(self.total):,} in all"
        )
        text += f", {self.num_written:,} updates are there" if self.num_written else ""
        if storage.is_remote(workdir):
            return f"{text}."
        folders = (workdir, *workdir.absolute().parents)
        free = shutil.disk_usage(next(folder for folder in folders if folder.exists())).free
        if self.disk_bytes(max(self.total - self.num_written, 0)) > free:
            raise ValueError(
                f"{text}, but only {free:,} are free; free some space, or use a smaller --k."
            )
        return f"{text}; {free:,} are free."

    def write(self) -> str:
        """Write the missing updates, file by file, and return a summary.

        After an interruption the same command continues behind the last complete file.
        """
        tail_mass = []
        if self.num_written < self.total:
            records = self._records(tail_mass)
            for start in range(self.num_written, self.total, self._updates_per_file):
                count = min(self._updates_per_file, self.total - start)
                updates = (next(records) for _ in range(count))
                if self.is_first_host:
                    self.manifest = teacher_cache.add_file(self.run.workdir, self.manifest, updates)
                else:
                    list(updates)
        size = sum(file["bytes"] for file in self.manifest["files"].values())
        count = teacher_cache.num_updates(self.manifest)
        mass = f"; mass of the tail {np.mean(tail_mass):.4f} on average" if tail_mass else ""
        return f"{self.run.workdir}: {count:,} updates, {size:,} bytes{mass}"

    def _records(self, tail_mass: list[float]) -> Iterator[list[bytes]]:
        """Yield the records of each missing batch, of all hosts; appends the mass of its tail."""
        run, strategy = self.run, self.strategy
        workdir, which = runs.teacher_source(run)
        params, _ = inference.read_params(runs.read_run(workdir), self.tokens, which, strategy)
        params = strategy.place_state(live_teacher.cast_params(run, params))
        options: dict[str, Any] = {key: self.identity[key] for key in ("k", "dtype", "temperature")}
        model_config = live_teacher.teacher_config(run)
        options["model"] = transformer.Transformer(model_config, strategy.shard_activations)
        options["num_microbatches"] = run.parallel.num_microbatches
        step = strategy.compile(functools.partial(_top_k_step, **options))
        batches = itertools.islice(self._batches(self.num_written), self.total - self.num_written)
        bar = {"total": self.total, "initial": self.num_written, "unit": "update", "disable": None}
        for rows in tqdm.tqdm(batches, desc="teacher-cache", file=sys.stderr, **bar):
            top_k = strategy.fetch_rows(step(params, strategy.place_batch(rows)))
            rows, top_k = parallel.gather_rows((batch.Batch(*rows), top_k))
            tail_mass.append(_tail_mass(rows, top_k, options["temperature"]))
            yield teacher_cache.encode_records(rows, top_k, self.identity)


def _tail_mass(rows: batch.Batch, top_k: batch.TeacherTopK, temperature: float) -> float:
    """The softened distribution's mass outside the top k, averaged over targets."""
    is_target = batch.loss_weights(rows) > 0
    tail = top_k.tail[is_target]
    logits = np.asarray(top_k.logits[is_target], np.float32)
    top = np.logaddexp.reduce(logits / temperature, axis=-1)
    return float(np.exp(tail - np.logaddexp(top, tail)).sum() / max(is_target.sum(), 1))


def _check(run: runs.Run, k: int, dtype: str, updates: int) -> None:
    if run.stage != "distill":
        raise ValueError(
            f"stage={run.stage!r} has no teacher; use the config of a student, as "
            f"configs/distill.py."
        )
    if runs.is_claimed(run.workdir):
        raise ValueError(f"--out={run.workdir} holds a run; use a folder of its own.")
    lookup.lookup(teacher_cache.STORED_DTYPES, dtype, "--dtype")
    if not 1 <= k <= run.model.vocab_size:
        raise ValueError(f"--k={k} is out of bounds; use 1 to {run.model.vocab_size}, all ids.")
    if updates < 0:
        raise ValueError(f"--updates={updates} is too small; use 1 or more, or 0 for the run's.")
