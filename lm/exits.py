"""Exit codes of commands, and errors as one line."""

USER_ERROR = 2  # an error that the user can fix
DIVERGED = 3  # training diverged; running the command again does not help
UNFINISHED = 75  # run the same command again


def one_line(error: BaseException, limit: int | None = 200) -> str:
    """Return an error's message on one line of at most `limit` characters, or its type."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
