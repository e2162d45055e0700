"""Checks that every part of a recipe shares: from plain data to frozen dataclasses, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from kvq.errors import RecipeError, suggest


def build(cls, data: Any, where: str):
    """Make a spec of plain data; ``where`` names it in error messages."""
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where} is {data!r}, not a mapping: write it as '{{name: value}}'.")
    refuse_unknown(data, tuple(f.name for f in dataclasses.fields(cls)), where)
    try:
        return cls(**data)
    except TypeError:
        raise RecipeError(f"{where} is incomplete: {data!r} lacks a required setting.") from None
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def refuse_unknown(data: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for name in data:
        if name not in known:
            raise RecipeError(f"{where} has no setting {name!r}.{suggest(str(name), known)}")


def is_count(value: Any) -> bool:
    """True for a whole number of 1 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_choice(name: str, value: Any, choices: tuple, what: str = "known") -> None:
    """Refuse a value that is none of ``choices``; None passes, for settings that are left out."""
    if value is not None and (isinstance(value, bool) or value not in choices):
        words = [repr(choice) if isinstance(choice, str) else str(choice) for choice in choices]
        ways = f"{', '.join(words[:-1])} or {words[-1]}" if words[1:] else words[0]
        raise RecipeError(f"{name}={value!r} is not {what}: use {ways}.")


def check_flag(name: str, value: Any) -> None:
    """Refuse anything but true, false and None."""
    if value is not None and not isinstance(value, bool):
        raise RecipeError(f"{name}={value!r} is neither true nor false: use one of them.")


def check_fields(spec, what: str, required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    """Refuse settings that this codec or transform lacks or does not take; the first field names the kind."""
    for field in dataclasses.fields(spec)[1:]:
        name, value = field.name, getattr(spec, field.name)
        if name in required and value is None:
            raise RecipeError(f"{what} needs {name!r}: add '{name}: ...' beside it.")
        if name not in (*required, *optional) and value is not None:
            takes = ", ".join((*required, *optional)) or "no settings"
            raise RecipeError(f"{what} has no setting {name!r} (it takes {takes}): remove it.")


def given(spec, required: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Any]:
    """The settings that were given, as plain data."""
    found = {name: getattr(spec, name) for name in (*required, *optional) if getattr(spec, name) is not None}
    return {name: plain(value) for name, value in found.items()}


def plain(value: Any) -> Any:
    """A setting as plain data: parts become mappings without what was left out."""
    if dataclasses.is_dataclass(value):
        parts = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {name: plain(part) for name, part in parts.items() if part is not None}
    if isinstance(value, tuple):
        return [plain(part) for part in value]
    return value
