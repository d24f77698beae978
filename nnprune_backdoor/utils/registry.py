"""Names for classes that plug in: criteria, selectors, attacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from ..errors import DataError, unknown_name

T = TypeVar("T")

_Class = TypeVar("_Class", bound=type)


class Registry(Generic[T]):
    """Dataclasses by name. `kind` is what an error message calls them."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[_Class], _Class]:
        """Class decorator; a name that another class has raises ValueError.

        The same class may come again, as it does when a notebook's cell is run twice.
        """

        def add(cls: _Class) -> _Class:
            there = self._classes.get(name, cls)
            if (there.__module__, there.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(f"the {self.kind} {name!r} is registered already")
            self._classes[name] = cls
            return cls

        return add

    def get(self, name: str) -> type[T]:
        """The class; an unknown name raises UnknownNameError with the close ones."""
        if name not in self._classes:
            raise unknown_name(self.kind, name, self._classes)
        return self._classes[name]

    def create(self, name: str, settings: dict[str, Any]) -> T:
        """An instance; an unknown setting raises UnknownNameError, a missing one DataError."""
        cls = self.get(name)
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        for given in settings:
            if given not in [field.name for field in fields]:
                owner = f"hyper-parameter of {self.kind} {name!r}"
                raise unknown_name(owner, given, [field.name for field in fields])
        for field in fields:
            optional = field.default is not field.default_factory  # both MISSING: required
            if not optional and field.name not in settings:
                raise DataError(
                    f"the {self.kind} {name!r} needs {field.name!r}; "
                    f"make it yourself: {cls.__name__}({field.name}=...)"
                )
        return cls(**settings)

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._classes)
