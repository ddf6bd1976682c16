"""The one exception that means "the user can fix this": commands print it on one line and exit 1."""


class UserError(ValueError):
    """Bad input of the user's. The text names what, which value, which bound, and what to do."""


class TransientError(UserError):
    """A fault of the machine that may be over at the next try: a disk or a network that was away.

    Commands print it on one line as well, and exit with `process.CRASHED`: the batch scripts requeue the job.
    """


def message_on_one_line(error: BaseException) -> str:
    """Return the whole message of an error, its line breaks replaced by spaces."""
    return " ".join(str(error).split())


def one_line(error: BaseException) -> str:
    """The first line of what went wrong; where `datasets` only says that generating failed, of its cause."""
    while type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
