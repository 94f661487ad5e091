"""Which classes of attack there are."""

from collections.abc import Callable, Iterable, Iterator

from . import kills, media, pairs, records, weights
from .lab import Lab
from .outcome import Outcome

CLASSES: dict[str, Callable[[Lab, int, Iterable[int], bool], Iterator[Outcome]]] = {
    "weights": weights.attack,
    "media": media.attack,
    "records": records.attack,
    "kills": kills.attack,
    "pairs": pairs.attack,
}
COUNTS = {"weights": 500, "media": 200, "records": 70, "kills": 60, "pairs": 20}
"""Inputs of each."""
