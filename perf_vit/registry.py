"""Registry of named objects, such as mixers, heads and label formats."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import TypeVar

__all__ = ["Registry", "did_you_mean", "load_extensions"]

T = TypeVar("T")
C = TypeVar("C")

_GROUP = "perf_vit"

_loaded: set[str] = set()


def load_extensions() -> None:
    """Import the modules that installed packages name as entry points of the group "perf_vit", once a process.

    Registries do this when they list their names or don't know one, so that extensions work from configs, on the
    command line and in worker processes. An extension's own exceptions pass as they are.
    """
    if _GROUP in _loaded:
        return
    # Extensions look up names too while they are imported.
    _loaded.add(_GROUP)
    for each in entry_points(group=_GROUP):
        importlib.import_module(each.module)


def did_you_mean(name: object, known: Iterable[str], otherwise: str = "") -> str:
    """Return the end of an error line about an unknown name: "; did you mean 'b'?".

    Args:
        name: Name that is unknown.
        known: Names that exist.
        otherwise: Returned if no known name is close.
    """
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else otherwise


class Registry(Mapping[str, T]):
    """Objects by name, in the order of their registration.

    Args:
        key: What a user calls the name, such as "mixer" or "model.head"; starts the line of an error.
        error: Exception of an unknown name.
    """

    def __init__(self, key: str, error: type[Exception] = ValueError) -> None:
        self.key = key
        self._error = error
        self._objects: dict[str, T] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Decorate a class or function to find it by name.

        Args:
            name: Name in configs and on the command line.

        Raises:
            ValueError: The name is taken.
        """

        def add(item: C) -> C:
            self.add(name, item)  # type: ignore[arg-type]
            return item

        return add

    def add(self, name: str, item: T) -> None:
        """Register an object.

        Raises:
            ValueError: The name is taken.
        """
        if name in self._objects:
            raise ValueError(f"{self.key} {name!r} is registered already; use another name")
        self._objects[name] = item

    def __getitem__(self, name: str) -> T:
        """Return the object with a name; raise the registry's error, which names the closest name, if there is none."""
        if name not in self:
            known = ", ".join(self._objects)
            raise self._error(f"{self.key} must be one of {known}, got {name!r}{did_you_mean(name, self._objects)}")
        return self._objects[name]

    def __contains__(self, name: object) -> bool:
        # Built-in names are looked up while the package is imported, when extensions can't be.
        if name not in self._objects:
            load_extensions()
        return name in self._objects

    def __iter__(self) -> Iterator[str]:
        load_extensions()
        return iter(self._objects)

    def __len__(self) -> int:
        load_extensions()
        return len(self._objects)
