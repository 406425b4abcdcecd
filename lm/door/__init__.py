"""The door: python -m lm <command>.

flags     what a command may be told, and how a line is read
commands  what each of them does
calls     one call: help, the command, the exit code
"""

from lm.door.calls import HELP, PROGRAM, UNFINISHED, guarded, main, overview
from lm.door.commands import COMMANDS, TRAIN
from lm.door.flags import FLAGS, parse

__all__ = [
    "COMMANDS",
    "FLAGS",
    "HELP",
    "PROGRAM",
    "TRAIN",
    "UNFINISHED",
    "guarded",
    "main",
    "overview",
    "parse",
]
