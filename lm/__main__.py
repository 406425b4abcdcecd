"""python -m lm <command>: see lm/cli."""

from lm import cli

if __name__ == "__main__":
    raise SystemExit(cli.main())
