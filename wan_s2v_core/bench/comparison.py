"""Two runs beside each other: what became faster or slower, beyond what runs differ by anyway."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .cases import CASE_KEYS, SAME

TOLERANCE = 0.03
"""A case may be slower by this share, besides the spread of both runs."""

Entry = Mapping[str, Any]


def read_results(path: Path) -> list[dict[str, Any]]:
    """The cases of an earlier run.

    Raises:
        ConfigError: if the file is none of `bench`.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        entries = None
    is_list = isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)
    if not is_list or not all(set(CASE_KEYS) <= set(entry) for entry in entries):
        raise ConfigError(f"{path} holds no results of bench. Use the bench.json that an earlier run wrote with --out.")
    return entries


@dataclass(frozen=True)
class Comparison:
    """One case in both runs. Ratios are new over old."""

    case: str
    before_seconds: float
    after_seconds: float
    allowed_ratio: float
    """Above this it counts as slower: the tolerance, and the spread of both runs."""
    before_first_use: float | None
    after_first_use: float | None
    same_gpu: bool
    notes: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        return self.after_seconds / self.before_seconds

    @property
    def is_regression(self) -> bool:
        """Only times of one kind of card tell something about the code."""
        return self.same_gpu and self.ratio > self.allowed_ratio

    @property
    def verdict(self) -> str:
        if not self.same_gpu:
            return "another GPU"
        if self.is_regression:
            return "SLOWER"
        return "faster" if self.ratio < 2 - self.allowed_ratio else "same"


@dataclass(frozen=True)
class AgainstReport:
    """All cases that both runs measured, and those that only one did."""

    comparisons: tuple[Comparison, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    gpus: tuple[str, str]

    @property
    def regressions(self) -> list[Comparison]:
        return [found for found in self.comparisons if found.is_regression]

    def lines(self) -> Iterator[str]:
        """Markdown."""
        yield "## Against an earlier run"
        if self.gpus[0] != self.gpus[1]:
            yield (
                f"**Different GPUs**: {self.gpus[0]} before, {self.gpus[1]} now. Ratios of times tell about the cards, "
                "not about the code; nothing is counted as slower."
            )
        yield ""
        yield "| case | before | now | ratio | first use before / now | |"
        yield "|---|---|---|---|---|---|"
        for found in self.comparisons:
            uses = " / ".join(
                "" if use is None else f"{use:.2f} s" for use in (found.before_first_use, found.after_first_use)
            )
            times = f"{found.before_seconds:.4g} s | {found.after_seconds:.4g} s | {found.ratio:.3f}"
            told = "; ".join((found.verdict, *found.notes))
            yield f"| {found.case} | {times} | {uses} | {told} |"
        for what, names in (("before", self.only_before), ("now", self.only_after)):
            if names:
                yield ""
                yield f"Only {what}: {', '.join(names)}."


def key_of(entry: Entry) -> tuple:
    """What two results must have in common."""
    return tuple(entry.get(name) for name in SAME)


def label_of(entry: Entry) -> str:
    size = f"{entry['width']}x{entry['height']}" if entry["width"] else ""
    words = (entry["case"], size, entry["precision"], entry["attention_backend"] or "")
    return " ".join(word for word in words if word)


def compare(before: Sequence[Entry], after: Sequence[Entry]) -> AgainstReport:
    """Every case that both runs have measured."""
    old = {key_of(entry): entry for entry in before if entry["seconds_total"]}
    new = {key_of(entry): entry for entry in after if entry["seconds_total"]}
    comparisons = tuple(_compare(old[key], entry) for key, entry in new.items() if key in old)
    gpus = tuple(", ".join(sorted({entry["gpu"] for entry in entries})) for entries in (before, after))
    return AgainstReport(
        comparisons,
        tuple(label_of(entry) for key, entry in old.items() if key not in new),
        tuple(label_of(entry) for key, entry in new.items() if key not in old),
        gpus,
    )


def _compare(old: Entry, new: Entry) -> Comparison:
    details = [entry.get("details") or {} for entry in (old, new)]
    spread = sum(detail.get("spread") or 0.0 for detail in details)
    notes = [f"{name} {old[name]} -> {new[name]}" for name in ("torch",) if old[name] != new[name]]
    uses = [detail.get("first_use_seconds") for detail in details]
    return Comparison(
        label_of(new), old["seconds_total"], new["seconds_total"], 1 + TOLERANCE + spread, *uses,
        old["gpu"] == new["gpu"], tuple(notes),
    )  # fmt: skip
