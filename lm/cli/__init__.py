"""The command line: python -m lm <command>.

flags     the flags of all commands, and their parser
commands  the functions of the commands
entry     main: help, one command, the exit code
"""

from lm.cli.commands import COMMANDS, TRAIN, find_run_folders
from lm.cli.entry import HELP, PROGRAM, main, overview, run_guarded
from lm.cli.flags import FLAGS, parse_flags
