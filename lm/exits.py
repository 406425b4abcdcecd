"""How a command ends: its exit codes, and an error as one line."""

USER_ERROR = 2  # a mistake that the user can correct
DIVERGED = 3  # training gave up; starting again changes nothing
UNFINISHED = 75  # run the same command again


def one_line(error: BaseException, limit: int | None = 200) -> str:
    """An error's message on one line of at most `limit` characters; its type if it is empty."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
