"""Chat with a run's model at a terminal: streamed answers, and the history of a dialogue."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import re
import string
import sys
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np

from lm import batch, decoding, lookup, pipeline, runs, steps, tasks, tokenizer, transformer
from lm.inference import generate, loading

HELP = """\
Type a text and press Enter. /reset clears the history, /quit or Ctrl-D exits, Ctrl-C stops an
answer, /help prints this.
"""
COMMANDS = ("/help", "/quit", "/reset")


class Stream:
    """Generates one answer token by token, with the ids of Generator.

    Beam search yields all tokens at the end; with several sampled answers, only the first is
    generated. params: on the host.
    """

    def __init__(
        self, run: runs.Run, params, tokens, config: decoding.DecodingConfig, seed: int = 0
    ):
        config = dataclasses.replace(config, num_return_sequences=1)
        model, length, eos = transformer.Transformer(run.model), run.lengths[1], tokens.eos
        options = {"model": model, "length": length, "config": config}
        self._params, self._seed, self._eos = params, seed, eos
        self._input_length, self._length = run.data.input_length, config.max_tokens(length)
        self._is_beam = config.method == "beam"
        self._init = jax.jit(functools.partial(steps.init_decoding, **options))
        self._decode = jax.jit(functools.partial(steps.decode_step, eos=eos, **options))

        def advance(params, state: decoding.DecodeState) -> decoding.DecodeState:
            step = functools.partial(model.apply, {"params": params}, method="decode_step")
            return decoding.decode_token(step, state, config, eos=eos)

        self._advance = jax.jit(advance, donate_argnums=1)

    def __call__(self, ids: np.ndarray, number: int = 0) -> Iterator[int]:
        """Yield the answer's ids, without eos.

        ids: from tasks.truncate_input. number: of the input; samples depend on it and the seed.
        """
        ((_, rows),) = pipeline.input_batches([ids], 1, self._input_length)
        inputs = self._params, batch.Batch(*rows), np.array([[self._seed, number]], np.int32)
        answer = self._beam(inputs) if self._is_beam else self._stepwise(inputs)
        yield from itertools.takewhile(lambda token: token != self._eos, answer)

    def _beam(self, inputs) -> list[int]:
        return np.asarray(self._decode(*inputs).ids)[0, 0].tolist()

    def _stepwise(self, inputs) -> Iterator[int]:
        state = self._init(*inputs)
        for _ in range(self._length):
            state = self._advance(self._params, state)
            yield int(state.token[0])


def stream_text(tokens: tokenizer.Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Yield pieces of text that join to tokens.decode(ids), each as soon as it is complete."""
    prefix, length, text = [], 0, ""
    for token in ids:
        prefix.append(token)
        text = tokens.decode(prefix)
        complete = len(text.rstrip("\ufffd"))
        if complete > length:
            yield text[length:complete]
            length = complete
    if text[length:]:
        yield text[length:]


class InputTooLong(ValueError):
    """A line is longer than the model's input, and --strict forbids to truncate it."""


class Chat:
    """Answers lines; a dialogue task has a history of turns.

    A line fills the template of the run's task; with several tasks or running text it is used
    unchanged. A long input is truncated with a warning on stderr (a dialogue drops its oldest
    turns), or refused if `strict`.
    """

    def __init__(
        self,
        run: runs.Run,
        tokens: tokenizer.Tokenizer,
        stream: Callable[[np.ndarray, int], Iterator[int]],
        strict: bool = False,
    ):
        run_tasks = [run.data.get_task(name) for name in run.data.names]
        self._task = run_tasks[0] if len(run_tasks) == 1 else generate.PLAIN
        self._input_length, self._tokens, self._stream = run.data.input_length, tokens, stream
        self._strict = strict
        self._turns: list[str] = []
        self._is_warned = False  # that old turns are dropped
        self._number = 0  # of the next line

    def reset(self) -> None:
        """Clear the history."""
        self._turns.clear()
        self._is_warned = False

    def __call__(self, line: str) -> Iterator[str]:
        """Yield the answer to a line piece by piece.

        Raises InputTooLong without adding the line to the history.
        """
        ids = self._input_ids(line)
        number, self._number, answer = self._number, self._number + 1, []
        if self._task.turns:
            self._turns.append(_single_line(line))
        try:
            for piece in stream_text(self._tokens, self._stream(ids, number)):
                answer.append(piece)
                yield piece
        finally:  # the history gets the visible part of an interrupted answer
            if self._task.turns:
                self._turns.append(_single_line("".join(answer)))

    def _input_ids(self, line: str) -> np.ndarray:
        """Encode a line after the history; warn of truncation."""
        ids, is_truncated = self._encode(line, self._turns)
        if not is_truncated:
            return ids
        line_fits = bool(self._turns) and not self._encode(line, [])[1]
        subject = "the dialogue so far, with the line," if line_fits else "the line"
        message = f"{subject} is longer than the model's {self._input_length} tokens"
        if self._strict:
            fix = "clear it by /reset" if line_fits else "shorten it"
            raise InputTooLong(f"{message}; {fix}, or omit --strict.")
        if not line_fits:
            _print_error(f"warning: {message} and was truncated.")
        elif not self._is_warned:
            _print_error(f"warning: {message}; from now on its oldest turns are dropped.")
            self._is_warned = True
        return ids

    def _encode(self, line: str, turns: list[str]) -> tuple[np.ndarray, bool]:
        task = self._task
        columns = {column for _, column, *_ in string.Formatter().parse(task.inputs) if column}
        if task.turns:
            text = task.format_dialogue([*turns, _single_line(line)])
        elif len(columns) == 1:
            text = task.format_input({columns.pop(): line})
        else:
            text = task.prefix + line
        return tasks.truncate_input(task, text, self._input_length, self._tokens)


def _single_line(text: str) -> str:
    """Format a turn as training does: one line, single spaces."""
    return " ".join(text.split())


def _print_error(message: str) -> None:
    print(f"lm: {message}", file=sys.stderr, flush=True)


def chat(model: Chat, read: Callable[[str], str], write: Callable[[str], object]) -> None:
    """Answer each line of read(prompt) by write(piece) of its pieces; obey the commands of HELP.

    Ends at /quit, at the end of the input, or at Ctrl-C at the prompt.
    """
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
            model.reset()
        elif line == "/help":
            write(HELP)
        elif re.fullmatch(r"/[^\s/]*", line):
            hint = lookup.nearest(line, COMMANDS) or "."
            write(f"{line} is not a command; use one of {', '.join(COMMANDS)}{hint}\n")
        elif line:
            try:
                for piece in model(line):
                    write(piece)
            except KeyboardInterrupt:
                write(" ..")
            except InputTooLong as error:
                _print_error(str(error))
                continue
            write("\n")


def interactive(
    workdir: str | os.PathLike,
    step: str | int = "newest",
    decoding: str = "",
    seed: int = 0,
    strict: bool = False,
) -> None:
    """Chat with a run's checkpoint at a terminal; arguments as in `predict`."""
    with contextlib.suppress(ImportError):  # optional: enables line editing in input()
        import readline  # noqa: F401
    run, strategy, tokens, params, _ = loading.open_run(workdir, step)
    config = loading.decoding_config(run, decoding)
    stream = Stream(run, strategy.fetch(params), tokens, config, seed)
    write = functools.partial(print, end="", flush=True)
    chat(Chat(run, tokens, stream, strict), input, write)
