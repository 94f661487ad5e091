"""Which classes of attack there are."""

from collections.abc import Callable, Iterable, Iterator

from . import kills, media, pairs, prompts, records, server_kills, weights
from .lab import Lab
from .outcome import Outcome

CLASSES: dict[str, Callable[[Lab, int, Iterable[int], bool], Iterator[Outcome]]] = {
    "weights": weights.attack,
    "media": media.attack,
    "prompts": prompts.attack,
    "records": records.attack,
    "kills": kills.attack,
    "servers": server_kills.attack,
    "pairs": pairs.attack,
}
COUNTS = {"weights": 500, "media": 200, "prompts": 100, "records": 70, "kills": 60, "servers": 15, "pairs": 20}
"""Inputs of each."""
