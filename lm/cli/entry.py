"""Running a command line: help, the command, its exit code, errors as one sentence."""

from __future__ import annotations

import inspect
import os
import pathlib
import signal
import sys
from collections.abc import Callable

from absl import logging

from lm import exits, extensions, lookup, storage
from lm.cli import commands, flags

HELP = {"--help", "-h", "help"}
PROGRAM = str(pathlib.Path(__file__).parents[1] / "__main__.py")  # of python -m lm


def usage(name: str) -> str:
    """Return the help of a command."""
    function, names = commands.COMMANDS[name]
    lines = [f"python -m lm {name}: {inspect.cleandoc(function.__doc__ or '')}", ""]
    for flag in names:
        kind, default, text = flags.FLAGS[flag.removesuffix("?")]
        status = "optional" if default == "" or flag.endswith("?") else f"default {default!r}"
        if default is None and not flag.endswith("?"):
            status = "required"
        label = flag.upper() if kind == "positional" else "--" + flag.removesuffix("?")
        lines.append(f"  {label:<14} {text} ({status})")
    if {"config", "config?"} & set(names):
        lines += ["", "Every key of a config, its unit and its default: configs/base.py."]
    return "\n".join(lines)


def overview() -> str:
    """Return the help of the program: one line per command."""
    lines = ["python -m lm <command> [flags]; each command has its own --help", ""]
    for name, (function, _) in commands.COMMANDS.items():
        lines.append(f"  {name:<13} {(function.__doc__ or '').splitlines()[0]}")
    return "\n".join(lines)


def run_guarded(work: Callable[[], int | None]) -> int:
    """Call work() and return its exit code, 0 for None.

    A ValueError or OSError is printed to stderr as one sentence, with exit code 2; an interrupt or
    a timeout has exit code 75.
    """
    # Compilation dominates short runs, so programs are cached; orbax and tfds log noise.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/lm/jax"))
    logging.set_verbosity(logging.FATAL)
    try:
        storage.as_path(os.environ["JAX_COMPILATION_CACHE_DIR"])  # sets up gs:// for jax
        return work() or 0
    except (ValueError, OSError) as error:
        if os.environ.get("LM_TRACEBACK"):
            raise
        print(f"lm: {exits.one_line(error, None)}", file=sys.stderr)
        return exits.UNFINISHED if isinstance(error, TimeoutError) else exits.USER_ERROR
    except KeyboardInterrupt:
        print("\nlm: interrupted; run the same command again.", file=sys.stderr)
        return exits.UNFINISHED


def main(arguments: list[str] | None = None) -> int:
    """Run one command line, by default that of this process; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in HELP:
        print(overview())
        return 0

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C; training replaces it

    def work() -> int | None:
        name, *rest = arguments
        function, names = lookup.lookup(commands.COMMANDS, name, "the command")
        if HELP & set(rest):
            print(usage(name))
            return 0
        values = flags.parse_flags(name, names, rest)
        if "extensions" in names:
            extensions.load(filter(None, values.extensions.split(",")))
        return function(values)

    return run_guarded(work)
