"""The config loader: defaults in the code < a YAML file by name or path < dotted overrides.

A config is a tree of frozen dataclasses. Keys are checked here against the fields: an unknown key is an error of one
line with a suggestion. jsonargparse merges the values and checks their types. The dataclasses check ranges.
"""

import dataclasses
import difflib
import json
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from codecssl.tokenize.common.errors import UserError

C = TypeVar("C")

HERE = Path(__file__).resolve().parent


def names(stage: str) -> list[str]:
    """Return the names of the shipped configs of a stage, as accepted by `load_config`."""
    return sorted(path.stem for path in (HERE / stage).glob("*.yaml"))


def config_path(stage: str, name: str) -> Path:
    """Return the YAML file of `name`, which is an existing path or the name of one of the stage's configs."""
    for path in (HERE / stage / f"{name}.yaml", Path(name)):
        if path.is_file():
            return path
    raise UserError(
        f"config {name!r}: no such file, and not among the {stage} configs ({', '.join(names(stage))})"
        + _suggestion(name, names(stage))
    )


def load_config(kind: type[C], stage: str, name: str, overrides: Sequence[str] = ()) -> C:
    """Load a `kind` from the YAML file `name`, with `overrides` (["--section.key", "value", "--a.b=c", ...])."""
    path = config_path(stage, name)
    values = _read_yaml(path)
    check_keys(kind, values, str(path))
    options = _options(kind, overrides)
    return _build(kind, lambda parser: parser.parse_args(options, namespace=parser.parse_object(values)))


def from_dict(kind: type[C], values: Mapping[str, Any]) -> C:
    """Build a `kind` from nested plain values and defaults. Raises UserError for a wrong key or type."""
    check_keys(kind, values, "config")
    return _build(kind, lambda parser: parser.parse_object(dict(values)))


def _build(kind: type[C], parse: Callable[[Any], Any]) -> C:
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    try:
        parsed = parser.instantiate(parse(parser))
    except (ArgumentError, TypeError) as error:
        raise UserError("config: " + " ".join(str(error).split())) from None
    return kind(**{field.name: parsed[field.name] for field in dataclasses.fields(typing.cast(Any, kind))})


def to_yaml(config: Any) -> str:
    """Return the complete config as YAML, defaults included. `from_dict` reads it back to an equal config."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Return dotted key -> (old, new) for every value in which two configs of one kind differ."""
    flat_old, flat_new = _flatten(dataclasses.asdict(old)), _flatten(dataclasses.asdict(new))
    return {key: (flat_old[key], flat_new[key]) for key in flat_new if flat_old[key] != flat_new[key]}


def _options(kind: Any, arguments: Sequence[str]) -> list[str]:
    """Check the keys of overrides and return ["--section.key=value", ...]. A lone value of a tuple becomes a list."""
    options: list[str] = []
    rest = list(arguments)
    while rest:
        key, equals, text = rest.pop(0).partition("=")
        if not key.startswith("--"):
            raise UserError(f"argument {key!r}: not understood; overrides are --section.key value")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"override {key}: has no value; give {key} VALUE")
            text = rest.pop(0)
        *sections, name = key[2:].split(".")
        nested: Any = {name: text}
        for section in reversed(sections):
            nested = {section: nested}
        check_keys(kind, nested, "command line")
        value = _yaml_value(key, text)
        if typing.get_origin(_type_of(kind, key[2:])) is tuple and not isinstance(value, list):
            text = json.dumps([value])
        options.append(f"{key}={text}")
    return options


def _type_of(kind: Any, key: str) -> Any:
    """Annotated type of a dotted key."""
    for name in key.split("."):
        kind = typing.get_type_hints(kind)[name]
    return kind


def check_keys(kind: Any, values: Mapping[str, Any], source: str, prefix: str = "") -> None:
    """Raise UserError for the first key of `values` that is not a field of `kind`, with the nearest field."""
    hints = typing.get_type_hints(kind)
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"{source}: unknown key '{prefix}{key}'{_suggestion(str(key), list(hints), prefix)}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise UserError(f"{source}: '{prefix}{key}' is a section, and was given {value!r}")
            check_keys(hints[key], value, source, f"{prefix}{key}.")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict | None):
        raise UserError(f"{path}: holds a {type(values).__name__}; it must hold sections of keys")
    return values or {}


def _yaml_value(key: str, text: str) -> Any:
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # bytes of the command line that are not UTF-8
        raise UserError(
            f"override {key}: {text} is not UTF-8, which no config can hold; rename it, or name a link to it"
        )
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"override {key}: {text!r} is not a YAML value") from None


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _suggestion(key: str, known: Sequence[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean '{prefix}{near[0]}'?" if near else ""
