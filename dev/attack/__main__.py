"""The command of dev/run.py: attack [CLASS ...]."""

import argparse
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # begun as a folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from attack import report
from attack.classes import CLASSES, COUNTS
from attack.lab import Lab
from attack.outcome import Outcome


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dev/run.py attack", description=__doc__)
    add = parser.add_argument
    usual = ", ".join(f"{name} {count}" for name, count in COUNTS.items())
    add("classes", nargs="*", metavar="CLASS", help=f"all by default: {usual}")
    add("--seed", type=int, help="the same inputs again; a new one by default")
    add("--count", type=int, help="inputs of each class, for the numbers above")
    add("--only", type=int, nargs="+", metavar="NUMBER", help="these inputs alone, which are kept")
    add("--out", type=Path, default=Path("attack"), help="folder for CLASS-SEED.json and .md [%(default)s]")
    add("--checkpoint", type=Path, help="of demo/tiny_checkpoint.py; made by default")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.classes if name not in CLASSES]:
        parser.error(f"there is no class {unknown[0]}. Choose among: {', '.join(CLASSES)}.")
    return options


def run_class(name: str, options: argparse.Namespace, lab: Lab, seed: int) -> list[Outcome]:
    """All inputs of a class, told one by one; what is done is saved when it is stopped, too."""
    numbers = options.only or range(options.count or COUNTS[name])
    outcomes: list[Outcome] = []
    began = time.monotonic()
    try:
        for outcome in CLASSES[name](lab, seed, numbers, bool(options.only)):
            outcomes.append(outcome)
            mark = "!!" if outcome.is_fault else "  "
            told = f"{mark} {name} {outcome.number}: {outcome.kind}: {outcome.verdict}, {outcome.seconds:.1f} s"
            print(
                f"{told}: {report.last_line(outcome.said)}".encode("ascii", "backslashreplace").decode(),
                file=sys.stderr,
            )
    finally:
        if outcomes:
            report.save(options.out, name, seed, outcomes)
    print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    return outcomes


def main(arguments: Sequence[str]) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has those in the background ignore Ctrl-C
    options = parse(arguments)
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    folder = Path(tempfile.mkdtemp(prefix="attack-"))
    faults = 0
    with Lab(folder, options.checkpoint) as lab:
        for name in options.classes or CLASSES:
            outcomes = run_class(name, options, lab, seed)
            faults += sum(outcome.is_fault for outcome in outcomes)
            print(report.table(name, seed, outcomes), flush=True)
        if options.only:
            print(f"inputs are kept in {folder}", file=sys.stderr)
        else:
            lab.clear()
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
