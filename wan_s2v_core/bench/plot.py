"""Results as a picture: what each case took against what the ceilings allow, and growth with the tokens."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cases import GROWTH
from .comparison import Entry, label_of
from .growth import fit_entries, growth_series
from .measure import SPLIT

log = logging.getLogger(__name__)

COLOURS = {"attention": "#4477aa", "linears": "#ee6677", "other": "#ccbb44", "transfers": "#228833"}
ALLOWED_COLOUR = "#333333"
INSTALL = "no plot: it needs matplotlib. Install it with: pip install matplotlib (or the extra wan-s2v[bench])"


def draw(entries: Sequence[Entry], folder: Path) -> list[Path]:
    """bench.png and bench.svg in `folder`; nothing, and one line in the log, without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        log.warning(INSTALL)
        return []
    bars = [entry for entry in entries if entry["seconds_total"] and entry["case"] != GROWTH]
    series = growth_series(entries)
    panels = bool(bars) + bool(series)
    if not panels:
        return []
    height = 1.5 + 0.45 * len(bars) * bool(bars)
    figure = Figure(figsize=(7 * panels, max(4.5, height)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    figure.suptitle(f"{entries[0]['gpu']}, torch {entries[0]['torch']}, commit {entries[0]['commit']}", fontsize=9)
    if bars:
        _draw_cases(axes[0], bars)
    if series:
        _draw_growth(axes[-1], series)
    files = [folder / "bench.png", folder / "bench.svg"]
    for file in files:
        figure.savefig(file, dpi=150, bbox_inches="tight")
    return files


def _draw_cases(axis: Any, entries: Sequence[Entry]) -> None:
    """A bar of every case, of the time taken, in the colours of the split; a mark where the ceilings are."""
    labels = [label_of(entry) + (" (est.)" if entry["estimated"] else "") for entry in entries]
    left = [0.0] * len(entries)
    for kind in SPLIT:
        parts = [(entry["split"].get(kind) or 0.0) / entry["seconds_total"] for entry in entries]
        axis.barh(labels, parts, left=left, color=COLOURS[kind], label=kind)
        left = [before + part for before, part in zip(left, parts, strict=True)]
    for row, entry in enumerate(entries):
        if share := entry["ceiling_share"]:
            axis.plot([share, share], [row - 0.4, row + 0.4], color=ALLOWED_COLOUR, linewidth=2)
        axis.text(1.02, row, f"{entry['seconds_total']:.3g} s", va="center", fontsize=8)
    axis.plot([], [], color=ALLOWED_COLOUR, linewidth=2, label="allowed by the ceilings")
    axis.set(xlim=(0, 1.15), xlabel="share of the time taken")
    axis.invert_yaxis()
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.4, -0.1), ncols=3)


def _draw_growth(axis: Any, series: dict[str, list[Entry]]) -> None:
    """Times over tokens, and the fitted model of the work as a line."""
    for number, (way, entries) in enumerate(series.items()):
        colour = f"C{number}"
        tokens = [entry["details"]["tokens"] for entry in entries]
        axis.loglog(tokens, [entry["seconds_total"] for entry in entries], "o", color=colour, label=way)
        if fit := fit_entries(entries):
            flops = [entry["details"]["flop"] for entry in entries]
            fitted = [fit.seconds(flop["total"] - flop["attention"], flop["attention"]) for flop in flops]
            axis.loglog(tokens, fitted, "-", color=colour, label=f"fit, {fit.largest_deviation:.1%} off at most")
    axis.set(xlabel="tokens", ylabel="seconds of a forward, few blocks")
    axis.legend(fontsize=7)
    axis.grid(True, which="both", alpha=0.3)
