"""The door: python -m lm <command>.

flags     what a command may be told, and how a line is read
commands  what each of them does
calls     one call: help, the command, the exit code
"""

from lm.cli.commands import COMMANDS, TRAIN
from lm.cli.entry import HELP, PROGRAM, main, overview, run_guarded
from lm.cli.flags import FLAGS, parse_flags
