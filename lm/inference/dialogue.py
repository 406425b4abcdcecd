"""A run's model asked by hand: answers appear as they are found, and a dialogue has a history."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import string
import sys
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np

from lm import batch, decoding, lookup, pipeline, runs, steps, tasks, transformer
from lm.inference import generate, loading

HELP = """\
Type a text and press Enter. /reset forgets what was said before, /quit or Ctrl-D ends, Ctrl-C
stops an answer, /help says this.
"""
COMMANDS = ("/help", "/quit", "/reset")


class Stream:
    """A run's model that says one answer token by token, the ids that Answers would give.

    params: one copy of them. how: of beams, which know their answer only at the end, all tokens
    come at once; of several draws there is the first.
    """

    def __init__(self, run: runs.Run, params, tokens, how: decoding.DecodingConfig, seed: int = 0):
        how = dataclasses.replace(how, n_best=1)
        model, length, eos = transformer.Transformer(run.model), run.lengths[1], tokens.eos
        options = {"model": model, "length": length, "how": how}
        self._params, self._seed, self._eos = params, seed, eos
        self._most, self._length, self._how = run.data.input_length, how.room(length), how
        self._begin = jax.jit(functools.partial(steps.decode_begin, **options))
        self._whole = jax.jit(functools.partial(steps.decode_step, eos=eos, **options))

        def advance(params, state: decoding.DecodeState) -> decoding.DecodeState:
            step = functools.partial(model.apply, {"params": params}, method="decode_step")
            return decoding.advance(step, state, how, eos=eos)

        self._advance = jax.jit(advance, donate_argnums=1)

    def __call__(self, ids: np.ndarray, number: int = 0) -> Iterator[int]:
        """The answer to the ids of tasks.fitted, without eos. number: of the input, as in Answers.

        One program for a bucket of lengths, and one that advances; they are compiled once.
        """
        ((_, rows),) = pipeline.input_batches([ids], 1, self._most)
        asked = self._params, batch.Batch(*rows), np.array([[self._seed, number]], np.int32)
        if self._how.method == "beam":
            said = iter(np.asarray(self._whole(*asked).ids)[0, 0].tolist())
        else:
            said = self._walk(self._begin(*asked))
        for token in said:
            if token == self._eos:
                return
            yield token

    def _walk(self, state: decoding.DecodeState) -> Iterator[int]:
        for _ in range(self._length):
            state = self._advance(self._params, state)
            yield int(state.token[0])


def pieces(tokens, ids: Iterable[int]) -> Iterator[str]:
    """The text of ids as it grows: together they are tokens.decode of all, and none is taken back.

    What might be the beginning of a character waits for the rest of it.
    """
    said, shown, text = [], 0, ""
    for token in ids:
        said.append(token)
        text = tokens.decode(said)
        sure = len(text.rstrip("\ufffd"))
        if sure > shown:
            yield text[shown:sure]
            shown = sure
    if text[shown:]:
        yield text[shown:]


class Refused(ValueError):
    """A line that is too long, in a talk where none is cut."""


class Chat:
    """A line at a time to a run: of a dialogue with all that was said before, else by itself.

    The task's template is put around a line, as around a record's only column; where the run has
    several tasks, or is of running text, a line is asked as it stands. What is too long is cut, of
    a dialogue the oldest turns first, with a warning on stderr; where it is strict, it is refused.
    """

    def __init__(self, run: runs.Run, tokens, stream: Stream, strict: bool = False):
        named = [run.data.get_task(name) for name in run.data.names]
        self._task = named[0] if len(named) == 1 else generate.PLAIN
        self._most, self._tokens, self._stream = run.data.input_length, tokens, stream
        self._strict = strict
        self._turns: list[str] = []
        self._is_warned = False  # that turns are left out
        self._number = 0

    def reset(self) -> None:
        """Forget what was said before."""
        self._turns.clear()
        self._is_warned = False

    def __call__(self, line: str) -> Iterator[str]:
        """The answer to a line, piece by piece. Raises Refused, and the line was never said."""
        ids = self._asked(line)
        number, self._number, said = self._number, self._number + 1, []
        if self._task.turns:
            self._turns.append(_flat(line))
        try:
            for piece in pieces(self._tokens, self._stream(ids, number)):
                said.append(piece)
                yield piece
        finally:  # an answer that was stopped was heard as far as it went
            if self._task.turns:
                self._turns.append(_flat("".join(said)))

    def _asked(self, line: str) -> np.ndarray:
        """The ids of a line after what was said before; where they are not all, that is said."""
        ids, cut = self._fitted(line, self._turns)
        if not cut:
            return ids
        fits = bool(self._turns) and not self._fitted(line, [])[1]
        what = "the talk so far, with the line," if fits else "the line"
        long = f"{what} is longer than the model's {self._most} tokens"
        if self._strict:
            cure = "forget it by /reset" if fits else "shorten it"
            raise Refused(f"{long}; {cure}, or leave --strict out.")
        if not fits:
            _warn(f"{long} and was cut.")
        elif not self._is_warned:
            _warn(f"{long}; from now on its oldest turns are left out.")
            self._is_warned = True
        return ids

    def _fitted(self, line: str, before: list[str]) -> tuple[np.ndarray, bool]:
        return tasks.truncate_input(self._task, self._text(line, before), self._most, self._tokens)

    def _text(self, line: str, before: list[str]) -> str:
        task = self._task
        if task.turns:
            return task.history([*before, _flat(line)])
        columns = {column for _, column, *_ in string.Formatter().parse(task.inputs) if column}
        return task.ask({columns.pop(): line}) if len(columns) == 1 else task.prefix + line


def _flat(text: str) -> str:
    """A turn as the model has learnt them: a line, single spaces."""
    return " ".join(text.split())


def _warn(sentence: str) -> None:
    print(f"lm: warning: {sentence}", file=sys.stderr, flush=True)


def chat(talk: Chat, read: Callable[[str], str], write: Callable[[str], object]) -> None:
    """Ask line by line what `read` of a prompt gives, and `write` the answers, until /quit."""
    write(HELP)
    while True:
        try:
            line = read("> ").strip()
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return
        if line == "/quit":
            return
        if line == "/reset":
            talk.reset()
        elif line == "/help":
            write(HELP)
        elif re.fullmatch(r"/[^\s/]*", line):
            hint = lookup.nearest(line, COMMANDS) or "."
            write(f"{line} is no command; use one of {', '.join(COMMANDS)}{hint}\n")
        elif line:
            try:
                for piece in talk(line):
                    write(piece)
            except KeyboardInterrupt:
                write(" ..")
            except Refused as error:
                print(f"lm: {error}", file=sys.stderr, flush=True)
                continue
            write("\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def interactive(
    workdir, which: str | int = "newest", how: str = "", seed: int = 0, strict: bool = False
) -> None:
    """Ask a checkpoint of a run by hand, on a terminal; the arguments are those of `predict`."""
    with contextlib.suppress(ImportError):  # not every Python has it
        import readline  # noqa: F401  (input then edits lines, and knows the last ones)
    run, strategy, tokens, params, _ = loading.open_run(workdir, which)
    how = decoding.parse(how or run.config["evaluate"]["decoding"])
    stream = Stream(run, strategy.fetch(params), tokens, how, seed)
    chat(Chat(run, tokens, stream, strict), input, _write)
