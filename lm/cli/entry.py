"""One call of the door: help, a command, and one sentence for what a user can cause."""

from __future__ import annotations

import inspect
import os
import pathlib
import signal
import sys
from collections.abc import Callable

from absl import logging

from lm import exits, lookup, storage
from lm.cli import commands, flags

HELP = {"--help", "-h", "help"}
PROGRAM = str(pathlib.Path(__file__).parents[1] / "__main__.py")  # what python -m lm runs


def usage(name: str) -> str:
    """The help of one command."""
    function, takes = commands.COMMANDS[name]
    lines = [f"python -m lm {name}: {inspect.cleandoc(function.__doc__)}", ""]
    for flag in takes:
        kind, default, text = flags.FLAGS[flag.removesuffix("?")]
        given = "required" if default is None and not flag.endswith("?") else "optional"
        given = given if default in (None, "") else f"default {default!r}"
        shown = flag.upper() if kind == "place" else "--" + flag.removesuffix("?")
        lines.append(f"  {shown:<12} {text} ({given})")
    if {"config", "config?"} & set(takes):
        lines += ["", "Every key of a config, its unit and its default: configs/base.py."]
    return "\n".join(lines)


def overview() -> str:
    """The help of the door: every command in a line."""
    summary = lambda function: function.__doc__.splitlines()[0]
    lines = [
        f"  {name:<10} {summary(function)}" for name, (function, _) in commands.COMMANDS.items()
    ]
    return "\n".join(["python -m lm <command> [flags]; each has its own --help", "", *lines])


def run_guarded(work: Callable[[], int | None]) -> int:
    """Do the work: its exit code or 0; 2 with one sentence on stderr for a user's mistake, 75 where
    it was interrupted or has waited in vain.
    """
    # Recompiling is the longest wait of a short run; orbax and tfds say much that is no news.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/lm/jax"))
    logging.set_verbosity(logging.FATAL)
    try:
        storage.as_path(os.environ["JAX_COMPILATION_CACHE_DIR"])  # of gs://, as all else reaches it
        return work() or 0
    except (ValueError, OSError) as error:
        if os.environ.get("LM_TRACEBACK"):  # for whoever looks for the place, not the cure
            raise
        print(f"lm: {exits.one_line(error, None)}", file=sys.stderr)
        return exits.UNFINISHED if isinstance(error, TimeoutError) else exits.USER_ERROR
    except KeyboardInterrupt:
        print("\nlm: interrupted; run the same command again.", file=sys.stderr)
        return exits.UNFINISHED


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in HELP:
        print(overview())
        return 0

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # where none saves first, as Ctrl-C

    def work():
        name, *rest = arguments
        function, takes = lookup.lookup(commands.COMMANDS, name, "the command")
        if HELP & set(rest):
            print(usage(name))
            return 0
        return function(flags.parse_flags(name, takes, rest))

    return run_guarded(work)
