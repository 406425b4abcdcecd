"""A teacher read once over the batches that its students' runs will deal: the cache of it."""

from __future__ import annotations

import functools
import itertools
import shutil
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from lm import (
    batch,
    distill,
    inference,
    lookup,
    parallel,
    pipeline,
    runs,
    steps,
    storage,
    transformer,
)
from lm.pipeline import teacher_cache
from lm.train import live_teacher

SAMPLED = 8  # batches whose targets are counted to foretell the size
PARTS = {"order": "order of data", "vocabulary": "model"}  # what goes by another name


def identity(run: runs.Run, tokens, examples: pipeline.Examples, k: int, dtype: str) -> dict:
    """All that decides what a cache of this run's teacher holds, as plain values.

    Of the teacher its checkpoint's sums are read, no parameters.
    """
    named, which = runs.teacher_source(run)
    with inference.open_checkpoints(runs.read_run(named), read_only=True) as saved:
        update, parameters = saved.fingerprint(which)
    dtypes = run.teacher.dtype
    return {
        "teacher": {"update": update, "parameters": parameters, "dtype": dtypes},
        "tokenizer": tokens.fingerprint,
        "order": pipeline.data_order_spec(examples, run.seed),
        "k": k,
        "dtype": dtype,
        "vocabulary": run.model.vocab_size,
        "temperature": cache_temperature(run),
    }


def cache_temperature(run: runs.Run) -> float:
    """The temperature at which a run asks its cached teacher."""
    return distill.shared_temperature(run.teacher.terms)


def find_teacher_cache(run: runs.Run, tokens, examples: pipeline.Examples) -> pipeline.TeacherCache:
    """The cache that teacher.cache names. examples: of the run's training split.

    Raises ValueError where it is another teacher's, tokenizer's or order's, and where it has fewer
    updates than the run.
    """
    where = run.teacher.cache
    found = pipeline.open_teacher_cache(where)
    ours = identity(run, tokens, examples, found.identity["k"], found.identity["dtype"])
    odd = runs.differences(ours, found.identity)
    if odd:
        part = odd[0].split()[0].split(".")[0]
        what = PARTS.get(part, part)
        raise ValueError(
            f"teacher.cache={where} was made with another {what}: {', '.join(odd)}; make one of "
            f"this config with `python -m lm teacher-cache`, or leave it empty."
        )
    total = runs.total_updates(run, len(examples))
    if found.updates < total:
        raise ValueError(
            f"teacher.cache={where} has {found.updates} updates, and the run {total}; make it "
            f"longer: python -m lm teacher-cache, as before, with --updates={total}."
        )
    return found


def top_k_logits(logits: jax.Array, k: int, dtype: str, temperature: float) -> batch.TeacherTopK:
    """The k likeliest ids of logits [B, T, V], their log-probabilities in dtype, and the tail."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    kept, ids = jax.lax.top_k(log_p, k)
    rest = jnp.put_along_axis(log_p, ids, -jnp.inf, axis=-1, inplace=False)
    kept = jnp.maximum(kept, jnp.finfo(dtype).min.astype(jnp.float32)).astype(dtype)
    return batch.TeacherTopK(ids, kept, jax.nn.logsumexp(rest / temperature, axis=-1))


def teacher_top_k_step(params, rows: batch.Batch, *, model, parts: int, axis=None, **kept):
    """What a teacher says of a batch, in so many parts, one after the other: a batch.Taught.

    kept: k, dtype and temperature, as `likeliest` takes them.
    """
    split = lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
    whole = lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
    of = lambda part: top_k_logits(steps.apply_model(model, params, part, None), **kept)
    return jax.tree.map(whole, jax.lax.map(of, jax.tree.map(split, rows)))


class CacheWriter:
    """A cache of a run's teacher, to be written on this host and those beside it.

    updates: 0 for those of the run. Raises ValueError for what cannot be written, and where --out
    has something else.
    """

    def __init__(self, run: runs.Run, k: int = 16, dtype: str = "float16", updates: int = 0):
        _check(run, k, dtype, updates)
        self.run, self.strategy = run, parallel.make_strategy(run.parallel)
        micro = run.parallel.num_microbatches
        parallel.check_batch_size(run.data.batch_size, self.strategy.shards, micro)
        self.first = parallel.host_index_and_count()[0] == 0
        self.tokens, self.examples = self._prepared()
        self.identity = identity(run, self.tokens, self.examples, k, dtype)
        self.manifest = teacher_cache.open_manifest(run.workdir, self.identity)
        self.done = teacher_cache.updates(self.manifest)
        self.total = updates or runs.total_updates(run, len(self.examples))
        self.tail = []  # the mean mass of each batch's tail

    def _prepared(self):
        # Made by the first host while others wait.
        def prepare():
            tokens = runs.make_tokenizer(self.run)
            return tokens, runs.make_examples(self.run, tokens)[0]

        made = prepare() if self.first else None
        parallel.barrier("tokenizer and examples of a cache")
        return made or prepare()

    def _dealt(self, start: int) -> Iterator[batch.Batch]:
        host, hosts = parallel.host_index_and_count()
        seed = self.run.seed
        return pipeline.train_batches(self.examples, seed, start=start, host=host, hosts=hosts)

    @functools.cached_property
    def update_bytes(self) -> int:
        """Bytes of an update, about: as the first batches have targets."""
        dealt = self._dealt(0)
        sampled = [next(dealt).targets_segment_ids > 0 for _ in range(min(self.total, SAMPLED))]
        rows = len(sampled[0]) * teacher_cache.OVERHEAD
        targets = np.mean([real.sum() for real in sampled])
        each = rows + targets * teacher_cache.position(self.identity).itemsize
        return round(each * parallel.host_index_and_count()[1])

    @property
    def file_updates(self) -> int:
        """How many updates a file has."""
        return max(1, teacher_cache.FILE // self.update_bytes)

    def bytes_of(self, updates: int) -> int:
        """What so many updates take on the disk, about: files of whole blocks, and one beside."""
        files = [self.file_updates] * (updates // self.file_updates)
        files += [updates % self.file_updates] * bool(updates % self.file_updates)
        blocks = (1 - (-count * self.update_bytes // teacher_cache.BLOCK) for count in files)
        return teacher_cache.BLOCK * sum(blocks)

    def account(self) -> str:
        """What would be written: its size, and the room there is.

        Raises ValueError where there is not enough.
        """
        each, left = self.update_bytes, max(self.total - self.done, 0)
        here, kept = self.run.workdir, self.identity
        said = (
            f"{here}: {self.total:,} updates of {self.run.data.batch_size} rows, the "
            f"{kept['k']} likeliest of {kept['vocabulary']:,} ids in {kept['dtype']}: about "
            f"{each:,} bytes an update, {self.bytes_of(self.total):,} in all"
        )
        said += f", {self.done:,} updates are there" if self.done else ""
        if storage.is_remote(here):
            return f"{said}."
        there = next(folder for folder in (here, *here.absolute().parents) if folder.exists())
        free = shutil.disk_usage(there).free
        if self.bytes_of(left) > free:
            raise ValueError(
                f"{said}, but only {free:,} are free; free some space, or use a smaller --k."
            )
        return f"{said}; {free:,} are free."

    def write(self) -> str:
        """Write what is not there yet, file by file; returns what was written, in words.

        Killed, the same command goes on behind the last whole file.
        """
        each = self.file_updates
        if self.done < self.total:
            told = self._told()
            for start in range(self.done, self.total, each):
                count = min(each, self.total - start)
                records = (next(told) for _ in range(count))
                if self.first:
                    self.manifest = teacher_cache.add_file(self.run.workdir, self.manifest, records)
                else:
                    list(records)
        size = sum(file["bytes"] for file in self.manifest["files"].values())
        there = teacher_cache.updates(self.manifest)
        mass = f"; mass of the tail {np.mean(self.tail):.4f} on average" if self.tail else ""
        return f"{self.run.workdir}: {there:,} updates, {size:,} bytes{mass}"

    def _told(self) -> Iterator[list[bytes]]:
        """The records of each batch that is not there yet, of all hosts."""
        (named, which), ours = runs.teacher_source(self.run), self.run
        theirs = runs.read_run(named)
        params, _ = inference.read_params(theirs, self.tokens, which, self.strategy)
        params = self.strategy.place_state(live_teacher.cast_params(ours, params))
        model = transformer.Transformer(
            live_teacher.teacher_config(ours), self.strategy.shard_activations
        )
        options = {name: self.identity[name] for name in ("k", "dtype", "temperature")}
        options |= {"model": model, "parts": ours.parallel.num_microbatches}
        step = self.strategy.compile(functools.partial(teacher_top_k_step, **options))
        dealt = itertools.islice(self._dealt(self.done), self.total - self.done)
        bar = {"total": self.total, "initial": self.done, "unit": "update", "disable": None}
        for rows in tqdm.tqdm(dealt, desc="teacher-cache", file=sys.stderr, **bar):
            told = self.strategy.fetch_rows(step(params, self.strategy.place_batch(rows)))
            rows, told = parallel.gather_rows((batch.Batch(*rows), told))
            self.tail.append(_tail_mass(rows, told, options["temperature"]))
            yield teacher_cache.records_of(rows, told, self.identity)


def _tail_mass(rows: batch.Batch, told: batch.TeacherTopK, temperature: float) -> float:
    # What all ids but the k have of the softened distribution, the mean over targets.
    real = batch.loss_weights(rows) > 0
    tail, logits = told.tail[real], np.asarray(told.logits[real], np.float32)
    kept = np.logaddexp.reduce(logits / temperature, axis=-1)
    return float(np.exp(tail - np.logaddexp(kept, tail)).sum() / max(real.sum(), 1))


def _check(run: runs.Run, k: int, dtype: str, updates: int) -> None:
    if run.stage != "distill":
        raise ValueError(
            f"stage={run.stage!r} has no teacher to ask; give the config of a student, "
            f"as configs/distill.py."
        )
    if runs.is_claimed(run.workdir):
        raise ValueError(f"--out={run.workdir} holds a run; use a folder of its own.")
    lookup.lookup(teacher_cache.STORED, dtype, "--dtype")
    if not 1 <= k <= run.model.vocab_size:
        raise ValueError(f"--k={k} is out of bounds; use 1 to {run.model.vocab_size}, all ids.")
    cache_temperature(run)  # raises where there are several
    if updates < 0:
        raise ValueError(f"--updates={updates} is too small; use 1 or more, or 0 for the run's.")
