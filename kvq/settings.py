"""Checks that every part of a recipe shares: from plain data to frozen dataclasses, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import yaml

from kvq.errors import RecipeError, listed, suggest

# Characters of the largest recipe or search space that is read.
LARGEST_YAML = 1 << 20


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


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice: YAML would keep the last value without a word."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(text: str, what: str) -> Any:
    """Plain data of YAML that users write; ``what`` names it. Raises RecipeError for text that is none, that names a
    key twice, or that is larger or deeper than any recipe."""
    if len(text) > LARGEST_YAML:
        raise RecipeError(f"{what} has {len(text)} characters, a recipe at most {LARGEST_YAML}: is it another file?")
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        told = isinstance(error, yaml.constructor.ConstructorError)
        why = error.problem if told else "mend it, or start from 'kvq recipes show kivi2'"
        raise RecipeError(f"{what} is not readable YAML{line}: {why}.") from None


def is_count(value: Any) -> bool:
    """True for a whole number of 1 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_one_of(value: Any, choices: tuple) -> bool:
    """True for one of ``choices``, of its type: 4.0 is not 4, as a recipe's hash is of what it says."""
    return any(type(value) is type(choice) and value == choice for choice in choices)


def check_choice(name: str, value: Any, choices: tuple, what: str = "known") -> None:
    """Refuse a value that is none of ``choices``; None passes, for settings that are left out."""
    if value is not None and not is_one_of(value, choices):
        words = [repr(choice) if isinstance(choice, str) else str(choice) for choice in choices]
        raise RecipeError(f"{name}={value!r} is not {what}: use {listed(words, 'or')}.")


def check_flag(name: str, value: Any) -> None:
    """Refuse anything but true, false and None."""
    if value is not None and not isinstance(value, bool):
        raise RecipeError(f"{name}={value!r} is neither true nor false: use one of them.")


def check_seed(name: str, seed: Any) -> None:
    """Refuse anything but whole numbers of 0 or more and None."""
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or seed < 0):
        raise RecipeError(f"{name}={seed!r} is not a seed: use a whole number of 0 or more.")


def check_settings(cls, data: Mapping[str, Any], what: str, more: tuple[str, ...] = ()) -> None:
    """Refuse settings that a method lacks or does not take.

    cls    dataclass of the method's settings, ``own_fields`` of which it takes.
    more   names of further settings that it takes.
    """
    own = own_fields(cls)
    required = tuple(field.name for field in own if field.default is dataclasses.MISSING)
    takes = (*required, *(field.name for field in own if field.name not in required), *more)
    for name in required:
        if name not in data:
            raise RecipeError(f"{what} needs {name!r}: add '{name}: ...' beside it.")
    for name in data:
        if name not in takes:
            raise RecipeError(
                f"{what} has no setting {name!r} (it takes {', '.join(takes) or 'no settings'}): remove it."
            )


def own_fields(cls) -> tuple[dataclasses.Field, ...]:
    """Fields of a settings dataclass, without those that all methods share (marked ``shared``)."""
    return tuple(field for field in dataclasses.fields(cls) if not field.metadata.get("shared"))


def plain(value: Any) -> Any:
    """A setting as plain data: parts become mappings without what was left out."""
    if dataclasses.is_dataclass(value):
        parts = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {name: plain(part) for name, part in parts.items() if part is not None}
    if isinstance(value, tuple):
        return [plain(part) for part in value]
    return value
