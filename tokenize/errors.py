"""The one exception that means "the user can fix this": commands print it on one line and exit 1."""


class UserError(ValueError):
    """Bad input of the user's. The text names what, which value, which bound, and what to do."""
