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

from lm import batch, choose, distill, evaluate, parallel, pipeline, run, steps, transformer
from lm.pipeline import taught
from lm.sources import places
from lm.train import teaching

SAMPLED = 8  # batches whose targets are counted to foretell the size
PARTS = {"order": "order of data", "vocabulary": "model"}  # what goes by another name


def identity(this: run.Run, tokens, examples: pipeline.Examples, k: int, dtype: str) -> dict:
    """All that decides what a cache of this run's teacher holds, as plain values.

    Of the teacher its checkpoint's sums are read, no parameters.
    """
    named, which = run.teacher_of(this)
    with evaluate.open_checkpoints(run.read_run(named), read_only=True) as saved:
        update, parameters = saved.fingerprint(which)
    dtypes = this.config["teacher"]["dtype"]
    return {
        "teacher": {"update": update, "parameters": parameters, "dtype": dtypes},
        "tokenizer": tokens.fingerprint,
        "order": pipeline.dealt(examples, this.config["seed"]),
        "k": k,
        "dtype": dtype,
        "vocabulary": this.model.vocab_size,
        "temperature": softness(this),
    }


def softness(this: run.Run) -> float:
    """The temperature at which a run asks its cached teacher."""
    return distill.softness(distill.parse(this.config["teacher"]["loss"]))


def find_taught(this: run.Run, tokens, examples: pipeline.Examples) -> pipeline.Taught:
    """The cache that teacher.cache names. examples: of the run's training split.

    Raises ValueError where it is another teacher's, tokenizer's or order's, and where it has fewer
    updates than the run.
    """
    where = this.config["teacher"]["cache"]
    found = pipeline.read_taught(where)
    ours = identity(this, tokens, examples, found.identity["k"], found.identity["dtype"])
    odd = run.differences(ours, found.identity)
    if odd:
        part = odd[0].split()[0].split(".")[0]
        what = PARTS.get(part, part)
        raise ValueError(
            f"teacher.cache={where} was made with another {what}: {', '.join(odd)}; make one of "
            f"this config with `python -m lm teacher-cache`, or leave it empty."
        )
    total = run.total_updates(this, len(examples))
    if found.updates < total:
        raise ValueError(
            f"teacher.cache={where} has {found.updates} updates, and the run {total}; make it "
            f"longer: python -m lm teacher-cache, as before, with --updates={total}."
        )
    return found


def likeliest(logits: jax.Array, k: int, dtype: str, temperature: float) -> batch.Taught:
    """The k likeliest ids of logits [B, T, V], their log-probabilities in dtype, and the tail."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    kept, ids = jax.lax.top_k(log_p, k)
    rest = jnp.put_along_axis(log_p, ids, -jnp.inf, axis=-1, inplace=False)
    kept = jnp.maximum(kept, jnp.finfo(dtype).min.astype(jnp.float32)).astype(dtype)
    return batch.Taught(ids, kept, jax.nn.logsumexp(rest / temperature, axis=-1))


def told_step(params, rows: batch.Batch, *, model, parts: int, axis=None, **kept):
    """What a teacher says of a batch, in so many parts, one after the other: a batch.Taught.

    kept: k, dtype and temperature, as `likeliest` takes them.
    """
    split = lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
    whole = lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
    of = lambda part: likeliest(steps.predict(model, params, part, None), **kept)
    return jax.tree.map(whole, jax.lax.map(of, jax.tree.map(split, rows)))


class CacheWriter:
    """A cache of a run's teacher, to be written on this host and those beside it.

    updates: 0 for those of the run. Raises ValueError for what cannot be written, and where --out
    has something else.
    """

    def __init__(self, this: run.Run, k: int = 16, dtype: str = "float16", updates: int = 0):
        _check(this, k, dtype, updates)
        self.this, self.strategy = this, parallel.make_strategy(this.parallel)
        micro = this.parallel.micro_batches
        parallel.check_batch(this.data.batch_size, self.strategy.shards, micro)
        self.first = parallel.hosts()[0] == 0
        self.tokens, self.examples = self._prepared()
        self.identity = identity(this, self.tokens, self.examples, k, dtype)
        self.manifest = taught.begun(this.workdir, self.identity)
        self.done = taught.updates(self.manifest)
        self.total = updates or run.total_updates(this, len(self.examples))
        self.tail = []  # the mean mass of each batch's tail

    def _prepared(self):
        # Made by the first host while others wait.
        def prepare():
            tokens = run.make_tokenizer(self.this)
            return tokens, run.make_examples(self.this, tokens)[0]

        made = prepare() if self.first else None
        parallel.meet("tokenizer and examples of a cache")
        return made or prepare()

    def _dealt(self, start: int) -> Iterator[batch.Batch]:
        host, hosts = parallel.hosts()
        seed = self.this.config["seed"]
        return pipeline.train_batches(self.examples, seed, start=start, host=host, hosts=hosts)

    @functools.cached_property
    def update_bytes(self) -> int:
        """Bytes of an update, about: as the first batches have targets."""
        dealt = self._dealt(0)
        sampled = [next(dealt).targets_segment_ids > 0 for _ in range(min(self.total, SAMPLED))]
        rows = len(sampled[0]) * taught.OVERHEAD
        targets = np.mean([real.sum() for real in sampled])
        each = rows + targets * taught.position(self.identity).itemsize
        return round(each * parallel.hosts()[1])

    @property
    def file_updates(self) -> int:
        """How many updates a file has."""
        return max(1, taught.FILE // self.update_bytes)

    def bytes_of(self, updates: int) -> int:
        """What so many updates take on the disk, about: files of whole blocks, and one beside."""
        files = [self.file_updates] * (updates // self.file_updates)
        files += [updates % self.file_updates] * bool(updates % self.file_updates)
        blocks = (1 - (-count * self.update_bytes // taught.BLOCK) for count in files)
        return taught.BLOCK * sum(blocks)

    def account(self) -> str:
        """What would be written: its size, and the room there is.

        Raises ValueError where there is not enough.
        """
        each, left = self.update_bytes, max(self.total - self.done, 0)
        here, kept = self.this.workdir, self.identity
        said = (
            f"{here}: {self.total:,} updates of {self.this.data.batch_size} rows, the "
            f"{kept['k']} likeliest of {kept['vocabulary']:,} ids in {kept['dtype']}: about "
            f"{each:,} bytes an update, {self.bytes_of(self.total):,} in all"
        )
        said += f", {self.done:,} updates are there" if self.done else ""
        if places.is_remote(here):
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
                    self.manifest = taught.add_file(self.this.workdir, self.manifest, records)
                else:
                    list(records)
        size = sum(file["bytes"] for file in self.manifest["files"].values())
        there = taught.updates(self.manifest)
        mass = f"; mass of the tail {np.mean(self.tail):.4f} on average" if self.tail else ""
        return f"{self.this.workdir}: {there:,} updates, {size:,} bytes{mass}"

    def _told(self) -> Iterator[list[bytes]]:
        """The records of each batch that is not there yet, of all hosts."""
        (named, which), ours = run.teacher_of(self.this), self.this
        theirs = run.read_run(named)
        params, _ = evaluate.read_params(theirs, self.tokens, which, self.strategy)
        params = self.strategy.place_state(teaching.cast(ours, params))
        model = transformer.Transformer(teaching.model_of(ours), self.strategy.place_rows)
        options = {name: self.identity[name] for name in ("k", "dtype", "temperature")}
        options |= {"model": model, "parts": ours.parallel.micro_batches}
        step = self.strategy.compile(functools.partial(told_step, **options))
        dealt = itertools.islice(self._dealt(self.done), self.total - self.done)
        bar = {"total": self.total, "initial": self.done, "unit": "update", "disable": None}
        for rows in tqdm.tqdm(dealt, desc="teacher-cache", file=sys.stderr, **bar):
            told = self.strategy.fetch_rows(step(params, self.strategy.place_batch(rows)))
            rows, told = parallel.all_rows((batch.Batch(*rows), told))
            self.tail.append(_tail_mass(rows, told, options["temperature"]))
            yield taught.records_of(rows, told, self.identity)


def _tail_mass(rows: batch.Batch, told: batch.Taught, temperature: float) -> float:
    # What all ids but the k have of the softened distribution, the mean over targets.
    real = batch.loss_weights(rows) > 0
    tail, logits = told.tail[real], np.asarray(told.logits[real], np.float32)
    kept = np.logaddexp.reduce(logits / temperature, axis=-1)
    return float(np.exp(tail - np.logaddexp(kept, tail)).sum() / max(real.sum(), 1))


def _check(this: run.Run, k: int, dtype: str, updates: int) -> None:
    if this.config["stage"] != "distill":
        raise ValueError(
            f"stage={this.config['stage']!r} has no teacher to ask; give the config of a student, "
            f"as configs/distill.py."
        )
    if run.is_claimed(this.workdir):
        raise ValueError(f"--out={this.workdir} holds a run; use a folder of its own.")
    choose.choose(taught.STORED, dtype, "--dtype")
    if not 1 <= k <= this.model.vocab_size:
        raise ValueError(f"--k={k} is out of bounds; use 1 to {this.model.vocab_size}, all ids.")
    softness(this)  # raises where there are several
    if updates < 0:
        raise ValueError(f"--updates={updates} is too small; use 1 or more, or 0 for the run's.")
