"""Registries of methods: classes by the name that recipes give them.

A registry fills itself. What kvq ships are the modules of one package, each of which registers its own classes as it is
imported; other distributions name modules in an entry-point group, and these are imported once, when a name is unknown
to all the others or when everything is listed.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

from kvq.errors import RecipeError, suggest


class Registry:
    """Classes of one kind by name.

    what      the kind in words, as in "unknown codec".
    package   its modules register what kvq ships.
    group     of the entry points that register what others ship.
    """

    def __init__(self, what: str, package: str, group: str):
        self.what, self.package, self.group = what, package, group
        self._classes: dict[str, type] = {}
        self._shipped = self._others = False

    def add(self, name: str, cls: type) -> None:
        """Raises RecipeError for a name that another class has, and for a class that lacks what every one must have."""
        lacking = sorted(getattr(cls, "__abstractmethods__", ()))
        if lacking:
            raise RecipeError(f"{self.what} {name!r} of {_place(cls)} lacks {', '.join(lacking)}: write them.")
        held = self._classes.get(name)
        if held is not None and _place(held) != _place(cls):
            raise RecipeError(f"{self.what} {name!r} of {_place(cls)} is {_place(held)} already: choose another name.")
        self._classes[name] = cls

    def register(self, name: str, attribute: str) -> Callable[[type], type]:
        """A class decorator that adds a class and keeps its name as this attribute of it."""

        def registered(cls: type) -> type:
            setattr(cls, attribute, name)
            self.add(name, cls)
            return cls

        return registered

    def get(self, name: Any) -> type:
        """The class of a name. Raises RecipeError for an unknown one."""
        found = self.find(name)
        if found is None:
            raise RecipeError(f"unknown {self.what} {name!r}.{suggest(str(name), self.names())}")
        return found

    def find(self, name: Any) -> type | None:
        """The class of a name; None for an unknown one."""
        if not isinstance(name, str):
            return None
        if name not in self._classes:
            self._import_shipped()
        if name not in self._classes:
            self._import_others()
        return self._classes.get(name)

    def names(self) -> tuple[str, ...]:
        """All names, in alphabetical order."""
        self._import_shipped()
        self._import_others()
        return tuple(sorted(self._classes))

    def shipped(self) -> tuple[str, ...]:
        """The names that kvq's own package registers."""
        return tuple(name for name in self.names() if self._classes[name].__module__.startswith(f"{self.package}."))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def classes(self) -> tuple[type, ...]:
        """All classes, in the order of ``names``."""
        return tuple(self._classes[name] for name in self.names())

    def _import_shipped(self) -> None:
        if not self._shipped:
            self._shipped = True
            for module in pkgutil.iter_modules(importlib.import_module(self.package).__path__):
                importlib.import_module(f"{self.package}.{module.name}")

    def _import_others(self) -> None:
        if self._others:
            return
        for point in metadata.entry_points(group=self.group):
            try:
                point.load()
            except Exception as error:
                owner = f" of {point.dist.name}" if point.dist else ""
                raise RecipeError(
                    f"plug-in {point.name!r}{owner} (entry-point group {self.group!r}, {point.value}) cannot be "
                    f"loaded: {type(error).__name__}: {' '.join(str(error).split())}; mend it or uninstall it."
                ) from error
        self._others = True


def _place(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
