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
from typing import Any

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
        self._temporary = storage.as_path(f"{out}.part")
        if storage.is_remote(out):
            local = out.removeprefix(storage.SCHEME)
            self._temporary = pathlib.Path(storage.CACHE_DIR).expanduser() / f"{local}.part"
            self._temporary.parent.mkdir(parents=True, exist_ok=True)
        self._metadata = self._temporary.with_name(self._temporary.name + ".json")
        if not self._temporary.exists():
            logs.write_atomically(self._temporary, "")
        self._lock = self._temporary.open("rb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ValueError(
                f"{self._temporary} is being written by another process; wait for it, or write to "
                f"another --out."
            ) from None
        self.done, size = self._whole_chunks(chunk)
        previous = json.loads(self._metadata.read_text()) if self.done else dependencies
        different = [name for name in dependencies if previous.get(name) != dependencies[name]]
        if different:
            raise ValueError(
                f"{self._temporary} has {self.done} answers of another {' and '.join(different)}; "
                f"remove it, or write to another --out."
            )
        os.truncate(self._temporary, size)
        if not self.done:
            logs.write_atomically(self._metadata, json.dumps(dependencies, indent=2) + "\n")
        self._file = logs.AppendedFile(self._temporary)

    def _whole_chunks(self, chunk: int) -> tuple[int, int]:
        """Count (lines, bytes) of the whole chunks in OUT.part."""
        done = size = position = 0
        if self._metadata.exists():
            with self._temporary.open("rb") as file:
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
        elif not self._temporary.stat().st_size:  # nothing to resume
            self._temporary.unlink()
            self._metadata.unlink()
        self._lock.close()

    def _publish(self) -> None:
        if storage.is_remote(self._out):
            with self._temporary.open("rb") as file, storage.as_path(self._out).open("wb") as out:
                shutil.copyfileobj(file, out, storage.COPY_CHUNK_BYTES)
            self._temporary.unlink()
        else:
            os.replace(self._temporary, self._out)
        self._metadata.unlink()


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
    """Answer rows with a run's checkpoint: one JSON line for each row to `out`, or to stdout.

    A line has "inputs" (the model's input), "prediction" (the best answer) and, with several
    answers, "predictions" and "scores"; other columns are copied to the output line. An interrupted
    call continues (see ResumableWriter) and ends with the same bytes.

    Args:
      rows: iterated twice, as InputFile; see Prompts.
      decoding: the short form, see decoding.parse; empty: the run's decoding.
      strict: refuse long inputs instead of truncating them.
      nearest: a metric; writes only the answer that scores best against the row's targets
        (Kim and Rush 2016, section 3.3, arXiv:1606.07947).

    Raises ValueError as inspect_inputs and ResumableWriter, and for an unusable `out`.
    """
    _check_out(rows, out)
    run, strategy, tokens, params, _ = loading.open_run(workdir, step)
    config = loading.decoding_config(run, decoding)
    _check_nearest(nearest, config, rows)
    several = config.num_return_sequences > 1 and not nearest
    columns = prompts.ANSWER_COLUMNS if several else prompts.ANSWER_COLUMNS[:1]
    make_prompt = prompts.Prompts(run, tokens, columns)
    stats = prompts.inspect_inputs(rows, make_prompt, strict)
    for sentence in stats.warnings:
        print(f"lm: warning: {sentence}.", file=sys.stderr)
    # The config's batch size, unlike that of `run`, does not depend on the number of devices.
    chunk = CHUNK * runs.read_run(workdir).data.batch_size
    checksums = jax.device_get(checkpoints.tree_checksums(strategy.fetch(params)))
    dependencies = {  # equal dependencies, equal answers
        "input": stats.digest,
        "checkpoint": _digest(json.dumps(list(map(int, jax.tree.leaves(checksums))))),
        "model": _digest(f"{run.model} {run.lengths}"),
        "tokenizer": tokens.fingerprint,
        "decoding": str(config) + (f" nearest={nearest}" if nearest else ""),
        "seed": seed,
    }
    smallest = -(-max(stats.count, 1) // strategy.shards) * strategy.shards
    batch_size = min(run.data.batch_size, smallest)
    model = generate.Generator(run, strategy, params, tokens, config, seed=seed, rows=batch_size)
    writer = ResumableWriter(out, dependencies, chunk)
    options = {"total": stats.count, "desc": "decoding", "unit": "input", "disable": None}
    with writer, tqdm.tqdm(initial=writer.done, **options) as bar:
        remaining = itertools.islice(rows, writer.done, None)
        for start in range(writer.done, stats.count, chunk):
            chunk_rows = list(itertools.islice(remaining, chunk))
            inputs = [make_prompt(row, number) for number, row in enumerate(chunk_rows, start)]
            answers = model.generate([prompt.ids for prompt in inputs], start, bar.update)
            lines = zip(chunk_rows, inputs, answers, strict=True)
            writer.add(_line(*line, several, nearest) for line in lines)


def _check_out(rows: Iterable[dict], out: str) -> None:
    if os.path.isdir(out):
        raise ValueError(f"--out={out} is a folder; name a file.")
    if out and not storage.is_remote(out) and not os.path.isdir(os.path.dirname(out) or "."):
        raise ValueError(f"--out={out} is in a folder that does not exist; create it first.")
    path = getattr(rows, "path", None)
    if path and out and os.path.realpath(path) == os.path.realpath(out):
        raise ValueError(f"--out={out} is the input file and would replace it; name another.")


def _check_nearest(nearest: str, config: DecodingConfig, rows: Iterable[dict]) -> None:
    if not nearest:
        return
    lookup.lookup(metrics.METRICS, nearest, "--nearest")
    if config.num_return_sequences == 1 or "targets" not in next(iter(rows), {"targets": ""}):
        raise ValueError(
            f"--nearest={nearest} selects among several answers to inputs with targets; use "
            f"--split, or rows with targets, and num_return_sequences=4 in --decoding."
        )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _line(
    row: dict, prompt: prompts.Prompt, answers: tuple[list, list], several: bool, nearest: str
) -> dict:
    texts, scores = answers
    if nearest:
        targets = [row.get("references", row["targets"])]
        score = lambda text: next(iter(metrics.score(nearest, [text], targets).values()))
        texts = [max(texts, key=score)]
    line = {"inputs": prompt.text, "prediction": texts[0]}
    line |= {"predictions": texts, "scores": scores} if several else {}
    return line | {name: value for name, value in row.items() if name not in line}
