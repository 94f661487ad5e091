"""A register of the kinds of inputs that a class of attack has."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """make: (chance, folder or file) -> what it calls for, where that is not `expects`."""

    name: str
    expects: str
    make: Callable[..., Any]


class Kinds(dict[str, Kind]):
    """Kinds by name."""

    def add(self, expects: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register a function; its name says what is done."""

        def register(make: Callable[..., Any]) -> Callable[..., Any]:
            name = make.__name__.replace("_", " ")
            assert name not in self, name
            self[name] = Kind(name, expects, make)
            return make

        return register
