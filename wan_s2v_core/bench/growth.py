"""How the time of a forward grows with the number of tokens, against the model of its work."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cases import GROWTH

LEAST_POINTS = 4


@dataclass(frozen=True)
class GrowthFit:
    """seconds = fixed + linear work / linear rate + attention work / attention rate.

    The second term holds all that grows with the tokens, so its rate is below that of the products alone.
    """

    fixed_seconds: float
    linear_tflops: float | None
    """None where the times show no such term."""
    attention_tflops: float | None
    largest_deviation: float
    """Of the times from the fit, as a share."""
    points: int

    def seconds(self, linear_flop: float, attention_flop: float) -> float:
        pairs = ((linear_flop, self.linear_tflops), (attention_flop, self.attention_tflops))
        return self.fixed_seconds + sum(flop / rate / 1e12 for flop, rate in pairs if rate)

    def line(self) -> str:
        linear, attention = (
            "none" if rate is None else f"{rate:.4g} TFLOP/s" for rate in (self.linear_tflops, self.attention_tflops)
        )
        return (
            f"{self.fixed_seconds * 1e3:.2f} ms + what grows with the tokens at {linear} + attention at {attention}; "
            f"no point is more than {self.largest_deviation:.1%} off"
        )


def fit_growth(linear_flop: Sequence[float], attention_flop: Sequence[float], seconds: Sequence[float]) -> GrowthFit:
    """The best such model in relative terms, no term below zero.

    Least squares of the relative error; a term that would be negative is left out, the most negative one first.
    """
    times = np.asarray(seconds, dtype=np.float64)
    terms = np.stack([np.ones_like(times), np.asarray(linear_flop) / 1e12, np.asarray(attention_flop) / 1e12], axis=1)
    used = [0, 1, 2]
    while True:
        found = np.linalg.lstsq(terms[:, used] / times[:, None], np.ones_like(times), rcond=None)[0]
        if (found >= 0).all() or len(used) == 1:
            break
        # relative to what it contributes at most, since the terms have different units
        used.pop(int(np.argmin(found * terms[:, used].max(axis=0))))
    values = np.zeros(3)
    values[used] = found
    deviation = float(np.abs(times / (terms @ values) - 1).max())
    rates = [float(1 / value) if value > 0 else None for value in values[1:]]
    return GrowthFit(float(values[0]), *rates, deviation, len(times))


def growth_series(entries: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The measured growth cases of each way, by number of tokens."""
    series: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        if entry["case"] == GROWTH and entry["seconds_total"]:
            series.setdefault(f"{entry['precision']} {entry['attention_backend']}", []).append(entry)
    return {way: sorted(found, key=lambda entry: entry["details"]["tokens"]) for way, found in series.items()}


def fit_entries(entries: Sequence[Mapping[str, Any]]) -> GrowthFit | None:
    """The fit to cases of one way; None if they are too few."""
    if len(entries) < LEAST_POINTS:
        return None
    flops = [entry["details"]["flop"] for entry in entries]
    attention = [flop["attention"] for flop in flops]
    linear = [flop["total"] - flop["attention"] for flop in flops]
    return fit_growth(linear, attention, [entry["seconds_total"] for entry in entries])
