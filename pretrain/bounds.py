"""Range checks of settings. They raise UserError with the key, the value and the bound."""

from codecssl.tokenize.common.errors import UserError


def at_least(key: str, value: float, bound: float) -> None:
    if value < bound:
        raise UserError(f"{key}: {value}, must be at least {bound}")


def above_zero(key: str, value: float) -> None:
    if value <= 0.0:
        raise UserError(f"{key}: {value}, must be above 0")


def probability(key: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise UserError(f"{key}: {value}, must be at least 0 and below 1")
