"""The command line: python -m lm <command>.

flags     the flags of all commands, and parsing
commands  what each command does
entry     one call: help, the command, the exit code
"""

from lm.cli.commands import COMMANDS, TRAIN, find_run_folders
from lm.cli.entry import HELP, PROGRAM, main, overview, run_guarded
from lm.cli.flags import FLAGS, parse_flags
