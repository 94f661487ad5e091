"""What another card would take, from its own ceilings and the shares that were measured on this one.

Each part of a case (attention, linears, the rest) reaches the same share of its ceiling there as here. That is all that
is assumed, so the other card's ceilings must be measured ones too: published peak rates are not reached by any kernel.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .cases import OF_THE_DIT
from .comparison import Entry, label_of, read_results
from .measure import ATTENTION, LINEARS, OTHER, TRANSFERS

RATE_NAMES = ("bf16_tflops", "fp16_tflops", "fp32_tflops", "fp8_tflops", "int8_tflops", "attention_tflops",
              "attention8_tflops", "bandwidth_gbs", "to_device_gbs")  # fmt: skip
"""Of another card: products by type, exact attention in 16 and 8 bits, its memory (read and written), copies to it."""
NEEDED = {16: "attention_tflops", 8: "attention8_tflops"}


@dataclass(frozen=True)
class OtherCard:
    """Ceilings of another card, as given or as another run measured them there."""

    name: str
    given: Mapping[str, float]
    measured: tuple[Entry, ...] = ()

    def rates(self, entry: Entry) -> tuple[Mapping[str, float | None], str | None]:
        """Its rates for a case measured here, by RATE_NAMES, and what is missing."""
        here = entry["details"]["ceilings"]
        rates = self.given or self._nearest(entry)
        needed = (f"{here['products']}_tflops", NEEDED[here["attention_bits"]])
        missing = [name for name in needed if not rates.get(name)]
        return rates, ", ".join(missing) or None

    def _nearest(self, entry: Entry) -> dict[str, float | None]:
        """Of the other run: the ceilings for this precision at the number of tokens nearest to this case's."""
        here, tokens = entry["details"]["ceilings"], entry["details"]["tokens"]
        fitting = [
            other
            for other in self.measured
            if (there := other["details"]["ceilings"])["products"] == here["products"]
            and there["attention_bits"] == here["attention_bits"]
            and all(there.get(name) for name in ("square", "up", "down", "attention"))
        ]
        if not fitting:
            return {}
        nearest = min(fitting, key=lambda other: abs(math.log(other["details"]["tokens"] / tokens)))
        found = nearest["details"]["ceilings"]
        return {
            f"{here['products']}_tflops": mean_product_rate(nearest),
            NEEDED[here["attention_bits"]]: found["attention"],
            "bandwidth_gbs": found.get("device_gbs"),
            "to_device_gbs": found.get("to_device_gbs"),
        }


def mean_product_rate(entry: Entry) -> float:
    """One rate for the three products of a block: the third part of the time at each shape's own."""
    found = entry["details"]["ceilings"]
    return 3 / sum(1 / found[name] for name in ("square", "up", "down"))


def parse_other_card(text: str) -> OtherCard:
    """NAME=VALUE,... in TFLOP/s and GB/s, or the bench.json of a run on that card.

    Raises:
        ConfigError: if it is neither.
    """
    if "=" not in text:
        measured = [entry for entry in read_results(Path(text)) if has_ceilings(entry)]
        if not measured:
            raise ConfigError(f"{text} has no measured ceilings. Run bench --cases forward on that card.")
        return OtherCard(measured[0]["gpu"], {}, tuple(measured))
    given = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            given[name.strip()] = float(value)
        except ValueError:
            raise ConfigError(f"--predict {part}: {value!r} is no number. Write bf16_tflops=300.") from None
        if name.strip() not in RATE_NAMES or not 0 < given[name.strip()] < math.inf:
            raise ConfigError(f"--predict {part} is not known. Give rates above 0 of: {', '.join(RATE_NAMES)}.")
    return OtherCard("the card with " + text.replace(",", ", "), given)


def has_ceilings(entry: Entry) -> bool:
    """Whether a prediction can be made from a case: it ran, and so did its ceilings."""
    details = entry.get("details") or {}
    ceilings = details.get("ceilings") or {}
    is_measured = entry["seconds_total"] and entry["ceiling_share"] and details.get("tokens")
    return bool(is_measured and all(ceilings.get(name) for name in ("square", "up", "down", "attention")))


@dataclass(frozen=True)
class Prediction:
    """Seconds of a case on another card; None, and why, where a rate is missing."""

    case: str
    card: str
    seconds: float | None
    measured_seconds: float
    measured_on: str
    missing: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"prediction": True, **self.__dict__}


def predict(entries: Sequence[Entry], card: OtherCard) -> list[Prediction]:
    """For all cases of the DiT whose ceilings were measured."""
    return [_predict(entry, card) for entry in entries if entry["case"] in OF_THE_DIT and has_ceilings(entry)]


def _predict(entry: Entry, card: OtherCard) -> Prediction:
    rates, missing = card.rates(entry)
    seconds = None if missing else _seconds_there(entry, rates)
    return Prediction(label_of(entry), card.name, seconds, entry["seconds_total"], entry["gpu"], missing)


def _seconds_there(entry: Entry, rates: Mapping[str, float | None]) -> float:
    """Each part at the same share of its ceiling. Without a rate for memory, the rest follows the products."""
    here, split = entry["details"]["ceilings"], entry["split"]
    attention = here["attention"] / rates[NEEDED[here["attention_bits"]]]
    linears = mean_product_rate(entry) / rates[f"{here['products']}_tflops"]
    measured = sum(split.values())
    products = split[ATTENTION] + split[LINEARS]
    both = (split[ATTENTION] * attention + split[LINEARS] * linears) / products if products else linears
    memory = here["device_gbs"] / rates["bandwidth_gbs"] if rates.get("bandwidth_gbs") else both
    has_link = rates.get("to_device_gbs") and here.get("to_device_gbs")
    link = here["to_device_gbs"] / rates["to_device_gbs"] if has_link else 1.0
    factors = {ATTENTION: attention, LINEARS: linears, OTHER: memory, TRANSFERS: link}
    there = sum(split[kind] * factor for kind, factor in factors.items())
    return there + max(0.0, entry["seconds_total"] - measured) * memory


def prediction_lines(predictions: Sequence[Prediction]) -> Iterator[str]:
    """Markdown."""
    yield "## Predictions, not measurements"
    yield "Other cards at their own ceilings, each part with the share of them that was measured here."
    yield ""
    yield "| case | card | predicted | measured here |"
    yield "|---|---|---|---|"
    for found in predictions:
        seconds = f"no rate given: {found.missing}" if found.seconds is None else f"{found.seconds:.4g} s (prediction)"
        yield f"| {found.case} | {found.card} | {seconds} | {found.measured_seconds:.4g} s on {found.measured_on} |"
