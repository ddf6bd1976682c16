"""Exceptions that commands print on one line: `UserError` can be fixed by the user."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Invalid user input. The message states what, which value, which bound, and what to do."""


class TransientError(UserError):
    """A machine fault that may be transient, such as an unavailable disk or network.

    Commands print it on one line and exit with `process.CRASHED`. The batch scripts then requeue the job.
    """


def message_on_one_line(error: BaseException) -> str:
    """Return the whole message of an error, its line breaks replaced by spaces."""
    return " ".join(str(error).split())


def one_line(error: BaseException) -> str:
    """First line of an error message, or of its cause if `datasets` only reports that generation failed."""
    while type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


def check_share(tasks: int, task: int) -> None:
    """Check a share of divided work, `--tasks N --task I`. Raises UserError unless 0 <= I < N."""
    if tasks < 1 or not 0 <= task < tasks:
        raise UserError(f"task {task} of {tasks}: --task counts from 0 to --tasks - 1")


@contextmanager
def damaged_file(path: object, remedy: str) -> Iterator[None]:
    """Turn errors of values that no program of ours writes into a UserError. For files that may be damaged or crafted.

    UserErrors and errors of the disk pass unchanged.
    """
    try:
        yield
    except (OSError, UserError):
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({one_line(error)}); {remedy}") from error
