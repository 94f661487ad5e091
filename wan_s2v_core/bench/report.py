"""Results as markdown: what was measured, against which ceilings, what eats the rest, and what failed."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from typing import Any

from .cases import ARTICLE, OF_THE_DIT
from .comparison import Entry, label_of
from .growth import fit_entries, growth_series
from .measure import SPLIT

GB = 1e9


def report_lines(entries: Sequence[Entry], command: str = "") -> Iterator[str]:
    """The whole report but comparisons and predictions."""
    yield "# Benchmark"
    if command:
        yield f"```\n{command}\n```"
    yield f"{_hardware(entries)}, {date.today().isoformat()}. Medians; `estimated` ones are put together from parts."
    measured = [entry for entry in entries if entry["seconds_total"]]
    for part in (_table, _roofline, _ceilings, _estimates, _growth, _kernels, _first_use):
        if lines := list(part(measured)):
            yield ""
            yield from lines
    if failed := [entry for entry in entries if entry["error"]]:
        yield ""
        yield "## Not measured"
        yield from (f"- {label_of(entry)}: {entry['error']}" for entry in failed)


def _hardware(entries: Sequence[Entry]) -> str:
    facts = [sorted({str(entry[name]) for entry in entries}) for name in ("gpu", "torch", "commit")]
    gpu, torch, commit = (", ".join(values) or "nothing" for values in facts)
    return f"{gpu}, torch {torch}, commit {commit}"


def _rows(header: str, rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {header} |"
    yield "|" + "---|" * (header.count("|") + 1)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _number(value: float | None, form: str = ".4g", unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _share(value: float | None) -> str:
    return _number(value, ".1%")


def _table(entries: Sequence[Entry]) -> Iterator[str]:
    rows = []
    for entry in entries:
        split = " / ".join(_number(entry["split"].get(kind), ".3g") for kind in SPLIT)
        peak = entry["peak_bytes"]
        rows.append(
            (
                label_of(entry) + (" (estimated)" if entry["estimated"] else ""),
                entry["weights"],
                _number(entry["seconds_total"], unit=" s"),
                _number(entry["seconds_per_forward"], unit=" s"),
                _number(entry["details"].get("frames_per_second")),
                _number(None if peak is None else peak / GB, ".2f", " GB"),
                _number(entry["tflops"]),
                _share(entry["ceiling_share"]),
                split,
            )
        )
    yield "## Cases"
    header = "case | weights | total | a forward | frames/s | peak | TFLOP/s | of the ceiling | "
    yield from _rows(header + "attention / linears / other / transfers, s", rows)


def _roofline(entries: Sequence[Entry]) -> Iterator[str]:
    """What the ceilings allow for each case, what it took, and what eats the rest."""
    rows = []
    for entry in entries:
        allowed = entry["details"].get("allowed_seconds")
        if not allowed:
            continue
        taken, split = entry["seconds_total"], entry["split"]
        eaten = {kind: split[kind] for kind in ("other", "transfers")}
        if "linears" in allowed:
            eaten |= {f"{kind} below their ceiling": split[kind] - allowed[kind] for kind in ("attention", "linears")}
        else:
            products = split["attention"] + split["linears"]
            eaten["products below their ceiling"] = products - allowed["total"]
        eaten["no kernel at work"] = entry["details"].get("idle_seconds", 0.0)
        told = sorted((item for item in eaten.items() if item[1] > 0.001 * taken), key=lambda item: -item[1])
        rest = ", ".join(f"{kind} {seconds / taken:.1%}" for kind, seconds in told)
        share = allowed["total"] / taken
        rows.append((label_of(entry), f"{allowed['total']:.4g} s", f"{taken:.4g} s", f"{share:.1%}", rest))
    if rows:
        yield "## Against the ceilings"
        yield "Allowed: every product at the rate that this very device reached for it alone, and nothing else."
        yield ""
        yield from _rows("case | allowed | taken | share | what eats the rest, of the time taken", rows)


def _ceilings(entries: Sequence[Entry]) -> Iterator[str]:
    rows: dict[tuple, Sequence[str]] = {}
    copies: Mapping[str, float] = {}
    for entry in entries:
        found = entry["details"].get("ceilings")
        if not found:
            continue
        copies = {name: found[name] for name in ("device_gbs", "to_device_gbs") if name in found} or copies
        products = " / ".join(_number(found[name]) for name in ("square", "up", "down"))
        attention = f"{_number(found['attention'])} ({found['attention_kernel']})"
        key = (entry["details"]["tokens"], found["products"], found["attention_bits"])
        rows[key] = (f"{key[0]:,}", found["products"], products, f"{found['attention_bits']} bits", attention)
    if rows:
        yield "## Ceilings, measured in the same process"
        header = "tokens | products | TFLOP/s: width to width / up / down | attention | TFLOP/s (kernel)"
        yield from _rows(header, [rows[key] for key in sorted(rows)])
        yield ""
        yield "Copies: " + ", ".join(f"{name.removesuffix('_gbs')} {rate:.4g} GB/s" for name, rate in copies.items())


def _estimates(entries: Sequence[Entry]) -> Iterator[str]:
    for entry in entries:
        if entry["case"] != ARTICLE:
            continue
        details = entry["details"]
        yield f"## {label_of(entry)}: {entry['frames']} frames, {entry['steps']} steps, guidance {entry['guidance']:g}"
        yield (
            f"{details['clips']} clips, {details['forwards']} forwards, {details['measured_forwards']} of them measured"
            f" in {details['measured_clips']} clips. "
            + ("**Estimated**: each part times its count." if entry["estimated"] else "Run in full.")
            + " Without loading and without writing the file."
        )
        yield ""
        rows = [
            (part["name"], str(part["times"]), f"{part['seconds']:.4g} s", f"{part['moving_seconds']:.3g} s")
            for part in details["parts"]
        ]
        yield from _rows("stage | times | each, all steps | moving its network", rows)


def _growth(entries: Sequence[Entry]) -> Iterator[str]:
    for way, series in growth_series(entries).items():
        fit = fit_entries(series)
        blocks = series[0]["details"]["blocks"]
        yield f"## Growth with the tokens: {way}, {blocks} blocks"
        if fit:
            yield f"Fit: {fit.line()}."
        yield ""
        rows = []
        for entry in series:
            flop = entry["details"]["flop"]
            fitted = fit and fit.seconds(flop["total"] - flop["attention"], flop["attention"])
            deviation = fitted and entry["seconds_total"] / fitted - 1
            tokens, taken = f"{entry['details']['tokens']:,}", f"{entry['seconds_total'] * 1e3:.4g} ms"
            rows.append((tokens, f"{flop['total'] / 1e12:.4g}", taken, _number(deviation, "+.1%")))
        yield from _rows("tokens | TFLOP | time | off the fit", rows)


def _kernels(entries: Sequence[Entry]) -> Iterator[str]:
    shown = [entry for entry in entries if entry["details"].get("kernels") and entry["case"] in OF_THE_DIT[:2]]
    for entry in shown:
        yield f"## Profile: {label_of(entry)}, one forward"
        rows = [
            (kernel["name"].replace("|", "/"), kernel["kind"], str(kernel["calls"]), f"{kernel['seconds'] * 1e3:.4g}")
            for kernel in entry["details"]["kernels"]
        ]
        yield from _rows("kernel | kind | calls | ms", rows)


def _first_use(entries: Sequence[Entry]) -> Iterator[str]:
    uses: list[tuple[str, Any]] = [
        (label_of(entry), entry["details"]["first_use_seconds"])
        for entry in entries
        if "first_use_seconds" in entry["details"]
    ]
    if uses:
        yield "## First use"
        yield (
            "What the first call of each case took beyond a later one: compiling, searching for kernels, or reading "
            "them from the cache of an earlier process. Run it a second time and compare (`--against`)."
        )
        yield ""
        yield from _rows("case | first use", [(name, f"{seconds:.2f} s") for name, seconds in uses])
