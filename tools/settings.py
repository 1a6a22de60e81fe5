"""Settings of a run: a flat YAML file and ``key=value`` overrides, read into a dataclass whose types they must have."""

import dataclasses
import difflib
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml

T = TypeVar("T")


def read_settings(kind: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read a flat YAML file, then apply ``key=value`` overrides.

    Args:
        kind: a dataclass; fields without a default must be set, and not to an empty value.
        path: the file.
        overrides: each replaces one line of the file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A key is unknown or missing, or a value has the wrong type.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no config file at {path}")
    try:
        values = _parse(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `key: value` lines")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r} must look like key=value")
        try:
            values[key] = _parse(text)
        except ValueError as error:
            raise ValueError(f"override {override!r} is no YAML: {error}") from error
    kinds = get_type_hints(kind)
    for key in values:
        if key not in kinds:
            near = difflib.get_close_matches(str(key), kinds, 1)
            raise ValueError(f"unknown key {key!r} in {path}" + (f": did you mean {near[0]!r}?" if near else ""))
        values[key] = _convert(key, values[key], kinds[key])
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING and not values.get(field.name):
            raise ValueError(f"{path} must set {field.name!r}")
    return kind(**values)


def _parse(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        where = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{error.problem or error.context}{where}") from error
    except yaml.YAMLError as error:  # of a character
        raise ValueError(str(error).splitlines()[0]) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def check_choices(settings: Any, choices: dict[str, Sequence[str]]) -> None:
    """Raise a ValueError for a setting that is none of the allowed values."""
    for key, allowed in choices.items():
        if getattr(settings, key) not in allowed:
            raise ValueError(f"{key} must be one of {', '.join(allowed)}, not {getattr(settings, key)!r}")


def _convert(key: str, value: Any, kind: Any) -> Any:
    allowed = get_args(kind) or (kind,)
    if value is None and types.NoneType in allowed:
        return None
    if float in allowed and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as text
        except (TypeError, ValueError, OverflowError):
            pass
    elif type(value) in allowed:
        return value
    elif str in allowed and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)  # a folder called 2024
    raise ValueError(f"{key} must be {allowed[0].__name__}, not {value!r}")
