"""Outcomes as one table for each class, and as JSON."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .outcome import FAULTS, GIGABYTE, TURNED_AWAY, Outcome

SHOWN = 160


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Figures of one class."""
    counts = Counter(outcome.verdict for outcome in outcomes)
    return {
        "inputs": len(outcomes),
        "verdicts": dict(counts),
        "faults": sum(counts[verdict] for verdict in FAULTS),
        "slowest_seconds": round(max((outcome.seconds for outcome in outcomes), default=0.0), 1),
        "most_anonymous_gb": round(max((outcome.peak_bytes for outcome in outcomes), default=0) / GIGABYTE, 3),
    }


def table(attack: str, seed: int, outcomes: Sequence[Outcome]) -> str:
    """The figures of a class as a table, then what is at fault, by kind."""
    facts = summary(outcomes)
    lines = [f"### {attack}, seed {seed}", "", "| what became of it | inputs |", "|---|---|"]
    lines += [f"| {verdict} | {count} |" for verdict, count in sorted(facts["verdicts"].items())]
    lines += [f"| **all** | **{facts['inputs']}** |", ""]
    lines.append(f"Slowest {facts['slowest_seconds']} s; at most {facts['most_anonymous_gb']} GB of anonymous memory.")
    told = [outcome for outcome in outcomes if outcome.is_fault or outcome.verdict == TURNED_AWAY]
    if told:
        lines += ["", "| number | kind | verdict | why |", "|---|---|---|---|"]
        lines += [f"| {one.number} | {one.kind} | {one.verdict} | {last_line(one.said)} |" for one in told]
    return "\n".join(lines) + "\n"


def last_line(said: str) -> str:
    """What a message or a traceback comes to, in one line of a table."""
    lines = said.strip().splitlines() or [""]
    places = re.findall(r'File "[^"]*?/((?:wan_s2v_core|nodes)/[^"]+)", line (\d+)', said)
    where = f" (at {places[-1][0]}:{places[-1][1]})" if places else ""
    return re.sub(r"/\S*/input-\w+/", "", lines[-1]).replace("|", "/")[:SHOWN] + where


def save(folder: Path, attack: str, seed: int, outcomes: Sequence[Outcome]) -> None:
    """ATTACK-SEED.json and ATTACK-SEED.md in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"attack": attack, "seed": seed, **summary(outcomes), "outcomes": [one.to_dict() for one in outcomes]}
    text = json.dumps(content, indent=1)
    (folder / f"{attack}-{seed}.json").write_text(text + "\n", encoding="utf-8")
    (folder / f"{attack}-{seed}.md").write_text(
        table(attack, seed, outcomes), encoding="utf-8", errors="backslashreplace"
    )
