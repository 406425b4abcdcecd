"""python -m lm <command>: see lm/door."""

from lm import door

if __name__ == "__main__":
    raise SystemExit(door.main())
