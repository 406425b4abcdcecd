"""Answer inputs: in order, in bounded memory, resumable."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterable
from typing import IO, Any

import jax
import tqdm

from lm import checkpoints, logs, lookup, metrics, runs, storage
from lm.decoding import DecodingConfig
from lm.inference import generate, loading, prompts

CHUNK = 8  # batches that are sorted by length and written together


class ResumableWriter:
    """Writes lines to OUT.part and renames it to OUT when done; without OUT, to stdout.

    OUT.part.json records what the lines depend on; a later call with the same dependencies
    continues after the last whole chunk. For a bucket, OUT.part lies below ~/.cache/lm/gs.

    Raises ValueError if OUT.part has other dependencies, or another process writes it.
    """

    def __init__(self, out: str, dependencies: dict, chunk: int):
        self.done, self._out = 0, out
        if not out:
            return
        self._part = storage.as_path(f"{out}.part")
        if storage.is_remote(out):
            local = out.removeprefix(storage.SCHEME)
            self._part = pathlib.Path(storage.CACHE_DIR).expanduser() / f"{local}.part"
            self._part.parent.mkdir(parents=True, exist_ok=True)
        self._metadata = self._part.with_name(self._part.name + ".json")
        if not self._part.exists():
            logs.write_atomically(self._part, "")
        self._lock = _lock(self._part)
        self.done, size = self._whole_chunks(chunk)
        written = json.loads(self._metadata.read_text()) if self.done else dependencies
        different = [name for name in dependencies if written.get(name) != dependencies[name]]
        if different:
            raise ValueError(
                f"{self._part} has {self.done} answers of another {' and '.join(different)}; "
                f"remove it, or write to another --out."
            )
        os.truncate(self._part, size)
        if not self.done:
            logs.write_atomically(self._metadata, json.dumps(dependencies, indent=2) + "\n")
        self._file = logs.AppendedFile(self._part)

    def _whole_chunks(self, chunk: int) -> tuple[int, int]:
        """Count (lines, bytes) of the whole chunks in OUT.part."""
        done = size = position = 0
        if self._part.exists() and self._metadata.exists():
            with self._part.open("rb") as file:
                for number, line in enumerate(file, 1):
                    position += len(line)
                    if number % chunk == 0 and line.endswith(b"\n"):
                        done, size = number, position
        return done, size

    def add(self, rows: Iterable[dict]) -> None:
        """Write rows; they are on disk when this returns."""
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if self._out:
            self._file.add(lines.encode("utf-8", "backslashreplace"))  # lone surrogates
        else:
            sys.stdout.write(lines)
            sys.stdout.flush()

    def __enter__(self) -> ResumableWriter:
        return self

    def __exit__(self, kind, *error) -> None:
        if not self._out:
            return
        self._file.close()
        if kind is None:
            self._publish()
        elif not self._part.stat().st_size:  # nothing to resume
            self._part.unlink()
            self._metadata.unlink()
        self._lock.close()

    def _publish(self) -> None:
        if storage.is_remote(self._out):
            with self._part.open("rb") as source, storage.as_path(self._out).open("wb") as target:
                shutil.copyfileobj(source, target, storage.COPY_CHUNK_BYTES)
            self._part.unlink()
        else:
            os.replace(self._part, self._out)
        self._metadata.unlink()


def _lock(path: pathlib.Path) -> IO[bytes]:
    """Open a file under an exclusive lock, which closing releases."""
    file = path.open("rb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(
            f"{path} is being written by another process; wait for it, or write to another --out."
        ) from None
    return file


def predict(
    workdir: str | os.PathLike,
    rows: Iterable[dict[str, Any]],
    out: str = "",
    *,
    step: str | int = "newest",
    decoding: str = "",
    seed: int = 0,
    strict: bool = False,
    nearest: str = "",
) -> None:
    """Answer rows with a run's checkpoint: a line of JSON each, in order, to `out` or stdout.

    A line is the row with "inputs" as text, "prediction", and with several answers "predictions"
    and "scores". An interrupted call continues (see ResumableWriter) and ends with the same bytes.

    Args:
      rows: iterated twice, as InputFile; see Prompts.
      step: as of read_params. decoding: as decoding.parse reads it; empty: the run's own.
      seed: of sampling. strict: refuse long inputs instead of truncating them.
      nearest: a metric; writes only the answer that scores best against the row's targets
        (Kim and Rush 2016, section 3.3, arXiv:1606.07947).

    Raises ValueError as inspect_inputs and ResumableWriter do, and for an unusable `out`.
    """
    _check_out(rows, out)
    run, strategy, tokens, params, _ = loading.open_run(workdir, step)
    config = loading.decoding_config(run, decoding)
    _check_nearest(nearest, config, rows)
    several = config.num_return_sequences > 1 and not nearest
    columns = prompts.ANSWER_COLUMNS if several else prompts.ANSWER_COLUMNS[:1]
    make_prompt = prompts.Prompts(run, tokens, columns)
    stats = prompts.inspect_inputs(rows, make_prompt, strict)
    for sentence in stats.sentences(make_prompt.words):
        print(f"lm: warning: {sentence}.", file=sys.stderr)
    # The config's batch size, unlike that of `run`, does not depend on the number of devices.
    chunk = CHUNK * runs.read_run(workdir).data.batch_size
    dependencies = _dependencies(stats, run, tokens, strategy.fetch(params), config, seed)
    dependencies["decoding"] += nearest and f" nearest={nearest}"
    smallest = -(-max(stats.count, 1) // strategy.shards) * strategy.shards
    batch_size = min(run.data.batch_size, smallest)
    model = generate.Generator(run, strategy, params, tokens, config, seed=seed, rows=batch_size)
    options = {"total": stats.count, "desc": "decoding", "unit": "input", "disable": None}
    with (
        ResumableWriter(out, dependencies, chunk) as writer,
        tqdm.tqdm(initial=writer.done, **options) as bar,
    ):
        remaining = itertools.islice(rows, writer.done, None)
        for start in range(writer.done, stats.count, chunk):
            chunk_rows = list(itertools.islice(remaining, chunk))
            inputs = [make_prompt(row, number) for number, row in enumerate(chunk_rows, start)]
            answers = model.generate([prompt.ids for prompt in inputs], start, bar.update)
            if nearest:
                answers = map(_nearest, itertools.repeat(nearest), chunk_rows, answers)
            writer.add(map(_line, chunk_rows, inputs, answers, itertools.repeat(several)))


def _check_out(rows: Iterable[dict], out: str) -> None:
    if os.path.isdir(out):
        raise ValueError(f"--out={out} is a folder; name a file.")
    if out and not storage.is_remote(out) and not os.path.isdir(os.path.dirname(out) or "."):
        raise ValueError(f"--out={out} is in a folder that does not exist; create it first.")
    if (
        isinstance(rows, prompts.InputFile)
        and out
        and os.path.realpath(rows.path) == os.path.realpath(out)
    ):
        raise ValueError(f"--out={out} is the input file and would replace it; name another.")


def _check_nearest(nearest: str, config: DecodingConfig, rows: Iterable[dict]) -> None:
    if not nearest:
        return
    lookup.lookup(metrics.METRICS, nearest, "--nearest")
    if config.num_return_sequences == 1 or "targets" not in next(iter(rows), {"targets": ""}):
        raise ValueError(
            f"--nearest={nearest} chooses among several answers to inputs with targets; use "
            f"--split, or rows with targets, and num_return_sequences=4 in --decoding."
        )


def _nearest(metric: str, row: dict, answers: tuple[list, list]) -> tuple[list, list]:
    """Keep the answer that scores best against the row's targets."""
    texts, scores = answers
    targets = [row.get("references", row["targets"])]
    values = [next(iter(metrics.score(metric, [text], targets).values())) for text in texts]
    best = values.index(max(values))
    return [texts[best]], [scores[best]]


def _dependencies(
    stats: prompts.InputStats, run: runs.Run, tokens, params, config: DecodingConfig, seed: int
) -> dict:
    """Describe what the answers depend on: equal descriptions, equal answers."""
    checksums = jax.tree.leaves(jax.device_get(checkpoints.tree_checksums(params)))
    checksums = json.dumps([int(checksum) for checksum in checksums])
    return {
        "input": stats.digest,
        "checkpoint": hashlib.sha256(checksums.encode()).hexdigest(),
        "model": hashlib.sha256(f"{run.model} {run.lengths}".encode()).hexdigest(),
        "tokenizer": tokens.fingerprint,
        "decoding": str(config),
        "seed": seed,
    }


def _line(row: dict, prompt: prompts.Prompt, answers: tuple[list, list], several: bool) -> dict:
    texts, scores = answers
    line = {"inputs": prompt.text, "prediction": texts[0]}
    line |= {"predictions": texts, "scores": scores} if several else {}
    return line | {name: value for name, value in row.items() if name not in line}
